"""Engines for GPUs (FP8, 4 bits): built and measured anywhere, run on a CPU only where that is asked for."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.checkpoints import write_llava, write_nvila, write_vila15
from vila2.backends import compute
from vila2.backends.api import load
from vila2.backends.compute import plan_compute
from vila2.backends.engine_build import Calibration, QualityError, build_engine
from vila2.backends.engine_dir import ENGINE_FILE, WEIGHTS_FILE, read_engine
from vila2.errors import CheckpointError, UsageError
from vila2.ops.fp8 import Fp8Weight
from vila2.ops.int4 import Int4Weight

WRITERS = {"vila1.5": write_vila15, "nvila": write_nvila, "llava": write_llava}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "vila2-fast"


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a machine without a GPU does, wherever the tests run."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava(tmp_path_factory.mktemp("model") / "tiny")


def pictures(count: int) -> list[NDArray[np.uint8]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (60 + 9 * i, 80, 3), dtype=np.uint8) for i in range(count)]


def loose(**limits: float | None) -> Calibration:
    return Calibration(
        "noise", pictures(2), "What is it?", 6, **{"max_kl": None, "min_agreement": None, **limits}
    )


def captions_of(path: Path, **options: str) -> list[tuple[int, ...]]:
    with load(path, device="cpu", threads=1, **options) as model:  # type: ignore[arg-type]
        return [caption.token_ids for caption in model.caption(pictures(2), max_new_tokens=8)]


@pytest.mark.parametrize("precision", ["fp8", "int4"])
@pytest.mark.parametrize("kind", WRITERS)
def test_an_engine_captions_without_its_checkpoint(kind, precision, tmp_path):
    source = WRITERS[kind](tmp_path / "model")
    out = tmp_path / "engine"
    record = build_engine(source, out, precision, threads=1)
    assert (record.device, record.precision, record.quality) == ("cuda", precision, None)
    assert record == read_engine(out)
    shutil.rmtree(source)
    first = captions_of(out)
    assert all(first)
    assert captions_of(out, precision=precision) == first
    with load(out, device="cpu", threads=1) as model:
        layer = model.captioner.checkpoint.model.decoder.layers[0]
        assert isinstance(layer.down.packed, Fp8Weight if precision == "fp8" else Int4Weight)
        assert "emulated" in model.captioner.description


@pytest.mark.parametrize("precision", ["fp8", "int4"])
def test_the_quality_check_emulates(checkpoint, precision, tmp_path):
    stages: list[str] = []
    record = build_engine(
        checkpoint, tmp_path / "e", precision, threads=1, calibration=loose(), observe=stages.append
    )
    assert record.quality is not None
    assert 0 < record.quality["next_token_kl"] < 0.2
    assert ("what each product meets" in stages) == (precision == "int4")
    with pytest.raises(QualityError, match="too far from float32"):
        build_engine(checkpoint, tmp_path / "f", precision, threads=1, calibration=loose(max_kl=1e-9))
    assert not (tmp_path / "f").exists()


def test_a_checkpoint_is_rounded_once_into_the_cache(checkpoint, cache):
    first = captions_of(checkpoint, precision="fp8")
    (engine,) = (cache / "engines").iterdir()
    assert "fp8" in engine.name
    written = (engine / WEIGHTS_FILE).stat().st_mtime_ns
    assert captions_of(checkpoint, precision="fp8") == first
    assert (engine / WEIGHTS_FILE).stat().st_mtime_ns == written
    shutil.rmtree(cache / "engines")
    (cache / "engines").write_text("in the way")  # no cache: rounded in memory
    assert captions_of(checkpoint, precision="fp8") == first


def test_int4_of_a_checkpoint_is_scaled_by_scenes(checkpoint, cache, monkeypatch):
    monkeypatch.setattr("vila2.backends.engine_build._NUM_SCENES", 1)
    captions_of(checkpoint, precision="int4")
    (engine,) = (cache / "engines").iterdir()
    quality = read_engine(engine).quality
    assert quality is not None
    assert quality["calibration"] == "world dev 0-0"


@pytest.mark.parametrize("precision", ["fp8", "int4"])
def test_without_a_gpu_the_cpu_must_be_asked_for(checkpoint, precision, tmp_path):
    message = (
        rf"--precision {precision} is for CUDA GPUs, .* none here: take --precision int8, or --device cpu"
    )
    with pytest.raises(UsageError, match=message) as refused:
        load(checkpoint, precision=precision)
    assert "\n" not in str(refused.value)
    build_engine(checkpoint, tmp_path / "e", precision, threads=1)
    with pytest.raises(UsageError, match=message):
        load(tmp_path / "e")
    with pytest.raises(UsageError, match="--device cuda: torch sees no GPU"):
        load(tmp_path / "e", device="cuda")
    with pytest.raises(UsageError, match=f"was built for {precision}, not bf16"):
        load(tmp_path / "e", device="cpu", precision="bf16")


def test_what_a_card_lacks_is_said(monkeypatch):
    monkeypatch.setattr(compute, "fp8_lack", lambda: "NVIDIA A100 has capability 8.0, FP8 begins with 8.9")
    with pytest.raises(
        UsageError, match=r"A100 has capability 8\.0.*take --precision int4 or bf16 on this GPU"
    ):
        plan_compute("cuda", "fp8", False, False)
    assert plan_compute("cuda", "int4", False, False).low_bits == "int4"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (70 << 30, 80 << 30))
    where = [compute.builds_on(precision, 8 * 10**9) for precision in ("fp8", "int4", "int8")]
    assert where == ["cpu", "cuda", "cpu"]
    assert compute.builds_on("int4", 34 * 10**9) == "cpu"  # no room for 34 billion parameters in float32
    with pytest.raises(UsageError, match="--deterministic does not go with --precision int4"):
        plan_compute("cuda", "int4", True, False)


@pytest.mark.parametrize("precision", ["fp8", "int4"])
def test_broken_weights_are_refused(checkpoint, precision, tmp_path):
    out = tmp_path / "engine"
    build_engine(checkpoint, out, precision, threads=1)
    file = out / WEIGHTS_FILE
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    name = next(name for name in header if name.endswith("down.scales"))
    header[name]["shape"] = (
        header[name]["shape"][::-1] if precision == "int4" else [1, *header[name]["shape"]]
    )
    text = json.dumps(header, separators=(",", ":")).encode()
    assert len(text) <= size + 64
    whole = len(text).to_bytes(8, "little") + text + data[8 + size :]
    file.write_bytes(whole)
    record = json.loads((out / ENGINE_FILE).read_text()) | {"weight_bytes": len(whole)}
    (out / ENGINE_FILE).write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"not a whole weight file.*down\.scales is"):
        load(out, device="cpu")
