"""The plan is a pure function of the recipe and of what has been decided."""

from pathlib import Path
from typing import Any

import pytest

from tests.unit.augment.kits import SPECIALIST, STAGES, context, recipe
from vila2.augment.carry import recaption_settings
from vila2.augment.encodes import encode_plan
from vila2.augment.plan import ancestors, dependants, find_step, plan, rounds_of
from vila2.augment.step import Step
from vila2.errors import UsageError


def by_name(steps: list[Step]) -> dict[str, Step]:
    assert len({step.name for step in steps}) == len(steps)
    return {step.name: step for step in steps}


def gain(saturated: bool, best: int) -> dict[str, Any]:
    return {"saturated": saturated, "best": best}


def test_every_step_comes_after_what_it_needs() -> None:
    steps = plan(
        recipe(
            seeds=[0, 3],
            oracle={"min_gap": 0.1},
            control={"kinds": ["steps", "length"]},
            specialist=[SPECIALIST | {"must_beat": "relation.accuracy"}, SPECIALIST | {"name": "two"}],
            generalist={"each": True, "onto": "round"},
        )
    )
    known: set[str] = set()
    for step in steps:
        assert known.issuperset(step.waits_for), step.name
        known.add(step.name)
    assert {name.split("/")[0] for name in known} == {"source", "seed-0", "seed-3"}


def test_rounds_that_saturation_ends_are_gone() -> None:
    of = recipe(rounds={"max": 3}, seeds=[0])
    undecided = by_name(plan(of))
    assert "seed-0/round-3/train" in undecided
    decided = {"seed-0/round-1/gain": gain(False, 1), "seed-0/round-2/gain": gain(True, 1)}
    steps = by_name(plan(of, decided))
    assert "seed-0/round-2/gain" in steps
    assert "seed-0/round-3/recaption" not in steps
    assert rounds_of(of, 0, decided).best == 1
    stage = steps["seed-0/control-steps/train"].settings["stage"][1]
    assert stage["epochs"] == 2 * 2.0  # as much again as one round
    assert undecided["seed-0/control-steps/train"].settings["stage"][1]["epochs"] == 4 * 2.0


def test_a_round_starts_from_the_base_again_and_reads_its_own_captions() -> None:
    steps = by_name(plan(recipe()))
    zero, two = (steps[f"seed-0/round-{k}/train"].settings for k in (0, 2))
    assert two["base"] == zero["base"] == "base"
    paths = [settings["stage"][1]["data"][0]["path"] for settings in (zero, two)]
    assert paths == ["{run}/seed-0/round-0/captions", "{run}/seed-0/round-2/captions"]
    assert zero["stage"][0] == two["stage"][0]
    assert zero["stage"][2] == two["stage"][2]
    model = steps["seed-0/round-2/recaption"].settings["model"]
    assert model == "{run}/seed-0/round-1/train/03-sft/checkpoint"


def test_specialists_start_from_the_best_round_after_its_captions() -> None:
    of = recipe(rounds={"max": 2}, specialist=[SPECIALIST | {"must_beat": ["relation.accuracy"]}])
    decided = {"seed-0/round-1/gain": gain(False, 1), "seed-0/round-2/gain": gain(False, 2)}
    steps = by_name(plan(of, decided))
    train = steps["seed-0/specialist-spatial/train"].settings
    assert train["base"] == "{run}/seed-0/round-2/train/02-pretrain/checkpoint"
    assert [stage["name"] for stage in train["stage"]] == ["tune"]
    asked = steps["seed-0/specialist-spatial/recaption"]
    assert "seed-0/specialist-spatial/check" in asked.after
    assert asked.settings["model"] == "{run}/seed-0/specialist-spatial/train/01-tune/checkpoint"
    final = steps["seed-0/vila2/train"].settings
    assert final["base"] == "base"
    assert final["stage"][1]["data"][0]["path"] == "{run}/seed-0/vila2/captions"
    assert "onto" not in steps["seed-0/vila2/captions"].settings


