"""Captions that are there already: their files, CIDEr over them, and the truth of a world's folder."""

import json
import tarfile
from io import BytesIO
from pathlib import Path

import pytest

from vila2.errors import UsageError
from vila2.evaluate import compare
from vila2.evaluate.caption_files import read_captions, read_references
from vila2.evaluate.given import evaluate_references, evaluate_truths
from vila2.evaluate.truths import read_truths, scene_of
from vila2.world import World, WorldSettings
from vila2.world.shards import ShardPlan, shard_bytes
from vila2.world.texts import detailed_caption

# Files of captions


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"key": "1", "caption": "a cat"}\n\n{"key": 2, "text": "a dog"}\n'),
        ("a.json", '{"1": "a cat", "2": "a dog"}'),
        ("a.json", '[{"image_id": 1, "caption": "a cat"}, {"image_id": 2, "caption": "a dog"}]'),
        (
            "a.json",
            '{"annotations": [{"id": 9, "image_id": 1, "caption": "a cat"}, {"image_id": 2, "caption": "a dog"}]}',
        ),
    ],
)
def test_captions_of_every_kind_of_file(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_captions(tmp_path / name) == {"1": "a cat", "2": "a dog"}
    assert read_references(tmp_path / name) == {"1": ["a cat"], "2": ["a dog"]}


@pytest.mark.parametrize(
    "content",
    [
        '{"1": ["a cat", "one cat"]}',
        '[{"key": "1", "references": ["a cat", "one cat"]}]',
        '{"annotations": [{"image_id": 1, "caption": "a cat"}, {"image_id": 1, "caption": "one cat"}]}',
    ],
)
def test_references_may_be_several(tmp_path: Path, content: str) -> None:
    path = tmp_path / "references.json"
    path.write_text(content)
    assert read_references(path) == {"1": ["a cat", "one cat"]}
    with pytest.raises(UsageError, match="two captions for '1'"):
        read_captions(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "not JSON"),
        ("a.json", "3", "expected a list of captions or an object"),
        ("a.json", "[3]", "entry 0 is no object"),
        ("a.json", '[{"key": "1"}]', "entry 0: expected a key"),
        ("a.json", '{"1": []}', "expected a key"),
        ("a.jsonl", '{"key": "1", "caption": "x"}\nnope', "a.jsonl:2: not JSON"),
        ("a.jsonl", "[]", "a.jsonl:1: expected an object"),
        ("a.jsonl", '{"caption": "x"}', "a.jsonl:1: expected a key"),
        ("a.jsonl", '{"key": "1", "caption": 4}', "a.jsonl:1: expected a key"),
    ],
)
def test_broken_files_say_where(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=message):
        read_captions(tmp_path / name)


def test_missing_and_foreign_paths(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the file: No such file"):
        read_captions(tmp_path / "none.json")
    with pytest.raises(UsageError, match="no output of `vila2-fast recaption`"):
        read_captions(tmp_path)
    (tmp_path / "latin.json").write_bytes(b'{"1": "\xe9"}')
    with pytest.raises(UsageError, match="not UTF-8"):
        read_captions(tmp_path / "latin.json")


# CIDEr


def test_references_are_scored_and_what_is_missing_is_said() -> None:
    references = {"1": ["a cat on a mat"], "2": ["two dogs run", "dogs running"], "3": ["birds"]}
    result = evaluate_references({"1": "A cat on a mat.", "2": "a car", "9": "x"}, references, "mine")
    assert result.metrics["cider"].value == pytest.approx(0.5)  # 1 and 0; papers write 50
    assert (result.metrics["cider"].count, result.settings["without_caption"]) == (2, 1)
    better = evaluate_references({"1": "A cat on a mat.", "2": "dogs running"}, references, "better")
    difference = compare(result, better).metrics["cider"]
    assert difference.value > 0.1
    assert [record.scene for record in result.records] == [0, 1]


def test_nothing_in_common_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"no key in common \(they begin with 'a', 'b'\)"):
        evaluate_references({"a": "x"}, {"b": ["y"]}, "mine")


# The truth of a world


def write_world(folder: Path, **plan: object) -> World:
    settings = WorldSettings(image_size=32)
    made = ShardPlan(settings, split="dev", scenes=6, shard_size=4, **plan)  # type: ignore[arg-type]
    folder.mkdir()
    for name, scenes in made.shards():
        (folder / name).write_bytes(shard_bytes(made, scenes))
    return World(settings)


def test_truths_come_back_from_tars(tmp_path: Path) -> None:
    world = write_world(tmp_path / "w")
    truths = read_truths(tmp_path / "w")
    assert list(truths) == [f"dev-{index:08d}" for index in range(6)]
    for index, scene in enumerate(truths.values()):
        made = world.scene("dev", index)
        assert scene.truth() == made.truth()
        assert scene.relations() == made.relations()
    assert read_truths(next((tmp_path / "w").glob("*1.tar"))).keys() == set(list(truths)[4:])


def test_truths_come_back_from_loose_files(tmp_path: Path) -> None:
    write_world(tmp_path / "w")
    (tmp_path / "files").mkdir()
    for path in (tmp_path / "w").glob("*.tar"):
        with tarfile.open(path) as tar:
            tar.extractall(tmp_path / "files" / "sub", filter="data")
    (tmp_path / "files" / "world.json").write_text("{}")  # a plan, not a sample's
    assert [key.rpartition("/")[0] for key in read_truths(tmp_path / "files")] == ["sub"] * 6


def test_captions_are_held_against_the_truth(tmp_path: Path) -> None:
    world = write_world(tmp_path / "w")
    truths = read_truths(tmp_path / "w")
    captions = {key: detailed_caption(world.scene("dev", i)) for i, key in enumerate(truths) if i < 4}
    result = evaluate_truths(captions, truths, "mine")
    assert result.metrics["objects.f1"].value == 1.0
    assert "captions.cut" not in result.metrics
    assert (result.settings["split"], result.settings["without_caption"]) == ("dev", 2)


def test_what_holds_no_truth(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not there"):
        read_truths(tmp_path / "none")
    with pytest.raises(UsageError, match="holds no truth of scenes"):
        read_truths(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"no tar" * 100)
    with pytest.raises(UsageError, match=r"a\.tar: cannot read the tar"):
        read_truths(tmp_path)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        member = tarfile.TarInfo("1.json")
        member.size = 2
        tar.addfile(member, BytesIO(b"{}"))
    with pytest.raises(UsageError, match=r"a\.tar: 1\.json holds no truth of a scene"):
        read_truths(tmp_path)


def test_a_scene_survives_json() -> None:
    scene = World().scene("pretrain", 5)
    assert scene_of(json.loads(json.dumps(scene.truth()))).truth() == scene.truth()
