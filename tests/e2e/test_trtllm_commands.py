"""build, engines and recaption by TensorRT-LLM's stand-in: the native engine's rows, resumed and after failures."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import write_vila15
from tests.e2e import harness, sources
from tests.trtllm_standin import runtime
from tests.trtllm_standin.generate import FLAVOURS
from tests.unit.backends.conftest import install, standins  # noqa: F401 - a fixture
from vila2.cli.main import main
from vila2.data.verify import iter_rows

COUNT = 6
OPTIONS = [
    "--max-new-tokens",
    "8",
    "--prompt",
    "brief",
    "--prompt",
    "detailed",
    "--no-retry",
    "--decode-workers",
    "1",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    return write_vila15(tmp_path_factory.mktemp("model") / "vila15", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sources.write_folder(tmp_path_factory.mktemp("photos") / "photos", COUNT)


@pytest.fixture(scope="module")
def native(model: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    out = tmp_path_factory.mktemp("native") / "out"
    arguments = ["recaption", str(photos), "--model", str(model), "--out", str(out), "--device", "cpu"]
    assert main([*arguments, "--precision", "float32", "--threads", "1", *OPTIONS]) == 0
    return sorted_rows(out)


def sorted_rows(out: Path) -> list[dict[str, object]]:
    return sorted(iter_rows(out), key=lambda row: (row["key"], row["prompt"]))


@pytest.fixture(params=list(FLAVOURS))
def version(
    request: pytest.FixtureRequest,
    standins: dict[str, Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[str]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    yield from install(request.param, standins, monkeypatch)


def test_the_rows_are_those_of_the_native_engine(
    version: str,
    model: Path,
    photos: Path,
    native: list[dict[str, object]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    engine, out = tmp_path / "engine", tmp_path / "out"
    build = ["build", str(model), "--backend", "trtllm", "--max-batch", "4", "--out", str(engine)]
    assert main(build) == 0
    said = capsys.readouterr()
    assert f"vila15 in bf16 for none, tensorrt_llm {version}" in said.out
    assert "loading the checkpoint" in said.err
    run = ["recaption", str(photos), "--engine", str(engine), "--out", str(out), *OPTIONS]
    assert main([*run, "--limit", "2"]) == 0
    assert main(run) == 0
    assert "nano" not in capsys.readouterr().err
    assert sorted_rows(out) == native
    assert main(["verify", str(out)]) == 0
    manifest = json.loads((out / "manifest.json").read_text())["settings"]
    assert (manifest["backend"], manifest["precision"]) == ("trtllm", "bf16")
    assert runtime.log.count("shutdown") == 3

    assert main([*run, "--device", "cpu"]) == 2
    assert main([*run, "--engine-option", "max_seq_len=9"]) == 2
    assert main([*run, "--precision", "fp8"]) == 2
    long = [
        "recaption",
        str(photos),
        "--engine",
        str(engine),
        "--max-new-tokens",
        "300",
        "--out",
        str(tmp_path / "y"),
    ]
    assert main(long) == 2
    assert "has room for captions of 256 tokens, not 300" in capsys.readouterr().err


def test_a_worker_that_dies_costs_only_what_was_in_flight(
    version: str,
    model: Path,
    photos: Path,
    native: list[dict[str, object]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    run = [
        "recaption",
        str(photos),
        "--backend",
        "trtllm",
        "--model",
        str(model),
        "--out",
        str(out),
        *OPTIONS,
    ]
    run += ["--batch-size", "1", "--rows-per-part", "1"]
    runtime.faults = lambda number: "die" if number == 6 else ""
    assert main(run) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: TensorRT-LLM's worker failed: RuntimeError: MPI worker exited")
    early = harness.captions(out)
    assert 1 <= len(early) < 2 * COUNT
    runtime.faults = None
    assert main(run) == 0
    assert sorted_rows(out) == native

    # The engine that the first run built is in the cache, and so listed.
    capsys.readouterr()
    assert main(["engines", "--json"]) == 0
    [listed] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (listed["backend"], listed["name"], listed["valid"]) == ("trtllm", "vila15", True)
    assert main(["engines"]) == 0
    said = capsys.readouterr().out
    assert "trtllm bf16" in said
    assert "valid" in said
    assert main(["engines", "--prune", "--max-gib", "0"]) == 0
    assert "removed  vila15-trtllm-bf16" in capsys.readouterr().out
    assert not Path(listed["path"]).exists()


def test_without_the_package(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", str(model), "--backend", "trtllm"]) == 2
    assert "needs the package tensorrt_llm" in capsys.readouterr().err
    assert main(["engines", "--root", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "not compared with this machine" in said.err
    assert f"0 engines, 0.00 GiB in {tmp_path}" in said.out
    for wrong, words in (
        (["--precision", "int4-awq", "--out", "x"], "is for --backend trtllm"),
        (["--max-batch", "4", "--out", "x"], "are for --backend trtllm"),
        (["--backend", "trtllm", "--precision", "int8"], "is for --backend native"),
        ([], "--out is needed"),
    ):
        assert main(["build", str(model), *wrong]) == 2
        assert words in capsys.readouterr().err
