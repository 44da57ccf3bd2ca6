"""The nouns of training data: what a source gives (`Document`) and what a model is fed (`EncodedExample`)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from vila2.model.images import PreparedImage

Pixels = NDArray[np.uint8]
Conversation = tuple[tuple[str, str], ...]

VISUAL_TOKEN = (
    -1
)  # as in `vila2.model.prompt`, which cannot be imported here: it needs no torch, its neighbours do


@dataclass(frozen=True, slots=True)
class LazyImage:
    """An image that is rendered or read when it is needed, by the one process that needs it.

    `load` may raise SkippedDocument. `name`, if any, stands for what `load` gives, in this run and in later ones.
    """

    load: Callable[[], Pixels | bytes]
    name: str | None = None


Image = Pixels | bytes | LazyImage


@dataclass(frozen=True, slots=True)
class Document:
    """One item of a source. An image is uint8 pixels (height, width, 3) or encoded bytes, or gives one of these.

    - caption: `text` describes the images; conversations may follow. One whose only question is empty is a further
      caption of the same images.
    - conversation: each of `conversations` ((question, answer), ...) is about the images and independent of the
      others. `<image>` in questions says where the images go; without any they come first.
    - interleaved: `text` with `<image>` before what belongs to each image.
    - text: `text` alone.
    """

    key: str
    kind: Literal["caption", "conversation", "interleaved", "text"]
    images: tuple[Image, ...] = ()
    text: str = ""
    conversations: tuple[Conversation, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """A stretch of tokens; -1 stands for a visual token. `in_loss[i]`: token i is to be predicted."""

    token_ids: NDArray[np.int64]
    in_loss: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True, eq=False)
class EncodedExample:
    """What follows `prefix` (header and visual tokens, encoded once) in each of `branches`, independent of each other.

    `images` are those of the visual tokens, in order. A branch that shares its prefix with another begins with a
    token outside the loss: the row before it cannot predict two first tokens.
    """

    key: str
    images: "tuple[PreparedImage, ...]"
    prefix: Row
    branches: tuple[Row, ...]

    @property
    def num_rows(self) -> int:
        """Rows that the decoder computes for it."""
        return len(self.prefix) + sum(len(branch) for branch in self.branches)

    @property
    def num_tiles(self) -> int:
        return sum(len(image.tiles) for image in self.images)


class SkippedDocument(Exception):
    """A document that cannot be trained on; `reason` is a word for a program to count."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
