"""What trainers read: each format from one finished run over tars, and the llava format from each kind of source."""

import io
import json
import tarfile
from collections import defaultdict
from pathlib import Path

import pytest
from PIL import Image

from tests.e2e import harness, sources
from tests.e2e.harness import vila2_fast
from vila2.data.shards import open_source

COUNT = 7
OPTIONS = (
    "--max-new-tokens",
    "6",
    "--threads",
    "1",
    "--max-pixels",
    str(sources.MAX_PIXELS),
    "--prompt",
    "brief",
)
ANY = ("--status", "ok", "--status", "truncated", "--status", "repetitive")


def caption(tmp: Path, source: object, model: Path, *options: str) -> Path:
    out = tmp / "out"
    done = vila2_fast(tmp, "recaption", str(source), "--model", model, "--out", out, *OPTIONS, *options)
    assert done.code == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def tars(vila15: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp = tmp_path_factory.mktemp("exports")
    return caption(tmp, sources.write_tars(tmp / "tars", COUNT, bad=True), vila15, "--prompt", "ocr")


def usable(out: Path) -> dict[str, dict[str, str]]:
    """key -> prompt -> caption, of the rows that are no errors."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for row in harness.rows(out):
        if row["status"] != "error":
            found[row["key"]][row["prompt"]] = row["caption"]
    return found


def test_jsonl_replaces_joins_or_asks(tmp_path: Path, tars: Path) -> None:
    captions = usable(tars)
    assert len(captions) == COUNT
    for merge in ("replace", "concat", "qa"):
        target = tmp_path / merge
        done = vila2_fast(
            tmp_path, "export", tars, "--format", "jsonl", "--merge", merge, "--to", target, *ANY
        )
        assert done.code == 0, done.stderr
        assert f"{COUNT} samples" in done.stdout
        records = [json.loads(line) for line in (target / "captions.jsonl").read_text().splitlines()]
        assert {record["key"]: record["captions"] for record in records} == captions
        for record in records:
            original, new = f"original of {int(record['key'])}", captions[record["key"]]
            expected = {
                "replace": "\n".join([new["brief"], new["ocr"]]),
                "concat": "\n".join([original, new["brief"], new["ocr"]]),
                "qa": original,
            }
            assert record["text"] == expected[merge]
            answers = [turn["answer"] for turn in record.get("turns", [])]
            assert answers == ([new["brief"], new["ocr"]] if merge == "qa" else [])


def test_only_good_captions_and_chosen_prompts_unless_originals_are_kept(tmp_path: Path, tars: Path) -> None:
    ok = {row["key"] for row in harness.rows(tars) if row["status"] == "ok" and row["prompt"] == "brief"}
    with_original = {row["key"] for row in harness.rows(tars) if row["original"] and row["width"]}
    arguments = ("export", tars, "--format", "jsonl", "--prompt", "brief", "--to", tmp_path / "new")
    done = vila2_fast(tmp_path, *arguments)
    assert done.code == 0, done.stderr
    read = [json.loads(line) for line in (tmp_path / "new" / "captions.jsonl").read_text().splitlines()]
    assert {record["key"] for record in read} == ok
    refused = vila2_fast(tmp_path, *arguments, "--keep-originals")
    assert refused.code == 2
    assert "--force" in refused.stderr
    assert vila2_fast(tmp_path, *arguments, "--keep-originals", "--force").code == 0
    read = [json.loads(line) for line in (tmp_path / "new" / "captions.jsonl").read_text().splitlines()]
    assert {record["key"] for record in read} == ok | with_original
    assert not list(tmp_path.glob(".*.tmp"))
    assert vila2_fast(tmp_path, "export", tars, "--format", "jsonl", "--prompt", "breif").code == 2


def test_webdataset_carries_the_images(tmp_path: Path, tars: Path) -> None:
    arguments = ("export", tars, "--format", "webdataset", *ANY)
    assert vila2_fast(tmp_path, *arguments, "--to", tmp_path / "whole").code == 0
    assert vila2_fast(tmp_path, *arguments, "--to", tmp_path / "texts", "--captions-only").code == 0
    captions = usable(tars)
    seen = set()
    for path in sorted((tmp_path / "whole").rglob("*.tar")):
        with tarfile.open(path) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
        for name, data in members.items():
            if name.endswith(".json"):
                record = json.loads(data)
                stem = name.removesuffix(".json")
                assert Image.open(io.BytesIO(members[f"{stem}.jpg"])).size == (40, 30)
                assert members[f"{stem}.jpg"] == sources.picture(int(record["key"]), "JPEG")
                assert members[f"{stem}.txt"].decode() == "\n".join(captions[record["key"]].values())
                seen.add(record["key"])
    assert seen == captions.keys()
    names = []
    for path in (tmp_path / "texts").rglob("*.tar"):
        with tarfile.open(path) as tar:
            names += tar.getnames()
    assert len(names) == 2 * COUNT
    assert not [name for name in names if name.endswith(".jpg")]
    again = open_source(tmp_path / "whole")  # what was written is a source again
    originals = [sample.original for shard in again.shards for sample in shard.read()]
    assert sorted(originals) == sorted("\n".join(new.values()).strip() for new in captions.values())


def test_the_sidecar_store_of_vila(tmp_path: Path, tars: Path) -> None:
    target = tmp_path / "sidecar"
    done = vila2_fast(tmp_path, "export", tars, "--format", "vila", "--prompt", "brief", "--to", target, *ANY)
    assert done.code == 0, done.stderr
    assert {path.name for path in target.iterdir()} == {"part-000.tar.json", "part-001.tar.json"}
    stored = {
        key: value["output"]
        for path in target.iterdir()
        for key, value in json.loads(path.read_text()).items()
    }
    assert stored == {key: captions["brief"] for key, captions in usable(tars).items()}


def test_llava_from_tars_needs_the_images_as_files(tmp_path: Path, tars: Path) -> None:
    arguments = ("export", tars, "--format", "llava", "--merge", "qa", "--to", tmp_path / "llava", *ANY)
    refused = vila2_fast(tmp_path, *arguments)
    assert refused.code == 2
    assert "--copy-images" in refused.stderr
    done = vila2_fast(tmp_path, *arguments, "--copy-images")
    assert done.code == 0, done.stderr
    captions = usable(tars)
    records = json.loads((tmp_path / "llava" / "llava.json").read_text())
    assert len(records) == COUNT
    for record in records:
        assert Image.open(tmp_path / "llava" / record["image"]).size == (40, 30)
        values = [turn["value"] for turn in record["conversations"]]
        assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt"] * 3
        assert values[0].startswith("<image>\n")
        assert values[1] == f"original of {int(record['id'])}"
        assert values[3::2] == list(captions[record["id"]].values())
        assert not any("<image>" in value for value in values[1:])


@pytest.mark.parametrize("kind", ["folder", "llava"])
def test_llava_names_the_files_that_are_there(tmp_path: Path, vila15: Path, kind: str) -> None:
    if kind == "folder":
        root = sources.write_folder(tmp_path / "photos", COUNT)
        out = caption(tmp_path, root, vila15)
    else:
        root = tmp_path / "llava" / "images"
        source = sources.write_llava_json(tmp_path / "llava", COUNT)
        out = caption(tmp_path, source, vila15, "--image-root", str(root))
    done = vila2_fast(tmp_path, "export", out, "--format", "llava", "--merge", "concat", *ANY)
    assert done.code == 0, done.stderr
    records = json.loads((out / "export-llava" / "llava.json").read_text())
    assert len(records) == COUNT
    for record in records:
        assert (root / record["image"]).is_file()
        assert len(record["conversations"]) == 2
    # The export is a LLaVA source again.
    again = vila2_fast(
        tmp_path, "recaption", out / "export-llava" / "llava.json", "--image-root", root,
        "--model", vila15, "--out", tmp_path / "again", *OPTIONS,
    )  # fmt: skip
    assert again.code == 0, again.stderr
    originals = {row["key"]: row["original"] for row in harness.rows(tmp_path / "again")}
    assert originals == {r["id"]: r["conversations"][1]["value"].strip() for r in records}