def test_the_oracle_is_asked_before_any_round() -> None:
    names = [step.name for step in plan(recipe(oracle={"min_gap": 0.1}))]
    assert names.index("seed-0/oracle/gap") < names.index("seed-0/round-1/recaption")


def test_real_images_get_a_second_caption_where_no_truth_is_known() -> None:
    steps = by_name(plan(recipe(source={"path": "images"})))
    again = steps["seed-0/round-1/again"].settings
    assert again["temperature"] > 0
    assert again["limit"] == 1000
    assert "seed-0/round-1/again" in steps["seed-0/round-1/gate"].needs
    none = recipe(source={"path": "images"}, gates={"hallucination_rise": None})
    assert "seed-0/round-1/again" not in by_name(plan(none))


def test_settings_that_change_nothing_are_no_part_of_a_key() -> None:
    slow = [{**stage, "log_every": 5, "save_minutes": 1.0} for stage in STAGES]
    one = by_name(plan(recipe()))
    two = by_name(plan(recipe(threads=1, train={"base": "base", "stage": slow}, recaption={"batch_size": 3})))
    three = by_name(plan(recipe(recaption={"max_new_tokens": 9})))
    for name in ("seed-0/round-1/train", "seed-0/round-1/recaption"):
        digests = dict.fromkeys(one[name].needs, "d")
        assert one[name].key(digests) == two[name].key(digests)
    name = "seed-0/round-1/recaption"
    assert one[name].key(dict.fromkeys(one[name].needs, "d")) != three[name].key(
        dict.fromkeys(three[name].needs, "d")
    )


def test_a_key_follows_inputs() -> None:
    step = Step("s", "gate", {"a": 1}, ("x",))
    assert step.key({"x": "1"}) == step.key({"x": "1", "other": "2"})
    assert step.key({"x": "1"}) != step.key({"x": "2"})


def test_steps_are_found_by_name_by_folder_and_over_seeds() -> None:
    steps = plan(recipe(seeds=[0, 1]))
    assert find_step(steps, "seed-1/round-0/train", "--until") == ["seed-1/round-0/train"]
    assert find_step(steps, "round-0/train", "--until") == ["seed-0/round-0/train", "seed-1/round-0/train"]
    assert "seed-0/round-1/gain" in find_step(steps, "round-1", "--until")
    with pytest.raises(UsageError, match=r"--until 'round-9'.*round-1/train"):
        find_step(steps, "round-9", "--until")


def test_dependants_are_all_that_follow() -> None:
    steps = plan(recipe(rounds={"max": 2}))
    found = dependants(steps, ["seed-0/round-1/train"])
    assert "seed-0/round-2/recaption" in found
    assert "seed-0/round-1/recaption" not in found
    assert "seed-0/round-0/evaluate" not in found


def test_until_wants_what_a_step_waits_for_of_every_seed() -> None:
    steps = plan(recipe(seeds=[0, 1], oracle={"min_gap": 0.1}))
    found = ancestors(steps, find_step(steps, "oracle/gap", "--until"))
    assert "seed-1/oracle/train" in found
    assert not any("round-1" in name or "control" in name for name in found)
    later = ancestors(steps, ["seed-0/round-2/train"])
    assert {"seed-0/round-1/gain", "seed-0/round-2/gate", "seed-0/oracle/gap"} <= later


def test_a_gate_that_changes_its_mind_changes_no_training() -> None:
    one, two = by_name(plan(recipe())), by_name(plan(recipe(gates={"truncated": 0.5})))
    train = "seed-0/round-1/train"
    digests = dict.fromkeys(one[train].needs, "d")
    assert one[train].key(digests) == two[train].key(digests)
    gate = "seed-0/round-1/gate"
    assert one[gate].is_judgement
    digests = dict.fromkeys(one[gate].needs, "d")
    assert one[gate].key(digests) != two[gate].key(digests)


