"""The base of the small loops: made in one command, each part skipped when it is there, the rest gone on with."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from vila2.model.checkpoint import inspect_checkpoint

SCRIPT = Path(__file__).parents[2] / "recipes" / "small" / "base.py"
SMALL = "--themes home,farm --sign-words 4 --image-size 48 --width 32 --layers 1 --tokens 400 --threads 1"
SHORT = "--tower-steps 2 --decoder-steps 1 --place-steps 1"


def make(out: Path) -> str:
    command = [sys.executable, str(SCRIPT), "--out", str(out), *SMALL.split(), *SHORT.split()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout


def test_a_base_is_made_and_gone_on_with(tmp_path: Path) -> None:
    out = tmp_path / "small"
    assert f"the base parts -> {out / 'base'}" in make(out)
    assert inspect_checkpoint(out / "base").num_parameters < 100_000
    assert json.loads((out / "tower" / "tower.json").read_text())["images"] == 128

    tower = (out / "tower" / "tower.json").stat().st_mtime_ns
    first = (out / "decoder" / "01-decoder" / "summary.json").stat().st_mtime_ns
    (out / "base").unlink()
    shutil.rmtree(out / "decoder" / "02-places")
    make(out)
    assert (out / "tower" / "tower.json").stat().st_mtime_ns == tower
    assert (out / "decoder" / "01-decoder" / "summary.json").stat().st_mtime_ns == first
    assert (out / "base").resolve() == out / "decoder" / "02-places" / "checkpoint"
