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
from vila2.model.prompt import PromptTokens, build_prompt
from vila2.model.vlm import VisionLanguageModel

_ROWS_AT_ONCE = 32  # a vocabulary of 150,000 in float64 twice: 80 MB


@dataclass(frozen=True, slots=True)
class Quality:
    """`next_token_kl` is the mean KL divergence in nats, float32 against ours; `greedy_agreement` the share of tokens
    that both would write next; `equal_captions` the share of captions, freely written, that agree to the last token.
    """

    images: int
    tokens: int
    next_token_kl: float
    greedy_agreement: float
    equal_captions: float


@dataclass(frozen=True, slots=True)
class Told:
    """One image, what was asked of it, what float32 answered, and its hidden states (tokens, hidden) there: row i is
    what the i-th token of the answer, or at last its end, is read from.
    """

    image: PreparedImage
    prompt: PromptTokens
    answer: tuple[int, ...]
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
        told.append(Told(image, tokens, answer, follow(model, tokens, image, answer, torch.float32)))
    return Reference(tuple(told), model.decoder.lm_head.weight.detach().clone())


@torch.inference_mode()
def compare(
    model: VisionLanguageModel,
    reference: Reference,
    answers: Sequence[tuple[int, ...]],
    kv_dtype: torch.dtype,
) -> Quality:
    """Measure `model`, whose own free `answers` are given, against the reference."""
    divergence, agreed, count = 0.0, 0, 0
    dtype = model.decoder.norm.weight.dtype
    for told in reference.told:
        hidden = follow(model, told.prompt, told.image, told.answer, kv_dtype)
        for ours, theirs in _blocks(hidden, told.hidden):
            log_ours = model.decoder.logits(ours.to(dtype)).double().log_softmax(-1)
            log_theirs = (theirs @ reference.head.T).double().log_softmax(-1)
            divergence += float((log_theirs.exp() * (log_theirs - log_ours)).sum())
            agreed += int((log_ours.argmax(-1) == log_theirs.argmax(-1)).sum())
            count += len(ours)
    equal = sum(told.answer == answer for told, answer in zip(reference.told, answers, strict=True))
    images = len(reference.told)
    return Quality(images, count, divergence / count, agreed / count, equal / images)


def follow(
    model: VisionLanguageModel,
    prompt: PromptTokens,
    image: PreparedImage,
    answer: Sequence[int],
    kv_dtype: torch.dtype,
) -> Tensor:
    """The hidden states (len(answer) + 1, hidden) that `answer` and its end are read from, in one pass."""
    decoder, config = model.decoder, model.config.decoder
    visual = model.encode_images([image])[0]
    device = decoder.cos.device
    tokens = torch.tensor([*prompt.token_ids, *answer], device=device)
    hidden = decoder.embed(tokens.clamp_min(0))
    rows = image.num_tokens // image.num_placeholders
    for start, length, _, chunk in prompt.image_spans:
        hidden[start : start + length] = visual[chunk * rows : chunk * rows + length]
    count = len(tokens)
    shape = (config.num_layers, 2, 1, config.num_kv_heads, count, config.head_dim)
    attend = PagedAttend(
        cache=torch.zeros(shape, dtype=kv_dtype, device=device),
        positions=torch.arange(count, device=device),
        slots=torch.arange(count, device=device),
        block_tables=torch.zeros(1, 1, dtype=torch.int32, device=device),
        query_starts=torch.tensor([0, count], dtype=torch.int32, device=device),
        context_lens=torch.tensor([count], dtype=torch.int32, device=device),
        cos=decoder.cos,
        sin=decoder.sin,
        scale=config.head_dim**-0.5,
    )
    states: Tensor = decoder(hidden, attend)
    return states[len(prompt.token_ids) - 1 :].float()


def _blocks(ours: Tensor, theirs: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(torch.split(ours, _ROWS_AT_ONCE), torch.split(theirs, _ROWS_AT_ONCE), strict=True)
