"""Engine directories: built whole or not at all, run from mapped files, refused when they are not what is asked."""

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.checkpoints import write_llava, write_nvila, write_vila15
from vila2.backends import compute, engine_build, engine_dir, samples
from vila2.backends.api import load
from vila2.backends.engine_build import Calibration, QualityError, build_engine
from vila2.backends.engine_dir import ENGINE_FILE, WEIGHTS_FILE, read_engine
from vila2.backends.native import open_checkpoint
from vila2.errors import CheckpointError, OutputError, UsageError
from vila2.evaluate.calibration import of_world
from vila2.model.checkpoint import load_checkpoint
from vila2.model.shipped import checkpoint_path
from vila2.ops.native import native
from vila2.ops.quant import HAS_KERNELS

pytestmark = pytest.mark.skipif(not HAS_KERNELS, reason="vila2._C is not built, or without these kernels")

NANO = checkpoint_path("nano")
WRITERS = {"vila1.5": write_vila15, "nvila": write_nvila, "llava": write_llava}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "vila2-fast"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava(tmp_path_factory.mktemp("model") / "tiny")


def pictures(count: int, seed: int = 0) -> list[NDArray[np.uint8]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (60 + 9 * i, 80, 3), dtype=np.uint8) for i in range(count)]


def captions_of(path: Path, **options: str) -> list[tuple[int, ...]]:
    with load(path, device="cpu", threads=1, **options) as model:  # type: ignore[arg-type]
        return [caption.token_ids for caption in model.caption(pictures(3), max_new_tokens=12)]


def beside(out: Path) -> list[str]:
    """What lies in the folder of an engine, but for the checkpoint."""
    return sorted(path.name for path in out.parent.iterdir())


@pytest.mark.parametrize("precision", ["int8", "bf16", "float32"])
@pytest.mark.parametrize("kind", WRITERS)
def test_an_engine_captions_as_its_checkpoint_does(kind, precision, tmp_path):
    source = WRITERS[kind](tmp_path / "model")
    out = tmp_path / "engines" / "tiny"
    record = build_engine(source, out, precision, threads=1)
    assert beside(out) == ["tiny"]
    assert record == read_engine(out)
    expected = captions_of(source, precision=precision)
    shutil.rmtree(source)  # the engine is whole without it
    assert captions_of(out) == expected
    assert captions_of(out, precision=precision) == expected


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_weights_are_mapped_and_aligned(checkpoint, precision, tmp_path):
    out = tmp_path / "engine"
    build_engine(checkpoint, out, precision, threads=1)
    with load(out, threads=1) as model:
        maps = Path("/proc/self/maps")
        if not maps.exists():
            pytest.skip("no /proc here")
        lines = [line for line in maps.read_text().splitlines() if line.endswith(f"/engine/{WEIGHTS_FILE}")]
        spans = [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in lines]
        assert spans
        parameters = list(model.captioner.checkpoint.model.parameters())
        for module in model.captioner.checkpoint.model.modules():
            packed = getattr(module, "packed", None)
            if precision == "int8" and hasattr(packed, "panels"):
                parameters += [packed.panels, packed.scales, packed.sums]
                assert packed.panels.data_ptr() % 64 == 0
        for tensor in parameters:
            assert any(low <= tensor.data_ptr() < high for low, high in spans), tensor.shape


def test_what_is_there_already_is_left_alone(checkpoint, tmp_path):
    out = tmp_path / "engine"
    build_engine(checkpoint, out, "int8", threads=1)
    before = (out / WEIGHTS_FILE).stat()
    stages: list[str] = []
    build_engine(checkpoint, out, "int8", threads=1, observe=stages.append)
    assert (out / WEIGHTS_FILE).stat().st_ino == before.st_ino
    assert "packing" not in stages
    build_engine(checkpoint, out, "bf16", threads=1)  # another engine in its place, as a whole
    assert read_engine(out).precision == "bf16"
    assert beside(out) == ["engine"]


