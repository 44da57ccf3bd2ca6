"""Checkpoint to TensorRT-LLM engine, for whichever generation of the package is installed.

With the TensorRT engine path the language model is compiled, with room for the visual embeddings of a whole batch.
Without it, a checkpoint that the PyTorch backend loads is written, quantised where asked, and its caches are warmed.
The vision tower is run by us in both.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vila2.backends.trtllm_api import Api, load_api, parse_options
from vila2.backends.trtllm_engine import EngineFolder, EngineSpec, engine_place, engines_root, publish
from vila2.backends.trtllm_llm import build_llm, open_llm, run_once
from vila2.backends.trtllm_quantize import Calibration, quantise_folder, scenes
from vila2.backends.trtllm_vision import save_vision
from vila2.errors import UsageError
from vila2.model.checkpoint import LoadedCheckpoint, inspect_checkpoint, load_checkpoint, save_vila
from vila2.model.layout import small_files

PRECISIONS = ("bf16", "fp8", "int4")
TEXT_TOKENS = 256  # of a prompt, beside its image
MAX_BATCH = 256


def build(
    checkpoint: str | Path,
    out: str | Path | None = None,
    *,
    precision: str = "bf16",
    max_batch: int | None = None,
    max_new_tokens: int = 256,
    options: Sequence[str] = (),
    calibration: Calibration | None = None,
    observe: Callable[[str], None] = lambda stage: None,
) -> EngineFolder:
    """Build the engine of a checkpoint in the folder `out`, or in the cache; what is there already stays as it is.

    `options` are further `name=value` settings of tensorrt_llm's LLM; `calibration` (scenes of the synthetic world by
    default) is what fp8 and int4 are calibrated on where we quantise. CheckpointError, UsageError or OutputError.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r} is not one of: {', '.join(PRECISIONS)}")
    api = load_api()
    info = inspect_checkpoint(checkpoint)
    if precision != "bf16" and api.generation == "pytorch" and calibration is None:
        calibration = scenes()
    tokens = info.config.image_processor().max_tokens
    given = parse_options(options)
    api.keywords({}, given)  # refuses what this version does not know before anything is built
    limits = _limits(max_batch or MAX_BATCH, tokens, max_new_tokens, info.config.decoder.max_positions)
    spec = EngineSpec(
        digest=info.digest,
        generation=api.generation,
        precision=precision,
        gpu=this_gpu(),
        versions=dict(api.versions),
        limits=limits,
        options=given,
        calibration=calibration.digest if calibration is not None and precision != "bf16" else "",
    )
    name = Path(info.path).resolve().name
    place = engine_place(engines_root(), name, spec) if out is None else Path(out).absolute()
    config = json.loads(json.dumps(asdict(info.config)))

    def make(folder: Path) -> None:
        observe("loading the checkpoint")
        loaded = load_checkpoint(info.path, dtype=torch.bfloat16)
        _write_parts(loaded, info.layout.tokenizer_folder, folder)
        model = _materialise(loaded, info.layout.tokenizer_folder, folder, place)
        if api.generation == "pytorch":
            if calibration is not None and precision != "bf16":
                observe(f"quantising to {precision} on {calibration.name}")
                quantise_folder(model, loaded, precision, calibration)
            del loaded
            observe("warming the caches")
            with environment(cache_variables(folder)):
                _warm(api, folder, spec)
        else:
            del loaded
            observe("building the TensorRT engine")
            build_llm(api, model / "llm", folder / "llm", spec)
            shutil.rmtree(model)

    return publish(place, spec, name, str(Path(info.path).resolve()), config, make, observe)


def this_gpu() -> dict[str, Any]:
    """What an engine is built for."""
    if not torch.cuda.is_available():
        return {"name": "none", "capability": "0.0", "memory_gib": 0}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30),
    }


def cache_variables(folder: Path) -> dict[str, str]:
    """The environment variables that keep what is measured and compiled at a first start."""
    cache = folder / "cache"
    return {
        "TLLM_AUTOTUNER_CACHE_PATH": str(cache / "autotuner.json"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
    }


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables that the user has not set, for the time of the block and the processes started in it."""
    names = [name for name in values if name not in os.environ]
    os.environ.update({name: values[name] for name in names})
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)


def _limits(max_batch: int, image_tokens: int, max_new_tokens: int, max_positions: int) -> dict[str, int]:
    max_input = image_tokens + TEXT_TOKENS
    max_seq = min(-(-(max_input + max_new_tokens) // 64) * 64, max_positions)
    return {
        "max_batch_size": max_batch,
        "max_input_len": min(max_input, max_seq),
        "max_seq_len": max_seq,
        # Two prompts' prefill beside the decoding batch at least: VILA's prompts are not prefilled in chunks.
        "max_num_tokens": max(8192, 2 * max_seq + max_batch),
        "max_multimodal_len": max_batch * image_tokens,
        "max_new_tokens": max_new_tokens,
    }


def _write_parts(loaded: LoadedCheckpoint, tokenizer_folder: Path, folder: Path) -> None:
    save_vision(loaded.model, folder)
    (folder / "tokenizer").mkdir()
    for file in small_files(tokenizer_folder):
        shutil.copyfile(file, folder / "tokenizer" / file.name)


def _materialise(loaded: LoadedCheckpoint, tokenizer_folder: Path, folder: Path, place: Path) -> Path:
    """The checkpoint as TensorRT-LLM reads VILA: three folders, and a config that says where and in which type."""
    model = folder / "model"
    model.mkdir()
    save_vila(model, loaded.model, tokenizer_folder, loaded.config)
    file = model / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config |= {"model_dtype": "torch.bfloat16", "resume_path": str(place / "model")}
    for part in ("llm", "vision_tower", "mm_projector"):
        config[f"{part}_cfg"] = {**config[f"{part}_cfg"], "_name_or_path": part}
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return model


def _warm(api: Api, folder: Path, spec: EngineSpec) -> None:
    """One start and one short answer: tactics are measured and kernels compiled once, under the builder's lock."""
    llm = open_llm(api, folder, spec)
    try:
        run_once(api, llm)
    finally:
        llm.shutdown()
