"""lmms-eval itself, as a user starts it, with our engine as its model: its POPE on scenes of the world, from a file.

Run by `make test-eval`, in an environment that has lmms-eval; not a part of `make test`, which knows only a stand-in.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import lmms_eval
import numpy as np
import pytest
from PIL import Image

from tests.checkpoints import write_nvila
from vila2.backends.native import open_checkpoint
from vila2.types import CaptionRequest, SamplingParams
from vila2.world import World, WorldSettings, texts

SCENES = 5
ARGUMENTS = {"threads": 1, "precision": "float32", "deterministic": True}
MAX_NEW_TOKENS = 12
AFTER = "\nAnswer the question using a single word or phrase."  # what its POPE adds to each question
TASK = """\
include: {pope}
task: pope_world
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
generation_kwargs:
  max_new_tokens: {tokens}
  temperature: 0
  do_sample: false
"""


def documents() -> list[dict[str, Any]]:
    """POPE's columns, of presence questions about the first held-out scenes."""
    world = World(WorldSettings(image_size=56))
    found: list[dict[str, Any]] = []
    for index in range(SCENES):
        scene = world.scene("heldout", index)
        image = Image.fromarray(world.render(scene))
        for question in texts.questions(scene, tasks=["presence_random"]):
            number = str(len(found))
            asked = {"question": question.question, "answer": question.answer, "category": "random"}
            found.append(
                {"id": number, "question_id": number, "image_source": scene.key, "image": image, **asked}
            )
    return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_nvila(tmp_path_factory.mktemp("lmms") / "nvila", mode="resize")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """The output folder of one run of its command line."""
    folder = tmp_path_factory.mktemp("run")
    columns = {name: datasets.Value("string") for name in documents()[0]} | {"image": datasets.Image()}
    data = folder / "pope.parquet"
    datasets.Dataset.from_list(documents(), features=datasets.Features(columns)).to_parquet(str(data))
    tasks = folder / "tasks"
    tasks.mkdir()
    pope = Path(lmms_eval.__file__).parent / "tasks" / "pope" / "pope.yaml"
    (tasks / "pope_world.yaml").write_text(TASK.format(pope=pope, data=data, tokens=MAX_NEW_TOKENS))
    arguments = {
        "--model": "vila2_fast",
        "--model_args": ",".join(f"{k}={v}" for k, v in {"checkpoint": checkpoint, **ARGUMENTS}.items()),
        "--tasks": "pope_world",
        "--include_path": str(tasks),
        "--output_path": str(folder / "out"),
        "--batch_size": "1",
        "--device": "cpu",
    }
    offline = {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "lmms_eval",
            *(part for pair in arguments.items() for part in pair),
            "--log_samples",
        ],
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "out"


def samples(out: Path) -> list[dict[str, Any]]:
    (file,) = out.rglob("*samples_pope_world.jsonl")
    return sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: int(sample["doc_id"]))


def answer_of(sample: dict[str, Any]) -> str:
    answer: str = sample["filtered_resps"]
    assert isinstance(answer, str)
    return answer


def test_its_answers_are_the_engines(out: Path, checkpoint: Path) -> None:
    captioner = open_checkpoint(checkpoint, device="cpu", **ARGUMENTS)  # type: ignore[arg-type]
    sampling = SamplingParams(max_new_tokens=MAX_NEW_TOKENS)
    requests = [
        CaptionRequest(
            id=number,
            prompt=document["question"] + AFTER,
            images=(captioner.prepare(np.asarray(document["image"])),),
            sampling=sampling,
        )
        for number, document in enumerate(documents())
    ]
    answers = {caption.id: caption.text for caption in captioner.caption(requests)}
    logged = [answer_of(sample) for sample in samples(out)]
    assert logged == [answers[number] for number in range(len(requests))]
    assert len(set(logged)) > 1


def test_its_figures_are_of_these_answers(out: Path) -> None:
    (file,) = out.rglob("*results.json")
    figures = json.loads(file.read_text())["results"]["pope_world"]
    right = [document["answer"] for document in documents()]
    said = [answer_of(sample).lower().strip() for sample in samples(out)]
    assert figures["pope_accuracy,none"] == pytest.approx(
        np.mean([a == b for a, b in zip(right, said, strict=True)])
    )
    assert figures["pope_yes_ratio,none"] == pytest.approx(right.count("yes") / len(right))
