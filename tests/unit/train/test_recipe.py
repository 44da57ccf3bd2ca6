"""Recipes: what may be left out, what is refused in which words, what counts as another recipe."""

from pathlib import Path
from typing import Any

import pytest

from vila2.config import make_settings
from vila2.errors import UsageError
from vila2.train.recipe import Recipe, differences, read_recipe

WORLD = {"kind": "world", "texts": "alt"}


def stage(**values: Any) -> dict[str, Any]:
    return {"name": "align", "train": "projector", "steps": 3, "lr": 1e-3, "data": [WORLD], **values}


def recipe(*stages: dict[str, Any], **values: Any) -> Recipe:
    return make_settings(
        Recipe, {"base": "ckpt", "out": "runs/x", "stage": list(stages or [stage()]), **values}
    )


def refusal(*stages: dict[str, Any], **values: Any) -> str:
    with pytest.raises(UsageError) as error:
        recipe(*stages, **values)
    return str(error.value)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


TEXT = """
base = "ckpt"
out = "runs/x"
[[stage]]
name = "align"
from = "base"
train = ["projector", "decoder"]
steps = 3
lr = {projector = 1e-3, decoder = 1e-5}
optimizer = "muon"
[[stage.data]]
kind = "world"
texts = ["alt"]
"""


def test_one_number_is_for_every_part() -> None:
    found = recipe().stage[0]
    assert [found.lr.of(part) for part in ("vision", "projector", "decoder")] == [1e-3] * 3
    assert found.optimizer.of("decoder") == "adamw"
    assert found.train == ("projector",)


def test_file_with_rates_by_part(tmp_path: Path) -> None:
    found = read_recipe(write(tmp_path, TEXT)).stage[0]
    assert (found.lr.of("projector"), found.lr.of("decoder")) == (1e-3, 1e-5)
    assert found.optimizer.of("projector") == "muon"
    assert found.from_ == "base"


def test_overrides_reach_stages_by_name_and_lists_by_number(tmp_path: Path) -> None:
    sets = ["stage.align.lr=2e-4", "stage.0.data.0.weight=3", "seed=7", "precision=float32"]
    found = read_recipe(write(tmp_path, TEXT), sets, out="elsewhere")
    assert found.stage[0].lr.of("decoder") == 2e-4
    assert found.stage[0].data[0].weight == 3
    assert (found.seed, found.precision, found.out) == (7, "float32", "elsewhere")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stage.aling.lr=1", "did you mean 'align'"),
        ("lr", "expected key=value"),
        ("base.x=1", "holds no keys"),
        ("stage.align.stepz=4", "did you mean 'steps'"),
    ],
)
def test_overrides_that_reach_nothing(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=r".") as error:
        read_recipe(write(tmp_path, TEXT), [text])
    assert said in str(error.value)


def test_unknown_keys_name_the_nearest() -> None:
    assert "did you mean 'schedule'" in refusal(stage(shedule="cosine"))
    assert "did you mean 'seed'" in refusal(sed=1)
    assert "did you mean 'deviations'" in refusal(guard={"deviation": 1})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"epochs": 1.0}, "steps or epochs"),
        ({"steps": None}, "steps or epochs"),
        ({"train": ["projector", "projector"]}, "twice"),
        ({"train": ["tower"]}, "'vision', 'projector' or 'decoder'"),
        ({"lr": {"decoder": 1e-3}}, "trains projector with lr 0"),
        ({"lora": {"parts": ["decoder"]}}, "must be among train"),
        ({"data": [{"kind": "world"}]}, "needs texts"),
        ({"data": [{"kind": "llava"}]}, "needs a path"),
        ({"data": [{"kind": "text", "path": "x", "scenes": 3}]}, "text data has no key 'scenes'"),
        ({"name": "a/b"}, "name"),
    ],
)
def test_stages_that_make_no_sense(values: dict[str, Any], said: str) -> None:
    assert said in refusal(stage(**values))


def test_recipes_that_make_no_sense() -> None:
    assert "one of them" in refusal(base=None)
    assert "called 'align'" in refusal(stage(), stage())
    fresh = {"vision": {"width": 8}, "decoder": {"hidden_size": 8}}
    assert "needs a tokenizer" in refusal(base=None, model=fresh)


def test_a_path_is_a_parts_weights() -> None:
    found = recipe(
        base=None, model={"vision": "siglip/", "decoder": "llama/", "projector": {"kind": "linear"}}
    )
    assert found.model is not None
    assert (found.model.vision.weights, found.model.projector.kind) == ("siglip/", "linear")


def test_what_changes_nothing_learnt_is_not_compared() -> None:
    one = recipe(stage(save_every=3, log_every=2), out="a", tensorboard=True)
    two = recipe(stage(eval=[WORLD]), out="b")
    assert differences(one.deciding(), two.deciding()) == []


def test_differences_name_dotted_keys() -> None:
    one, two = recipe(stage()), recipe(stage(lr={"projector": 2e-3}), seed=1)
    lines = differences(one.deciding(), two.deciding())
    assert lines[0] == "seed was 0, is 1"
    assert "stage.align.lr.projector was 0.001, is 0.002" in lines


def test_a_recipe_survives_json() -> None:
    one = recipe(stage(lora={"rank": 4, "parts": ["projector"]}, warmup=5))
    assert make_settings(Recipe, one.to_json()) == one
