"""Recaptioned data to train on: the output folder in each mode, and each of its exports."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from tests.unit.data.tars import write_tar
from tests.unit.recaption.fakes import FakeCaptioner
from tests.unit.train.kits import kit, picture
from tests.unit.train.test_sources import shades
from vila2.config import RecaptionSettings, make_settings
from vila2.errors import SourceError, UsageError
from vila2.recaption.export import ExportOptions, export
from vila2.recaption.pipeline import run
from vila2.recaption.prompts import load_prompts
from vila2.train.examples import Document, SkippedDocument
from vila2.train.recaption_source import open_recaption
from vila2.types import Caption, CaptionRequest, FinishReason

COUNT = 12  # samples, of which one is no image and one has a caption that is not OK


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Pillow.fromarray(picture(shade)).save(buffer, "PNG")
    return buffer.getvalue()


def answer(request: CaptionRequest) -> Caption:
    number = request.images[0] // (20 * 20 * 3)
    reason = FinishReason.LENGTH if number == 5 else FinishReason.STOP
    kind = "brief" if "one short sentence" in request.prompt else "ocr"
    end = "" if number == 5 else "."  # what is cut off has no whole sentence to keep
    return Caption(request.id, f"{kind} of {number} <image>{end}", (1, 2), reason, 7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recaption")
    members: list[tuple[str, bytes]] = []
    for n in range(COUNT):
        members += [
            (f"{n:03d}.png", b"no image" if n == 7 else png(n)),
            (f"{n:03d}.txt", f"original {n}".encode()),
        ]
    source = path / "source"
    source.mkdir()
    write_tar(source / "a.tar", members[:10])
    write_tar(source / "b.tar", members[10:])
    values = {"source": str(source), "model": "m", "out": str(path / "out"), "prompt": ["brief", "ocr"]}
    settings = make_settings(
        RecaptionSettings, {**values, "decode_workers": 1, "rows_per_part": 5, "retry": []}
    )
    run(settings, open_model=lambda _: FakeCaptioner(answer))
    return path


def documents(source: object) -> dict[int, Document | str]:
    """By the number of the sample; a reason where it is skipped."""
    return dict(numbered(source, index) for index in range(source.length))


def numbered(source: object, index: int) -> tuple[int, Document | str]:
    try:
        document = source.document(index)
        return shades(document)[0], document
    except SkippedDocument as skipped:
        return -1 - index, skipped.reason


def question(name: str) -> str:
    (text,) = load_prompts()[name].texts
    return text


def test_new_captions_stand_in_the_place_of_the_original(folder: Path) -> None:
    found = documents(open_recaption("r", str(folder / "out")))
    assert {reason for number, reason in found.items() if number < 0} == {"corrupt_image", "no_caption"}
    assert len(found) == COUNT
    assert (found[3].kind, found[3].text) == ("caption", "brief of 3 <IMAGE>.\nocr of 3 <IMAGE>.")


def test_prompts_can_be_chosen_and_the_original_kept(folder: Path) -> None:
    out = str(folder / "out")
    assert documents(open_recaption("r", out, prompts=("ocr",)))[3].text == "ocr of 3 <IMAGE>."
    concat = documents(open_recaption("r", out, mode="concat", prompts=["brief"]))
    assert concat[4].text == "original 4\nbrief of 4 <IMAGE>."
    original = documents(open_recaption("r", out, mode="original"))
    assert sorted(original) == [-8, 0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11]
    assert original[5].text == "original 5"


def test_questions_and_answers_follow_the_original(folder: Path) -> None:
    found = documents(open_recaption("r", str(folder / "out"), mode="qa"))
    turns = (((question("brief"), "brief of 2 <IMAGE>."),), ((question("ocr"), "ocr of 2 <IMAGE>."),))
    assert (found[2].kind, found[2].text, found[2].conversations) == ("caption", "original 2", turns)
    captions, answers = kit("nvila").encoder().encode_all(found[2])
    assert (len(captions.branches), len(answers.branches)) == (1, 2)


def test_places_are_kept_for_the_next_run(folder: Path, tmp_path: Path) -> None:
    first = open_recaption("r", str(folder / "out"), cache=tmp_path)
    kept = sorted(tmp_path.iterdir())
    times = [path.stat().st_mtime_ns for path in kept]
    again = open_recaption("r", str(folder / "out"), cache=tmp_path)
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())] == times
    assert again.document(3).text == first.document(3).text


@pytest.mark.parametrize(
    ("form", "how"),
    [
        (form, how)
        for form in ("jsonl", "llava", "webdataset", "vila")
        for how in ("replace", "concat", "qa")
        if (form, how) != ("vila", "qa")  # whose files hold captions alone
    ],
)
def test_exports_say_the_same_as_the_folder(folder: Path, tmp_path: Path, form: str, how: str) -> None:
    target = tmp_path / "export"
    export(folder / "out", target, ExportOptions(form, how, copy_images=form == "llava"))
    root = str(folder / "source") if form in ("jsonl", "vila") else None
    source = open_recaption("e", str(target), image_root=root)
    mode = "new" if how == "replace" else how
    wanted = {
        n: d for n, d in documents(open_recaption("r", str(folder / "out"), mode=mode)).items() if n >= 0
    }
    found = documents(source)
    assert found.keys() == wanted.keys()
    for number, document in wanted.items():
        got = found[number]
        if form == "llava":
            said = got.conversations[0]
            texts = [document.text, *(answer for ((_, answer),) in document.conversations)]
            assert [answer for _, answer in said] == texts
            assert "<image>" not in said[0][0]
        else:
            assert (got.text, got.conversations) == (document.text, document.conversations)


def test_what_does_not_fit_says_so(folder: Path, tmp_path: Path) -> None:
    out = str(folder / "out")
    with pytest.raises(UsageError, match=r"no mode 'orignal'.*original"):
        open_recaption("r", out, mode="orignal")
    with pytest.raises(UsageError, match=r"no captions of a prompt 'ocra'.*ocr"):
        open_recaption("r", out, prompts=["ocra"])
    with pytest.raises(SourceError, match="neither the output of a recaption run nor an export"):
        open_recaption("r", str(tmp_path), image_root=str(folder / "source"))
    export(folder / "out", tmp_path / "jsonl", ExportOptions("jsonl"))
    with pytest.raises(UsageError, match="name their source with image_root"):
        open_recaption("r", str(tmp_path / "jsonl"))
    with pytest.raises(UsageError, match="exported with its own"):
        open_recaption("r", str(tmp_path / "jsonl"), mode="qa")
    with pytest.raises(SourceError, match="does not exist"):
        open_recaption("r", str(tmp_path / "gone"))


def test_a_record_of_a_sample_that_is_gone_is_skipped(folder: Path, tmp_path: Path) -> None:
    record = {"shard": "a.tar", "index": 99, "text": "x"}
    path = tmp_path / "captions.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in (record, {**record, "index": 1}, {"text": "x"})))
    source = open_recaption("e", str(path), image_root=str(folder / "source"))
    encoder = kit("nvila").encoder()
    for index, expected in ((0, "missing_file"), (2, "bad_record")):
        with pytest.raises(SkippedDocument) as skipped:
            encoder.encode(source.document(index))
        assert skipped.value.reason == expected
    assert np.unique(encoder.encode(source.document(1)).images[0].tiles).tolist() == [1]
