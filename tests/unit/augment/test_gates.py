"""Gates pass what is fit and stop what is not, and say which figure, which limit and which caption."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.augment.kits import context, evaluation, write_output
from vila2.augment.context import GateFailed, Outcome
from vila2.augment.gates import content_words, run_compare, run_gain, run_gate
from vila2.augment.measured import gains
from vila2.augment.recipe import Gates
from vila2.augment.step import Step
from vila2.errors import UsageError
from vila2.types import Status
from vila2.world import World, WorldSettings
from vila2.world.shards import ShardPlan, shard_bytes
from vila2.world.texts import detailed_caption

GOOD = [(f"k{i}", f"A {a} stands on the {b}.") for i, (a, b) in enumerate(
    [("dog", "grass"), ("horse", "road"), ("cat", "roof"), ("cow", "meadow"), ("hen", "fence")]
)]  # fmt: skip


def gate(tmp: Path, outcomes: dict[str, Any] | None = None, **changes: Any) -> Outcome:
    limits = Gates(**changes.pop("limits", {})).model_dump(mode="json")
    values = {"limits": limits, "before": None, "truth": None, "again": None, **changes}
    needs = tuple(name for name in outcomes or {})
    of = {name.replace("/", "__"): value for name, value in (outcomes or {}).items()}
    return run_gate(Step("gate", "gate", values, needs), context(tmp, **of))


def output(tmp: Path, name: str, captions: list[tuple[str, str]], **more: Any) -> str:
    return str(write_output(tmp / name, captions, **more))


def test_good_captions_pass(tmp_path: Path) -> None:
    outcome = gate(tmp_path, captions=output(tmp_path, "a", GOOD))
    assert outcome.metrics["words"] == 6
    assert outcome.metrics["repetitive"] == 0
    found = json.loads((tmp_path / "gate" / "gate.json").read_text())
    assert all(check["passed"] for check in found["checks"])


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (Status.TRUNCATED, "the share of truncated captions is 0.2, the gate wants at most 0.1"),
        (Status.REPETITIVE, "the share of repetitive captions is 0.2, the gate wants at most 0.05"),
        (Status.ERROR, "the share of images without a caption is 0.2, the gate wants at most 0.05"),
    ],
)
def test_bad_rows_stop_it(tmp_path: Path, status: Status, said: str) -> None:
    out = output(tmp_path, "a", GOOD, status={3: status})
    with pytest.raises(GateFailed, match=said) as failed:
        gate(tmp_path, captions=out)
    assert "for example k3" in str(failed.value)
    assert (tmp_path / "gate" / "gate.json").exists()


def test_a_loop_that_nobody_marked_is_found(tmp_path: Path) -> None:
    looping = [*GOOD[:4], ("k4", "It is a red car. " * 3)]
    with pytest.raises(GateFailed, match="repetitive"):
        gate(tmp_path, captions=output(tmp_path, "a", looping))


@pytest.mark.parametrize(
    ("captions", "said"),
    [
        (
            [(key, text + " And" + " so on" * 9) for key, text in GOOD],
            "the length against the round before is",
        ),
        ([(key, "A.") for key, _ in GOOD], "the length against the round before is"),
        ([(key, "A dog stands on the grass.") for key, _ in GOOD], "the loss of distinct word pairs is"),
        (
            [(key, "Some blue ship sails far away.") for key, _ in GOOD],
            "the agreement with the round before is",
        ),
    ],
)
def test_drift_from_the_round_before_stops_it(
    tmp_path: Path, captions: list[tuple[str, str]], said: str
) -> None:
    limits = {"repetitive": None, "agreement": 0.6}
    if "agreement" in said or "length" in said:
        limits["diversity_drop"] = None
    before, now = output(tmp_path, "a", GOOD), output(tmp_path, "b", captions)
    gate(tmp_path, captions=before, before=before, limits=limits)
    with pytest.raises(GateFailed, match=said):
        gate(tmp_path, captions=now, before=before, limits=limits)


def write_world(folder: Path) -> tuple[Path, World]:
    settings = WorldSettings(image_size=16)
    folder.mkdir()
    plan = ShardPlan(settings, scenes=6)
    (folder / "pretrain-00000.tar").write_bytes(shard_bytes(plan, range(6)))
    return folder, World(settings)


def test_hallucination_is_measured_against_the_truth(tmp_path: Path) -> None:
    truth, world = write_world(tmp_path / "world")
    scenes = [world.scene("pretrain", i) for i in range(6)]
    keys = [f"pretrain-{i:08d}" for i in range(6)]
    right = [(key, detailed_caption(scene)) for key, scene in zip(keys, scenes, strict=True)]
    missing = [next(name for name in world.lexicon.names if name not in scene.counts()) for scene in scenes]
    wrong = [(key, f"There is {name} here.") for key, name in zip(keys, missing, strict=True)]
    limits = {"hallucination": 0.1}
    good = gate(tmp_path, captions=output(tmp_path, "a", right), truth=str(truth), limits=limits)
    assert good.metrics["hallucination"] == 0
    bad = output(tmp_path, "b", wrong)
    with pytest.raises(GateFailed, match="mentions of what is not there is 1"):
        gate(tmp_path, captions=bad, truth=str(truth), limits=limits)
    rising = {"before/gate": {"hallucination": 0.2}}
    with pytest.raises(GateFailed, match=r"the rise of mentions of what is not there is 0\.8"):
        gate(tmp_path, outcomes=rising, captions=bad, truth=str(truth))


def test_without_a_truth_a_second_caption_shows_what_is_made_up(tmp_path: Path) -> None:
    one = output(tmp_path, "a", GOOD)
    same = output(tmp_path, "b", GOOD)
    other = output(tmp_path, "c", [(key, "Something else entirely appears.") for key, _ in GOOD])
    assert gate(tmp_path, captions=one, again=same).metrics["hallucination"] == 0
    with pytest.raises(GateFailed, match="made-up words is 1"):
        gate(tmp_path, captions=one, again=other, limits={"hallucination": 0.5})


def gain(tmp: Path, *evaluations: list[bool], **changes: Any) -> dict[str, Any]:
    folders = []
    for number, right in enumerate(evaluations):
        folder = tmp / f"e{number}"
        folder.mkdir(exist_ok=True)
        evaluation(right).save(folder / "evaluation.json")
        folders.append(str(folder))
    values = {"metrics": ["relation.accuracy"], "need": "any", "can_stop": True, "is_last": False}
    step = Step("gain", "gain", {**values, "evaluations": folders, **changes})
    return run_gain(step, context(tmp)).values


HALF, MOST, ALL = [i % 2 == 0 for i in range(80)], [i % 8 != 0 for i in range(80)], [True] * 80


def test_a_gain_beyond_its_interval_goes_on(tmp_path: Path) -> None:
    found = gain(tmp_path, HALF, ALL)
    assert found["gained"]
    assert not found["saturated"]
    assert found["gains"][0]["low"] > 0
    assert found["best"] == 1


def test_a_gain_within_its_interval_stops(tmp_path: Path) -> None:
    nearly = [False, *MOST[1:]]
    nearly[8] = True  # one question more
    found = gain(tmp_path, HALF, MOST, nearly)
    assert not found["gained"]
    assert found["saturated"]
    assert found["best"] == 2
    assert not gain(tmp_path, HALF, MOST, nearly, can_stop=False)["saturated"]


def test_the_best_round_may_be_an_earlier_one(tmp_path: Path) -> None:
    assert gain(tmp_path, HALF, ALL, MOST)["best"] == 1
    assert gain(tmp_path, ALL, HALF)["best"] == 1  # the best round, be it worse than none


def test_what_was_not_measured_is_named() -> None:
    with pytest.raises(UsageError, match=r"no metric 'x' was measured; there are relation\.accuracy"):
        gains(evaluation(HALF), evaluation(ALL), ("x",))


def test_one_model_has_to_beat_another(tmp_path: Path) -> None:
    for name, right in (("a", HALF), ("b", ALL)):
        (tmp_path / name).mkdir()
        evaluation(right).save(tmp_path / name / "evaluation.json")
    values = {"metrics": ["relation.accuracy"], "margin": 0.4}
    up = {"before": str(tmp_path / "a"), "after": str(tmp_path / "b")}
    down = {"before": up["after"], "after": up["before"]}
    outcome = run_compare(Step("c", "compare", values | up), context(tmp_path))
    assert outcome.metrics["relation.accuracy"] == 0.5
    with pytest.raises(GateFailed, match=r"relation.accuracy went from 1.0000 to 0.5000, -0.5000"):
        run_compare(Step("d", "compare", values | down), context(tmp_path))
    with pytest.raises(GateFailed, match=r"better by 0\.6 or more"):
        run_compare(Step("e", "compare", values | up | {"margin": 0.6}), context(tmp_path))
    with pytest.raises(GateFailed, match="beyond its interval"):
        run_compare(Step("f", "compare", values | down | {"margin": None}), context(tmp_path))


def test_content_words_are_the_ones_that_say_something() -> None:
    assert content_words("The dog is on a red Mat.") == {"dog", "red", "mat"}