def test_builders_of_one_directory_wait_for_one_another(checkpoint, tmp_path):
    out = tmp_path / "engine"
    stages: list[list[str]] = [[] for _ in range(3)]
    builders = [
        threading.Thread(target=build_engine, args=(checkpoint, out, "int8"), kwargs={"observe": seen.append})
        for seen in stages
    ]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert sum("packing" in seen for seen in stages) == 1
    assert read_engine(out).precision == "int8"
    assert beside(out) == ["engine"]


def test_a_build_that_dies_leaves_no_engine_and_the_next_one_cleans_up(checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "engine"

    def no_room(model: object, file: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(engine_build, "save_packed", no_room)
        with pytest.raises(OutputError, match=r"cannot write the engine .*No space left"):
            build_engine(checkpoint, out, "int8", threads=1)
    assert beside(out) == []
    (tmp_path / ".engine.999.building").mkdir()  # of a process that was killed
    build_engine(checkpoint, out, "int8", threads=1)
    assert beside(out) == ["engine"]


def test_a_folder_that_is_no_engine_is_not_touched(checkpoint, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"x")
    with pytest.raises(OutputError, match="exists and is no engine directory"):
        build_engine(checkpoint, tmp_path / "photos", "int8")
    assert beside(tmp_path / "photos") == ["photos"]


def test_the_quality_check_measures_scores_and_refuses(checkpoint, tmp_path):
    out = tmp_path / "engine"
    seen: list[int] = []

    def score(reference: list[str], ours: list[str]) -> dict[str, float]:
        seen.append(len(reference))
        return {"equal_texts": sum(a == b for a, b in zip(reference, ours, strict=True)) / len(ours)}

    calibration = Calibration("noise", pictures(3), "What is it?", 10, score, max_kl=None, min_agreement=None)
    quality = build_engine(checkpoint, out, "int8", threads=1, calibration=calibration).quality
    assert quality is not None
    assert json.loads((out / ENGINE_FILE).read_text())["quality"] == quality
    assert quality["calibration"] == "noise"
    assert quality["images"] == 3
    assert quality["tokens"] >= 3
    assert 0 < quality["next_token_kl"] < 0.05
    assert 0 < quality["greedy_agreement"] <= 1
    assert "equal_texts" in quality
    assert seen == [3]
    strict = Calibration("noise", pictures(3), "What is it?", 10, max_kl=1e-9)
    with pytest.raises(
        QualityError, match=r"too far from float32 on 3 images of noise: next-token KL .*--force"
    ):
        build_engine(checkpoint, tmp_path / "other", "int8", threads=1, calibration=strict)
    assert beside(out) == ["engine"]


def test_rounding_for_samples_and_to_nearest_are_two_engines(checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "engine"
    assert build_engine(checkpoint, out, "int8", threads=1, samples=0).samples == 0
    nearest = (out / WEIGHTS_FILE).read_bytes()
    stages: list[str] = []
    record = build_engine(checkpoint, out, "int8", threads=1, samples=2, observe=stages.append)
    assert record.samples == read_engine(out).samples == 2
    assert "samples to round for" in stages
    assert (out / WEIGHTS_FILE).read_bytes() != nearest
    assert build_engine(checkpoint, tmp_path / "plain", "bf16", threads=1).samples == 0


def test_samples_are_the_models_own_words_on_scenes_that_measure_nothing(checkpoint, monkeypatch):
    loaded = load_checkpoint(checkpoint, dtype=torch.float32)
    found = samples.own_samples(loaded, loaded.config.template, 3)
    assert len(found) == 3
    assert all(len(sample) == len(sample.prompt.token_ids) + len(sample.answer) for sample in found)
    measured = of_world(checkpoint, 3)
    prepared = [loaded.image_processor.prepare(image).tiles.tobytes() for image in measured.images]
    assert not {sample.image.tiles.tobytes() for sample in found} & set(prepared)
    monkeypatch.setattr(samples, "_MOST_TOKENS", 1)  # images of very many tokens: one has to do
    assert len(samples.own_samples(loaded, loaded.config.template, 3)) == 1


def test_nano_in_int8_says_what_float32_says(tmp_path):
    """The shipped model is at a distance that no user sees; rounding to nearest is farther."""
    measured = replace(of_world(NANO, 12), max_kl=None, min_agreement=None)
    nearest, ours = (
        build_engine(
            NANO, tmp_path / f"{count}", "int8", threads=1, calibration=measured, samples=count
        ).quality
        for count in (0, 16)
    )
    assert nearest is not None
    assert ours is not None
    assert ours["greedy_agreement"] >= 0.99
    assert ours["free_agreement"] >= 0.9
    assert ours["next_token_kl"] < 1e-4
    assert ours["next_token_kl"] < nearest["next_token_kl"]
    assert 0 < ours["near_ties"] < 0.2


def test_float32_is_at_no_distance(checkpoint, tmp_path):
    calibration = Calibration("noise", pictures(2), "What is it?", 8, max_kl=1e-6, min_agreement=1.0)
    record = build_engine(checkpoint, tmp_path / "e", "float32", threads=1, calibration=calibration)
    assert record.quality is not None
    assert record.quality["equal_captions"] == 1
    # An engine that was not measured is built anew when it is to be measured.
    build_engine(checkpoint, tmp_path / "f", "int8", threads=1)
    loose = Calibration("noise", pictures(2), "What is it?", 8, max_kl=None, min_agreement=None)
    assert build_engine(checkpoint, tmp_path / "f", "int8", threads=1, calibration=loose).quality is not None


def test_int8_of_a_checkpoint_is_built_once_into_the_cache(checkpoint, cache, monkeypatch):
    first = captions_of(checkpoint, precision="int8")
    engines = list((cache / "engines").iterdir())
    assert len(engines) == 1
    monkeypatch.setattr(engine_build, "load_checkpoint", None)  # nothing is rounded again
    assert captions_of(checkpoint, precision="int8") == first


def test_without_a_cache_int8_is_rounded_in_memory(checkpoint, cache):
    expected = captions_of(checkpoint, precision="int8")
    shutil.rmtree(cache / "engines")
    (cache / "engines").write_text("in the way")
    assert captions_of(checkpoint, precision="int8") == expected


def test_an_engine_is_refused_for_what_it_is_not(checkpoint, tmp_path):
    out = tmp_path / "engine"
    build_engine(checkpoint, out, "int8", threads=1)
    with pytest.raises(UsageError, match="was built for int8, not bf16"):
        load(out, precision="bf16")
    with pytest.raises(UsageError, match="was built for cpu"):
        load(out, device="cuda")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "is an engine of format 99"),
        ({"layout": "bytes-panels-1x1"}, "holds weights as bytes-panels-1x1, this run needs"),
        ({"weight_bytes": 5}, "bytes instead of 5"),
        ({"config": {}}, "is broken"),
        ({"extra": 1}, "is broken"),
    ],
)
def test_a_stale_or_broken_record_is_refused_in_one_line(checkpoint, tmp_path, change, message):
    out = tmp_path / "engine"
    build_engine(checkpoint, out, "int8", threads=1)
    values = json.loads((out / ENGINE_FILE).read_text()) | change
    (out / ENGINE_FILE).write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message) as refused:
        load(out)
    assert "build it again" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_engine_of_a_checkpoint_that_changed_is_stale(tmp_path):
    source = write_llava(tmp_path / "model")
    out = tmp_path / "engine"
    build_engine(source, out, "int8", threads=1)
    write_llava(source, seed=1)
    with pytest.raises(CheckpointError, match="is stale"):
        load(out)
    build_engine(source, out, "int8", threads=1)
    captions_of(out)


