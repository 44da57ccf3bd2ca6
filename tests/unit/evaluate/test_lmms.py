"""The adapter for lmms-eval, driven as its evaluator drives a model, against a captioner that is asked one by one."""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.checkpoints import write_nvila
from tests.unit.evaluate import lmms_standin
from tests.unit.evaluate.lmms_standin import Task, run
from vila2.backends.native import open_checkpoint
from vila2.errors import UsageError, VilaError
from vila2.types import CaptionRequest, SamplingParams

QUESTIONS = ("What is this?", "How many?", "Is it red? Answer yes or no.")
Document = dict[str, Any]


@pytest.fixture(scope="module")
def adapter() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        lmms_standin.install(patch)
        yield import_module("vila2.evaluate.lmms")
        patch.delitem(lmms_standin.sys.modules, "vila2.evaluate.lmms")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_nvila(tmp_path_factory.mktemp("lmms") / "nvila", mode="resize")


@pytest.fixture
def model(adapter: ModuleType, checkpoint: Path) -> Any:
    return opened(adapter, checkpoint)


def opened(adapter: ModuleType, checkpoint: Path, more: str = "") -> Any:
    arguments = f"checkpoint={checkpoint},threads=1,precision=float32,deterministic=True{more}"
    return adapter.Vila2Fast.create_from_arg_string(arguments, {"batch_size": 1, "device": "cpu"})


