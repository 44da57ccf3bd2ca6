"""Sources of files: what each record becomes, what is skipped and why, and that nothing leaves its folder."""

import base64
import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as Pillow

from tests.unit.data.tars import write_tar
from tests.unit.train.kits import kit, picture
from vila2.errors import SourceError, UsageError
from vila2.recaption.prompts import load_prompts
from vila2.train.examples import Document, LazyImage, SkippedDocument
from vila2.train.mixture import Mixture
from vila2.train.records import LineRecords, RecordStore
from vila2.train.sample_source import SampleSource
from vila2.train.sources import open_mixture, open_train_source
from vila2.train.text_sources import open_interleaved, open_llava, open_text


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Pillow.fromarray(picture(shade)).save(buffer, "PNG")
    return buffer.getvalue()


def shade(image: object) -> int:
    data = image.load() if isinstance(image, LazyImage) else image
    assert isinstance(data, bytes)
    return int(np.asarray(Pillow.open(io.BytesIO(data)))[0, 0, 0])


def shades(document: Document) -> list[int]:
    return [shade(image) for image in document.images]


def lines(path: Path, *records: object) -> Path:
    path.write_text(
        "".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records), encoding="utf-8"
    )
    return path


def reason(source: object, index: int) -> str:
    with pytest.raises(SkippedDocument) as skipped:
        source.document(index)
    return skipped.value.reason


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number in range(10):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    return tmp_path


# Tars, folders, Parquet


def test_tars_give_captions_and_answers_to_a_prompt(tmp_path: Path) -> None:
    members = [(f"{n}.png", png(n)) for n in range(3)] + [("x.txt", b"no image")]
    members += [("a.png", png(9)), ("a.txt", b"a <image> dog"), ("b.png", b""), ("b.txt", b"nothing")]
    for n in (1, 2):
        write_tar(tmp_path / f"{n}.tar", members)
    source = SampleSource("s", str(tmp_path))
    assert source.length == 12
    found = source.document(4)
    assert (found.kind, found.text, shades(found)) == ("caption", "a <IMAGE> dog", [9])
    assert source.document(10).key != found.key
    assert [reason(source, n) for n in (0, 3, 5)] == ["no_text", "no_image", "empty_file"]
    asked = SampleSource("s", str(tmp_path), "What is it?").document(4)
    assert (asked.kind, asked.text) == ("conversation", "")
    assert asked.conversations == ((("What is it?", "a <IMAGE> dog"),),)
    named = SampleSource("s", str(tmp_path), "detailed").document(4)
    assert named.conversations[0][0][0] in load_prompts()["detailed"].texts


def test_a_folder_of_images_with_texts_beside_them(images: Path) -> None:
    (images / "3.txt").write_text("three")
    source = SampleSource("s", f"folder:{images}")
    assert source.document(3).text == "three"
    assert shades(source.document(3)) == [3]


def test_parquet_is_read_in_stretches_and_mixed_within_them(tmp_path: Path) -> None:
    table = pa.table(
        {"image": [png(n % 250) for n in range(300)], "caption": [f"number {n}" for n in range(300)]}
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=50)
    pq.write_table(table.slice(0, 37), tmp_path / "b.parquet")
    source = SampleSource("s", str(tmp_path))
    assert (source.length, source.stretch) == (337, 64)
    for index in (0, 63, 64, 299, 300, 336):
        expected = index if index < 300 else index - 300
        assert source.document(index).text == f"number {expected}"
        assert shades(source.document(index)) == [expected % 250]
    mixture = Mixture([source])
    assert sorted(mixture.place(n)[1] for n in range(337)) == list(range(337))


# LLaVA


def test_llava_records(images: Path) -> None:
    def turns(*said: str) -> list[dict[str, str]]:
        return [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(said)]

    records = [
        {"id": 1, "image": "1.png", "conversations": turns("<image>\nWhat?", "A dog.", "Where?", "Here.")},
        {"image": "2.png", "conversations": turns("What?\n<image>", "A cat.")},
        {"image": ["3.png", "4.png"], "conversations": turns("<image>\n<image>\nBoth?", "Yes.")},
        {"image": ["3.png", "4.png"], "conversations": turns("First <image> then <image>?", "Yes.")},
        {"conversations": turns("Hello?", "Hello.")},
        {"image": "5.png", "caption": "a dog"},
        {
            "image": "6.png",
            "conversations": [{"from": "system", "value": "be"}, *turns("A?", "B.", "unanswered?")],
        },
        {
            "images": ["7.png"],
            "messages": [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}],
        },
    ]
    path = images / "data.json"
    path.write_text(json.dumps(records))
    source = open_llava("l", str(path))
    assert source.length == len(records)
    found = [source.document(n) for n in range(len(records))]
    assert found[0].conversations == ((("What?", "A dog."), ("Where?", "Here.")),)
    assert found[1].conversations == ((("What?", "A cat."),),)
    assert found[2].conversations == ((("Both?", "Yes."),),)
    assert found[3].conversations == ((("First <image> then <image>?", "Yes."),),)
    assert (found[4].images, found[4].kind) == ((), "conversation")
    assert (found[5].kind, found[5].text) == ("caption", "a dog")
    assert found[6].conversations == ((("A?", "B."),),)
    assert found[7].conversations == ((("A?", "B."),),)
    assert [shades(d) for d in found] == [[1], [2], [3, 4], [3, 4], [], [5], [6], [7]]
    for document in found:
        kit("nvila").encoder().encode(document)


