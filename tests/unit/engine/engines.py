"""Engines over tiny checkpoints with limits of a test's own, and requests for them."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from vila2.backends.native import NativeCaptioner, open_checkpoint
from vila2.engine.engine import Engine, EngineLimits
from vila2.engine.sequence import EngineRequest
from vila2.types import CaptionRequest


def photo(seed: int, height: int = 37, width: int = 61) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def with_limits(path: Path, **limits: int) -> NativeCaptioner:
    """The checkpoint in float32 on one thread."""
    captioner = open_checkpoint(path, device="cpu", precision="float32", threads=1)
    captioner.engine = another_engine(captioner, **limits)
    return captioner


def another_engine(captioner: NativeCaptioner, **limits: int) -> Engine:
    engine = captioner.engine
    return Engine(engine.model, EngineLimits(**limits), engine.eos_ids, engine.decode, torch.float32)


def engine_requests(captioner: NativeCaptioner, requests: Sequence[CaptionRequest]) -> list[EngineRequest]:
    """What the captioner would give its engine."""
    engine, taken = captioner.engine, []
    captioner.engine = SimpleNamespace(add=taken.append)
    try:
        for request in requests:
            assert captioner.add(request) is None
    finally:
        captioner.engine = engine
    captioner._under_way.clear()
    return taken
