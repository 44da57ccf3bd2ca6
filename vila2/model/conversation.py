"""Whole conversations to tokens for training: what the model reads and what it must write.

Invariant: the tokens before an answer are those that `build_prompt` makes at inference, so that a model is trained on
exactly what it will meet. In the loss are an answer, with the space that a template sets before it, and the token
that ends it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from vila2.errors import UsageError
from vila2.model.prompt import TEMPLATE_TEXTS, VISUAL_TOKEN, Template, check_template, owns_bos, place_images
from vila2.model.tokenizer import IMAGE_PLACEHOLDER, Tokenizer

if TYPE_CHECKING:
    from vila2.model.images import PreparedImage
    from vila2.model.vlm import ModelConfig

TokenIds = NDArray[np.int64]
Key = TypeVar("Key")
Value = TypeVar("Value")

_CACHED_TEXTS = 1 << 15
_CACHED_HEADERS = 256
_QUESTION = "vila2question{}end".format
_ANSWER = "vila2answer{}end".format
_LEADING_IMAGES = re.compile(rf"(?:{IMAGE_PLACEHOLDER}\n*)*")
_NO_TOKENS: TokenIds = np.empty(0, dtype=np.int64)


@dataclass(slots=True)
class TrainingTokens:
    """The tokens of `header` (through the last image, if no loss comes before it), then `token_ids`; -1 stands for a
    visual token. `in_loss` says which of `token_ids` are to be predicted; in the header none is.

    The header is one and the same array for conversations that begin alike.
    """

    header: TokenIds = field(default_factory=_NO_TOKENS.view)
    token_ids: list[int] = field(default_factory=list)
    in_loss: list[bool] = field(default_factory=list)

    def add(self, ids: Sequence[int], in_loss: bool) -> None:
        self.token_ids += ids
        self.in_loss += [in_loss] * len(ids)


@dataclass(frozen=True, slots=True)
class _Frame:
    """What stands around the answers: before answer k `prompts[k]` and `lead`, after it the token `ends[k]`."""

    prompts: tuple[str, ...]
    lead: str
    ends: tuple[int, ...]


class ConversationEncoder:
    """Encodes for one checkpoint. `template` None: the checkpoint's own. Not thread-safe."""

    def __init__(self, tokenizer: Tokenizer, config: "ModelConfig", template: str | None = None) -> None:
        self.template = check_template(template or config.template)
        self.tokenizer, self.config = tokenizer, config
        eos = tokenizer.inner.eos_token_id
        eos = min(tokenizer.eos_ids, default=None) if eos is None else eos
        if eos is None:
            raise UsageError(
                "the tokenizer names no end-of-sequence token: set eos_token in tokenizer_config.json"
            )
        self.eos_id = int(eos)
        # What stands before a text that follows an image: a token that sets it off, or nothing.
        self._image_anchor = "" if tokenizer.image_token_id is None else IMAGE_PLACEHOLDER
        self._texts: dict[tuple[str, bool], list[int]] = {}
        self._headers: dict[tuple[object, ...], TokenIds] = {}
        tokenizer.encode("")  # transformers takes away a truncation that tokenizer.json may ask for
        self._fast = getattr(tokenizer.inner, "backend_tokenizer", None)
        self._rendered = lru_cache(maxsize=1024)(self._render_frame)

    def conversation(
        self, turns: Sequence[tuple[str, str]], images: Sequence["PreparedImage"], template: str | None = None
    ) -> TrainingTokens:
        """`turns` ((question, answer), ...) about `images`, with the loss on the answers.

        `<image>` in the questions says where the images go; without any they come first. ValueError if there is
        another number of them than of images, or a token that the model has no embedding for.
        """
        template = template or self.template
        questions, used = self._placed([question for question, _ in turns], images)
        frame = self._frame(template, questions)
        tokens, order = TrainingTokens(), _chunk_lengths(images)
        if used[0] == len(images):
            tokens.header = self._header(template, frame.prompts[0], images, order)
        for turn, (prompt, (_, answer), end) in enumerate(zip(frame.prompts, turns, frame.ends, strict=True)):
            with_bos = turn == 0 and not owns_bos(template, prompt, self.tokenizer)
            anchor = "" if turn == 0 else self.tokenizer.name(frame.ends[turn - 1])
            pieces = prompt.split(IMAGE_PLACEHOLDER)
            if turn == 0 and len(tokens.header):
                pieces, anchor, with_bos = pieces[-1:], self._image_anchor, False
                tokens.add(self._after_image(pieces[0]), False)
            else:
                self._add(tokens, pieces, order, anchor, with_bos, in_loss=False)
                if len(pieces) > 1:
                    anchor, with_bos = self._image_anchor, False
                    order = order[len(pieces) - 1 :]
            written = frame.lead + _defused(answer.strip())
            tokens.add(self._after(anchor + pieces[-1], with_bos, written), True)
            tokens.add([end], True)
        return self._checked(tokens)

    def caption(self, text: str, images: Sequence["PreparedImage"]) -> TrainingTokens:
        """The images and their caption alone (the template `plain`), with the loss on the caption."""
        return self.conversation([("", text)], images, "plain")

    def text(self, text: str, images: Sequence["PreparedImage"] = ()) -> TrainingTokens:
        """Text with `<image>` where images go, every token of it in the loss. ValueError as for a conversation."""
        placed = self._placed([text], images)[0][0] if images else _defused(text)
        tokens = TrainingTokens()
        order = _chunk_lengths(images)
        self._add(tokens, placed.split(IMAGE_PLACEHOLDER), order, "", with_bos=True, in_loss=True)
        tokens.add([self.eos_id], True)
        tokens.in_loss[0] = False  # nothing stands before it
        return self._checked(tokens)

    def _placed(
        self, questions: list[str], images: Sequence["PreparedImage"]
    ) -> tuple[tuple[str, ...], list[int]]:
        """The questions with one `<image>` a placeholder, and how many images each holds; the first holds all of
        them where none is named."""
        counts = [question.count(IMAGE_PLACEHOLDER) for question in questions]
        if not any(counts):
            counts[0] = len(images)
        elif sum(counts) != len(images):
            raise ValueError(
                f"the text names {sum(counts)} images as {IMAGE_PLACEHOLDER}, but has {len(images)}"
            )
        placed, start = [], 0
        for question, count in zip(questions, counts, strict=True):
            placed.append(place_images(question, images[start : start + count], self.config))
            start += count
        return tuple(placed), counts

    def _header(
        self, template: str, prompt: str, images: Sequence["PreparedImage"], order: list[int]
    ) -> TokenIds:
        """The tokens of a first prompt through its last image."""
        before = prompt.rpartition(IMAGE_PLACEHOLDER)[0]
        if not images:
            return _NO_TOKENS
        key = (template, before, *order)
        header = self._headers.get(key)
        if header is None:
            tokens = TrainingTokens()
            pieces = [*before.split(IMAGE_PLACEHOLDER), ""]
            with_bos = not owns_bos(template, prompt, self.tokenizer)
            self._add(tokens, pieces, order, "", with_bos, in_loss=False)
            after = self._after_image("")
            self._checked(tokens)
            header = np.array(tokens.token_ids[: len(tokens.token_ids) - len(after)], dtype=np.int64)
            _remember(self._headers, key, header, _CACHED_HEADERS)
        return header

    def _add(
        self,
        tokens: TrainingTokens,
        pieces: Sequence[str],
        order: Sequence[int],
        anchor: str,
        with_bos: bool,
        in_loss: bool,
    ) -> None:
        """Add texts with an image between each two, of `order` visual tokens; the first text stands after `anchor`.

        A text is tokenised with the placeholders around it, where those are tokens, as in the whole.
        """
        image_id = self.tokenizer.image_token_id
        last = len(pieces) - 1
        for place, piece in enumerate(pieces):
            if place:
                tokens.add([VISUAL_TOKEN] * order[place - 1], False)
            marked = piece if place == last else piece + self._image_anchor
            if place:
                newline = list(self.tokenizer.newline_ids) if self.config.token_newline else []
                tokens.add(newline, False)
                ids = self._after(self._image_anchor, False, marked)
            else:
                ids = self._after(anchor, with_bos, marked)
            if place < last and image_id is not None:
                ids = ids[: ids.index(image_id)]
            tokens.add(ids, in_loss)

    def _after_image(self, text: str) -> list[int]:
        """What follows the visual tokens of an image when `text` does."""
        ids = self._after(self._image_anchor, False, text) if text else []
        return [*self.tokenizer.newline_ids, *ids] if self.config.token_newline else ids

    def _after(self, context: str, with_bos: bool, text: str) -> list[int]:
        """The tokens that `text` adds to those of `context`; where they would melt together, its own tokens.

        A BOS that the tokenizer sets before an empty context counts as the text's.
        """
        if not context:
            return self._ids(text, with_bos)
        before, both = self._ids(context, with_bos), self._ids(context + text, with_bos)
        return both[len(before) :] if both[: len(before)] == before else self._ids(text, False)

    def _ids(self, text: str, with_bos: bool) -> list[int]:
        ids = self._texts.get((text, with_bos))
        if ids is None:
            if self._fast is None:
                ids = self.tokenizer.encode(text, with_bos)
            else:  # a third of the time that transformers takes for the same
                ids = self._fast.encode(text, add_special_tokens=with_bos).ids
            _remember(self._texts, (text, with_bos), ids, _CACHED_TEXTS)
        return ids

    def _frame(self, template: str, questions: tuple[str, ...]) -> _Frame:
        if template == "auto":
            return self._auto_frame(questions)
        texts, last = TEMPLATE_TEXTS[template], len(questions) - 1
        ends = [self._end(texts, turn == last) for turn in range(len(questions))]
        prompts = [texts.user + question + texts.assistant for question in questions]
        lead = texts.lead
        if template in ("plain", "raw"):
            lead = "" if _is_blank(questions[0]) else "\n"
        return _Frame((texts.start + prompts[0], *prompts[1:]), lead, tuple(ends))

    def _end(self, texts: Template, is_last: bool) -> int:
        """The id of the token that ends an answer; the end of sequence where the vocabulary has no such token."""
        for name in (texts.last_end if is_last else None, texts.end):
            found = None if name is None else self.tokenizer.token_id(name)
            if found is not None:
                return found
        return self.eos_id

    def _auto_frame(self, questions: tuple[str, ...]) -> _Frame:
        """The checkpoint's own chat template around the answers.

        Rendering is dear, so plain questions are put into a frame that was rendered with marks in their place. A
        question at whose text a template might look (spaces at its ends, anything in angle brackets) is rendered.
        """
        heads, bodies = [], []
        for question in questions:
            head = _LEADING_IMAGES.match(question)
            cut = head.end() if head else 0
            heads.append(question[:cut])
            bodies.append(question[cut:])
        if any("<" in body or not body or body != body.strip() for body in bodies):
            return self._rendered(questions)
        frame = self._rendered(tuple(head + _QUESTION(turn) for turn, head in enumerate(heads)))
        prompts = [
            prompt.replace(_QUESTION(turn), body, 1)
            for turn, (prompt, body) in enumerate(zip(frame.prompts, bodies, strict=True))
        ]
        return _Frame(tuple(prompts), frame.lead, frame.ends)

    def _render_frame(self, questions: tuple[str, ...]) -> _Frame:
        """The frame of these questions, found by rendering the template with marks in the place of the answers.

        Where it sets no special token after an answer, the end of sequence is set there: a model has to learn to
        stop. ValueError if the template loses an answer.
        """
        messages = []
        for turn, question in enumerate(questions):
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": _ANSWER(turn)})
        rest = self.tokenizer.apply_chat_template(messages, add_generation_prompt=False)
        pieces = []
        for turn in range(len(questions)):
            before, found, rest = rest.partition(_ANSWER(turn))
            if not found:
                raise ValueError("the chat template loses an answer: choose another template")
            pieces.append(before)
        prompt = self.tokenizer.apply_chat_template(messages[:1])
        lead = pieces[0].removeprefix(prompt) if pieces[0].startswith(prompt) else ""
        prompts, ends = [prompt], []
        for following in [*pieces[1:], rest]:
            end, text = self._split_end(following)
            ends.append(end)
            prompts.append(text.removesuffix(lead))
        return _Frame(tuple(prompts[:-1]), lead, tuple(ends))

    def _split_end(self, text: str) -> tuple[int, str]:
        """The special token that `text` begins with, and the rest; the end of sequence if it begins with none."""
        stripped = text.lstrip()
        first = self.tokenizer.encode(stripped)[:1]
        if first and self.tokenizer.is_special(first[0]):
            return first[0], stripped.removeprefix(self.tokenizer.name(first[0]))
        return self.eos_id, text

    def _checked(self, tokens: TrainingTokens) -> TrainingTokens:
        beyond = max(tokens.token_ids, default=0)
        if beyond >= self.config.decoder.vocab_size:
            raise ValueError(
                f"the text holds the token {self.tokenizer.name(beyond)!r}, for which the model has no embedding"
            )
        return tokens


def _remember(cache: dict[Key, Value], key: Key, value: Value, limit: int) -> None:
    """Add to a bounded dictionary; the oldest entry leaves."""
    if len(cache) >= limit:
        cache.pop(next(iter(cache)))
    cache[key] = value


def _chunk_lengths(images: Sequence["PreparedImage"]) -> list[int]:
    """The visual tokens of each placeholder."""
    return [
        image.num_tokens // image.num_placeholders for image in images for _ in range(image.num_placeholders)
    ]


def _defused(text: str) -> str:
    """An `<image>` inside an answer would be taken for an image."""
    return text.replace(IMAGE_PLACEHOLDER, "<IMAGE>")


def _is_blank(question: str) -> bool:
    return not question.replace(IMAGE_PLACEHOLDER, "").strip()
