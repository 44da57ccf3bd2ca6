"""The filters of grounding data, on odd boxes."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.unit.augment.kits import context
from vila2.augment.boxes import FILE_NAME, BadBoxes, filtered, run_boxes
from vila2.augment.step import Step
from vila2.errors import SourceError, UsageError
from vila2.train.text_sources import open_llava


def record(*answers: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nWhere?"}]
    turns += [{"from": "gpt", "value": answer} for answer in answers]
    return {"id": "1", "image": "a.jpg", "conversations": turns}


def answers(found: dict[str, Any]) -> list[str]:
    return [turn["value"] for turn in found["conversations"] if turn["from"] == "gpt"]


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("a dog [0.1,0.2,0.5,0.6] runs", "a dog [100,200,500,600] runs"),
        ("a dog [1, 20, 500, 999]", "a dog [001,020,500,999]"),
        ("a dog [0.5,0.5,1.0,1.0]", "a dog [500,500,999,999]"),
        ("a list [1] of [2, 3] and [100,100,200,200]", "a list [1] of [2, 3] and [100,100,200,200]"),
    ],
)
def test_boxes_come_out_as_three_digits(said: str, kept: str) -> None:
    assert answers(filtered(record(said), 0.7, 3)) == [kept]


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("a dog", "no box"),
        ("a sky [0,0,900,900]", "box too large"),
        ("a sky [0,0,1,1]", "box too large"),
        ("a dog [500,100,400,200]", "box without an area"),
        ("a dog [100,100,100,200]", "box without an area"),
        ("a dog [0,0,500,1000]", "box outside the image"),
        ("a dog [-5,0,500,100]", "box outside the image"),
        ("a dog [0.1,0.1,1.5,0.2]", "box outside the image"),
        ("dog [1,1,9,9], dog [2,2,9,9], dog [3,3,9,9] and dog [4,4,9,9]", "too many of one kind"),
        ("dog [1,1,9,9][2,2,9,9][3,3,9,9][4,4,9,9]", "too many of one kind"),
    ],
)
def test_what_is_not_worth_learning_is_dropped_with_its_reason(said: str, reason: str) -> None:
    with pytest.raises(BadBoxes, match=reason):
        filtered(record(said), 0.7, 3)


def test_three_of_a_kind_may_stay() -> None:
    text = "cat [001,001,009,009], dog [001,001,009,009], dog [002,002,009,009], dog [003,003,009,009]"
    assert answers(filtered(record(text), 0.7, 3)) == [text]


@pytest.mark.parametrize("bad", [None, 3, {}, {"conversations": [3]}, {"conversations": [{"from": "gpt"}]}])
def test_other_things_are_no_records(bad: Any) -> None:
    with pytest.raises(BadBoxes, match="no conversation"):
        filtered(bad, 0.7, 3)


def run(tmp: Path, path: Path) -> dict[str, Any]:
    settings = {"path": str(path), "max_area": 0.7, "max_same": 3}
    return run_boxes(Step("boxes", "boxes", settings), context(tmp)).metrics


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_file_is_filtered(tmp_path: Path, suffix: str) -> None:
    records = [record("a dog [100,100,200,200]"), record("no box"), record("ä sky [0,0,999,999]")]
    file = tmp_path / f"data{suffix}"
    text = json.dumps(records) if suffix == ".json" else "\n".join(json.dumps(r) for r in records)
    file.write_text(text)
    found = run(tmp_path, file)
    assert found == {"kept": 1, "dropped": {"no box": 1, "box too large": 1}}
    lines = (tmp_path / "boxes" / FILE_NAME).read_text().splitlines()
    assert [json.loads(line) for line in lines] == records[:1]


def test_what_is_left_is_read_as_conversations_about_the_images_of_the_file(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(data / "a.jpg")
    file = data / "grit.json"
    file.write_text(json.dumps([record("a sky [0,0,1,1]"), record("a dog [0.1,0.2,0.5,0.6] runs")]))
    run(tmp_path, file)
    documents = open_llava("grit", str(tmp_path / "boxes" / FILE_NAME), str(data))
    assert documents.length == 1
    found = documents.document(0)
    assert found.conversations[0][0][1] == "a dog [100,200,500,600] runs"
    assert len(found.images) == 1


def test_a_file_that_gives_nothing_stops(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(record("nothing")) + "\n")
    with pytest.raises(UsageError, match="no record"):
        run(tmp_path, file)
    with pytest.raises(SourceError, match="not a file"):
        run(tmp_path, tmp_path / "none.json")
