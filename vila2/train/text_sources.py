"""Documents from JSON records: conversations in LLaVA's form, plain text, and interleaved images and texts.

A record that cannot be used is skipped and named when it is met; image paths must stay inside their folder.
"""

import base64
import binascii
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from vila2.data.llava_json import build_index
from vila2.data.local_index import index_path, load_index, save_index
from vila2.data.reading import BadSample, check_text, pick_caption, read_image_file, safe_join, text_fields
from vila2.errors import SourceError
from vila2.train.examples import Conversation, Document, Image, LazyImage, SkippedDocument
from vila2.train.records import LineRecords, Records, find_files, read_record

_MARK = "<image>"
_SPEAKERS = {"human": 0, "user": 0, "gpt": 1, "assistant": 1}
# Names of a question and of its answer in a record of one turn.
_PAIRS = (("question", "answer"), ("prompt", "response"), ("instruction", "output"))
_LEADING_MARKS = re.compile(r"\s*(?:<image>\s*)+")
_MAX_BASE64 = 1 << 28


class RecordSource:
    """`make` turns record `index` into a document; its text problems (BadSample) become skips."""

    def __init__(self, name: str, records: Records, make: Callable[[str, dict[str, Any]], Document]) -> None:
        self.name, self.records, self._make = name, records, make

    @property
    def length(self) -> int:
        return len(self.records)

    def document(self, index: int) -> Document:
        key = f"{self.name}/{index}"
        try:
            return self._make(key, self.records[index])
        except BadSample as bad:
            raise SkippedDocument(bad.error.kind.value, f"{key}: {bad.error.message}") from None


def open_text(name: str, path: str, cache: Path | None = None) -> RecordSource:
    """JSON Lines of texts: `text`, or a conversation (`conversations`, `messages`, question and answer)."""
    return RecordSource(name, LineRecords(find_files(path, (".jsonl", ".ndjson")), cache), text_document)


def open_interleaved(
    name: str, path: str, image_root: str | None = None, max_images: int = 6, cache: Path | None = None
) -> RecordSource:
    """JSON Lines of interleaved documents; images below `image_root` (default: the folder of the file)."""
    files = find_files(path, (".jsonl", ".ndjson"))
    root = _root(image_root, files[0])
    make = partial(interleaved_document, image_root=root, max_images=max_images)
    return RecordSource(name, LineRecords(files, cache), make)


