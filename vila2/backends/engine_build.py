"""Checkpoint to engine directory: load in float32, pack, measure, write beside, rename.

Builders of one directory wait for one another, and find the work of the first. A directory that is there is replaced
as a whole; processes that have it mapped keep the old one.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vila2 import __version__
from vila2.backends.compute import (
    ON_CUDA,
    ComputePlan,
    available_cores,
    builds_on,
    pack_model,
    plan_compute,
    takes_torch_bf16,
    wants_narrow,
)
from vila2.backends.engine_dir import (
    ENGINE_FILE,
    TOKENIZER_FOLDER,
    WEIGHTS_FILE,
    EngineRecord,
    is_engine,
    layout_of,
    read_engine,
    versions,
)
from vila2.backends.product_inputs import product_inputs
from vila2.backends.quality import Quality, Reference, compare, tell
from vila2.backends.samples import COUNT, EXACT, own_samples, write_captions
from vila2.data.files import make_folder, sync_file, sync_folder
from vila2.data.lock import waiting_lock
from vila2.errors import OutputError, UsageError, VilaError
from vila2.model.checkpoint import CheckpointInfo, LoadedCheckpoint, inspect_checkpoint, load_checkpoint
from vila2.model.digest import cache_folder
from vila2.model.images import PreparedImage
from vila2.model.layout import small_files
from vila2.model.packed import save_packed
from vila2.model.sample import Sample
from vila2.ops.quant import HAS_KERNELS
from vila2.ops.threads import set_threads
from vila2.types import Caption
from vila2.world import World, WorldSettings, texts

USED_FILE = "used"  # in a cached engine; its time is that of the last run (see `vila2-fast engines`)
_TMP = ".building"
_OLD = ".replaced"
_NUM_SCENES = 16

# Captions of float32, captions of the engine -> figures for engine.json.
Score = Callable[[Sequence[str], Sequence[str]], Mapping[str, Any]]


class QualityError(VilaError):
    """An engine that is too far from float32 to be used."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """The images on which an engine is compared with float32, and what is asked of them.

    `max_kl` and `min_agreement` are where an engine is refused (see Quality); None never refuses.
    """

    name: str
    images: Sequence[NDArray[np.uint8]]
    prompt: str
    max_new_tokens: int = 64
    score: Score | None = None
    max_kl: float | None = 0.02
    min_agreement: float | None = 0.97


def build_engine(
    path: str | Path,
    out: str | Path,
    precision: str,
    *,
    deterministic: bool = False,
    threads: int | None = None,
    template: str | None = None,
    calibration: Calibration | None = None,
    samples: int = COUNT,
    observe: Callable[[str], None] = lambda stage: None,
) -> EngineRecord:
    """Build the engine of a checkpoint in the folder `out`; nothing is done where it is there already.

    The precisions of GPUs (see `compute.ON_CUDA`) are built on any machine: without a GPU the quality check emulates
    them, which takes its time.

    int8 weights are rounded for up to `samples` images of the world; 0 rounds each to its nearest step.
    QualityError, and no engine, if the calibration refuses it; OutputError if `out` is something else or cannot be
    written. `observe` is told each stage as it begins.
    """
    out = Path(out).absolute()
    info = inspect_checkpoint(path)
    device = builds_on(precision, info.num_parameters)
    if not HAS_KERNELS and precision not in ON_CUDA:
        raise UsageError(
            "vila2._C is not built here, or is older than this source: install vila2-fast with a C++17 compiler"
        )
    plan = plan_compute(device, precision, deterministic, takes_torch_bf16())
    if out.exists() and not is_engine(out) and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} exists and is no engine directory: choose another --out")
    make_folder(out.parent)
    observe("waiting for another builder")
    with _write_errors(out), waiting_lock(out.with_name(f".{out.name}.lock")):
        samples = samples if precision == "int8" else 0
        present = _present(out, info, precision, layout_of(plan), calibration, samples)
        if present is not None:
            return present
        set_threads(threads or available_cores())
        _clear(out)
        return _build(info, out, plan, precision, device, template, calibration, samples, observe)


def cached_engine(path: str | Path, precision: str) -> Path | None:
    """The engine of a checkpoint in the user's cache, built there (and not measured) on first use: int8, fp8 or int4.

    None where there is no place to keep one: no kernels, no home, no room.
    """
    if precision == "int8" and not HAS_KERNELS:
        return None
    try:
        digest = inspect_checkpoint(path).digest
        kind = precision if precision != "int8" else "int8-narrow" if wants_narrow() else "int8-wide"
        out = cache_folder() / "engines" / f"{digest}-{kind}-{__version__}"
        scenes = _scenes(path) if precision == "int4" else None
        # Whoever opens the checkpoint has chosen the threads.
        build_engine(path, out, precision, threads=torch.get_num_threads(), calibration=scenes)
        (out / USED_FILE).touch()
    except (OutputError, OSError, RuntimeError):  # RuntimeError: no home directory
        return None
    return out


def _scenes(path: str | Path) -> Calibration:
    """A few scenes of the synthetic world: what 4-bit weights are scaled by where nobody chose images."""
    world = World(WorldSettings(image_size=inspect_checkpoint(path).config.image_size))
    images = [world.render(world.scene("dev", index)) for index in range(_NUM_SCENES)]
    return Calibration(
        f"world dev 0-{_NUM_SCENES - 1}",
        images,
        texts.CAPTION_PROMPTS["detailed"][0],
        max_new_tokens=32,
        max_kl=None,
        min_agreement=None,
    )


def _present(
    out: Path,
    info: CheckpointInfo,
    precision: str,
    layout: str,
    calibration: Calibration | None,
    samples: int,
) -> EngineRecord | None:
    """The engine that is there, if it is the one asked for."""
    if not is_engine(out):
        return None
    try:
        record = read_engine(out)
    except VilaError:
        return None
    found = (record.digest, record.precision, record.layout, record.samples)
    same = found == (info.digest, precision, layout, samples)
    same = same and (precision != "int8" or record.is_narrow in (None, wants_narrow()))
    whole = same and record.versions == versions() and (record.quality is not None or calibration is None)
    return record if whole and (out / WEIGHTS_FILE).stat().st_size == record.weight_bytes else None


def _build(
    info: CheckpointInfo,
    out: Path,
    plan: ComputePlan,
    precision: str,
    device: str,
    template: str | None,
    calibration: Calibration | None,
    samples: int,
    observe: Callable[[str], None],
) -> EngineRecord:
    observe("loading")
    checkpoint = load_checkpoint(info.path, dtype=torch.float32, device=device)
    template = template or checkpoint.config.template
    reference = captions = images = inputs = None
    if calibration is not None:
        observe("captions in float32")
        images = [checkpoint.image_processor.prepare(image) for image in calibration.images]
        captions = write_captions(
            checkpoint, EXACT, device, template, calibration.prompt, images, calibration.max_new_tokens
        )
        answers = [caption.token_ids for caption in captions]
        reference = tell(checkpoint, template, calibration.prompt, images, answers)
        if precision == "int4":
            observe("what each product meets")
            inputs = product_inputs(checkpoint.model, reference)
    own: tuple[Sample, ...] = ()
    if precision == "int8" and samples:
        observe("samples to round for")
        own = own_samples(checkpoint, template, samples)
    observe("packing")
    pack_model(checkpoint.model, plan, inputs, own)
    del inputs
    quality: dict[str, Any] | None = None
    if calibration is not None and reference is not None and captions is not None and images is not None:
        observe(f"captions in {precision}")
        quality = _measure(checkpoint, plan, device, template, calibration, reference, captions, images)
    observe("writing")
    config = checkpoint.model.config
    record = EngineRecord(
        name=Path(info.path).resolve().name,
        checkpoint=str(Path(info.path).resolve()),
        digest=info.digest,
        device="cuda" if precision in ON_CUDA else "cpu",
        precision=precision,
        layout=layout_of(plan),
        is_narrow=wants_narrow() if precision == "int8" else None,
        weight_bytes=0,
        samples=samples,
        config=config,
        limits={"max_positions": config.decoder.max_positions, "tokens_per_tile": config.tokens_per_tile},
        quality=quality,
        versions=versions(),
    )
    return _write(checkpoint, info, record, out)


def _measure(
    checkpoint: LoadedCheckpoint,
    plan: ComputePlan,
    device: str,
    template: str,
    calibration: Calibration,
    reference: Reference,
    before: Sequence[Caption],
    images: Sequence[PreparedImage],
) -> dict[str, Any]:
    """The figures for engine.json; QualityError past the calibration's limits."""
    after = write_captions(
        checkpoint, plan, device, template, calibration.prompt, images, calibration.max_new_tokens
    )
    measured = compare(checkpoint.model, reference, [caption.token_ids for caption in after], plan.kv_dtype)
    _refuse(measured, calibration)
    figures: dict[str, Any] = {"calibration": calibration.name, **asdict(measured)}
    if calibration.score is not None:
        figures |= calibration.score([c.text for c in before], [c.text for c in after])
    return figures