def test_bad_llava_records_are_skipped_and_the_others_stay(images: Path) -> None:
    good = {
        "image": "1.png",
        "conversations": [{"from": "human", "value": "A"}, {"from": "gpt", "value": "B"}],
    }
    outside = images.parent / "outside.png"
    outside.write_bytes(png(1))
    (images / "link.png").symlink_to(outside)
    bad: list[tuple[object, str]] = [
        ('{"image": \n', "bad_record"),
        ("[1, 2]\n", "bad_record"),
        ({**good, "image": 3}, "bad_record"),
        ({**good, "conversations": "A"}, "bad_record"),
        ({**good, "conversations": [{"from": "dog", "value": "A"}]}, "bad_record"),
        (
            {**good, "conversations": good["conversations"][::-1] * 2 + good["conversations"][:1] * 2},
            "bad_record",
        ),
        (
            {**good, "conversations": [{"from": "human", "value": "A"}, {"from": "gpt", "value": " "}]},
            "no_text",
        ),
        ({"image": "1.png"}, "no_text"),
        ('{"image": "1.png", "caption": "half \\ud800"}\n', "bad_text"),
    ]
    unreadable: list[tuple[object, str]] = [
        ({**good, "image": "../outside.png"}, "unsafe_path"),
        ({**good, "image": str(outside)}, "unsafe_path"),
        ({**good, "image": "link.png"}, "unsafe_path"),
        ({**good, "image": "gone.png"}, "missing_file"),
    ]
    path = lines(images / "data.jsonl", good, *(r for r, _ in bad), *(r for r, _ in unreadable), good)
    source = open_llava("l", str(path))
    assert source.length == len(bad) + len(unreadable) + 2
    for number, (_, expected) in enumerate(bad, start=1):
        assert reason(source, number) == expected
    for number, (_, expected) in enumerate(unreadable, start=1 + len(bad)):
        with pytest.raises(SkippedDocument) as skipped:
            kit("nvila").encoder().encode(source.document(number))
        assert skipped.value.reason == expected
    assert source.document(0).conversations == source.document(source.length - 1).conversations


# Text and interleaved


def test_text_lines(tmp_path: Path) -> None:
    records = [
        {"text": " A dog. "},
        {"question": "What?", "answer": "A dog."},
        {"prompt": "What?", "response": "A cat."},
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
        {"other": 1},
        {"text": ""},
    ]
    folder = tmp_path / "texts"
    folder.mkdir()
    lines(folder / "a.jsonl", *records[:3], "\n", "\r\n")
    (folder / "b.jsonl").write_text(
        "\n".join(json.dumps(record) for record in records[3:])
    )  # no newline at the end
    source = open_text("t", str(folder))
    assert source.length == len(records)
    assert (source.document(0).kind, source.document(0).text) == ("text", "A dog.")
    expected = [("What?", "A dog."), ("What?", "A cat."), ("Add.\n1 2", "3"), ("Q", "A")]
    assert [source.document(n).conversations for n in range(1, 5)] == [((turn,),) for turn in expected]
    assert [reason(source, n) for n in (5, 6)] == ["no_text", "no_text"]


def test_interleaved_lines(images: Path) -> None:
    encoded = base64.b64encode(png(8)).decode()
    records = [
        {"images": ["1.png", "2.png"], "text": "One <image> dog. <image> Two."},
        {"images": ["1.png"], "text": "A dog."},
        {
            "text_list": ["First.", "The <image> second.", "Third."],
            "image_info": [
                {"image_name": "3.png", "matched_text_index": 2},
                {"image_base64": encoded, "matched_text_index": 0},
                {"image_name": "4.png", "matched_text_index": 0},
            ],
        },
        {"texts": [None, "A dog.", None, "A cat."], "images": ["5.png", None, "6.png", None]},
        {"images": [f"{n}.png" for n in range(8)], "text": "".join(f"<image> text {n} " for n in range(8))},
    ]
    source = open_interleaved("i", str(lines(images / "x.jsonl", *records)))
    found = [source.document(n) for n in range(len(records))]
    assert [shades(d) for d in found] == [[1, 2], [1], [8, 4, 3], [5, 6], [0, 1, 2, 3, 4, 5]]
    assert found[0].text == "One <image> dog. <image> Two."
    assert found[1].text == "<image>A dog."
    assert found[2].text == "<image><image>First. The <IMAGE> second. <image>Third."
    assert found[3].text == "<image>A dog.\n<image>A cat."
    assert found[4].text.count("<image>") == 6
    assert "text 7" in found[4].text
    for document in found:
        example = kit("vila15").encoder().encode(document)
        assert len(example.images) == len(document.images)


