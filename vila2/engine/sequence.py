"""What the engine schedules: a request in tokens, and the sequence that grows from it.

The engine knows tokens and pixels; it knows nothing of chat templates, files or captions.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from vila2.engine.draft import Draft
from vila2.model.images import PreparedImage
from vila2.types import FinishReason, SamplingParams


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """`length` placeholder positions of a prompt from `start` on, filled by rows `offset:` of image `image`."""

    start: int
    length: int
    image: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A prompt in tokens (-1 at every visual position) with the images that fill its placeholders.

    `header_length` counts the tokens before the first visual one: they are the same for a whole run and are
    computed once. Requests with one `image_key` have equal tokens up to the end of their last image span, and
    share the encode and the prefill of it; `num_siblings` says how many will come. `draft` holds the tokens that
    will probably be written: they decide how fast the request is served, never what it becomes.
    """

    id: int
    token_ids: tuple[int, ...]
    spans: tuple[ImageSpan, ...] = ()
    images: tuple[PreparedImage, ...] = ()
    sampling: SamplingParams = SamplingParams()
    header_length: int = 0
    image_key: Hashable = None
    num_siblings: int = 1
    rng_key: int = 0
    draft: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a request: its new tokens (end-of-sequence token and cut loops excluded) and why it ended.

    With `finish_reason` ERROR, `error` says what could not be done.
    """

    id: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    num_prompt_tokens: int
    error: str = ""


@dataclass(frozen=True, slots=True)
class PrefixKey:
    """A point of the prompt up to which the KV cache may be shared: the first `num_tokens` tokens, named `key`."""

    key: Hashable
    num_tokens: int
    num_users: int  # how many sequences will ask for it; 0 = as long as the run lasts


@dataclass(eq=False, slots=True)
class Sequence:
    """A request under way. `num_computed` tokens of `tokens` have their keys and values in `blocks`."""

    request: EngineRequest
    tokens: list[int]
    prefixes: tuple[PrefixKey, ...]
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    produces: list[Hashable] = field(default_factory=list)  # prefixes that others wait for us to compute
    loop_runs: NDArray[np.int32] | None = None  # see repetition.py
    num_preemptions: int = 0
    draft: Draft | None = None
    # Where the device runs ahead of the host (see overlap.py):
    num_pending: int = 0  # tokens that it has sampled or will have, and nobody has read
    is_closing: bool = False  # the last token that there is room for is among those
    is_done: bool = False
    slot: int = -1  # its place in the device's tables

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.token_ids)

    @property
    def num_tokens(self) -> int:
        """All tokens, those included that nobody has read yet."""
        return len(self.tokens) + self.num_pending

    @property
    def num_new_tokens(self) -> int:
        """Those of `num_tokens` that the prompt has not."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def output(self) -> list[int]:
        return self.tokens[self.num_prompt_tokens :]

    @property
    def is_decoding(self) -> bool:
        """All but the newest token are computed."""
        return self.num_computed == self.num_tokens - 1 and self.num_new_tokens > 0


def start_sequence(request: EngineRequest, kinds: bytes = b"") -> Sequence:
    """A sequence with the prefixes that it may share: the header, then header and images for siblings."""
    prefixes = []
    image_end = max((span.start + span.length for span in request.spans), default=0)
    limit = len(request.token_ids) - 1  # at least one token must be computed to get logits
    header = request.token_ids[: request.header_length]
    if request.spans and 0 < request.header_length <= limit:
        prefixes.append(PrefixKey(("header", header), request.header_length, 0))
    if request.image_key is not None and request.num_siblings > 1 and image_end <= limit:
        prefixes.append(PrefixKey(("image", header, request.image_key), image_end, request.num_siblings))
    draft = Draft(request.draft, kinds) if request.draft else None
    return Sequence(request, list(request.token_ids), tuple(prefixes), draft=draft)