def test_specialists_that_see_alike_are_asked_together() -> None:
    two = [SPECIALIST, SPECIALIST | {"name": "ocr", "prompt": ["ocr", "brief"], "must_beat": "reading.exact"}]
    steps = by_name(plan(recipe(specialist=two, generalist={"each": True})))
    asked = steps["seed-0/specialists/recaption"]
    assert asked.settings["prompt"] == ["spatial", "ocr", "brief"]
    model = "{run}/seed-0/specialist-ocr/train/01-tune/checkpoint"
    assert asked.settings["models"]["brief"] == asked.settings["models"]["ocr"] == model
    assert {f"seed-0/specialist-{n}" for n in ("spatial/train", "ocr/train", "ocr/check")} <= set(
        asked.waits_for
    )
    assert "seed-0/specialist-ocr/recaption" not in steps
    one = steps["seed-0/vila2-ocr/captions"].settings
    assert one["outputs"] == ["{run}/seed-0/specialists/recaption"]
    assert one["prompts"] == ["ocr", "brief"]
    with_tower = SPECIALIST["stage"][0] | {"train": ["vision", "decoder"]}
    for changes in (
        {"specialist": [two[0], two[1] | {"stage": [with_tower]}]},
        {"specialist": two, "launch": {"recaption": {"command": "run {arguments}"}}},
        {"specialist": two, "recaption": {"prompt_template": "{prompt}"}},
        {"specialist": [two[0], two[1] | {"prompt": "spatial"}]},
    ):
        assert "seed-0/specialists/recaption" not in by_name(plan(recipe(**changes)))


def specialist(name: str, *train: str, **changes: Any) -> dict[str, Any]:
    """One that trains these parts and is asked the prompt of its name."""
    stage = SPECIALIST["stage"][0] | {"train": list(train)}
    return {"name": name, "prompt": name, "stage": [stage], **changes}


def test_who_trains_the_tower_encodes_by_itself_and_the_plan_says_so() -> None:
    of = recipe(
        specialist=[
            specialist("spatial", "decoder"),
            specialist("grounding", "vision", "projector", "decoder"),
            specialist("ocr", "projector", "decoder"),
        ],
        generalist={"each": True},
    )
    steps = by_name(plan(of))
    together, alone = steps["seed-0/specialists/recaption"], steps["seed-0/specialist-grounding/recaption"]
    assert together.settings["prompt"] == ["spatial", "ocr"]
    assert together.why == "spatial, ocr of every image, one encode for all 2 specialists"
    assert "an encode of its own: it trains the tower" in alone.why
    outputs = {name: steps[f"seed-0/{name}/captions"].settings["outputs"] for name in ("vila2", "vila2-ocr")}
    shared, own = (f"{{run}}/{step.name}" for step in (together, alone))
    assert outputs == {"vila2": [shared, own], "vila2-ocr": [shared]}
    said = encode_plan(of)
    assert said[0] == "one encode an image serves 2 specialists: spatial, ocr"
    assert said[1].startswith("grounding encodes every image by itself: it trains the tower")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"launch": {"recaption": {"command": "run {arguments}"}}}, "launched"),
        ({"recaption": {"prompt_template": "{prompt}"}}, "wordings of its own"),
        ({"recaption": {"backend": "http", "base_url": "http://a.example/v1"}}, "http backend"),
        (
            {"specialist": [specialist("a", "decoder"), specialist("b", "decoder", prompt="a")]},
            "is asked too",
        ),
        ({"specialist": [specialist("a", "decoder"), specialist("b", "vision")]}, "no other specialist"),
    ],
)
def test_what_keeps_specialists_apart_is_said(changes: dict[str, Any], said: str) -> None:
    two = [specialist("spatial", "decoder"), specialist("ocr", "decoder")]
    of = recipe(**{"specialist": two, **changes})
    steps = by_name(plan(of))
    assert "seed-0/specialists/recaption" not in steps
    told = encode_plan(of)
    assert len(told) == 2
    assert any(said in line for line in told)
    alone = [s.why for n, s in steps.items() if n.endswith("/recaption") and "specialist-" in n]
    assert len(alone) == 2
    assert all("an encode of its own: " in why for why in alone)


