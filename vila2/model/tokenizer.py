"""A checkpoint's tokenizer, behind the few calls that prompts and the engine need.

Read from the checkpoint's own files only: no download, and no code that ships with a checkpoint is run. Chat
templates are rendered by transformers, in jinja2's sandbox.
"""

import os
from collections.abc import Iterable, Sequence
from enum import IntEnum
from importlib import import_module
from pathlib import Path
from typing import Any

from vila2.errors import CheckpointError
from vila2.model.weight_files import read_json

IMAGE_PLACEHOLDER = "<image>"
_PROBE = "vila2probe"
_SPACES = ("\u2581", "\u0120")  # how vocabularies write a space: SentencePiece, byte-level
_LINES = ("\u010a", "<0x0A>", "\n")  # and a new line


class TokenKind(IntEnum):
    """What a token is to the word that it stands in."""

    INSIDE = 0  # it goes on with a word
    WORD = 1  # a space and the beginning of a word
    MARK = 2  # it stands for itself: punctuation
    LINE = 3  # a new line, and what follows


class Tokenizer:
    """Text to token ids and back. `eos_ids` end a caption; `image_token_id` is None where `<image>` is no token."""

    def __init__(self, inner: Any, eos_ids: Iterable[int], chat_template: str | None = None) -> None:
        self.inner = inner
        self.chat_template: str | None = chat_template
        self.bos_id: int | None = inner.bos_token_id
        self.bos_token: str | None = inner.bos_token
        self.eos_ids: frozenset[int] = frozenset(eos_ids)
        self._size = len(inner)
        self.image_token_id: int | None = self.token_id(IMAGE_PLACEHOLDER)
        with_specials = self._ids("a", add_special_tokens=True)
        self.adds_bos: bool = bool(with_specials) and with_specials[0] == self.bos_id
        self.newline_ids: tuple[int, ...] = tuple(self._ids("\n", add_special_tokens=True))
        self._content_is_list = chat_template is not None and self._wants_list()

    def __len__(self) -> int:
        return self._size

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self.inner(text, add_special_tokens=add_special_tokens)["input_ids"])

    @property
    def text_vocab_size(self) -> int:
        """One more than the highest id that ordinary text can become; added tokens are not counted."""
        added = self.inner.added_tokens_decoder
        return 1 + max((index for index in self.inner.get_vocab().values() if index not in added), default=-1)

    def token_id(self, token: str) -> int | None:
        """The id of a token given as it is written in the vocabulary, or None."""
        found = self.inner.get_vocab().get(token)
        return None if found is None else int(found)

    def is_special(self, token: int) -> bool:
        """Is this id a special token or an added one, rather than a piece of ordinary text?"""
        return token in self.inner.all_special_ids or token in self.inner.added_tokens_decoder

    def kinds(self) -> bytes:
        """A `TokenKind` for each id."""
        pieces = self.inner.convert_ids_to_tokens(list(range(self._size)))
        return bytes(_kind(piece or "") for piece in pieces)

    def name(self, token: int) -> str:
        """The token as it is written in the vocabulary."""
        return str(self.inner.convert_ids_to_tokens(token))

    def add_image_token(self) -> None:
        """Make `<image>` one token, as the NVILA code does after loading."""
        if self.image_token_id is None:
            self.inner.add_tokens([IMAGE_PLACEHOLDER], special_tokens=True)
            self._size = len(self.inner)
            self.image_token_id = self.token_id(IMAGE_PLACEHOLDER)

    def add_eos_ids(self, ids: Iterable[int]) -> None:
        self.eos_ids |= frozenset(ids)

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """Token ids of `text`. With `add_bos`, exactly as the tokenizer does by itself: some add a BOS, some none."""
        if add_bos:
            return self._ids(text, add_special_tokens=True)
        return self._ids(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens. Ids beyond the vocabulary (padding rows of a model) are left out."""
        known = [token for token in ids if 0 <= token < self._size]
        return str(self.inner.decode(known, skip_special_tokens=True))

    def apply_chat_template(
        self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        """Render `messages` ({role, content}, content with `<image>` where an image goes) by the chat template.

        Templates of processors take the content as a list of typed parts; such a template gets one. CheckpointError
        if there is no template or it does not render.
        """
        if self.chat_template is None:
            raise CheckpointError("the tokenizer has no chat template: choose one with --template")
        contents = [_parts(m["content"]) if self._content_is_list else m["content"] for m in messages]
        typed = [{**m, "content": content} for m, content in zip(messages, contents, strict=True)]
        return self._render(typed, add_generation_prompt)

    def _render(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool) -> str:
        try:
            return str(
                self.inner.apply_chat_template(
                    messages,
                    chat_template=self.chat_template,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )
            )
        except Exception as error:  # a template is a program of the checkpoint's: it may fail in any way
            raise CheckpointError(f"the chat template of the checkpoint fails: {error}") from None

    def _wants_list(self) -> bool:
        """Does the template read the content as a list of parts? Given a string, such a template drops its text."""
        try:
            return _PROBE not in self._render(
                [{"role": "user", "content": _PROBE}], add_generation_prompt=True
            )
        except CheckpointError:
            return True


def _kind(piece: str) -> TokenKind:
    if piece.startswith(_LINES):
        return TokenKind.LINE
    if not any(character.isalnum() for character in piece):
        return TokenKind.MARK
    return TokenKind.WORD if piece.startswith(_SPACES) else TokenKind.INSIDE


def _parts(content: str) -> list[dict[str, str]]:
    """The typed parts of a content. A processor's template writes the newline after an image by itself."""
    parts: list[dict[str, str]] = []
    for index, chunk in enumerate(content.split(IMAGE_PLACEHOLDER)):
        if index:
            parts.append({"type": "image"})
        text = chunk.removeprefix("\n") if index else chunk
        if text:
            parts.append({"type": "text", "text": text})
    return parts


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in the folder `path`; end-of-sequence ids also from its generation_config.json.

    CheckpointError if there is none or it cannot be read without running code of the checkpoint.
    """
    folder = Path(path)
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    if not any((folder / name).is_file() for name in names):
        raise CheckpointError(f"{folder} holds no tokenizer (tokenizer.json or tokenizer.model): incomplete")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import AutoTokenizer

    sentencepiece_only = (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()
    changes = _sentencepiece_settings(folder) if sentencepiece_only else {}
    try:
        inner = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, **changes
        )
    except Exception as error:  # transformers and the tokenizers library raise many types, some their own
        raise CheckpointError(f"the tokenizer in {folder} cannot be loaded: {_first_line(error)}") from None
    return Tokenizer(inner, _eos_ids(inner, folder), _chat_template(inner, folder))


def _sentencepiece_settings(folder: Path) -> dict[str, bool]:
    """What to tell transformers about a tokenizer.model. Llama's adds a BOS unless the config says otherwise."""
    try:
        import_module("google.protobuf")
    except ModuleNotFoundError:
        raise CheckpointError(
            f"{folder / 'tokenizer.model'} is read with protobuf, which is not installed: pip install protobuf"
        ) from None
    config = folder / "tokenizer_config.json"
    silent = not config.is_file() or read_json(config).get("add_bos_token") is None
    return {"add_bos_token": True} if silent else {}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _eos_ids(inner: Any, folder: Path) -> set[int]:
    ids = set() if inner.eos_token_id is None else {int(inner.eos_token_id)}
    generation = folder / "generation_config.json"
    configured = read_json(generation).get("eos_token_id") if generation.is_file() else None
    if configured is not None:
        ids |= {int(token) for token in (configured if isinstance(configured, list) else [configured])}
    return ids


def _chat_template(inner: Any, folder: Path) -> str | None:
    """The tokenizer's own template, else that of the processor (older LLaVA: chat_template.json)."""
    template = getattr(inner, "chat_template", None)
    if template is None and (folder / "chat_template.json").is_file():
        template = read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, dict):  # several by name
        template = template.get("default")
    return template if isinstance(template, str) else None


def has_chat_template(folder: Path) -> bool:
    """Will `load_tokenizer(folder)` have a chat template? Known from the files, without loading it."""
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    config = folder / "tokenizer_config.json"
    return config.is_file() and bool(read_json(config).get("chat_template"))
