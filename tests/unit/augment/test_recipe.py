"""Recipes: what is refused before anything runs, and what the training gets."""

from pathlib import Path
from typing import Any

import pytest

from tests.unit.augment.kits import SPECIALIST, STAGES, recipe
from vila2.augment.recipe import read_loop_recipe
from vila2.errors import UsageError

ROOT = Path(__file__).resolve().parents[3]
LOOPS = ("loop_quick.toml", "three_rounds.toml")


@pytest.mark.parametrize(
    "path",
    [*(ROOT / "recipes" / "loop").glob("*.toml"), *(ROOT / "recipes" / name for name in LOOPS)],
    ids=lambda p: p.stem,
)
def test_shipped_recipes_are_sound(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vila2.augment.plan import plan

    monkeypatch.chdir(ROOT)
    assert len(plan(read_loop_recipe(path))) > 10


def test_the_round_fills_its_place() -> None:
    values = recipe().train_recipe("folder", "images", 7, "out")
    assert values["stage"][1]["data"] == [{"kind": "recaption", "path": "folder", "image_root": "images"}]
    assert values["stage"][0]["data"] == STAGES[0]["data"]
    assert values["seed"] == 7
    assert STAGES[1]["data"] == [{"kind": "captions"}]
    assert recipe().captions_stage == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"source": {}}, "give path"),
        ({"source": {"path": "x", "world": {"scenes": 1}}}, "give path"),
        ({"rounds": {"max": 1, "min": 2}}, "must not exceed"),
        ({"seeds": [1, 1]}, "different numbers"),
        ({"specialist": [SPECIALIST, SPECIALIST]}, "the same name"),
        ({"specialist": [SPECIALIST], "rounds": {"max": 0, "min": 0}}, "at least 1"),
        ({"recaption": {"model": "m"}}, "the loop sets it itself"),
        ({"source": {"path": "x"}, "oracle": {}}, "known of a world only"),
        ({"launch": {"train": {"command": "torchrun"}}}, "must hold"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        recipe(**changes)


def test_parts_are_checked_by_their_owners(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    head = "out: o\nsource: {world: {scenes: 3}}\n"
    file.write_text(
        head + "train: {base: b, stage: [{name: a, train: decoder, steps: 1, lr: 1.0, data: []}]}\n"
    )
    with pytest.raises(UsageError, match='no data entry has kind = "captions"'):
        read_loop_recipe(file)
    stage = "{name: a, train: decoder, steps: 1, lr: 1.0, data: [{kind: captions}]}"
    file.write_text(f"{head}train: {{base: b, stage: [{stage}]}}\n")
    assert read_loop_recipe(file).stages == ("a",)
    with pytest.raises(UsageError, match=r"did you mean 'relation\.accuracy'"):
        read_loop_recipe(file, ['saturation.metrics=["relation.acuracy"]'])
    with pytest.raises(UsageError, match=r"train: stage\.0: stage a: trains decoder with lr 0"):
        read_loop_recipe(file, ["train.stage.a.lr=0.0"])
