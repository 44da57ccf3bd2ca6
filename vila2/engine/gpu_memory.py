"""What a GPU's memory is for: weights, graphs, what a step holds, and the KV cache, which gets the rest of a share.

The cache is taken whole at the start, and what steps and graphs need besides is measured before at its largest (see
vila2.engine.measure), so a run that starts does not run out of memory in the middle. The same is reckoned here from
the model's shape: it stands beside the measured figures, and for them where they cannot be right. Should both be
wrong, the engine makes its batches smaller, or takes fewer sequences (`Engine.step`), and goes on.
"""

from dataclasses import dataclass

import torch

from vila2.errors import UsageError
from vila2.model.vlm import ModelConfig

# For what torch holds between allocations of other sizes than those that were measured.
_SLACK_BYTES = 1 << 29
# A captured graph's nodes and the parameters of its kernels, for some hundred kernels.
_GRAPH_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes beside weights and cache: of the largest steps, of the graphs, and of images that wait for their text."""

    steps: int
    graphs: int
    images: int

    @property
    def total(self) -> int:
        return self.steps + self.graphs + self.images + _SLACK_BYTES


@dataclass(frozen=True, slots=True)
class CardPlan:
    """How a card's memory is shared out. `free` was read with the weights in place and nothing else of a run."""

    total: int
    free: int
    share: float
    needs: Needs
    reckoned: Needs  # by the model's shape alone; the same where nothing was measured

    @property
    def left(self) -> int:
        """`share` of the card, less what is taken already and what all but the cache needs; below 0 if it is short."""
        return int(self.share * self.total) - (self.total - self.free) - self.needs.total

    @property
    def kv_bytes(self) -> int:
        """What the cache may have: what is left. UsageError, with the sizes, if nothing is."""
        taken, needs = self.total - self.free, self.needs
        if self.left <= 0:
            raise UsageError(
                f"no GPU memory is left for the KV cache: of {_gib(self.total)} --gpu-memory {self.share:g} allows "
                f"{_gib(self.share * self.total)}; weights and others hold {_gib(taken)}, steps need "
                f"{_gib(needs.steps)}, graphs {_gib(needs.graphs)}, images {_gib(needs.images)}: lower --batch-size, "
                "choose a smaller --precision, or free the card"
            )
        return self.left

    def describe(self, kv_bytes: int) -> str:
        """The sizes, for a log: measured ones with the reckoned ones behind them."""
        needs, reckoned = self.needs, self.reckoned
        return (
            f"of {_gib(self.total)} the KV cache has {_gib(kv_bytes)}, weights and others "
            f"{_gib(self.total - self.free)}, steps {_gib(needs.steps)} (reckoned {_gib(reckoned.steps)}), graphs "
            f"{_gib(needs.graphs)} (reckoned {_gib(reckoned.graphs)}), images {_gib(needs.images)}"
        )


def reckon_needs(
    config: ModelConfig,
    *,
    max_batch_tokens: int,
    max_num_seqs: int,
    vision_batch: int,
    num_graphs: int,
    images: int,
) -> Needs:
    """The needs by the model's shape; `images` are those whose visual tokens are kept at once."""
    largest = config.image_processor().max_tokens
    return Needs(
        activation_bytes(config, max_batch_tokens, max_num_seqs, vision_batch),
        graph_bytes(config, max_num_seqs, num_graphs),
        images * largest * config.decoder.hidden_size * 2,
    )


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


def fitting_batch_tokens(
    config: ModelConfig,
    *,
    free: int,
    max_batch_tokens: int,
    max_num_seqs: int,
    vision_batch: int,
    steps: int | None = None,
) -> int:
    """`max_batch_tokens`, halved until a step fits into what is `free` with cache and graphs in place.

    `steps` is what the largest ones were measured to need, if they were. UsageError, with the sizes, when none fits.
    """
    tokens = max_batch_tokens
    scale = 1.0
    if steps is not None:
        scale = steps / activation_bytes(config, tokens, max_num_seqs, vision_batch)
    while (needed := scale * activation_bytes(config, tokens, max_num_seqs, vision_batch)) > free:
        if tokens <= max_num_seqs:
            raise UsageError(
                f"GPU memory is too small for the first step: with weights, cache and graphs in place {_gib(free)} are "
                f"left, and {max_num_seqs} sequences need {_gib(needed)}: lower --batch-size or --gpu-memory"
            )
        tokens = max(tokens // 2, max_num_seqs)
    return tokens


# torch raises an error of its own; its libraries and Triton say it in words.
_FULL = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device's memory has ended."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _FULL)


def out_of_memory(doing: str, *, free: int, total: int) -> UsageError:
    """What to say when the card is full in spite of it all."""
    return UsageError(
        f"out of GPU memory while {doing}: {_gib(free)} of {_gib(total)} are free; lower --batch-size or --gpu-memory, "
        "choose a smaller --precision, or free the card"
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
