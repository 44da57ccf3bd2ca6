"""Documents to examples: texts to tokens with their loss, images to tiles, what several texts share into a prefix.

In two halves. `plan` makes the tokens, and needs of most images only that they are there; `finish` loads and cuts the
images. Processes that share a step all plan all of it, and finish what falls to them.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

from vila2.data.decode import DecodeError, DecodeLimits, decode_image
from vila2.model.conversation import ConversationEncoder, TrainingTokens
from vila2.model.images import ImageProcessor, PreparedImage
from vila2.model.tokenizer import IMAGE_PLACEHOLDER, Tokenizer
from vila2.train.examples import (
    VISUAL_TOKEN,
    Document,
    EncodedExample,
    Image,
    LazyImage,
    Pixels,
    Row,
    SkippedDocument,
)
from vila2.train.image_cache import ImageCache

if TYPE_CHECKING:
    from vila2.model.vlm import ModelConfig

_LIMITS = DecodeLimits()
_NO_ROW = Row(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.bool_))
# VILA squeezes the spaces around an image; its newline is the model's own.
_AROUND_IMAGE = re.compile(r"[ \t]*<image>\s*")


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """An example but for its pixels. `num_cut`: branches cut to the token limit; `num_dropped`: without a loss then."""

    example: EncodedExample  # its images have the right sizes and counts, and may be empty
    images: tuple[Image, ...]
    num_images: int  # of the document: some modes treat a single image in another way
    num_cut: int = 0
    num_dropped: int = 0


class ExampleEncoder:
    """Encodes for one checkpoint. `template` None: the checkpoint's own; captions are always `plain`.

    `max_tokens` bounds a prefix with one branch; longer ones are cut. `plan` is for one thread, `finish` for any.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        model_config: "ModelConfig",
        image_processor: ImageProcessor,
        template: str | None = None,
        *,
        max_tokens: int | None = None,
        limits: DecodeLimits = _LIMITS,
        cache: ImageCache | None = None,
    ) -> None:
        self.texts = ConversationEncoder(tokenizer, model_config, template)
        self.image_processor = image_processor
        positions = model_config.decoder.max_positions
        self.max_tokens = min(max_tokens or positions, positions)
        self.limits, self.cache = limits, cache
        self.tile_rows = _tile_rows(model_config)
        self._token_newline = model_config.token_newline

    def encode(self, document: Document) -> EncodedExample:
        """The one example of a document whose texts share a header. Raises SkippedDocument."""
        examples = self.encode_all(document)
        if len(examples) > 1:
            raise SkippedDocument("several_headers", f"{document.key}: it has {len(examples)} headers")
        return examples[0]

    def encode_all(self, document: Document) -> list[EncodedExample]:
        """A document's examples: one for each header that its texts have. Raises SkippedDocument."""
        return [self.finish(plan) for plan in self.plan(document)]

    def plan(self, document: Document) -> list[Plan]:
        """The document's examples but for their pixels. Raises SkippedDocument."""
        document = self._tidied(document)
        images = [self._outline(image, len(document.images)) for image in document.images]
        try:
            texts = self._tokens(document, images)
        except ValueError as error:
            raise SkippedDocument("bad_prompt", f"{document.key}: {error}") from None
        groups = [(_NO_ROW, [_row(tokens) for tokens in texts])] if not images else _by_header(texts)
        plans = [self._plan(document, images, prefix, rows) for prefix, rows in groups]
        plans = [plan for plan in plans if plan.example.branches]
        if not plans:
            raise SkippedDocument(
                "too_long", f"{document.key}: nothing to learn within {self.max_tokens} tokens"
            )
        return plans

    def finish(self, plan: Plan) -> EncodedExample:
        """The planned example with its pixels. Raises SkippedDocument for an image that cannot be used."""
        return replace(plan.example, images=tuple(self._prepare(i, plan.num_images) for i in plan.images))

    def cost(self, example: EncodedExample) -> float:
        """What an example costs, counted in rows of the decoder."""
        return example.num_rows + self.tile_rows * example.num_tiles

    def _plan(
        self, document: Document, images: Sequence[PreparedImage], prefix: Row, rows: Sequence[Row]
    ) -> Plan:
        kept, limit = len(images), self.max_tokens - len(prefix)
        if not images:
            shared = _common(rows)
            prefix, rows = _part(rows[0], 0, shared), [_part(row, shared, len(row)) for row in rows]
            limit -= shared
        elif not len(prefix):
            limit, kept = _cut_between_images(rows[0], images, limit)
        branches = [_part(row, 0, max(0, min(len(row), limit))) for row in rows]
        first = 0 if len(prefix) else 1  # nothing stands before the first token of all
        learnt = tuple(branch for branch in branches if branch.in_loss[first:].any())
        return Plan(
            EncodedExample(document.key, tuple(images[:kept]), prefix, learnt),
            document.images[:kept],
            len(document.images),
            num_cut=sum(len(row) > limit for row in rows),
            num_dropped=len(rows) - len(learnt),
        )

    def _tidied(self, document: Document) -> Document:
        """Interleaved text with its marks as the model reads them, and without images that no text follows."""
        if document.kind != "interleaved" or not document.images:
            return document
        text, images = document.text, document.images
        if IMAGE_PLACEHOLDER not in text:
            text = IMAGE_PLACEHOLDER * len(images) + text
        mark = IMAGE_PLACEHOLDER if self._token_newline else f"{IMAGE_PLACEHOLDER}\n"
        text = _AROUND_IMAGE.sub(mark, text)
        while text.endswith(mark) and images:
            text, images = text.removesuffix(mark), images[:-1]
        return replace(document, text=text, images=images)

    def _tokens(self, document: Document, images: Sequence[PreparedImage]) -> list[TrainingTokens]:
        if document.kind in ("text", "interleaved"):
            return [self.texts.text(document.text, images)]
        tokens = [self.texts.caption(document.text, images)] if document.text else []
        for turns in document.conversations:
            blank = len(turns) == 1 and not turns[0][0].replace(IMAGE_PLACEHOLDER, "").strip()
            tokens.append(self.texts.conversation(turns, images, "plain" if blank else None))
        return tokens

    def _outline(self, image: Image, num_images: int) -> PreparedImage:
        """The image as `prepare` would give it, its pixels not yet made; made here where its size decides."""
        processor = self.image_processor
        if processor.mode in ("dynamic", "dynamic_s2") and num_images == 1:
            return self._prepare(image, num_images)
        tiles = np.broadcast_to(np.uint8(0), (1, processor.image_size, processor.image_size, 3))
        return PreparedImage(tiles, processor.mode, None, processor.tokens_per_tile, 1, 0, 0)

    def _prepare(self, image: Image, num_images: int) -> PreparedImage:
        key = None
        if self.cache is not None:
            image = image if isinstance(image, LazyImage) and image.name else _loaded(image)
            key = _image_key(image, num_images)
            found = self.cache.get(key)
            if found is not None:
                return found
        pixels = _loaded(image)
        if isinstance(pixels, bytes):
            try:
                pixels = decode_image(pixels, self.limits).pixels
            except DecodeError as error:
                raise SkippedDocument(error.kind.value, str(error)) from None
        prepared = self.image_processor.prepare(pixels, num_images)
        if self.cache is not None and key is not None:
            self.cache.put(key, prepared)
        return prepared


