"""The folder of a run: which recipe may go on in it."""

import json
from pathlib import Path

import pytest

from vila2.config import make_settings
from vila2.errors import UsageError
from vila2.train.recipe import Recipe
from vila2.train.run_folder import RunFolder


def run_folder(out: Path, themes: object, steps: int = 4, more: tuple[str, ...] = ()) -> RunFolder:
    data = {"kind": "world", "split": "pretrain", "texts": ["alt"], "options": {"themes": themes}}
    stages = [
        {"name": name, "train": ["decoder"], "steps": steps, "batch_examples": 1, "lr": 1e-3, "data": [data]}
        for name in ("first", *more)
    ]
    return RunFolder(make_settings(Recipe, {"base": "somewhere", "out": str(out), "stage": stages}))


def begin(folder: RunFolder) -> None:
    folder.record(folder.recipe.deciding())
    checkpoint = folder.checkpoint(0)
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text("{}")


def test_the_same_recipe_goes_on_whether_its_lists_are_lists_or_tuples(tmp_path: Path) -> None:
    begin(run_folder(tmp_path, ("home", "farm")))
    for themes in (("home", "farm"), ["home", "farm"]):
        again = run_folder(tmp_path, themes)
        again.record(again.recipe.deciding())


def test_a_stage_may_be_added_and_one_that_has_begun_may_not_change(tmp_path: Path) -> None:
    begin(run_folder(tmp_path, ["home"]))
    longer = run_folder(tmp_path, ["home"], more=("second",))
    longer.record(longer.recipe.deciding())
    recorded = json.loads((tmp_path / "recipe.json").read_text())["deciding"]
    assert [stage["name"] for stage in recorded["stage"]] == ["first", "second"]
    for other in (run_folder(tmp_path, ["farm"]), run_folder(tmp_path, ["home"], steps=5)):
        with pytest.raises(UsageError, match=r"begun with another recipe: stage\.first"):
            other.record(other.recipe.deciding())
