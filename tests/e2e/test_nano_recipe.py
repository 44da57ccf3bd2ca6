"""The chain that makes nano, from nothing to the folder that ships, with two steps where the recipes have thousands."""

import runpy
import sys
from pathlib import Path

import pytest

from vila2.cli.main import main as vila2_fast
from vila2.model.checkpoint import inspect_checkpoint
from vila2.train import located, tower

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "nano"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Runs a script of the recipe as `python recipes/nano/NAME.py ARGUMENTS` would."""
    monkeypatch.syspath_prepend(RECIPES)
    known = set(sys.modules)

    def run(name: str, *arguments: str | Path) -> None:
        monkeypatch.setattr(sys, "argv", [name, *(str(argument) for argument in arguments)])
        runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")

    yield run
    for name in ("ship", "vocabulary"):
        if name not in known:
            sys.modules.pop(name, None)


def test_from_nothing_to_the_folder_that_ships(
    script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, package = tmp_path / "run", tmp_path / "package"
    monkeypatch.setattr(tower, "_PROBE", 8)
    monkeypatch.setattr(located, "_PROBE", 8)
    monkeypatch.setattr(tower, "_COUNTED", 64)
    few = (
        "--vocabulary-scenes",
        "40",
        "--tower-steps",
        "2",
        "--located-steps",
        "2",
        "--decoder-steps",
        "2",
        "--threads",
        "1",
    )
    script("base", "--out", run, *few)
    assert (run / "base").resolve() == run / "decoder" / "02-places" / "checkpoint"

    settings = [f"base={run / 'base'}", "threads=1"]
    for stage in ("align", "pretrain", "sft", "questions"):
        settings += [f"stage.{stage}.steps=2", f"stage.{stage}.batch_examples=2"]
    words = [word for setting in settings for word in ("--set", setting)]
    assert vila2_fast(["train", str(RECIPES / "nano.toml"), "--out", str(run / "train"), *words]) == 0

    script("ship", run, "--into", package, "--scenes", "2")
    shipped = inspect_checkpoint(package / "nano")
    assert set(shipped.dtypes) == {"BF16"}
    assert shipped.num_parameters == inspect_checkpoint(package / "nano-base").num_parameters
    assert (
        "Then (`vila2/train/located.py`) 2 steps of 64 images"
        in (package / "nano-base" / "README.md").read_text()
    )
    assert (
        "| questions | vision, projector, decoder | 2 | 4 |" in (package / "nano" / "README.md").read_text()
    )

    script("compare", run, "--scenes", "2", "--card", package / "nano" / "figures.json")
    told = capsys.readouterr().out
    assert "within" in told
    assert "worse" not in told


def test_figures_are_placed_by_their_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(RECIPES)
    lines = runpy.run_path(str(RECIPES / "compare.py"))["lines"]
    sys.modules.pop("ship", None)

    def figure(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.02, "high": value + 0.02}

    card = {"objects.f1": figure(0.9), "chair.i": figure(0.1), "pope.accuracy": figure(0.9)}
    found = {"objects.f1": figure(0.85), "chair.i": figure(0.05), "pope.accuracy": figure(0.93)}
    shown, behind = lines(found, card)
    assert behind == 1
    assert [line.split()[-1] for line in shown[:3]] == ["worse", "better", "meet"]
    assert lines({**found, "objects.f1": figure(0.91), "chair.i": figure(0.15)}, card)[1] == 1
    assert lines({}, card)[1] == 3
