"""What a GPU's memory is for: weights, graphs, what a step holds, and the KV cache, which gets the rest of a share.

The cache is taken whole at the start, and what steps need besides is reckoned here at its largest, so a run that
starts does not run out of memory in the middle. Should the reckoning be wrong, the engine makes its batches smaller
(`Engine.step`) and goes on.
"""

from vila2.errors import UsageError
from vila2.model.vlm import ModelConfig

# What the driver's context, libraries and the holes between allocations take beside what is reckoned.
_SLACK_BYTES = 1 << 30
# A captured graph's nodes and the parameters of its kernels, for some hundred kernels.
_GRAPH_BYTES = 8 << 20


def activation_bytes(config: ModelConfig, max_batch_tokens: int, max_num_seqs: int, vision_batch: int) -> int:
    """The most that a step holds at once beside weights and cache, in bfloat16 with its logits in float32 as well."""
    decoder, vision = config.decoder, config.vision
    # gate and up, their product, the block's input, output and residual
    language = max_batch_tokens * (3 * decoder.intermediate_size + 4 * decoder.hidden_size) * 2
    logits = max_num_seqs * decoder.vocab_size * (2 + 4)
    tower = vision_batch * vision.num_positions * (2 * vision.inner_width + 6 * vision.width) * 2
    return language + logits + tower


def graph_bytes(config: ModelConfig, max_num_seqs: int, num_graphs: int) -> int:
    """What the graphs of decoding keep: one step of the largest batch, which all of them share, and their nodes."""
    return num_graphs * _GRAPH_BYTES + activation_bytes(config, max_num_seqs, max_num_seqs, 0)


def kv_budget(
    config: ModelConfig,
    *,
    free: int,
    total: int,
    share: float,
    max_batch_tokens: int,
    max_num_seqs: int,
    vision_batch: int,
    num_graphs: int,
) -> int:
    """Bytes for the cache: `share` of the card's `total`, less what is taken already, the graphs, and a step.

    `free` is measured with the weights in place. UsageError, with the sizes, if nothing is left.
    """
    taken = total - free
    steps = activation_bytes(config, max_batch_tokens, max_num_seqs, vision_batch)
    graphs = graph_bytes(config, max_num_seqs, num_graphs)
    budget = int(share * total) - taken - graphs - steps - _SLACK_BYTES
    if budget <= 0:
        raise UsageError(
            f"no GPU memory is left for the KV cache: of {_gib(total)} --gpu-memory {share:g} allows "
            f"{_gib(share * total)}; weights and others hold {_gib(taken)}, a step of {max_batch_tokens} tokens needs "
            f"{_gib(steps)}, graphs {_gib(graphs)}: lower --batch-size, choose a smaller --precision, or free the card"
        )
    return budget


def fitting_batch_tokens(
    config: ModelConfig, *, free: int, max_batch_tokens: int, max_num_seqs: int, vision_batch: int
) -> int:
    """`max_batch_tokens`, halved until a step fits into what is `free` with cache and graphs in place.

    UsageError, with the sizes, when no step does.
    """
    tokens = max_batch_tokens
    while (needed := activation_bytes(config, tokens, max_num_seqs, vision_batch)) > free:
        if tokens <= max_num_seqs:
            raise UsageError(
                f"GPU memory is too small for the first step: with weights, cache and graphs in place {_gib(free)} are "
                f"left, and {max_num_seqs} sequences need {_gib(needed)}: lower --batch-size or --gpu-memory"
            )
        tokens = max(tokens // 2, max_num_seqs)
    return tokens


def out_of_memory(doing: str, *, free: int, total: int) -> UsageError:
    """What to say when the card is full in spite of it all."""
    return UsageError(
        f"out of GPU memory while {doing}: {_gib(free)} of {_gib(total)} are free; lower --batch-size or --gpu-memory, "
        "choose a smaller --precision, or free the card"
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
