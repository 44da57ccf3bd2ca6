"""Floating-point operations of a training step and of a caption, and what this machine's matrix product reaches.

Counted is what the model's products and its visible attention pairs need: 2 per multiply-add, forward and the
gradients that are wanted. Recomputation, padding, norms, activations and the optimiser count as nothing, so a share
of the ceiling that is made of these figures is the useful share.
"""

import time
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from vila2.model.decoder import DecoderConfig
from vila2.model.projector import ProjectorConfig
from vila2.model.vision import VisionConfig
from vila2.model.vlm import ModelConfig
from vila2.ops.quant import byte_linear, pack_bytes, quantize_weight
from vila2.ops.threads import set_threads

if TYPE_CHECKING:
    from vila2.train.batches import PackedBatch

PARTS = ("vision", "projector", "decoder")


def step_flops(
    config: ModelConfig, batches: "PackedBatch | Sequence[PackedBatch]", trained_parts: Collection[str]
) -> float:
    """Operations of one step over `batches` when the `trained_parts` (of vision, projector, decoder) learn."""
    unknown = set(trained_parts) - set(PARTS)
    if unknown:
        raise ValueError(f"unknown parts {sorted(unknown)}: expected some of {', '.join(PARTS)}")
    several = batches if isinstance(batches, Sequence) else [batches]
    return sum(_batch_flops(config, batch, trained_parts) for batch in several)


def _batch_flops(config: ModelConfig, batch: "PackedBatch", trained: Collection[str]) -> float:
    tiles = sum(len(image.tiles) for image in batch.images) * _tiles_per_stored(config)
    visual = sum(image.num_tokens for image in batch.images)
    vision = "vision" in trained
    projector = "projector" in trained
    decoder = "decoder" in trained
    total = 0.0
    tower, attention = _vision_products(config.vision)
    total += tiles * (tower * _passes(vision, vision) + attention * (3 if vision else 1))
    # The gradient stops at the patches: nothing learns below them.
    total -= tiles * _first_products(config.vision) * vision
    first, rest = _projector_products(config.projector)
    # A norm stands before the first product of a downsampling projector: it learns from that product's input.
    below = vision or (projector and config.projector.factor > 1)
    total += visual * (first * _passes(projector, below) + rest * _passes(projector, projector or vision))
    flows = bool(trained)  # every part lies below the head, the embeddings of the decoder included
    rows = len(batch.token_ids)
    everywhere, labelled = _decoder_products(config.decoder)
    total += (rows * everywhere + batch.num_labels * labelled) * _passes(decoder, flows)
    pairs = visible_pairs(batch.segments)
    per_pair = 4.0 * config.decoder.q_size * config.decoder.num_layers
    total += pairs * per_pair * (3 if flows else 1)
    head = 2.0 * config.decoder.hidden_size * config.decoder.vocab_size
    total += batch.num_labels * head * _passes(decoder, flows)
    return total


def caption_flops(config: ModelConfig, *, tiles: int, visual: int, prompt: int, new: int) -> float:
    """Operations of one caption of `new` tokens after a prompt of `prompt`, of which `visual` are those of an image in
    `tiles` tiles. Past the last attention, and in the head, only the rows that a token is chosen from count."""
    tower, attention = _vision_products(config.vision)
    first, rest = _projector_products(config.projector)
    everywhere, labelled = _decoder_products(config.decoder)
    rows = prompt + new - 1
    head = 2.0 * config.decoder.hidden_size * config.decoder.vocab_size
    pairs = rows * (rows + 1) // 2
    return (
        tiles * _tiles_per_stored(config) * (tower + attention)
        + visual * (first + rest)
        + rows * everywhere
        + new * (labelled + head)
        + pairs * 4.0 * config.decoder.q_size * config.decoder.num_layers
    )


def _passes(learns: bool, flows: bool) -> int:
    """How many times a product is multiplied: forward, for its weights' gradient, for its input's."""
    return 1 + learns + flows


