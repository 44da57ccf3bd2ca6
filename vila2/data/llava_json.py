"""LLaVA training files: a JSON list, or one JSON object a line, of records that name images below `image_root`.

A record is `{"id", "image", "conversations": [{"from", "value"}, ...]}` with further fields allowed. `image` may be a
list: each image is a sample of its own, with the key `id#0`, `id#1`, ... An id that comes again gets `#2`, `#3`, ...
The original caption is the first answer of the conversation, or else a caption field; the first question, without
the image mark, is the field `question`. Records are found again by their byte offsets.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vila2.data.local_index import Index, index_path, load_index, pack_strings, save_index, unpack_string
from vila2.data.reading import (
    BadSample,
    check_text,
    decode_text,
    parse_json,
    pick_caption,
    read_image_file,
    safe_join,
    text_fields,
    unique_key,
)
from vila2.data.source import pick_indices
from vila2.errors import SourceError
from vila2.types import ErrorKind, Sample

_CHUNK = 1 << 24
_MAX_RECORD = 1 << 28
_GAP = re.compile(r"[\s,]*")
_SINGLE = -1  # the image number of a record with one image


@dataclass(frozen=True, slots=True)
class _Record:
    """Where a record lies and what it parsed to (None if it did not)."""

    offset: int
    size: int
    value: Any


def _lines(file: BinaryIO) -> Iterator[_Record]:
    """The lines of a JSON Lines file that are not blank."""
    offset = 0
    for line in file:
        start = offset
        offset += len(line)
        body = line.removeprefix(b"\xef\xbb\xbf") if start == 0 else line
        if not body.strip():
            continue
        try:
            value = json.loads(body.decode("utf-8", "replace"), strict=False)
        except (ValueError, RecursionError):
            value = None
        yield _Record(offset - len(body), len(body), value)


def _elements(file: BinaryIO, path: Path) -> Iterator[_Record]:
    """The elements of a JSON list, parsed piece by piece so that a file of any size fits. Raises SourceError.

    The bytes are read as Latin-1, in which a character is a byte and all of JSON's own signs are themselves.
    """
    decoder = json.JSONDecoder(strict=False)
    text, base, position = "", 0, 0  # base: the offset in the file of text[0]
    at_end = False
    started = False
    while True:
        gap = _GAP.match(text, position)
        position = gap.end() if gap else position
        if not started and position < len(text):
            position = text.index("[", position) + 1
            started = True
            continue
        if started and text[position : position + 1] == "]":
            return
        try:
            value, end = decoder.raw_decode(text, position)
            complete = end < len(text) or at_end  # a number could go on in the next piece
        except (ValueError, RecursionError) as exc:
            complete = False
            if at_end or len(text) - position > _MAX_RECORD:
                raise SourceError(
                    f"{path} is not a JSON list: no record can be read at byte {base + position}"
                    f" ({str(exc).split(':')[0]}); repair it, or convert it to one record a line (.jsonl)"
                ) from None
        if complete:
            yield _Record(base + position, end - position, _as_utf8(value, text[position:end]))
            position = end
            continue
        more = file.read(_CHUNK)
        at_end = not more
        text, base, position = text[position:] + more.decode("latin-1"), base + position, 0


def _as_utf8(value: Any, latin: str) -> Any:
    if latin.isascii():
        return value
    return json.loads(latin.encode("latin-1").decode("utf-8", "replace"), strict=False)


def _images(value: Any) -> list[str]:
    """The image paths of a record. Raises BadSample."""
    if not isinstance(value, dict):
        raise BadSample(ErrorKind.BAD_RECORD, "the record is not a JSON object")
    image = value.get("image")
    if image is None or image == []:
        raise BadSample(ErrorKind.NO_IMAGE, "the record has no image")
    images = [
        path for path in (image if isinstance(image, list) else [image]) if isinstance(path, str) and path
    ]
    if (isinstance(image, list) and len(images) < len(image)) or not images:
        raise BadSample(ErrorKind.BAD_RECORD, "`image` is neither a path nor a list of paths")
    return images


def _key(value: Any, number: int) -> str:
    identity = value.get("id") if isinstance(value, dict) else None
    if isinstance(identity, str | int) and str(identity):
        return str(identity).encode("utf-8", "backslashreplace").decode()
    return f"@{number}"


def build_index(path: Path) -> Index:
    """Scan a file. Arrays per sample: key, record (offset, size), number of the image in its record.
    Raises SourceError."""
    places: list[tuple[int, int, int]] = []
    keys: list[bytes] = []
    seen: dict[str, int] = {}
    try:
        with path.open("rb") as file:
            records = _lines(file) if _is_lines(file, path) else _elements(file, path)
            for number, record in enumerate(records):
                try:
                    count = len(_images(record.value))
                except BadSample:
                    count = 1
                key = _key(record.value, number)
                for k in range(count):
                    places.append((record.offset, record.size, k if count > 1 else _SINGLE))
                    keys.append(unique_key(f"{key}#{k}" if count > 1 else key, seen).encode())
    except OSError as exc:
        raise SourceError(f"cannot read {path}: {exc.strerror}") from exc
    index = pack_strings("key", keys)
    index["place"] = np.array(places, np.int64).reshape(-1, 3)
    return index


def _is_lines(file: BinaryIO, path: Path) -> bool:
    """Whether the file holds one object a line; leaves it at its start. Raises SourceError."""
    head = file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()
    file.seek(0)
    if head[:1] == b"[" and path.suffix.lower() not in (".jsonl", ".ndjson"):
        return False
    if head[:1] == b"{":
        return True
    what = "it is empty" if not head else f"it begins with {head[:20]!r}"
    raise SourceError(f"{path} is neither a JSON list of records nor one JSON record a line: {what}")


@dataclass
class JsonShard:
    """All samples of one LLaVA file."""

    path: Path
    image_root: Path
    index_dir: Path | None = None
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = self.path.name

    def __len__(self) -> int:
        return len(self._index["place"])

    def read(self, indices: Sequence[int] | None = None) -> Iterator[Sample]:
        chosen = pick_indices(len(self), indices)
        try:
            with self.path.open("rb") as file:
                for i in chosen:
                    yield self._sample(file, i)
        except FileNotFoundError as exc:
            raise SourceError(f"{self.path} is gone") from exc

    def _sample(self, file: BinaryIO, i: int) -> Sample:
        offset, size, number = map(int, self._index["place"][i])
        key = unpack_string(self._index, "key", i).decode()
        try:
            file.seek(offset)
            shown = f"the record at byte {offset}"
            record = parse_json(decode_text(file.read(size), shown), shown)
            image = _images(record)[max(number, 0)]
            fields = text_fields(record, shown)
            question, answer = _first_turns(record, shown)
            if question:
                fields.setdefault("question", question)
            data = read_image_file(safe_join(self.image_root, image), image)
        except BadSample as exc:
            return Sample(self.name, i, key, error=exc.error)
        return Sample(self.name, i, key, data, answer or pick_caption(fields), fields)

    @cached_property
    def _index(self) -> Index:
        if self.index_dir is None:
            return build_index(self.path)
        try:
            status = self.path.stat()
        except OSError as exc:
            raise SourceError(f"cannot read {self.path}: {exc.strerror}") from exc
        path = index_path(self.index_dir, "json", str(self.path), status.st_size, status.st_mtime_ns)
        index = load_index(path)
        if index is None:
            index = build_index(self.path)
            save_index(path, index)
        return index


def _first_turns(record: dict[str, Any], shown: str) -> tuple[str, str]:
    """The first question, without the image mark, and the first answer of a conversation. Raises BadSample."""
    turns = record.get("conversations", [])
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadSample(ErrorKind.BAD_RECORD, f"`conversations` is not a list of objects in {shown}")
    said: dict[str, str] = {}
    for turn in turns:
        speaker, value = turn.get("from"), turn.get("value")
        if isinstance(speaker, str) and isinstance(value, str):
            said.setdefault(speaker, check_text(value, shown))
    question = said.get("human", "").replace("<image>", "").strip()
    return question, said.get("gpt", "").strip()
