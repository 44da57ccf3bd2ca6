"""What a user meets on the command line beside the captions: help, probes, estimates, exit codes, one-line errors."""

import json
import os
import pty
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e import sources
from tests.e2e.harness import vila2_fast
from vila2.config import RecaptionSettings

OPTIONS = ("--max-new-tokens", "6", "--threads", "1")


def fresh(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, with all its imports."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **environment},
    )


def test_help_comes_quickly_and_without_torch() -> None:
    script = (
        "import sys\n"
        "from vila2.cli.main import main\n"
        "assert main(['--help']) == 0 and main(['recaption', '--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'pyarrow'} & set(sys.modules)\n"
        "print('HEAVY', heavy)"
    )
    done = fresh("-c", script)
    assert done.returncode == 0, done.stderr
    assert "HEAVY set()" in done.stdout
    for name in ("recaption", "verify", "export", "doctor", "--max-new-tokens"):
        assert name in done.stdout
    # Against the least that a command of rich-click takes: this machine may be slow, or busy.
    least = "import rich_click\n@rich_click.command()\ndef least(): 'Nothing.'\nleast(['--help'])"
    assert cpu_seconds("-m", "vila2.cli", "--help") < 2 * cpu_seconds("-c", least)


def cpu_seconds(*arguments: str) -> float:
    """Of the fastest of four processes; the clock would measure the neighbours."""
    seconds = []
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        fresh(*arguments)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(seconds)


def test_every_setting_is_an_option_and_every_option_a_setting() -> None:
    from vila2.cli.recaption import recaption

    names = {parameter.name for parameter in recaption.params}
    fields = {field.alias or name for name, field in RecaptionSettings.model_fields.items()}
    assert names - fields == {"recipe", "no_retry"}
    assert fields - names == {"repetition", "commit_seconds"}  # recipes only


def test_doctor_says_what_there_is(tmp_path: Path) -> None:
    done = vila2_fast(tmp_path, "doctor", "--json")
    assert done.code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["machine"]["cores"] >= 1
    assert report["libraries"]["torch"]
    assert report["used for"]["device"] in ("cpu", "cuda")
    plain = vila2_fast(tmp_path, "doctor")
    assert "tensorrt_llm" in plain.stdout


def test_prompts_and_completion(tmp_path: Path) -> None:
    listed = json.loads(vila2_fast(tmp_path, "prompts", "--json").stdout)
    assert len(listed["detailed"]) == 3
    for shell in ("bash", "zsh", "fish"):
        done = vila2_fast(tmp_path, "completion", shell)
        assert done.code == 0
        assert "_VILA2_FAST_COMPLETE" in done.stdout
    completed = fresh(
        "-m", "vila2.cli", COMP_WORDS="vila2-fast rec", COMP_CWORD="1", _VILA2_FAST_COMPLETE="bash_complete"
    )
    assert "recaption" in completed.stdout


def test_inspect_describes_each_kind_and_refuses_what_is_none(
    tmp_path: Path, checkpoints: dict[str, Path]
) -> None:
    kinds = {}
    for name, path in checkpoints.items():
        report = json.loads(vila2_fast(tmp_path, "inspect", path, "--json").stdout)
        kinds[name] = report["kind"]
        assert report["parameters"] > 0
    assert kinds == {"vila15": "vila1.5", "nvila": "nvila", "llava": "llava"}
    assert "vila1.5, " in vila2_fast(tmp_path, "inspect", checkpoints["vila15"], "--no-digest").stdout
    done = vila2_fast(tmp_path, "inspect", tmp_path)
    assert done.code == 1
    assert len(done.stderr.splitlines()) == 1


