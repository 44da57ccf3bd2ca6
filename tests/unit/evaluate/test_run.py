"""A whole evaluation with captioners that know the truth, what is written of it, and how two compare."""

import json
from pathlib import Path

import pytest

from tests.unit.evaluate.oracle import always_yes, oracle, swap_yes_and_no
from tests.unit.recaption.fakes import FakeCaptioner
from vila2.errors import OutputError, UsageError, VilaError
from vila2.evaluate import Evaluation, compare, evaluate, load_evaluation
from vila2.types import Caption, CaptionRequest, ErrorKind, FinishReason, SampleError
from vila2.world import Scene, World

SCENES = 40


def measured(captioner: FakeCaptioner, **settings: object) -> Evaluation:
    return evaluate("a/checkpoint", scenes=SCENES, captioner=captioner, **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def right() -> Evaluation:
    return measured(oracle(SCENES))


def test_the_truth_is_perfect(right: Evaluation) -> None:
    perfect = {
        name: estimate.value
        for name, estimate in right.metrics.items()
        if estimate.better and estimate.value != {"higher": 1.0, "lower": 0.0}[estimate.better]
    }
    assert not perfect
    assert right.metrics["pope.yes_ratio"].value == pytest.approx(0.5, abs=0.02)
    assert right.metrics["diversity.unique"].value == 1.0
    assert len(right.records) > 10 * SCENES
    assert right.metrics["objects.f1"].low > 0.85  # type: ignore[operator]


def test_yes_to_everything_is_biased_and_half_right() -> None:
    result = measured(oracle(SCENES, always_yes), tasks=["presence"])
    values = {name: estimate.value for name, estimate in result.metrics.items()}
    assert values["pope.adversarial.recall"] == values["pope.yes_ratio"] == 1.0
    assert values["pope.accuracy"] == values["pope.precision"] == pytest.approx(0.5, abs=0.02)
    assert values["pope.f1"] == pytest.approx(2 / 3, abs=0.02)
    assert not [name for name in values if not name.startswith(("pope.", "answers."))]


def test_hallucinations_are_found() -> None:
    def invent(scene: Scene, task: str, question: str, answer: str) -> str:
        extra = next(name for name in ("owl", "dog") if name not in scene.counts())
        return f"{answer} There is a {extra}." if scene.index % 2 else answer

    result = measured(oracle(SCENES, invent), tasks=["captions"])
    assert result.metrics["chair.s"].value == 0.5
    assert result.metrics["objects.recall"].value == 1.0
    assert (
        0
        < result.metrics["chair.i"].value
        == pytest.approx(1 - result.metrics["objects.precision"].value, abs=0.2)
    )


def test_one_image_carries_all_its_questions() -> None:
    captioner = oracle(SCENES)
    measured(captioner)
    assert captioner.prepared == SCENES
    by_image: dict[object, list[CaptionRequest]] = {}
    for request in captioner.requests:
        by_image.setdefault(request.image_key, []).append(request)
    for requests in by_image.values():
        assert {request.num_siblings for request in requests} == {len(requests)}
        assert len({id(request.images[0]) for request in requests}) == 1
    assert all(request.sampling.temperature == 0 for request in captioner.requests)
    assert not captioner.closed


def test_limit_bounds_the_questions_of_a_scene() -> None:
    result = measured(oracle(SCENES), tasks=["all"], limit=3)
    asked = [record.scene for record in result.records if record.task != "captions"]
    assert max(asked.count(scene) for scene in range(SCENES)) == 3


def test_objects_choose_scenes_and_change_none(right: Evaluation) -> None:
    few = evaluate("a/checkpoint", scenes=20, objects=(1, 2), captioner=oracle(SCENES * 2))
    world = World()
    scenes = sorted({record.scene for record in few.records})
    assert len(scenes) == 20
    assert {len(world.scene("heldout", index).objects) for index in scenes} == {1, 2}
    passed_over = set(range(scenes[-1])) - set(scenes)
    assert min(len(world.scene("heldout", index).objects) for index in passed_over) > 2
    same = [record for record in few.records if record.scene < SCENES]
    assert same == [record for record in right.records if record.scene in scenes]
    assert (few.settings["objects"], right.settings["objects"]) == ("1-2", "1-5")
    with pytest.raises(UsageError, match="of different scenes \\(objects is '1-5' and '1-2'\\)"):
        compare(right, few)


@pytest.mark.parametrize("tasks", [["captions", "count"], ["reading"]])
def test_progress_counts_scenes_to_the_last(tasks: list[str]) -> None:
    seen: list[int] = []
    totals: set[int] = set()
    last_with_a_sign = max(i for i in range(SCENES) if World().scene("heldout", i).sign)

    def observe(done: int, total: int) -> None:
        seen.append(done)
        totals.add(total)

    evaluate("x", tasks, scenes=last_with_a_sign + 3, captioner=oracle(SCENES + 3), observe=observe)
    assert totals == {last_with_a_sign + 3}
    assert seen == sorted(set(seen))
    assert seen[-1] == last_with_a_sign + 3


def test_a_cut_caption_counts_as_cut() -> None:
    def cut(request: CaptionRequest) -> Caption:
        return Caption(request.id, "A cat", finish_reason=FinishReason.LENGTH)

    assert measured(FakeCaptioner(cut), tasks=["captions"]).metrics["captions.cut"].value == 1.0


def test_a_request_that_fails_ends_the_evaluation() -> None:
    def fail(request: CaptionRequest) -> Caption:
        error = SampleError(ErrorKind.PROMPT_TOO_LONG, "the prompt has 900 tokens")
        return Caption(request.id, "", finish_reason=FinishReason.ERROR, error=error)

    with pytest.raises(VilaError, match=r"scene 0/heldout/.*: the prompt has 900 tokens"):
        measured(FakeCaptioner(fail))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ["nonsense"]}, "no task 'nonsense'"),
        ({"split": "train"}, "no split 'train'; there are pretrain"),
        ({"style": "oil"}, "no style 'oil'; there are fluent"),
        ({"scenes": 0}, "scenes must be at least 1, got 0"),
        ({"objects": (0, 4)}, "scenes have 1 to 5 objects, not 0 to 4"),
        ({"objects": (4, 2)}, "scenes have 1 to 5 objects, not 4 to 2"),
        ({"objects": (2, 6)}, "scenes have 1 to 5 objects, not 2 to 6"),
    ],
)
def test_wrong_settings_are_refused_before_a_checkpoint_is_read(
    settings: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate("no/such/checkpoint", **settings)  # type: ignore[arg-type]


# What is written


def test_a_result_comes_back_from_its_file(right: Evaluation, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "result.json"
    right.save(path)
    assert load_evaluation(path) == right
    values = json.loads(path.read_text(encoding="utf-8"))
    assert values["format"] == 1
    assert len(values["records"]) == len(right.records)
    assert right.summary()["records"] == len(right.records)


def test_a_file_that_is_no_result(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    for content in ("", "[]", "{}", '{"format": 2}', '{"format": 1, "metrics": {}, "records": [{"a": 1}]}'):
        path.write_text(content)
        with pytest.raises(UsageError, match="not a result that `vila2-fast evaluate --out` wrote"):
            load_evaluation(path)
    with pytest.raises(UsageError, match="cannot read the file"):
        load_evaluation(tmp_path / "none.json")


def test_a_result_that_cannot_be_written(right: Evaluation, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write the result"):
        right.save(tmp_path / "file" / "result.json")
    with pytest.raises(OutputError, match="it is a folder"):
        right.save(tmp_path)


# Comparing


def test_a_difference_is_found_and_signed(right: Evaluation) -> None:
    wrong = measured(oracle(SCENES, swap_yes_and_no))
    result = compare(wrong, right)
    pope = result.metrics["pope.accuracy"]
    assert (pope.a, pope.b, pope.value) == (0.0, 1.0, 1.0)
    assert pope.p == pytest.approx(1 / 2001)
    assert pope.mcnemar is not None
    assert pope.mcnemar < 1e-9
    same = result.metrics["objects.f1"]
    assert (same.value, same.p, same.low, same.high) == (0.0, 1.0, 0.0, 0.0)
    assert same.mcnemar is None
    assert (result.scenes, result.answers, result.unpaired) == (SCENES, len(right.records), 0)
    assert result.to_json()["metrics"]["pope.accuracy"]["difference"] == 1.0


def test_only_common_questions_are_paired(right: Evaluation) -> None:
    part = evaluate("b", ["count"], scenes=SCENES // 2, captioner=oracle(SCENES))
    result = compare(right, part)
    assert set(result.metrics) == {"count.accuracy", "answers.readable"}
    assert result.answers == len(part.records)
    assert result.unpaired == len(right.records) - len(part.records)


def test_other_scenes_do_not_compare(right: Evaluation) -> None:
    other = measured(oracle(SCENES, split="dev"), split="dev")
    with pytest.raises(UsageError, match="of different scenes \\(split is 'heldout' and 'dev'\\)"):
        compare(right, other)
    captions = measured(oracle(SCENES), tasks=["captions"])
    counts = measured(oracle(SCENES), tasks=["count"])
    with pytest.raises(UsageError, match="no question in common"):
        compare(captions, counts)


def test_scenes_are_drawn_at_the_size_asked_for() -> None:
    sizes: list[tuple[int, ...]] = []

    class Watching(FakeCaptioner):
        def prepare(self, image: object) -> object:
            sizes.append(image.shape)  # type: ignore[attr-defined]
            return 0

    evaluate(
        "x", ["captions"], scenes=2, image_size=64, captioner=Watching(lambda r: Caption(r.id, "A cat."))
    )
    assert sizes == [(64, 64, 3)] * 2
    assert World().settings.image_size != 64
