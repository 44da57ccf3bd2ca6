"""The base of the small loops: made in one command, each part skipped when it is there, the rest gone on with."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from vila2.model.checkpoint import inspect_checkpoint, load_checkpoint

SCRIPT = Path(__file__).parents[2] / "recipes" / "small" / "base.py"
SMALL = "--themes home,farm --sign-words 4 --image-size 48 --width 32 --layers 1 --tokens 400"
SHORT = "--tower-steps 2 --decoder-steps 1 --place-steps 1"


def make(out: Path, threads: int = 1) -> str:
    command = [sys.executable, str(SCRIPT), "--out", str(out), "--threads", str(threads)]
    command += [*SMALL.split(), *SHORT.split()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout


def test_a_base_is_made_and_gone_on_with(tmp_path: Path) -> None:
    """Tower and decoder at once with two threads, one after the other with one: the same base."""
    out = tmp_path / "small"
    assert f"the base parts -> {out / 'base'}" in make(out, threads=2)
    assert inspect_checkpoint(out / "base").num_parameters < 100_000
    assert json.loads((out / "tower" / "tower.json").read_text())["images"] == 128
    base, tower = weights(out / "base"), weights(out / "tower")
    of_tower = {name for name in base if torch.equal(base[name], tower[name])}
    assert of_tower == {name for name in base if name.startswith(("vision.", "projector."))}

    first = (out / "decoder" / "01-decoder" / "summary.json").stat().st_mtime_ns
    for part in ("base", "tower", "decoder/02-places"):
        shutil.rmtree(out / part)
    make(out, threads=1)
    assert (out / "decoder" / "01-decoder" / "summary.json").stat().st_mtime_ns == first
    again = weights(out / "base")
    assert all(torch.equal(again[name], base[name]) for name in base)


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(checkpoint, dtype=torch.float32).model.state_dict()
