"""Documents to examples: images cut into tiles, texts to tokens with their loss, what they share put into a prefix."""

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from vila2.data.decode import DecodeError, DecodeLimits, decode_image
from vila2.model.conversation import ConversationEncoder, TrainingTokens
from vila2.model.images import ImageProcessor, PreparedImage
from vila2.model.tokenizer import IMAGE_PLACEHOLDER, Tokenizer
from vila2.train.examples import VISUAL_TOKEN, Document, EncodedExample, Pixels, Row, SkippedDocument

if TYPE_CHECKING:
    from vila2.model.vlm import ModelConfig

_LIMITS = DecodeLimits()


class ExampleEncoder:
    """Encodes for one checkpoint. `template` None: the checkpoint's own; captions are always `plain`.

    `max_tokens` bounds a prefix with one branch; longer ones are cut.
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
    ) -> None:
        self.texts = ConversationEncoder(tokenizer, model_config, template)
        self.image_processor = image_processor
        self.max_tokens = min(
            max_tokens or model_config.decoder.max_positions, model_config.decoder.max_positions
        )
        self.limits = limits

    def encode(self, document: Document) -> EncodedExample:
        """The one example of a document whose conversations share a header. Raises SkippedDocument."""
        examples = self.encode_all(document)
        if len(examples) > 1:
            raise SkippedDocument("several_headers", f"{document.key}: it has {len(examples)} headers")
        return examples[0]

    def encode_all(self, document: Document) -> list[EncodedExample]:
        """A document's examples: one for each header that its texts have. Raises SkippedDocument."""
        images = tuple(self._prepare(image, len(document.images)) for image in document.images)
        try:
            rows = [_row(tokens) for tokens in self._tokens(document, images)]
        except ValueError as error:
            raise SkippedDocument("bad_prompt", f"{document.key}: {error}") from None
        headers = [(row.token_ids[: _shared(row)].tobytes(), row) for row in rows]
        examples = []
        for _, group in groupby(headers, key=lambda pair: pair[0]):
            same = [row for _, row in group]
            cut = _shared(same[0])
            branches = tuple(self._cut(row, cut) for row in same)
            examples.append(EncodedExample(document.key, images, _part(same[0], 0, cut), branches))
        return examples

    def _tokens(self, document: Document, images: Sequence[PreparedImage]) -> list[TrainingTokens]:
        if document.kind in ("text", "interleaved"):
            return [self.texts.text(document.text, images)]
        tokens = [self.texts.caption(document.text, images)] if document.text else []
        for turns in document.conversations:
            plain = len(turns) == 1 and not turns[0][0].replace(IMAGE_PLACEHOLDER, "").strip()
            tokens.append(self.texts.conversation(turns, images, "plain" if plain else None))
        return tokens

    def _prepare(self, image: Pixels | bytes, num_images: int) -> PreparedImage:
        if isinstance(image, bytes):
            try:
                image = decode_image(image, self.limits).pixels
            except DecodeError as error:
                raise SkippedDocument(error.kind.value, str(error)) from None
        return self.image_processor.prepare(image, num_images)

    def _cut(self, row: Row, start: int) -> Row:
        return _part(row, start, min(len(row), self.max_tokens))


def _row(tokens: TrainingTokens) -> Row:
    return Row(np.array(tokens.token_ids, dtype=np.int64), np.array(tokens.in_loss, dtype=np.bool_))


def _part(row: Row, start: int, stop: int) -> Row:
    return Row(row.token_ids[start:stop], row.in_loss[start:stop])


def _shared(row: Row) -> int:
    """How much of a row other texts about the same images may share: up to its last visual token."""
    visual = np.flatnonzero(row.token_ids == VISUAL_TOKEN)
    cut = int(visual[-1]) + 1 if len(visual) else 0
    return 0 if row.in_loss[: cut + 1].any() else cut
