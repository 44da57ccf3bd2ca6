"""What is trained on: joined by place, whatever the order of parts, and never a caption of another image."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.unit.augment.kits import context, write_output
from vila2.augment.step import Step
from vila2.augment.texts import FILE_NAME, run_captions
from vila2.errors import UsageError
from vila2.types import Status

KEYS = ["k0", "k1", "k2", "k3", "k4"]
ORIGINALS = ["a dog", "a cat", "", "an <image> of a cow", "a hen"]
CAPTIONS = [(key, f"New caption {i}.") for i, key in enumerate(KEYS)]


def write_tar(path: Path) -> Path:
    image = bytes.fromhex("ffd8ffe0")  # never decoded here
    with tarfile.open(path, "w") as tar:
        for key, text in zip(KEYS, ORIGINALS, strict=True):
            for suffix, data in (("jpg", image), ("txt", text.encode())):
                entry = tarfile.TarInfo(f"{key}.{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return path


def run(tmp: Path, name: str, **settings: Any) -> list[dict[str, Any]]:
    step = Step(name, "captions", settings)
    outcome = run_captions(step, context(tmp))
    lines = (tmp / name / FILE_NAME).read_text().splitlines()
    assert outcome.images == len(lines)
    return [json.loads(line) for line in lines]


@pytest.fixture
def originals(tmp_path: Path) -> Path:
    run(tmp_path, "zero", mode="original", source=str(write_tar(tmp_path / "a.tar")))
    return tmp_path / "zero"


def test_originals_stand_as_they_are(originals: Path) -> None:
    records = [json.loads(line) for line in (originals / FILE_NAME).read_text().splitlines()]
    assert [r["text"] for r in records] == ORIGINALS
    assert [r["index"] for r in records] == [0, 1, 2, 3, 4]
    assert {r["shard"] for r in records} == {"a.tar"}


def test_new_captions_follow_the_originals_or_replace_them(tmp_path: Path, originals: Path) -> None:
    out = write_output(tmp_path / "out", CAPTIONS)
    more = {"mode": "new", "originals": str(originals), "outputs": [str(out)]}
    joined = run(tmp_path, "one", merge="concat", **more)
    assert joined[0]["text"] == "a dog\nNew caption 0."
    assert joined[2]["text"] == "New caption 2."
    assert joined[3]["text"].startswith("an <IMAGE> of a cow")
    replaced = run(tmp_path, "two", merge="replace", **more)
    assert [r["text"] for r in replaced] == [caption for _, caption in CAPTIONS]


def test_what_has_no_good_caption_keeps_its_own(tmp_path: Path, originals: Path) -> None:
    status = {1: Status.REPETITIVE, 3: Status.ERROR}
    out = write_output(tmp_path / "out", CAPTIONS[:4], status=status)
    more = {"mode": "new", "originals": str(originals), "outputs": [str(out)]}
    found = run(tmp_path, "one", merge="replace", **more)
    assert [r["text"] for r in found] == [
        "New caption 0.", "a cat", "New caption 2.", "an <image> of a cow", "a hen",
    ]  # fmt: skip


def test_answers_of_several_specialists_become_turns(tmp_path: Path, originals: Path) -> None:
    one = write_output(tmp_path / "s", CAPTIONS, prompt="spatial", wordings=("Where {key}?",))
    two = write_output(tmp_path / "o", CAPTIONS[2:4], prompt="ocr", wordings=("Read.",), start=2)
    found = run(tmp_path, "three", mode="turns", originals=str(originals), outputs=[str(one), str(two)])
    assert found[0]["turns"] == [{"question": "Where k0?", "answer": "New caption 0."}]
    assert [len(r["turns"]) for r in found] == [1, 1, 2, 2, 1]
    assert found[3]["turns"][1] == {"question": "Read.", "answer": "New caption 3."}
    assert found[0]["text"] == "a dog"


def test_a_question_that_needs_a_field_of_the_sample_is_refused(tmp_path: Path, originals: Path) -> None:
    out = write_output(tmp_path / "out", CAPTIONS, wordings=("About {title}?",))
    with pytest.raises(UsageError, match="title"):
        run(tmp_path, "t", mode="turns", originals=str(originals), outputs=[str(out)])


def test_unrelated_originals_make_it_as_long(tmp_path: Path, originals: Path) -> None:
    out = write_output(tmp_path / "out", [(key, "word " * 9) for key in KEYS])
    more = {"originals": str(originals)}
    long = run(tmp_path, "one", mode="new", merge="concat", outputs=[str(out)], **more)
    found = run(tmp_path, "u", mode="unrelated", like=str(tmp_path / "one"), seed=0, **more)
    for mine, theirs, original in zip(found, long, ORIGINALS, strict=True):
        assert mine["text"].startswith(original)
        assert abs(len(mine["text"].split()) - len(theirs["text"].split())) <= 5
    assert found == run(tmp_path, "v", mode="unrelated", like=str(tmp_path / "one"), seed=0, **more)


def test_true_captions_from_a_file(tmp_path: Path, originals: Path) -> None:
    file = tmp_path / "truth.json"
    file.write_text(json.dumps({"k0": "A brown dog.", "k9": "Nothing."}))
    found = run(tmp_path, "t", mode="truth", merge="concat", truth=str(file), originals=str(originals))
    assert found[0]["text"] == "a dog\nA brown dog."
    assert found[1]["text"] == "a cat"


def test_the_digest_is_of_the_content_alone(tmp_path: Path, originals: Path) -> None:
    out = write_output(tmp_path / "out", CAPTIONS)
    settings = {"mode": "new", "merge": "concat", "originals": str(originals), "outputs": [str(out)]}
    digests = {run_captions(Step(n, "captions", settings), context(tmp_path)).digest for n in ("x", "y")}
    assert len(digests) == 1
    again = run_captions(Step("z", "captions", settings | {"merge": "replace"}), context(tmp_path))
    assert again.digest not in digests
