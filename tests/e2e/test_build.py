"""`vila2-fast build` and what runs its engines: recaption and inspect, as a user calls them."""

import json
from pathlib import Path

import pytest

from tests.e2e import sources
from tests.e2e.harness import captions, start, vila2_fast
from vila2.ops.quant import HAS_KERNELS

pytestmark = pytest.mark.skipif(not HAS_KERNELS, reason="vila2._C is not built, or without these kernels")

QUICK = ("--threads", "1", "--max-new-tokens", "8")


def test_build_measure_and_recaption_with_the_engine(vila15: Path, tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    measured = ("--calibration-images", "2", "--force", *QUICK)
    done = vila2_fast(tmp_path, "build", vila15, "--precision", "int8", "--out", engine, *measured)
    assert done.code == 0, done.stderr
    assert "against float32 on 2 images of world dev 0-1: next-token KL" in done.stdout
    assert "captions in float32" in done.stderr
    quality = json.loads((engine / "engine.json").read_text())["quality"]
    assert quality["images"] == 2
    assert set(quality["truth"]) == {"float32", "engine"}

    photos = sources.write_folder(tmp_path / "photos", 3)
    done = vila2_fast(tmp_path, "recaption", photos, "--engine", engine, "--out", tmp_path / "a", *QUICK)
    assert done.code == 0, done.stderr
    assert "nano" not in done.stderr
    assert json.loads((tmp_path / "a" / "manifest.json").read_text())["settings"]["precision"] == "int8"
    done = vila2_fast(
        tmp_path,
        "recaption",
        photos,
        "--model",
        engine,
        "--out",
        tmp_path / "b",
        "--precision",
        "bf16",
        *QUICK,
    )
    assert done.code == 2
    assert done.stderr.count("\n") == 1
    assert "was built for int8, not bf16" in done.stderr

    done = vila2_fast(tmp_path, "inspect", engine)
    assert done.code == 0, done.stderr
    assert "int8" in done.stdout
    assert len(captions(tmp_path / "a")) == 3


def test_an_engine_too_far_from_float32_is_refused(vila15: Path, tmp_path: Path) -> None:
    photos = sources.write_folder(tmp_path / "photos", 3)
    done = vila2_fast(
        tmp_path, "build", vila15, "--out", tmp_path / "engine",
        "--calibration", photos, "--calibration-images", "2", "--max-kl", "0", *QUICK,
    )  # fmt: skip
    assert done.code == 1
    assert f"too far from float32 on 2 images of {photos}: next-token KL" in done.stderr
    assert not (tmp_path / "engine").exists()


def test_an_engine_for_gpus_runs_where_the_cpu_is_asked_for(vila15: Path, tmp_path: Path) -> None:
    engine, photos = tmp_path / "engine", sources.write_folder(tmp_path / "photos", 2)
    unseen = {"CUDA_VISIBLE_DEVICES": ""}
    measured = ("--calibration-images", "1", "--force", *QUICK)
    build = ("build", vila15, "--precision", "int4", "--out", engine, *measured)
    done = start(tmp_path, *build, environment=unseen).wait()
    assert done.code == 0, done.stderr
    assert "in int4 (nibbles-groups-128)" in done.stdout
    assert "against float32 on 1 images of world dev 0-0: next-token KL" in done.stdout

    run = ("recaption", photos, "--model", engine, "--out", tmp_path / "a", *QUICK)
    done = start(tmp_path, *run, environment=unseen).wait()
    assert done.code == 2
    assert done.stderr.count("\n") == 1
    assert "--precision int4 is for CUDA GPUs, and torch sees none here: take --precision int8" in done.stderr
    done = start(tmp_path, *run, "--device", "cpu", environment=unseen).wait()
    assert done.code == 0, done.stderr
    assert json.loads((tmp_path / "a" / "manifest.json").read_text())["settings"]["precision"] == "int4"
    assert len(captions(tmp_path / "a")) == 2
