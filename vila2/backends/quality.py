"""How far a model in few bits is from its float32 self, measured along the captions that float32 writes.

The reference runs first and leaves only tokens, texts and hidden states behind, so the two models need not be in
memory together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vila2.engine.runner import PagedAttend
from vila2.model.checkpoint import LoadedCheckpoint
from vila2.model.images import PreparedImage
from vila2.model.prompt import build_prompt
from vila2.model.sample import Sample, embed_sample
from vila2.model.vlm import VisionLanguageModel

_NEAR = 0.1
_BLOCK_SIZE = 16  # kernels are compiled for it: one block of each sample's length would compile them for each
_ROWS_AT_ONCE = 32  # a vocabulary of 150,000 in float64 twice: 80 MB


@dataclass(frozen=True, slots=True)
class Quality:
    """`next_token_kl` and `greedy_agreement` follow the greedy captions that float32 writes, each to its end, given the
    tokens before: the mean KL divergence in nats, float32 against ours, and the share of tokens that ours would write
    next too. The others compare captions that each writes freely: the share of float32's tokens that ours holds at
    the same place, where one other word shifts all that follow, and of captions that agree to the last token.

    `near_ties` is the share of tokens where float32's own choice leads the next by less than a tenth in the logits: a
    property of the model, on which agreement rests.
    """

    images: int
    tokens: int
    next_token_kl: float
    greedy_agreement: float
    free_agreement: float
    equal_captions: float
    near_ties: float


@dataclass(frozen=True, slots=True)
class Told:
    """A sample that float32 answered, and its hidden states (tokens, hidden) there: row i is what the i-th token of
    the answer, or at last its end, is read from.
    """

    sample: Sample
    hidden: Tensor


@dataclass(frozen=True, slots=True)
class Reference:
    """What float32 says about the calibration images. `head` (vocabulary, hidden) turns hidden states to logits."""

    told: tuple[Told, ...]
    head: Tensor


@torch.inference_mode()
def tell(
    checkpoint: LoadedCheckpoint,
    template: str,
    prompt: str,
    images: Sequence[PreparedImage],
    answers: Sequence[tuple[int, ...]],
) -> Reference:
    """Follow float32's own `answers` (token ids) through the model once more. Copies the head, which may be changed."""
    model = checkpoint.model
    told = []
    for image, answer in zip(images, answers, strict=True):
        tokens = build_prompt(template, prompt, [image], checkpoint.tokenizer, checkpoint.config)
        sample = Sample(image, tokens, answer)
        told.append(Told(sample, follow(model, sample, torch.float32)))
    return Reference(tuple(told), model.decoder.lm_head.weight.detach().clone())


@torch.inference_mode()
def compare(
    model: VisionLanguageModel,
    reference: Reference,
    answers: Sequence[tuple[int, ...]],
    kv_dtype: torch.dtype,
) -> Quality:
    """Measure `model`, whose own free `answers` are given, against the reference."""
    divergence, agreed, near, count = 0.0, 0, 0, 0
    dtype = model.decoder.norm.weight.dtype
    for told in reference.told:
        hidden = follow(model, told.sample, kv_dtype)
        for ours, theirs in _blocks(hidden, told.hidden):
            log_ours = model.decoder.logits(ours.to(dtype)).double().log_softmax(-1)
            log_theirs = (theirs @ reference.head.T).double().log_softmax(-1)
            divergence += float((log_theirs.exp() * (log_theirs - log_ours)).sum())
            agreed += int((log_ours.argmax(-1) == log_theirs.argmax(-1)).sum())
            first, second = log_theirs.topk(2).values.unbind(-1)
            near += int((first - second < _NEAR).sum())
            count += len(ours)
    expected = [told.sample.answer for told in reference.told]
    pairs = list(zip(expected, answers, strict=True))
    held = sum(a == b for theirs, ours in pairs for a, b in zip(theirs, ours, strict=False))
    written = sum(len(theirs) for theirs in expected)
    equal = sum(theirs == ours for theirs, ours in pairs)
    return Quality(
        images=len(pairs),
        tokens=count,
        next_token_kl=divergence / count,
        greedy_agreement=agreed / count,
        free_agreement=held / written if written else 1.0,
        equal_captions=equal / len(pairs),
        near_ties=near / count,
    )


def follow(model: VisionLanguageModel, sample: Sample, kv_dtype: torch.dtype) -> Tensor:
    """The hidden states (len(answer) + 1, hidden) that the answer and its end are read from, in one pass."""
    decoder, config = model.decoder, model.config.decoder
    device = decoder.cos.device
    count = len(sample)
    blocks = -(-count // _BLOCK_SIZE)
    shape = (config.num_layers, 2, blocks, config.num_kv_heads, _BLOCK_SIZE, config.head_dim)
    attend = PagedAttend(
        cache=torch.zeros(shape, dtype=kv_dtype, device=device),
        positions=torch.arange(count, device=device),
        slots=torch.arange(count, device=device),
        block_tables=torch.arange(blocks, dtype=torch.int32, device=device)[None],
        query_starts=torch.tensor([0, count], dtype=torch.int32, device=device),
        context_lens=torch.tensor([count], dtype=torch.int32, device=device),
        cos=decoder.cos,
        sin=decoder.sin,
        scale=config.head_dim**-0.5,
    )
    states: Tensor = decoder(embed_sample(model, sample), attend)
    return states[len(sample.prompt.token_ids) - 1 :].float()


def _blocks(ours: Tensor, theirs: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(torch.split(ours, _ROWS_AT_ONCE), torch.split(theirs, _ROWS_AT_ONCE), strict=True)