@pytest.mark.parametrize(
    ("built_on", "message"),
    [
        (True, "rounded for CPUs without VNNI, more coarsely than this one needs"),
        (False, "rounded for CPUs with VNNI, which this one lacks: slower here"),
    ],
)
def test_an_engine_of_another_kind_of_cpu_runs_and_says_what_it_costs(
    checkpoint, tmp_path, monkeypatch, built_on, message
):
    out = tmp_path / "engine"
    monkeypatch.setattr(compute, "wants_narrow", lambda: built_on)
    monkeypatch.setattr(engine_build, "wants_narrow", lambda: built_on)
    assert build_engine(checkpoint, out, "int8", threads=1, samples=0).is_narrow == built_on
    expected = captions_of(out)
    monkeypatch.setattr(engine_dir, "wants_narrow", lambda: built_on)
    assert "rounded for" not in open_checkpoint(out, device="cpu", threads=1).description
    monkeypatch.setattr(engine_dir, "wants_narrow", lambda: not built_on)
    captioner = open_checkpoint(out, device="cpu", threads=1)
    assert message in captioner.description
    assert captions_of(out) == expected
    # Built again, it is one of this machine's.
    monkeypatch.setattr(compute, "wants_narrow", lambda: not built_on)
    monkeypatch.setattr(engine_build, "wants_narrow", lambda: not built_on)
    assert build_engine(checkpoint, out, "int8", threads=1, samples=0).is_narrow == (not built_on)
    assert "rounded for" not in open_checkpoint(out, device="cpu", threads=1).description