def _by_header(texts: Sequence[TrainingTokens]) -> list[tuple[Row, list[Row]]]:
    """Texts that share a header, which becomes a prefix. One whose images come later stays alone, and so does one that
    begins with the loss: its first token is predicted by the header's last row, which can predict one token only."""
    groups: dict[bytes | int, tuple[Row, list[Row]]] = {}
    for number, tokens in enumerate(texts):
        header = tokens.header
        prefix = Row(header, np.zeros(len(header), dtype=np.bool_))
        name = header.tobytes() if len(header) and not tokens.in_loss[0] else number
        groups.setdefault(name, (prefix, []))[1].append(_row(tokens))
    return list(groups.values())


def _common(rows: Sequence[Row]) -> int:
    """How long a beginning several texts without images share; the token after it lies outside the loss in each."""
    if len(rows) < 2:
        return 0
    length = min(len(row) for row in rows)
    same = np.ones(length, dtype=np.bool_)
    for row in rows:
        same &= (row.token_ids[:length] == rows[0].token_ids[:length]) & ~row.in_loss[:length]
        same[:-1] &= ~row.in_loss[1:length]  # of the token that would follow
    same[-1] = False
    return int(np.argmin(same))


def _cut_between_images(row: Row, images: Sequence[PreparedImage], limit: int) -> tuple[int, int]:
    """Where to cut a row that holds images so that none is cut, nor the last token; and the images that stay."""
    limit = min(limit, len(row))
    visual = np.flatnonzero(row.token_ids == VISUAL_TOKEN)
    ends = np.cumsum([image.num_tokens for image in images])
    while limit:
        inside = int(np.searchsorted(visual, limit))
        kept = int(np.searchsorted(ends, inside, side="right"))
        whole = int(ends[kept - 1]) if kept else 0
        if inside == whole and row.token_ids[limit - 1] != VISUAL_TOKEN:
            return limit, kept
        first = whole if inside > whole else int(ends[kept - 2]) if kept > 1 else 0
        limit = int(visual[first])  # before the image that was cut, or that ended the row
    return 0, 0


def _loaded(image: Image) -> Pixels | bytes:
    return image.load() if isinstance(image, LazyImage) else image


def _image_key(image: Image, num_images: int) -> bytes:
    """Names what `prepare` makes of an image: by its name if it has one, else by its bytes or pixels."""
    if isinstance(image, LazyImage):
        parts = ("name", (image.name or "").encode())
    elif isinstance(image, bytes):
        parts = ("bytes", image)
    else:
        parts = (f"pixels {image.shape}", np.ascontiguousarray(image).tobytes())
    digest = blake2b(f"{parts[0]} {num_images == 1}\0".encode(), digest_size=16)
    digest.update(parts[1])
    return digest.digest()


def _row(tokens: TrainingTokens) -> Row:
    return Row(np.array(tokens.token_ids, dtype=np.int64), np.array(tokens.in_loss, dtype=np.bool_))


def _part(row: Row, start: int, stop: int) -> Row:
    return Row(row.token_ids[start:stop], row.in_loss[start:stop])


def _tile_rows(config: "ModelConfig") -> float:
    """The work of the tower on one tile, in rows of the decoder: the ratio of their products."""
    tower, decoder = config.vision, config.decoder
    patches = (tower.image_size // tower.patch_size) ** 2
    of_tile = patches * tower.num_layers * (4 * tower.width**2 + 2 * tower.width * tower.inner_width)
    of_attention = 2 * decoder.hidden_size * (decoder.q_size + decoder.kv_size)
    of_row = decoder.num_layers * (of_attention + 3 * decoder.hidden_size * decoder.intermediate_size)
    return of_tile / of_row