def _refuse(measured: Quality, calibration: Calibration) -> None:
    too_far = []
    # Written so that NaN is refused too.
    if calibration.max_kl is not None and not measured.next_token_kl <= calibration.max_kl:
        too_far.append(f"next-token KL {measured.next_token_kl:.4g} (at most {calibration.max_kl:g})")
    if calibration.min_agreement is not None and not measured.greedy_agreement >= calibration.min_agreement:
        agreement, least = measured.greedy_agreement, calibration.min_agreement
        too_far.append(f"greedy agreement {agreement:.2%} (at least {least:.0%})")
    if too_far:
        raise QualityError(
            f"the engine is too far from float32 on {measured.images} images of {calibration.name}: "
            f"{', '.join(too_far)}; choose another --precision, other limits, or --force"
        )


def _write(
    checkpoint: LoadedCheckpoint, info: CheckpointInfo, record: EngineRecord, out: Path
) -> EngineRecord:
    temporary = out.with_name(f".{out.name}.{os.getpid()}{_TMP}")
    try:
        (temporary / TOKENIZER_FOLDER).mkdir(parents=True)
        for file in small_files(info.layout.tokenizer_folder):
            shutil.copyfile(file, temporary / TOKENIZER_FOLDER / file.name)
        weights = temporary / WEIGHTS_FILE
        with weights.open("wb") as stream:
            save_packed(checkpoint.model, stream)
        record = replace(record, weight_bytes=weights.stat().st_size)
        text = json.dumps(record.to_json(), indent=2) + "\n"
        (temporary / ENGINE_FILE).write_text(text, encoding="utf-8")
        for file in temporary.rglob("*"):
            if file.is_file():
                sync_file(file)
        sync_folder(temporary)
        if out.exists():
            out.rename(out.with_name(f".{out.name}.{os.getpid()}{_OLD}"))
        temporary.rename(out)
        sync_folder(out.parent)
    finally:
        _clear(out)
    return record


def _clear(out: Path) -> None:
    """Remove what builders that died left beside `out`. Only the holder of the lock may."""
    for suffix in (_TMP, _OLD):
        for folder in out.parent.glob(f".{out.name}.*{suffix}"):
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _write_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write the engine {out}: {error.strerror or error}; free space or choose another --out"
        ) from error