def test_wide_weights_that_are_called_narrow_are_refused(checkpoint, tmp_path, monkeypatch):
    """Where sums of 16 bits are made of them they would saturate, and captions be wrong without a word."""
    monkeypatch.setattr(compute, "wants_narrow", lambda: False)
    out = tmp_path / "engine"
    build_engine(checkpoint, out, "int8", threads=1, samples=0)
    file = out / WEIGHTS_FILE
    data = file.read_bytes()
    wide, narrow = rb"\"is_narrow\": false", rb"\"is_narrow\": true "
    assert wide in data
    file.write_bytes(data.replace(wide, narrow))
    with pytest.raises(CheckpointError, match=r"not a whole weight file.*is_narrow.*build it again"):
        load(out)


def test_an_older_record_knows_no_kind_of_cpu(checkpoint, tmp_path):
    out = tmp_path / "engine"
    build_engine(checkpoint, out, "int8", threads=1, samples=0)
    values = json.loads((out / ENGINE_FILE).read_text())
    del values["is_narrow"]
    (out / ENGINE_FILE).write_text(json.dumps(values))
    assert "rounded for" not in open_checkpoint(out, device="cpu", threads=1).description


def test_broken_weights_are_refused(checkpoint, tmp_path):
    out = tmp_path / "engine"
    build_engine(checkpoint, out, "int8", threads=1)
    file = out / WEIGHTS_FILE
    data = file.read_bytes()
    file.write_bytes(b"\xff" * 16 + data[16:])
    with pytest.raises(CheckpointError, match="not a whole weight file"):
        load(out)
    file.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match="copy the engine again"):
        load(out)


def test_packed_weights_can_be_used_where_they_lie():
    from vila2.ops.linear import linear, pack, packed_from, packed_parts

    assert native is not None
    for dtype in (torch.float32, torch.bfloat16):
        for columns, depth, has_bias in ((33, 17, True), (16, 64, False), (1, 1, True)):
            weight = torch.randn(columns, depth)
            packed = pack(weight, torch.randn(columns) if has_bias else None, dtype)
            panels, bias = packed_parts(packed)
            again = packed_from(panels, bias, columns, depth, packed.storage)
            x = torch.randn(5, depth)
            expected = linear(x, packed)
            del packed
            assert torch.equal(linear(x, again), expected)
            with pytest.raises(ValueError, match="panels"):
                packed_from(panels[:-1], bias, columns, depth, again.storage)
            if bias is not None:
                with pytest.raises(ValueError, match="bias"):
                    packed_from(panels, bias[:-1], columns, depth, again.storage)
