"""`vila2-fast serve` as a process: the rows of the native engine, its death in the middle of a run, its end."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.e2e import harness, sources
from tests.e2e.harness import Process, start, vila2_fast
from tests.trtllm_standin.generate import FLAVOURS
from tests.unit.backends.conftest import install, standins  # noqa: F401 - a fixture
from vila2.cli.main import main
from vila2.data.verify import iter_rows
from vila2.errors import UsageError

COUNT = 8
ASKED = ["--prompt", "brief", "--prompt", "detailed", "--max-new-tokens", "12", "--decode-workers", "1"]
MODEL = ["--device", "cpu", "--precision", "float32", "--threads", "1"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sources.write_folder(tmp_path_factory.mktemp("photos") / "photos", COUNT)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


class Served:
    """A server process, and what it printed."""

    def __init__(self, tmp: Path, model: Path, *more: str, port: int = 0) -> None:
        arguments = ["serve", "--model", str(model), "--port", str(port), *MODEL, *more]
        self.process: Process = start(tmp, *arguments)
        harness.wait_for(lambda: "serving" in self.said, 120)
        found = re.search(r"at (http://[0-9.:]+)/v1", self.said)
        assert found is not None
        self.root = found.group(1)

    @property
    def said(self) -> str:
        return self.process._stdout.read_text() if self.process._stdout.exists() else ""

    def inside(self) -> float:
        lines = httpx.get(f"{self.root}/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith("vila2_requests_inside "))


@contextmanager
def served(tmp: Path, model: Path, *more: str, port: int = 0) -> Iterator[Served]:
    one = Served(tmp, model, *more, port=port)
    try:
        yield one
    finally:
        one.process.send(signal.SIGTERM)
        assert one.process.wait().code == 0


def by_http(server: str, source: Path, out: Path, *more: str) -> list[str]:
    return [
        "recaption",
        str(source),
        "--backend",
        "http",
        "--base-url",
        f"{server}/v1",
        "--out",
        str(out),
        *more,
    ]


def sorted_rows(out: Path) -> list[dict[str, object]]:
    return sorted(iter_rows(out), key=lambda row: (row["key"], row["prompt"]))


@pytest.mark.parametrize("sampled", [False, True])
def test_the_rows_are_those_of_the_native_engine(
    tmp_path: Path, vila15: Path, photos: Path, sampled: bool
) -> None:
    """Greedily from files of all formats, sent as PNG; and sampled from JPEGs, sent as they are. Two prompts each."""
    plain, form = list(ASKED), ["--send-format", "png"]
    if sampled:
        plain += ["--temperature", "0.8", "--top-p", "0.9", "--top-k", "40", "--seed", "5"]
        form = []
        whole, photos = photos, tmp_path / "jpegs"
        photos.mkdir()
        for number, file in enumerate(sorted(whole.rglob("*.jpg")) * COUNT):
            if number < COUNT:
                shutil.copy(file, photos / f"{number}.jpg")
    native, http = tmp_path / "native", tmp_path / "http"
    assert (
        vila2_fast(tmp_path, "recaption", photos, "--model", vila15, "--out", native, *MODEL, *plain).code
        == 0
    )
    with served(tmp_path, vila15, "--name", "ours") as server:
        done = vila2_fast(tmp_path, *by_http(server.root, photos, http, *plain, *form))
        assert done.code == 0, done.stderr
        assert server.inside() == 0
    assert sorted_rows(http) == sorted_rows(native)
    assert len(sorted_rows(http)) == 2 * COUNT
    digests = {
        json.loads((out / "manifest.json").read_text())["settings"]["model_digest"] for out in (native, http)
    }
    assert len(digests) == 1
    names = [json.loads((out / "summary.json").read_text())["model"] for out in (native, http)]
    assert names == ["vila15", "ours"]
    assert vila2_fast(tmp_path, "verify", http).code == 0


def test_native_http_and_the_stand_ins_of_both_generations_give_the_same_rows(
    tmp_path: Path,
    photos: Path,
    standins: dict[str, Path],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    from tests.checkpoints import write_vila15

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    model = write_vila15(tmp_path / "vila15", dtype=torch.bfloat16)
    outs = {name: tmp_path / name for name in ("native", "http")}
    options = [*ASKED, "--no-retry"]
    native = ["recaption", str(photos), "--model", str(model), "--out", str(outs["native"]), *MODEL, *options]
    assert vila2_fast(tmp_path, *native).code == 0
    with served(tmp_path, model) as server:
        done = vila2_fast(
            tmp_path, *by_http(server.root, photos, outs["http"], *options, "--send-format", "png")
        )
        assert done.code == 0, done.stderr
    for flavour in FLAVOURS:
        outs[flavour] = tmp_path / flavour
        run = ["recaption", str(photos), "--backend", "trtllm", "--model", str(model)]
        for _ in install(flavour, standins, monkeypatch):
            assert main([*run, "--out", str(outs[flavour]), *options]) == 0
    rows = {name: sorted_rows(out) for name, out in outs.items()}
    assert len(rows["native"]) == 2 * COUNT
    for name, written in rows.items():
        assert written == rows["native"], name


def test_a_server_killed_in_the_middle_and_started_again(tmp_path: Path, vila15: Path, photos: Path) -> None:
    """SIGKILL with requests under way: the run waits, goes on with the new one, loses no row, has none twice."""
    port = free_port()
    many = sources.write_folder(tmp_path / "many", 60)
    native, out = tmp_path / "native", tmp_path / "out"
    asked = [*ASKED, "--max-new-tokens", "200", "--ignore-eos"]
    first = Served(tmp_path, vila15, "--batch-size", "4", port=port)
    run = start(
        tmp_path, *by_http(first.root, many, out, *asked, "--send-format", "png", "--rows-per-part", "4")
    )
    harness.wait_for(lambda: len(list(out.glob("parts/*.parquet"))) >= 2, 60)
    first.process.send(signal.SIGKILL)
    assert first.process.wait().code == -signal.SIGKILL
    time.sleep(0.3)
    with served(tmp_path, vila15, port=port):
        done = run.wait()
        assert done.code == 0, done.stderr
    assert (
        vila2_fast(tmp_path, "recaption", many, "--model", vila15, "--out", native, *MODEL, *asked).code == 0
    )
    assert harness.captions(out) == harness.captions(native)
    assert len(harness.captions(out)) == 120
    assert vila2_fast(tmp_path, "verify", out).code == 0


def test_a_stop_in_the_middle_ends_what_is_under_way(tmp_path: Path, vila15: Path, photos: Path) -> None:
    port = free_port()
    out = tmp_path / "out"
    first = Served(tmp_path, vila15, "--batch-size", "2", port=port)
    asked = [*ASKED, "--max-new-tokens", "300", "--ignore-eos"]
    run = start(tmp_path, *by_http(first.root, photos, out, *asked))
    harness.wait_for(lambda: first.inside() >= 2, 60)
    first.process.send(signal.SIGTERM)
    done = first.process.wait()
    assert (done.code, done.stderr) == (0, "")
    with served(tmp_path, vila15, port=port):
        assert run.wait().code == 0
    assert len(harness.captions(out)) == 2 * COUNT


def test_what_is_wrong_is_one_line(tmp_path: Path, vila15: Path) -> None:
    with served(tmp_path, vila15) as server:
        port = server.root.rpartition(":")[2]
        for arguments, words in (
            (["--model", str(vila15), "--port", port], "cannot listen at 127.0.0.1 port"),
            (["--model", str(tmp_path / "none"), "--port", "0"], "none"),
            (["--api-key-env", "NO_SUCH_KEY"], "there is no key in NO_SUCH_KEY"),
            (["--api-key-env", "A", "--api-key-file", "b"], "not both"),
            (["--max-body-mib", "0"], "--max-body-mib"),
        ):
            done = vila2_fast(tmp_path, "serve", *arguments)
            assert done.code in (1, 2)
            assert done.stdout == ""
            assert words in done.stderr.splitlines()[-1]
            assert done.stderr.splitlines()[-1].startswith("error: ")


def test_the_engine_is_told_that_requests_share_images(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, object] = {}

    def opened(path: str, **options: object) -> None:
        told.update(options, path=path)
        raise UsageError("no further")

    monkeypatch.setattr("vila2.backends.native.open_checkpoint", opened)
    assert main(["serve", "--model", "some", "--port", "0"]) == 2
    assert (told["path"], told["shares_images"]) == ("some", True)


def test_a_key_is_asked_for_and_never_shown(tmp_path: Path, vila15: Path, photos: Path) -> None:
    key = "sk-served-5678"
    (tmp_path / "key").write_text(key)
    with served(tmp_path, vila15, "--api-key-file", str(tmp_path / "key")) as server:
        run = by_http(server.root, photos, tmp_path / "out", *ASKED, "--api-key-env", "CLIENT_KEY")
        assert "put the key into CLIENT_KEY" in vila2_fast(tmp_path, *run).stderr
        good = start(tmp_path, *run, environment={"CLIENT_KEY": key}).wait()
        assert good.code == 0, good.stderr
        assert key not in server.said + good.stdout + good.stderr


def test_without_the_extra_a_line_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['starlette'] = None; sys.modules['uvicorn'] = None\n"
        "from vila2.cli.main import main; sys.exit(main(['serve']))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 2
    assert re.fullmatch(r'error: serve needs \w+: pip install "vila2-fast\[serve\]"\n', done.stderr)
    help_text = subprocess.run(
        [sys.executable, "-c", code.replace("['serve']", "['serve', '--help']")],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert help_text.returncode == 0
    assert "--max-queue" in help_text.stdout