def visible_pairs(segments: "np.ndarray[tuple[int, int], np.dtype[np.int64]]") -> int:
    """How many (query, key) pairs the segments see."""
    length = segments[:, 1] - segments[:, 0]
    return int((length * (length + 1) // 2 + length * (segments[:, 3] - segments[:, 2])).sum())


def _decoder_products(config: DecoderConfig) -> tuple[float, float]:
    """The linears of all layers: per row, and per row with a label. Past the last attention only the latter count."""
    hidden, inner = config.hidden_size, config.intermediate_size
    inputs = 2.0 * hidden * (config.q_size + 2 * config.kv_size)
    outputs = 2.0 * hidden * (config.q_size + 3 * inner)
    return inputs * config.num_layers + outputs * (config.num_layers - 1), outputs


def _vision_products(config: VisionConfig) -> tuple[float, float]:
    """Per tile: the linears of the tower with its patches, and its attention."""
    tokens, width = config.num_positions, config.width
    weights = 4 * width * width + 2 * width * config.inner_width
    linears = 2.0 * tokens * weights * config.num_layers_run + _first_products(config)
    return linears, 4.0 * tokens * tokens * width * config.num_layers_run


def _first_products(config: VisionConfig) -> float:
    return 2.0 * config.grid_side**2 * 3 * config.patch_size**2 * config.width


def _projector_products(config: ProjectorConfig) -> tuple[float, float]:
    """Per visual token: the first linear, and those after it."""
    width, hidden, factor = config.input_width, config.hidden_size, config.factor
    if config.kind == "linear":
        return 2.0 * width * hidden, 0.0
    if factor == 1:
        layers = int(config.kind[len("mlp") : -len("x_gelu")])
        return 2.0 * width * hidden, 2.0 * (layers - 1) * hidden * hidden
    if factor == 2:
        return 2.0 * 4 * width * hidden, 2.0 * hidden * hidden
    return 2.0 * 9 * width * 3 * width, 2.0 * (3 * width * hidden + hidden * hidden)


def _tiles_per_stored(config: ModelConfig) -> int:
    """Tiles that the tower sees of each one that an image stores: s2 cuts its scales inside the model."""
    if config.image_mode != "s2":
        return 1
    return sum(-((-scale // config.image_size) ** 2) for scale in config.s2_scales)


def measured_ceiling(dtype: torch.dtype, threads: int, device: str = "cpu", seconds: float = 1.0) -> float:
    """Operations a second of torch's matrix product of this type: the best of squares of several sizes.

    Runs for about `seconds` on `threads` threads (of the CPU) and leaves the number of threads as it was. Where a type
    is so slow that a larger square alone would take longer (bfloat16 on a CPU without it), the smaller ones decide.
    """
    before = torch.get_num_threads()
    if device == "cpu":
        set_threads(threads)
    try:
        sides = (512, 1024, 1536, 2048) if device == "cpu" else (4096, 8192)
        best = _product_rate(sides[0], dtype, device, seconds / len(sides))
        for side in sides[1:]:
            if 2.0 * side**3 / best > seconds:
                break
            best = max(best, _product_rate(side, dtype, device, seconds / len(sides)))
        return best
    finally:
        if device == "cpu":
            set_threads(before)


def product_ceiling(dtype: torch.dtype, threads: int, device: str = "cpu") -> float:
    """Operations a second of the fastest product that can carry out one of this type here.

    That is float32's where a type has no instructions of its own. Of bytes it is the faster of torch's and our own.
    """
    best = measured_ceiling(torch.float32, threads, device)
    if dtype is torch.int8:
        return max(best, _byte_ceiling(threads))
    return best if dtype is torch.float32 else max(best, measured_ceiling(dtype, threads, device))


def _byte_ceiling(threads: int, side: int = 1024) -> float:
    before = torch.get_num_threads()
    set_threads(threads)
    try:
        floats = torch.randn(side, side)
        integers = floats.mul(30).clamp(-127, 127).to(torch.int8)
        packed = pack_bytes(quantize_weight(floats, narrow=True))
        products = (lambda: byte_linear(floats, packed), lambda: torch._int_mm(integers, integers))
        return max(2.0 * side**3 / best_time(product, "cpu", 0.5) for product in products)
    finally:
        set_threads(before)


def _product_rate(side: int, dtype: torch.dtype, device: str, seconds: float) -> float:
    a, b = (torch.randn(side, side).to(device, dtype) for _ in range(2))
    out = torch.mm(a, b)
    return 2.0 * side**3 / best_time(lambda: torch.mm(a, b, out=out), device, seconds)


def best_time(call: Callable[[], object], device: str, seconds: float) -> float:
    """Seconds of the fastest of the calls that fit into `seconds`, and of one at least."""
    best, spent = float("inf"), 0.0
    while spent < seconds or best == float("inf"):
        start = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
        best, spent = min(best, elapsed), spent + elapsed
    return best
