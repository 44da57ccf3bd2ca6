"""Each kind of source, with everything that can be bad in it, from the command line to verified rows."""

import json
from pathlib import Path

import pytest

from tests.e2e import harness, sources
from tests.e2e.harness import vila2_fast

COUNT = 12
OPTIONS = ("--max-new-tokens", "6", "--threads", "1", "--max-pixels", str(sources.MAX_PIXELS))
BAD_KINDS = {name: kind for name, (_, kind) in sources.BAD.items()}


def caption(tmp: Path, source: object, model: Path, *options: str) -> Path:
    """Run and verify with two prompts; returns the output folder."""
    out = tmp / "out"
    done = vila2_fast(
        tmp, "recaption", str(source), "--model", model, "--out", out, *OPTIONS,
        "--prompt", "brief", "--prompt", "ocr", *options,
    )  # fmt: skip
    assert done.code == 0, done.stderr
    assert "quarantined" in done.stdout
    checked = vila2_fast(tmp, "verify", out, "--json")
    assert checked.code == 0, checked.stdout
    assert json.loads(checked.stdout)["complete"]
    return out


def test_a_folder_of_images_of_all_formats(tmp_path: Path, vila15: Path) -> None:
    out = caption(tmp_path, sources.write_folder(tmp_path / "photos", COUNT, bad=True), vila15)
    found = harness.statuses(out)
    assert {k: v for k, v in found.items() if "bad" in k} == {f"bad-{n}.jpg": k for n, k in BAD_KINDS.items()}
    good = {k: v for k, v in found.items() if "bad" not in k}
    assert len(good) == COUNT
    assert set(good.values()) <= {"ok", "truncated", "repetitive"}
    by_key = {row["key"]: row for row in harness.rows(out)}
    assert by_key["004.bmp"]["original"] == "original of 4"
    assert by_key["sub/003.gif"]["original"] == ""
    assert (by_key["000.jpg"]["width"], by_key["000.jpg"]["height"]) == (40, 30)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["captioner"]["images_encoded"] == COUNT  # two prompts, one encode
    assert summary["captioner"]["images_shared"] == COUNT
    assert summary["errors_in_output"] == 2 * len(BAD_KINDS)


def test_webdataset_tars(tmp_path: Path, vila15: Path) -> None:
    out = caption(tmp_path, sources.write_tars(tmp_path / "tars", COUNT, bad=True), vila15)
    found = harness.statuses(out)
    for name, kind in BAD_KINDS.items():
        assert found[f"bad-{name}"] == kind
    kinds = [row["error_kind"] for row in harness.rows(out) if row["prompt"] == "ocr"]
    for kind in ("no_image", "duplicate_key", "bad_text", "truncated_tar"):
        assert kinds.count(kind) == 1, kind
    assert sum(kind is None for kind in kinds) == COUNT


def test_a_llava_json_with_its_image_root(tmp_path: Path, vila15: Path) -> None:
    source = sources.write_llava_json(tmp_path / "llava", COUNT, bad=True)
    out = caption(tmp_path, source, vila15, "--image-root", str(tmp_path / "llava" / "images"))
    found = harness.statuses(out)
    assert found["gone"] == "missing_file"
    assert found["none"] == "no_image"
    assert found["out"] == "unsafe_path"
    assert found["@15"] == "bad_record"
    assert sum(value in ("ok", "truncated", "repetitive") for value in found.values()) == COUNT


def test_parquet_with_image_bytes(tmp_path: Path, vila15: Path) -> None:
    out = caption(tmp_path, sources.write_parquet(tmp_path / "parquet", COUNT, bad=True), vila15)
    found = harness.statuses(out)
    for i, kind in enumerate([*BAD_KINDS.values(), "no_image"]):
        assert found[f"row{COUNT + i}"] == kind
    assert {row["original"] for row in harness.rows(out)} >= {"original of 0", "original of 11"}


@pytest.mark.parametrize("kind", ["nvila", "llava"])
def test_the_other_kinds_of_checkpoint(tmp_path: Path, checkpoints: dict[str, Path], kind: str) -> None:
    source = sources.write_folder(tmp_path / "photos", 4)
    done = vila2_fast(
        tmp_path, "recaption", source, "--model", checkpoints[kind], "--out", tmp_path / "out", *OPTIONS
    )
    assert done.code == 0, done.stderr
    assert len(harness.captions(tmp_path / "out")) == 4
    assert set(harness.statuses(tmp_path / "out").values()) <= {"ok", "truncated", "repetitive"}
