"""On which images an engine is compared with float32 when it is built, and how its captions are scored."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vila2.backends.engine_build import Calibration
from vila2.data.decode import DecodeError, DecodeLimits, decode_image
from vila2.data.shards import open_source
from vila2.data.source import Source
from vila2.errors import SourceError
from vila2.evaluate.given import evaluate_references, evaluate_truths
from vila2.model.checkpoint import inspect_checkpoint
from vila2.world import Scene, World, WorldSettings, texts

PROMPT = "Describe the image in detail."
SPLIT = "dev"
_TRUTHS = ("objects.precision", "objects.recall", "objects.f1", "chair.i")


def of_source(spec: str, count: int, image_root: str | None = None) -> Calibration:
    """`count` images spread evenly over a source (as recaption reads it). SourceError if none can be decoded."""
    source = open_source(spec, image_root=None if image_root is None else Path(image_root).expanduser())
    images = list(islice(_decoded(source, count), count))
    if not images:
        raise SourceError(f"{spec}: none of the images tried can be decoded: choose another --calibration")
    return Calibration(spec, images, PROMPT, score=_score_references)


def of_world(checkpoint: str | Path, count: int) -> Calibration:
    """Scenes 0 to `count` - 1 of the synthetic world's dev split, drawn at the checkpoint's own size."""
    world = World(WorldSettings(image_size=inspect_checkpoint(checkpoint).config.image_size))
    scenes = [world.scene(SPLIT, index) for index in range(count)]

    def score(reference: Sequence[str], ours: Sequence[str]) -> dict[str, Any]:
        truths = {"float32": _score_truths(reference, scenes), "engine": _score_truths(ours, scenes)}
        return {**_score_references(reference, ours), "truth": truths}

    prompt = texts.CAPTION_PROMPTS["detailed"][0]
    return Calibration(f"world {SPLIT} 0-{count - 1}", [world.render(s) for s in scenes], prompt, score=score)


def _decoded(source: Source, count: int) -> Iterator[NDArray[np.uint8]]:
    """Images at even distances first; those that cannot be decoded are passed over."""
    total = len(source)
    step = max(total // count, 1)
    ends = np.cumsum([len(shard) for shard in source.shards])
    for index in range(0, total, step):
        shard = int(np.searchsorted(ends, index, side="right"))
        at = index - (int(ends[shard - 1]) if shard else 0)
        for sample in source.shards[shard].read([at]):
            if sample.image is None:
                continue
            try:
                yield decode_image(sample.image, DecodeLimits()).pixels
            except DecodeError:
                continue


def _score_references(reference: Sequence[str], ours: Sequence[str]) -> dict[str, Any]:
    """CIDEr of the engine's captions with float32's as the references; 1 where all are equal and no two alike."""
    keyed = {str(i): [text] for i, text in enumerate(reference)}
    metrics = evaluate_references({str(i): text for i, text in enumerate(ours)}, keyed, "").metrics
    return {"cider_against_float32": metrics["cider"].value} if "cider" in metrics else {}


def _score_truths(captions: Sequence[str], scenes: Sequence[Scene]) -> dict[str, float]:
    keyed = {scene.key: text for scene, text in zip(scenes, captions, strict=True)}
    metrics = evaluate_truths(keyed, {scene.key: scene for scene in scenes}, "").metrics
    return {name: metrics[name].value for name in _TRUTHS if name in metrics}