def picture(number: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (40, 30 + number, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def shown(document: Document) -> list[Image.Image]:
    return list(document["images"])


def task_of(*counts: int, name: str = "local", **settings: Any) -> Task:
    """One document a count, with so many images."""
    documents = [{"images": [picture(10 * i + j) for j in range(n)]} for i, n in enumerate(counts)]
    return Task(name, documents, shown, **{"max_new_tokens": 8, **settings})


def alone(checkpoint: Path, question: str, images: list[Image.Image], settings: SamplingParams) -> str:
    """What the engine says to one request and nothing else."""
    captioner = open_checkpoint(checkpoint, threads=1, precision="float32", device="cpu", deterministic=True)
    prepared = tuple(
        captioner.checkpoint.image_processor.prepare(np.asarray(image.convert("RGB")), len(images))
        for image in images
    )
    request = CaptionRequest(id=0, prompt=question, images=prepared, sampling=settings)
    (caption,) = captioner.caption([request])
    assert caption.error is None
    return caption.text


def test_answers_are_the_engines_own_and_in_order(model: Any, checkpoint: Path) -> None:
    tasks = [task_of(1, 1, 2), task_of(1, name="other", max_new_tokens=5)]
    asked = [
        (task, document, text)
        for text in QUESTIONS
        for task in tasks
        for document in range(len(task.documents))
    ]
    requests = [task.request(document, text) for task, document, text in asked]
    answers = run(model, tasks, requests)
    assert len(set(answers)) > len(QUESTIONS)  # they depend on the image too
    for (task, document, text), answer in list(zip(asked, answers, strict=True))[::3]:
        images = shown(task.documents[document])
        settings = SamplingParams(max_new_tokens=task.settings["max_new_tokens"])
        assert answer == alone(checkpoint, text, images, settings), (task.name, document, text)
    assert {(kind, request[0]) for kind, request, _ in model.cache_hook.seen} == {
        ("generate_until", text) for text in QUESTIONS
    }


def test_questions_about_one_document_share_its_encode(model: Any) -> None:
    task = task_of(1, 1)
    run(model, [task], [task.request(i, text) for text in QUESTIONS for i in range(2)])
    assert model.captioner.stats()["images_encoded"] == 2


def test_documents_that_show_one_picture_share_it_while_they_are_neighbours(
    model: Any, checkpoint: Path
) -> None:
    order = (1, 1, 1, 2, 2, 1)  # of 40 questions each, more than may wait for a run's end
    task = Task("pairs", [{"images": [picture(n)]} for n in order], shown, max_new_tokens=2)
    questions = [f"Question {i}?" for i in range(40)]
    answers = run(model, [task], [task.request(i, text) for text in questions for i in range(len(order))])
    of_document = [answers[i :: len(order)] for i in range(len(order))]
    assert of_document[0] == of_document[1] == of_document[2] == of_document[5] != of_document[3]
    assert (
        model.captioner.stats()["images_encoded"] == 4
    )  # 80 of the first, its third document, two, the last
    assert of_document[3][7] == alone(
        checkpoint, questions[7], [picture(2)], SamplingParams(max_new_tokens=2)
    )


def test_documents_without_images(model: Any, checkpoint: Path) -> None:
    for task in (task_of(0), Task("text", [{}], None, max_new_tokens=8)):
        expected = alone(checkpoint, QUESTIONS[0], [], SamplingParams(max_new_tokens=8))
        assert run(model, [task], [task.request(0, QUESTIONS[0])]) == [expected]


def test_one_image_that_is_no_list_and_not_rgb(model: Any) -> None:
    single = Task(
        "single", [{"image": picture(3, "L")}], lambda document: document["image"], max_new_tokens=8
    )
    listed = Task(
        "listed", [{"image": picture(3, "L")}], lambda document: [document["image"]], max_new_tokens=8
    )
    answers = run(model, [single, listed], [task.request(0, "What?") for task in (single, listed)])
    assert answers[0] == answers[1]


def test_until_ends_an_answer(model: Any) -> None:
    task = task_of(1, max_new_tokens=30)
    (whole,) = run(model, [task], [task.request(0, QUESTIONS[0])])
    stop = whole[4:6]
    stopping = task_of(1, max_new_tokens=30, until=[stop, ""])
    (cut,) = run(model, [stopping], [stopping.request(0, QUESTIONS[0])])
    assert cut == whole[: whole.index(stop)].strip()


def test_generation_settings(adapter: ModuleType) -> None:
    of = adapter.sampling_of
    assert of({}) == SamplingParams(max_new_tokens=adapter.MAX_NEW_TOKENS)
    greedy = {"temperature": 0, "top_p": 0, "num_beams": 1, "do_sample": False, "max_new_tokens": 16}
    assert of(greedy) == SamplingParams(max_new_tokens=16)
    assert of({"temperature": 0.7, "do_sample": False, "top_p": 0.9, "top_k": 3}) == of({})
    assert of({"temperature": None, "top_p": None, "num_beams": None, "until": None}) == of({})
    sampled = of({"temperature": 0.7, "top_p": 0.9, "top_k": 3, "until": "\n\n", "max_new_tokens": 4})
    assert sampled == SamplingParams(temperature=0.7, top_p=0.9, top_k=3, max_new_tokens=4, stop=("\n\n",))
    with pytest.raises(UsageError, match="no beam search"):
        of({"num_beams": 5})


def test_what_it_cannot_do_is_refused(
    model: Any, adapter: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = Task("clips", [{}], lambda document: ["clip.mp4"])
    with pytest.raises(UsageError, match="clips shows something that is no image"):
        run(model, [video], [video.request(0, "What?")])
    long = task_of(1)
    with pytest.raises(VilaError, match=r"local: .*prompt"):
        run(model, [long], [long.request(0, "word " * 3000)])
    with pytest.raises(NotImplementedError, match="choose a generate_until task"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="choose a generate_until task"):
        model.generate_until_multi_round([])
    with pytest.raises(UsageError, match="--model_args of vila2_fast: no checkpoint"):
        adapter.Vila2Fast.create_from_arg_string("threads=1", {})
    with pytest.raises(UsageError, match="no argument 'max_pixels'"):
        adapter.Vila2Fast.create_from_arg_string("checkpoint=x,max_pixels=3", {})
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="start lmms-eval without a launcher"):
        adapter.Vila2Fast.create_from_arg_string("checkpoint=x", {})


def test_arguments_as_lmms_eval_gives_them(adapter: ModuleType, checkpoint: Path) -> None:
    model = adapter.Vila2Fast.create_from_arg_string(
        f"pretrained={checkpoint},max_num_seqs=3,threads=1",
        {"batch_size": 4, "max_batch_size": None, "device": "cpu"},
    )
    assert model.captioner.engine.limits.max_num_seqs == 3
    assert (model.batch_size, model.is_simple) == (4, True)


def test_lmms_eval_finds_it(adapter: ModuleType) -> None:
    manifest = adapter.manifest()
    module, _, name = manifest.simple_class_path.rpartition(".")
    assert getattr(import_module(module), name) is adapter.Vila2Fast
    assert issubclass(adapter.Vila2Fast, lmms_standin.lmms)
    project = (Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    group = project.partition('[project.entry-points."lmms_eval.models"]')[2].partition("[")[0]
    assert group.strip() == f'{manifest.model_id} = "vila2.evaluate.lmms:manifest"'
