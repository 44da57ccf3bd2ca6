"""What a run takes of a card's memory beside weights and cache, measured before the cache is made.

The largest batches go once through the tower and the language model, with one block for a cache, and every graph is
captured once and let go. What torch and the driver say before and after is what the run will need: with it the kernels
compile and the libraries load, so what those keep is in place when the card's free memory is read. A figure that cannot
be right, since another process took or gave memory meanwhile, is replaced by the reckoned one.
"""

import gc
from dataclasses import replace

import numpy as np
import torch

from vila2.engine.cuda_graphs import padded_sizes
from vila2.engine.engine import EngineLimits, make_ahead
from vila2.engine.gpu_memory import CardPlan, Needs, is_out_of_memory, reckon_needs
from vila2.engine.runner import ModelRunner
from vila2.model.vlm import VisionLanguageModel

_PROMPT = 256  # tokens: about an image and what is asked of it
_LEAST = 256  # tokens of a step, below which a card is too small


def plan_card(
    model: VisionLanguageModel,
    limits: EngineLimits,
    kv_dtype: torch.dtype,
    eos_ids: frozenset[int],
    *,
    room: int,
    share: float,
    sequence_bytes: int = 0,
) -> EngineLimits:
    """`limits` with `card` set, and with smaller batches where the largest ones found no memory.

    `room` is the most tokens that a sequence may come to have, `share` what may be used of the card in all. With
    `sequence_bytes`, of a usual sequence's cache, there may be fewer sequences too: they are halved until the cache
    holds half of them. torch.OutOfMemoryError if not even the smallest batches fit.
    """
    while True:
        needs = None
        try:
            needs = measure_needs(model, limits, kv_dtype, eos_ids, room)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        count = limits.max_num_seqs
        if needs is not None:
            free, total = torch.cuda.mem_get_info()
            card = CardPlan(total, free, share, needs, _reckoned(model, limits))
            if not sequence_bytes or count == 1 or card.left >= count * sequence_bytes // 2:
                return replace(limits, card=card)
        smaller = replace(
            limits,
            max_batch_tokens=max(limits.max_batch_tokens // 2, min(limits.max_batch_tokens, _LEAST), count),
            vision_batch=max(limits.vision_batch // 2, 1),
        )
        if needs is None and smaller == limits and not (sequence_bytes and count > 1):
            raise torch.OutOfMemoryError("not even the smallest batches fit")
        if needs is not None or smaller == limits:
            smaller = replace(smaller, max_num_seqs=count // 2)
        limits = smaller


@torch.inference_mode()
def measure_needs(
    model: VisionLanguageModel,
    limits: EngineLimits,
    kv_dtype: torch.dtype,
    eos_ids: frozenset[int],
    room: int,
) -> Needs:
    """Run the largest batches and capture the graphs, and let go of both."""
    reckoned = _reckoned(model, limits)
    runner = ModelRunner(model, 1, limits.block_size, kv_dtype)
    _settle()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    _run_largest(runner, limits)
    torch.cuda.synchronize()
    # What is reserved, not what is allocated: the tower's stream and the language model's have memory of their own.
    steps = torch.cuda.max_memory_reserved() - before
    _settle()
    ahead = make_ahead(runner, limits, room, eos_ids)
    _settle()
    free_with_graphs = torch.cuda.mem_get_info()[0]
    del ahead
    gc.collect()  # graphs must not outlive this by a cycle
    _settle()
    graphs = torch.cuda.mem_get_info()[0] - free_with_graphs
    return Needs(
        steps if steps > 0 else reckoned.steps, graphs if graphs > 0 else reckoned.graphs, reckoned.images
    )


def _reckoned(model: VisionLanguageModel, limits: EngineLimits) -> Needs:
    return reckon_needs(
        model.config,
        max_batch_tokens=limits.max_batch_tokens,
        max_num_seqs=limits.max_num_seqs,
        vision_batch=limits.vision_batch,
        num_graphs=(1 + limits.group_prefixes) * len(padded_sizes(limits.max_num_seqs)),
        # Those under way, one load ahead of them, and those whose siblings have not come.
        images=limits.max_num_seqs + limits.vision_batch + limits.max_kept_images,
    )


def _run_largest(runner: ModelRunner, limits: EngineLimits) -> None:
    """The largest batch of images, of prompts and of decoding, as the engine would run them."""
    processor = runner.model.config.image_processor()
    # As wide as it takes for the most tiles, where images are cut into tiles.
    image = processor.prepare(
        np.zeros((processor.image_size, processor.image_size * processor.max_tiles, 3), dtype=np.uint8)
    )
    count = max(1, limits.vision_batch // len(image.tiles))
    tokens = runner.encode([image] * count)
    runner.vision.join()
    length = min(_PROMPT, limits.max_batch_tokens, runner.model.config.decoder.max_positions)
    runner.probe(limits.max_batch_tokens // length, 0, length, length)
    runner.probe(limits.max_num_seqs, 0, length)
    del tokens


def _settle() -> None:
    """Wait for the device, and give back what torch holds for nobody."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
