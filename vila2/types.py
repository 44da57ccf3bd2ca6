"""The nouns that every layer shares: a sample comes in, a request goes to a captioner, a caption comes out.

Nothing here imports torch or numpy, so a test, a tool or a client of another backend can use these anywhere.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Status(str, Enum):
    """What became of a (sample, prompt): the `status` column of the output."""

    OK = "ok"
    TRUNCATED = "truncated"
    REPETITIVE = "repetitive"
    ERROR = "error"


class FinishReason(str, Enum):
    """Why a sequence ended: the `finish_reason` column of the output."""

    STOP = "stop"  # end-of-sequence token or a stop string
    LENGTH = "length"  # max_new_tokens, or the model's context, was reached
    REPETITION = "repetition"  # a loop was detected and cut
    ERROR = "error"


class ErrorKind(str, Enum):
    """The typed reason why a sample has no caption: the `error_kind` column of the output."""

    MISSING_FILE = "missing_file"
    EMPTY_FILE = "empty_file"
    NOT_AN_IMAGE = "not_an_image"
    CORRUPT_IMAGE = "corrupt_image"
    TOO_MANY_PIXELS = "too_many_pixels"
    TOO_SMALL = "too_small"
    EXTREME_ASPECT = "extreme_aspect"
    NO_IMAGE = "no_image"  # a tar or Parquet sample, or a record, without an image
    BROKEN_MEMBER = (
        "broken_member"  # a tar header that does not parse; the reader went on at the next good one
    )
    TRUNCATED_TAR = "truncated_tar"
    DUPLICATE_KEY = "duplicate_key"
    BAD_TEXT = "bad_text"  # not UTF-8
    BAD_RECORD = "bad_record"  # a JSON record or Parquet row of the wrong form
    UNSAFE_PATH = "unsafe_path"  # a path that leaves its folder
    READ_ERROR = "read_error"  # the operating system refused
    PROMPT_TOO_LONG = "prompt_too_long"
    BAD_PROMPT = (
        "bad_prompt"  # another number of <image> than images, or a token that the model does not have
    )
    EMPTY_CAPTION = "empty_caption"  # the model wrote nothing, in every attempt
    ENGINE_ERROR = "engine_error"
    SERVER_ERROR = "server_error"  # a server failed on this request, and answered others
    REQUEST_REFUSED = "request_refused"  # a server called this request wrong
    CONTENT_FILTER = "content_filter"  # a server's filter, or the model itself, would not answer


@dataclass(frozen=True, slots=True)
class SampleError:
    """Why a sample cannot be captioned, in one line for a person and one word for a program."""

    kind: ErrorKind
    message: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a source. `(shard, index)` identifies it; `index` counts from 0 within the shard.

    `image` holds the encoded bytes (JPEG, PNG, ...). A sample with an `error` still takes its place in the
    count, so that every sample of a source ends as exactly one row a prompt.
    """

    shard: str
    index: int
    key: str
    image: bytes | None = None
    original: str = ""
    fields: dict[str, str] = field(default_factory=dict)  # further text columns, for prompt templates
    error: SampleError | None = None


@dataclass(frozen=True, slots=True)
class RepetitionRule:
    """When a sequence counts as a loop: its tail repeats a period of at most `max_period` tokens at least
    `min_repeats` times and over at least `min_tokens` tokens in all."""

    max_period: int = 48
    min_repeats: int = 4
    min_tokens: int = 24

    def __post_init__(self) -> None:
        for name in ("max_period", "min_repeats", "min_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose the next token. `temperature == 0` means greedy; `top_k == 0` means no limit."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    max_new_tokens: int = 256
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    repetition: RepetitionRule | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (no limit) or more, got {self.top_k}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(f"min_new_tokens must lie in [0, max_new_tokens], got {self.min_new_tokens}")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A named user turn. `texts` holds its wordings: one is drawn per sample from the seed."""

    name: str
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CaptionRequest:
    """One (image, prompt) for a captioner.

    `images` holds what the captioner's own `prepare` returned for each image. `image_key` names the image:
    requests with the same key share its encode and its prefill; `num_siblings` says how many requests will
    come with that key, this one included. `rng_key` makes sampling depend on the sample and not on its batch.
    `draft` is a text that the caption probably resembles, such as the image's previous caption: an engine may write
    faster for it, never anything else.
    """

    id: int
    prompt: str
    images: tuple[Any, ...] = ()
    sampling: SamplingParams = SamplingParams()
    image_key: Hashable = None
    num_siblings: int = 1
    rng_key: int = 0
    draft: str = ""


@dataclass(frozen=True, slots=True)
class Caption:
    """A captioner's answer to one request. With `finish_reason` ERROR, `error` says why and `text` is empty.

    A captioner that sees no tokens, but is told their number, gives `token_count`.
    """

    id: int
    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason = FinishReason.STOP
    num_prompt_tokens: int = 0
    error: SampleError | None = None
    token_count: int | None = None

    @property
    def num_tokens(self) -> int:
        """The length of the answer in tokens."""
        return len(self.token_ids) if self.token_count is None else self.token_count

    @property
    def status(self) -> Status:
        """The status before any filter: how the sequence ended."""
        return _STATUS[self.finish_reason]


_STATUS = {
    FinishReason.STOP: Status.OK,
    FinishReason.LENGTH: Status.TRUNCATED,
    FinishReason.REPETITION: Status.REPETITIVE,
    FinishReason.ERROR: Status.ERROR,
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the filters say of a caption: the final text and status, or `retry` with other sampling."""

    status: Status
    text: str
    retry: bool = False
    trimmed: bool = False  # cut back to the end of a sentence
