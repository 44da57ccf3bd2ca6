"""How much of a GPU's memory the KV cache may have: what is left of a share of the card after weights and activations.

The cache is taken whole at the start, and what steps need besides is reckoned here at its largest, so a run that
starts does not run out of memory in the middle.
"""

from vila2.errors import UsageError
from vila2.model.vlm import ModelConfig

# What the driver's context, libraries, graphs and the holes between allocations take beside what is reckoned.
_SLACK_BYTES = 1 << 30


def activation_bytes(config: ModelConfig, max_batch_tokens: int, max_num_seqs: int, vision_batch: int) -> int:
    """The most that a step holds at once beside weights and cache, in bfloat16 with its logits in float32 as well."""
    decoder, vision = config.decoder, config.vision
    # gate and up, their product, the block's input, output and residual
    language = max_batch_tokens * (3 * decoder.intermediate_size + 4 * decoder.hidden_size) * 2
    logits = max_num_seqs * decoder.vocab_size * (2 + 4)
    tower = vision_batch * vision.num_positions * (2 * vision.inner_width + 6 * vision.width) * 2
    return language + logits + tower


def kv_budget(
    config: ModelConfig,
    *,
    free: int,
    total: int,
    share: float,
    max_batch_tokens: int,
    max_num_seqs: int,
    vision_batch: int,
) -> int:
    """Bytes for the cache: `share` of the card's `total`, less what is taken already and what steps will take.

    `free` is measured with the weights in place. UsageError, with the sizes, if nothing is left.
    """
    taken = total - free
    steps = activation_bytes(config, max_batch_tokens, max_num_seqs, vision_batch)
    budget = int(share * total) - taken - steps - _SLACK_BYTES
    if budget <= 0:
        raise UsageError(
            f"no GPU memory is left for the KV cache: of {_gib(total)} --gpu-memory {share:g} allows "
            f"{_gib(share * total)}; weights and others hold {_gib(taken)}, a step of {max_batch_tokens} tokens needs "
            f"{_gib(steps)}: lower --batch-size, choose a smaller --precision, or free the card"
        )
    return budget


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