def test_one_specialist_has_nobody_to_share_with() -> None:
    of = recipe(specialist=[SPECIALIST])
    assert encode_plan(of) == []
    assert by_name(plan(of))["seed-0/specialist-spatial/recaption"].why == "spatial of every image"


def test_from_the_second_round_on_the_captions_of_the_round_before_are_drafts() -> None:
    steps = by_name(plan(recipe()))
    drafts = {k: steps[f"seed-0/round-{k}/recaption"].free.get("draft") for k in (1, 2, 3)}
    assert drafts == {
        1: None,
        2: "{run}/seed-0/round-1/recaption",
        3: "{run}/seed-0/round-2/recaption",
    }
    without = by_name(plan(recipe(rounds={"draft": False})))["seed-0/round-2/recaption"]
    assert "draft" not in without.free
    assert without.key(dict.fromkeys(without.needs, "d")) == steps["seed-0/round-2/recaption"].key(
        dict.fromkeys(without.needs, "d")
    )  # they make it faster and change nothing


def test_only_pairs_are_recaptioned_and_interleaved_documents_left_alone() -> None:
    """Beside the captions in the pretraining stage stand documents that every model reads as they are."""
    documents = {"kind": "interleaved", "path": "mmc4", "max_images": 6, "weight": 2.0}
    stage = STAGES[1] | {"data": [{"kind": "captions", "weight": 3.0}, documents]}
    steps = by_name(plan(recipe(train={"base": "base", "stage": [STAGES[0], stage, STAGES[2]]}, oracle={})))
    models = ("round-0", "round-1", "round-2", "oracle", "control-steps")
    data = {name: steps[f"seed-0/{name}/train"].settings["stage"][1]["data"] for name in models}
    for name, (captions, other) in data.items():
        assert other == documents
        assert captions["weight"] == 3.0
        source = "round-0" if name == "control-steps" else name
        assert captions["path"] == f"{{run}}/seed-0/{source}/captions"


def test_a_fraction_of_the_set_is_recaptioned_and_merged_as_the_recipe_says(tmp_path: Path) -> None:
    of = recipe(rounds={"fraction": 0.34, "merge": "replace"})
    steps = by_name(plan(of))
    assert steps["seed-0/round-1/captions"].settings["merge"] == "replace"
    settings = recaption_settings(
        steps["seed-0/round-1/recaption"], context(tmp_path, of, source={"samples": 10})
    )
    assert settings.limit == 4
    assert settings.prompt == ("detailed",)
    whole = by_name(plan(recipe()))["seed-0/round-1/recaption"]
    assert recaption_settings(whole, context(tmp_path, source={"samples": 10})).limit is None


def test_real_data_of_a_specialist_pass_the_filters_first() -> None:
    stages = [
        {"name": "short", "train": ["decoder"], "steps": 1, "lr": 1e-3,
         "data": [{"kind": "llava", "path": "boxes:grit"}, {"kind": "llava", "path": "other.json"}]},
        {"name": "long", "train": ["decoder"], "steps": 1, "lr": 1e-3,
         "data": [{"kind": "llava", "path": "boxes:grit", "image_root": "elsewhere"}]},
    ]  # fmt: skip
    filters = [{"name": "grit", "path": "data/grit.jsonl"}]
    of = recipe(specialist=[{"name": "grounding", "prompt": "grounding", "stage": stages, "filter": filters}])
    steps = by_name(plan(of))
    boxes = steps["seed-0/specialist-grounding/data-grit"]
    assert boxes.settings == {"path": "data/grit.jsonl", "max_area": 0.7, "max_same": 3}
    train = steps["seed-0/specialist-grounding/train"]
    assert boxes.name in train.needs
    found = [entry for stage in train.settings["stage"] for entry in stage["data"]]
    assert [(entry["path"], entry.get("image_root")) for entry in found] == [
        (f"{{run}}/{boxes.name}/boxes.jsonl", "data"),  # images stay beside the file that was filtered
        ("other.json", None),
        (f"{{run}}/{boxes.name}/boxes.jsonl", "elsewhere"),
    ]