def test_convert_makes_a_pickled_checkpoint_usable(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    import shutil

    import torch
    from safetensors.torch import load_file

    old = tmp_path / "old"
    shutil.copytree(checkpoints["llava"], old)
    for path in old.glob("*.safetensors"):
        torch.save(load_file(path), path.with_name("pytorch_model.bin"))
        path.unlink()
    refused = vila2_fast(tmp_path, "inspect", old)
    assert refused.code == 1
    assert "vila2-fast convert" in refused.stderr
    done = vila2_fast(tmp_path, "convert", old, tmp_path / "new")
    assert done.code == 0, done.stderr
    assert vila2_fast(tmp_path, "inspect", tmp_path / "new").code == 0


def test_errors_are_one_line_with_the_right_exit_code(tmp_path: Path, vila15: Path) -> None:
    photos = sources.write_folder(tmp_path / "photos", 2)
    (tmp_path / "empty").mkdir()
    base = ["recaption", photos, "--model", vila15, "--out", tmp_path / "out"]
    cases = [
        (["recaption", tmp_path / "gone", *base[2:]], 1, "does not exist"),
        (["recaption", tmp_path / "empty", *base[2:]], 1, "nothing to caption"),
        ([*base[:2], "--model", tmp_path / "gone", *base[4:]], 1, "does not exist"),
        (["recaption", photos], 2, "missing out"),
        ([*base, "--max-new-tokens", "0"], 2, "max_new_tokens"),
        ([*base, "--backend", "trtllm", "--precision", "int8"], 2, "does not run on the trtllm backend"),
        ([*base, "--prompt", "breif"], 2, "did you mean 'brief'"),
        ([*base, "--prompt-text", "a {b.c}"], 2, "fields are written"),
        ([*base, "--prompt-text", "a {nothing}"], 2, "first sample lacks"),
        ([*base, "--rank", "3"], 2, "world_size"),
        ([*base, "--retry", "hot"], 2, "TEMPERATURE/TOP_P"),
        ([*base, "--frobnicate"], 2, "No such option"),
        ([*base, "--recipe", tmp_path / "gone.toml"], 2, "cannot read"),
        ([*base, "--template", "nonsense"], 2, "nonsense"),
        (["frobnicate"], 2, "frobnicate"),
        (["verify", tmp_path / "gone"], 1, "is not a folder"),
        (["verify", photos], 1, "manifest.json"),
        (["export", photos, "--format", "jsonl"], 1, "manifest.json"),
    ]
    if not has_gpu():
        cases.append(([*base, "--device", "cuda"], 2, "no GPU"))
    for arguments, code, words in cases:
        done = vila2_fast(tmp_path, *arguments)
        assert (done.code, len(done.stderr.splitlines())) == (code, 1), (arguments, done)
        assert done.stderr.startswith("error: ")
        assert words in done.stderr
        assert done.stdout == ""


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def test_a_dry_run_estimates_and_leaves_nothing(tmp_path: Path, vila15: Path) -> None:
    photos = sources.write_folder(tmp_path / "photos", 12)
    arguments = ["recaption", photos, "--model", vila15, "--out", tmp_path / "out", *OPTIONS, "--dry-run"]
    done = vila2_fast(tmp_path, *arguments)
    assert done.code == 0, done.stderr
    assert "12 samples, 12 of them to do" in done.stdout
    assert "estimate:" in done.stdout
    assert not (tmp_path / "out").exists()
    event = json.loads(vila2_fast(tmp_path, *arguments, "--json").stdout)
    assert (event["event"], event["probed"]) == ("estimate", 8)


def test_json_lines_for_machines_and_a_recipe(tmp_path: Path, vila15: Path) -> None:
    photos = sources.write_folder(tmp_path / "photos", 6)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {vila15}\nsource: {photos}\nmax_new_tokens: 200\nignore_eos: true\njson: true\n"
    )
    done = vila2_fast(
        tmp_path,
        "recaption",
        "--recipe",
        recipe,
        "--out",
        tmp_path / "out",
        "--threads",
        "1",
        "--batch-size",
        "1",
    )
    assert done.code == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[-1]["event"] == "summary"
    assert events[-1]["images"] == 6
    assert events[-1]["num_tokens"] == 1200
    for event in events[:-1]:
        assert event["event"] == "progress"
        assert event["bottleneck"]
    stored = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert stored == {name: value for name, value in events[-1].items() if name != "event"}


def test_a_terminal_gets_a_live_bar(tmp_path: Path) -> None:
    """Through a pseudo-terminal: the bar is drawn, and removed at the end."""
    script = (
        "import time\n"
        "from vila2.cli.progress import shown\n"
        "from vila2.recaption.stats import Progress\n"
        "with shown(False) as show:\n"
        "    for i in range(4):\n"
        "        show(Progress(i, 4, i, 10 * i, 1, i + 0.5, 3, 2, 1, 'vision'))\n"
        "        time.sleep(0.3)\n"
    )
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", script], stderr=slave, env={**os.environ, "COLUMNS": "150"}
    )
    os.close(slave)
    drawn = b""
    try:
        while piece := os.read(master, 4096):
            drawn += piece
    except OSError:
        pass  # the other end is closed
    assert process.wait(30) == 0
    os.close(master)
    for words in (b"captions/s", b"(vision)", b"1 errors", b"3/4"):
        assert words in drawn


def test_plain_lines_elsewhere(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from vila2.cli import progress
    from vila2.recaption.stats import Progress

    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 0.0)
    with progress.shown(False) as show:
        show(Progress(0, 9, 0, 0, 0, 0.0, 0, 0, 0, "starting"))
        show(Progress(3, 9, 6, 60, 1, 2.0, 4, 5, 6, "decode"))
    line = capsys.readouterr().err.strip()
    assert line == (
        "3/9 images, 3 captions/s, 30 tokens/s, queues decode 4 vision 5 language 6 (decode), 1 errors, 0:04 left"
    )


def test_a_reader_that_goes_away_is_met_with_silence() -> None:
    command = f"{sys.executable} -m vila2.cli prompts | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout == "detailed (the default)\n"


def test_an_unexpected_failure_is_one_line_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vila2.cli import main as module

    monkeypatch.setitem(module.COMMANDS, "doctor", "vila2.cli.nowhere:doctor")
    assert module.main(["doctor"]) == 1
    monkeypatch.setenv("VILA2_TRACEBACK", "1")
    with pytest.raises(ModuleNotFoundError):
        module.main(["doctor"])