def open_llava(
    name: str, path: str, image_root: str | None = None, cache: Path | None = None
) -> RecordSource:
    """A LLaVA file (a JSON list, or JSON Lines); images below `image_root` (default: the folder of the file)."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise SourceError(f"{path} is not a file: LLaVA data are one .json or .jsonl file")
    make = partial(llava_document, image_root=_root(image_root, file))
    return RecordSource(name, _LlavaRecords(file, cache), make)


def text_document(key: str, record: dict[str, Any]) -> Document:
    """A document without images. Raises SkippedDocument or BadSample."""
    turns = _turns(record, key)
    if turns:
        return Document(key, "conversation", conversations=(turns,))
    text = record.get("text")
    if not isinstance(text, str) or not text.strip():
        raise SkippedDocument("no_text", f"{key}: the record has neither text nor a conversation")
    return Document(key, "text", text=check_text(text.strip(), key))


def llava_document(key: str, record: dict[str, Any], image_root: Path) -> Document:
    """A conversation about the images of a record, or its caption. Raises SkippedDocument or BadSample.

    Marks that stand before all text are taken away, and so is the one mark of a single image wherever it stands: the
    encoder sets these images first, as at inference. Several images among texts stay where they are.
    """
    images = _image_paths(record, key)
    loaded = tuple(_lazy(image_root, path) for path in images)
    turns = _turns(record, key)
    if not turns:
        text = pick_caption(text_fields(record, key))
        if not text:
            raise SkippedDocument("no_text", f"{key}: the record has neither a conversation nor a caption")
        return Document(key, "caption" if images else "text", loaded, text)
    return Document(key, "conversation", loaded, conversations=(_images_first(turns, len(images)),))


def interleaved_document(key: str, record: dict[str, Any], image_root: Path, max_images: int = 6) -> Document:
    """A record `{images, text}` with a mark for each image, or lists as MMC4's and OBELICS' are.

    Of more than `max_images` images the first stay. Raises SkippedDocument or BadSample.
    """
    if "text_list" in record:
        pieces = _mmc4_pieces(record, key, max_images)
    elif "texts" in record:
        pieces = _aligned_pieces(record, key)
    else:
        pieces = _marked_pieces(record, key)
    text, images = "", list[Image]()
    for piece in pieces:
        if isinstance(piece, str):
            text += piece
        elif len(images) < max_images:
            text += _MARK
            images.append(_lazy(image_root, piece[0]) if isinstance(piece[0], str) else piece[0])
    if not text.replace(_MARK, "").strip():
        raise SkippedDocument("no_text", f"{key}: the record has no text")
    return Document(key, "interleaved", tuple(images), check_text(text.strip(), key))


_Piece = str | tuple[str | bytes]  # a text, or an image: its path or its bytes


def _marked_pieces(record: dict[str, Any], key: str) -> list[_Piece]:
    text, images = record.get("text"), _image_paths(record, key)
    if not isinstance(text, str):
        raise SkippedDocument("no_text", f"{key}: the record has no text")
    chunks = text.split(_MARK)
    if len(chunks) == 1:
        return [*((path,) for path in images), text]
    if len(chunks) != len(images) + 1:
        raise SkippedDocument("bad_prompt", f"{key}: {len(chunks) - 1} {_MARK}s for {len(images)} images")
    pieces: list[_Piece] = [chunks[0]]
    for path, chunk in zip(images, chunks[1:], strict=True):
        pieces += [(path,), chunk]
    return pieces


def _aligned_pieces(record: dict[str, Any], key: str) -> list[_Piece]:
    """`texts` and `images` side by side, one of the two null at each place."""
    texts, images = record["texts"], record.get("images")
    if not isinstance(texts, list) or not isinstance(images, list) or len(texts) != len(images):
        raise SkippedDocument("bad_record", f"{key}: texts and images are not lists of one length")
    pieces: list[_Piece] = []
    for text, image in zip(texts, images, strict=True):
        if isinstance(image, str) and image:
            pieces.append((image,))
        if isinstance(text, str) and text.strip():
            pieces.append(_defused(text.strip()) + "\n")
    return pieces


def _mmc4_pieces(record: dict[str, Any], key: str, max_images: int) -> list[_Piece]:
    """Sentences, and before each the images that belong to it (VILA, and of more than its limit the first listed)."""
    sentences, infos = record["text_list"], record.get("image_info", [])
    if not isinstance(sentences, list) or not all(isinstance(s, str) for s in sentences):
        raise SkippedDocument("bad_record", f"{key}: text_list is not a list of sentences")
    if not isinstance(infos, list) or not all(isinstance(info, dict) for info in infos):
        raise SkippedDocument("bad_record", f"{key}: image_info is not a list of objects")
    before: dict[int, list[_Piece]] = {}
    for info in infos[:max_images]:
        place = info.get("matched_text_index")
        if not isinstance(place, int) or not 0 <= place < len(sentences):
            raise SkippedDocument("bad_record", f"{key}: an image belongs to no sentence ({place!r})")
        before.setdefault(place, []).append((_mmc4_image(info, key),))
    pieces: list[_Piece] = []
    for place, sentence in enumerate(sentences):
        pieces += [*before.get(place, []), _defused(sentence.strip()) + " "]
    return pieces


def _mmc4_image(info: dict[str, Any], key: str) -> str | bytes:
    encoded, name = info.get("image_base64"), info.get("image_name")
    if isinstance(encoded, str) and len(encoded) <= _MAX_BASE64:
        try:
            return base64.b64decode(encoded, validate=True)
        except binascii.Error:
            raise SkippedDocument("corrupt_image", f"{key}: an image is not base64") from None
    if not isinstance(name, str) or not name:
        raise SkippedDocument("no_image", f"{key}: an image has neither bytes nor a name")
    return name


def _turns(record: dict[str, Any], key: str) -> Conversation:
    """The (question, answer) turns of a record; empty if it has none. Raises SkippedDocument or BadSample.

    A system message and an answer that nobody asked for are left out, and a last question without an answer.
    """
    listed = record.get("conversations", record.get("messages"))
    if listed is None:
        for ask, reply in _PAIRS:
            question, answer = record.get(ask), record.get(reply)
            if isinstance(question, str) and isinstance(answer, str) and answer.strip():
                more = record.get("input") if ask == "instruction" else None
                question = f"{question}\n{more}" if isinstance(more, str) and more.strip() else question
                return ((check_text(question, key), check_text(answer, key)),)
        return ()
    if not isinstance(listed, list) or not all(isinstance(said, dict) for said in listed):
        raise SkippedDocument("bad_record", f"{key}: the conversation is not a list of objects")
    said: list[tuple[int, str]] = []
    for item in listed:
        speaker, value = item.get("from", item.get("role")), item.get("value", item.get("content"))
        if speaker == "system":
            continue
        if speaker not in _SPEAKERS or not isinstance(value, str):
            raise SkippedDocument(
                "bad_record", f"{key}: a turn has no known speaker ({speaker!r}) or no text"
            )
        said.append((_SPEAKERS[speaker], check_text(value, key)))
    if said and said[0][0] == 1:
        said = said[1:]
    said = said[: len(said) // 2 * 2]
    if any(speaker != place % 2 for place, (speaker, _) in enumerate(said)):
        raise SkippedDocument("bad_record", f"{key}: the speakers do not take turns")
    if any(not answer.strip() for _, answer in said[1::2]):
        raise SkippedDocument("no_text", f"{key}: an answer is empty")
    return tuple((said[place][1], said[place + 1][1]) for place in range(0, len(said), 2))


def _images_first(turns: Conversation, num_images: int) -> Conversation:
    counts = [question.count(_MARK) for question, _ in turns]
    first = turns[0][0]
    if num_images == 1 and sum(counts) == 1 and counts[0] == 1:
        first = first.replace(_MARK, "").strip()
    elif num_images and sum(counts) == num_images == counts[0]:
        rest = _LEADING_MARKS.sub("", first, count=1) if _LEADING_MARKS.match(first) else first
        first = first if _MARK in rest else rest
    return ((first, turns[0][1]), *turns[1:])


def _image_paths(record: dict[str, Any], key: str) -> list[str]:
    value = record.get("image", record.get("images"))
    listed = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(path, str) and path for path in listed):
        raise SkippedDocument("bad_record", f"{key}: the images are not given by their paths")
    return listed


def _lazy(root: Path, path: str) -> LazyImage:
    return LazyImage(partial(_read_image, root, path))


def _read_image(root: Path, path: str) -> bytes:
    try:
        return read_image_file(safe_join(root, path), path)
    except BadSample as bad:
        raise SkippedDocument(bad.error.kind.value, bad.error.message) from None


def _root(image_root: str | None, file: Path) -> Path:
    root = file.parent if image_root is None else Path(image_root).expanduser()
    if not root.is_dir():
        raise SourceError(f"the image root {root} is not a folder")
    return root


def _defused(text: str) -> str:
    return text.replace(_MARK, "<IMAGE>")


class _LlavaRecords:
    """The records of a LLaVA file by number; an index file of `recaption` over the same file is used as well."""

    def __init__(self, file: Path, cache: Path | None) -> None:
        self._file = file
        index = None
        if cache is not None:
            status = file.stat()
            kept = index_path(cache, "json", str(file), status.st_size, status.st_mtime_ns)
            index = load_index(kept)
        if index is None:
            index = build_index(file)
            if cache is not None:
                save_index(kept, index)
        place = index["place"]
        self._places = place[place[:, 2] <= 0]  # the first image of a record, or its only one
        if len(self._places) == 0:
            raise SourceError(f"{file} holds no records")

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, size, _ = self._places[index]
        return read_record(self._file, int(start), int(size))
