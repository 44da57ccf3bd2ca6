"""The script for a real installation, on the stand-in: it gets through, and a broken adapter would not."""

import json
from pathlib import Path

import pytest

from bench.trtllm_check import main
from tests.trtllm_standin import runtime

ARGUMENTS = ["--images", "3", "--max-new-tokens", "6", "--max-batch", "4"]
# A random model in bf16 soon parts from itself in float32; the rest must hold.
ROUNDING = {"captions begin as the native engine's", "captions go on as the native engine's"}


def test_the_round(
    newest: str, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--model", str(models["vila15"]), *ARGUMENTS, "--json", str(tmp_path / "report.json")])
    report = json.loads((tmp_path / "report.json").read_text())
    assert {name for name, problem in report["checks"].items() if problem} <= ROUNDING
    assert len(report["checks"]) == 11
    assert report["facts"]["tensorrt_llm"] == newest
    assert "verdict: " in capsys.readouterr().out
    assert runtime.log[-1] == "shutdown"


def test_a_dead_worker_is_a_verdict(
    newest: str, models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    runtime.faults = lambda number: "die" if number == 5 else ""
    assert main(["--model", str(models["vila15"]), *ARGUMENTS]) == 1
    assert "verdict: FAILED: the round" in capsys.readouterr().out