def test_bad_interleaved_lines(images: Path) -> None:
    bad = [
        ({"images": ["1.png"], "text": "<image> and <image>"}, "bad_prompt"),
        ({"images": ["1.png"]}, "no_text"),
        ({"images": ["1.png"], "text": " <image> "}, "no_text"),
        ({"texts": ["a"], "images": []}, "bad_record"),
        ({"text_list": "a"}, "bad_record"),
        (
            {"text_list": ["a"], "image_info": [{"matched_text_index": 4, "image_name": "1.png"}]},
            "bad_record",
        ),
        ({"text_list": ["a"], "image_info": [{"matched_text_index": 0}]}, "no_image"),
        (
            {"text_list": ["a"], "image_info": [{"matched_text_index": 0, "image_base64": "%"}]},
            "corrupt_image",
        ),
    ]
    source = open_interleaved("i", str(lines(images / "x.jsonl", *(record for record, _ in bad))))
    assert [reason(source, n) for n in range(len(bad))] == [expected for _, expected in bad]


@pytest.mark.parametrize(
    ("opened", "message"),
    [
        (lambda path: open_text("t", str(path / "none")), "neither a file nor a folder"),
        (lambda path: open_text("t", str(path)), "neither a file nor a folder"),
        (lambda path: open_text("t", str(lines(path / "e.jsonl", "\n\n"))), "holds no records"),
        (lambda path: open_llava("l", str(path)), "is not a file"),
        (lambda path: open_interleaved("i", str(lines(path / "a.jsonl", {})), "/none"), "is not a folder"),
        (lambda path: SampleSource("s", str(path / "none")), "does not exist"),
    ],
)
def test_what_is_no_source_says_so(tmp_path: Path, opened, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        opened(tmp_path)


# Records


def test_lines_are_found_again_by_their_places(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", *({"n": n, "text": "é" * n} for n in range(500)))
    cache = tmp_path / "cache"
    for _ in range(2):
        records = LineRecords([path, path], cache)
        assert [records[n]["n"] for n in (0, 499, 500, 999, 250)] == [0, 499, 0, 499, 250]
    (kept,) = cache.iterdir()
    before = kept.stat().st_mtime_ns
    LineRecords([path], cache)
    assert kept.stat().st_mtime_ns == before
    lines(path, {"n": 7})
    assert LineRecords([path], cache)[0]["n"] == 7
    with pytest.raises(IndexError):
        LineRecords([path])[1]


@pytest.mark.parametrize("kept", [True, False])
def test_a_store_is_written_once(tmp_path: Path, kept: bool) -> None:
    path = tmp_path / "deep" / "a.records" if kept else None
    store = RecordStore(({"n": n} for n in range(100)), path)
    assert (len(store), store[0], store[99]) == (100, {"n": 0}, {"n": 99})
    with pytest.raises(IndexError):
        store[100]
    if kept:
        again = RecordStore(({"n": -1} for _ in range(3)), path)
        assert (len(again), again[42]) == (100, {"n": 42})
        path.write_bytes(path.read_bytes()[:-1])  # a torn store is made again
        assert len(RecordStore(({"n": -1} for _ in range(3)), path)) == 3


# Recipes


def entry(**values: object) -> SimpleNamespace:
    base = {
        "kind": "text", "weight": 1.0, "limit": None, "path": None, "image_root": None, "prompt": None, "prompts": (),
        "mode": None, "max_images": 6, "split": "pretrain", "texts": (), "scenes": None, "start": 0,
        "image_size": 64, "seed": 0, "style": "fluent", "options": {},
    }  # fmt: skip
    return SimpleNamespace(**base | values)


def test_a_mixture_of_entries(images: Path) -> None:
    path = lines(images / "a.jsonl", *({"text": f"text {n}"} for n in range(20)))
    entries = [
        entry(kind="world", texts=("alt",), weight=3.0),
        entry(kind="text", path=str(path), limit=5),
        entry(kind="webdataset", path=f"folder:{images}", limit=100),
    ]
    mixture = open_mixture(entries, seed=3, cache=images / "cache")
    assert [source.name for source in mixture.sources] == ["0-world", "1-text", "2-webdataset"]
    assert [source.length for source in mixture.sources] == [None, 5, 10]
    assert [item["share"] for item in mixture.describe()] == [2458, 819, 819]


def test_unknown_texts_and_options_of_the_world_name_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"no texts 'detaild'.*detailed"):
        open_train_source(entry(kind="world", texts=("detaild",)), "w")
    with pytest.raises(UsageError, match=r"no option 'per_imag'.*per_image"):
        open_train_source(entry(kind="world", texts=("alt",), options={"per_imag": 1}), "w")
    with pytest.raises(UsageError, match="related is 'near', expected any or neighbours"):
        open_train_source(entry(kind="world", texts=("spatial",), options={"related": "near"}), "w")
    with pytest.raises(UsageError, match="entry of their own"):
        open_train_source(entry(kind="world", texts=("alt", "instruction")), "w")
