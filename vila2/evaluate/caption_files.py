"""Captions and references from files: recaption outputs, JSON lines, JSON maps, and the COCO caption layout."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vila2.errors import UsageError

_KEYS = ("key", "image_id", "id", "image")
_TEXTS = ("caption", "text")
_MANY = ("references", "captions")


def read_captions(path: str | Path, prompt: str | None = None) -> dict[str, str]:
    """key -> caption, from a recaption output folder (of its one prompt, or of `prompt`) or a .json or .jsonl file.

    A file has objects with a key (key, image_id, id or image) and a text (caption or text), or is one JSON object
    {key: caption}. UsageError for anything else, and for a key that comes twice.
    """
    path = Path(path)
    if path.is_dir():
        return _once(path, ((row["key"], row["caption"]) for row in output_rows(path, prompt)))
    return _once(path, _texts(path))


def read_references(path: str | Path) -> dict[str, list[str]]:
    """key -> reference captions, at least one each: the same files, where a key may come again, hold a list
    (references or captions), or be a COCO annotation file; of a recaption output, its originals."""
    path = Path(path)
    references: dict[str, list[str]] = {}
    pairs: Iterator[tuple[str, str]]
    if path.is_dir():
        pairs = ((row["key"], row["original"]) for row in output_rows(path, None) if row["original"].strip())
    else:
        pairs = _texts(path)
    for key, text in pairs:
        references.setdefault(key, []).append(text)
    return references


def output_rows(path: Path, prompt: str | None) -> Iterator[dict[str, Any]]:
    """The rows of a recaption output that have a caption, in order. UsageError unless they are of one prompt."""
    from vila2.data.verify import iter_rows

    if not (path / "parts").is_dir():
        raise UsageError(f"{path}: no output of `vila2-fast recaption` (it has no parts folder)")
    found: set[str] = set()
    for row in iter_rows(path):
        found.add(row["prompt"])
        if row["status"] == "error" or (prompt is not None and row["prompt"] != prompt):
            continue
        if prompt is None and len(found) > 1:
            raise UsageError(f"{path} has captions of several prompts: choose one with --prompt")
        yield row
    if prompt is not None and prompt not in found:
        raise UsageError(
            f"{path} has no captions of prompt {prompt!r}; it has {', '.join(sorted(found)) or 'none'}"
        )


def _once(path: Path, pairs: Iterator[tuple[str, str]]) -> dict[str, str]:
    captions: dict[str, str] = {}
    for key, text in pairs:
        if key in captions:
            raise UsageError(f"{path}: two captions for {key!r}")
        captions[key] = text
    return captions


def _texts(path: Path) -> Iterator[tuple[str, str]]:
    """(key, text) of a file; a key with several texts comes several times."""
    for where, record in _records(path):
        key = next((record[name] for name in _KEYS if name in record), None)
        several = next((record[name] for name in _MANY if isinstance(record.get(name), list)), None)
        texts: list[Any] = (
            several if several is not None else [next((record[n] for n in _TEXTS if n in record), None)]
        )
        if key is None or not texts or not all(isinstance(text, str) for text in texts):
            raise UsageError(f"{where}: expected a key ({', '.join(_KEYS)}) and a text ({', '.join(_TEXTS)})")
        for text in texts:
            yield str(key), text


def _records(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"{path}: cannot read the file: {reason}") from None
    if path.suffix == ".jsonl":
        for number, line in enumerate(content.splitlines(), 1):
            if line.strip():
                yield f"{path}:{number}", _object(line, f"{path}:{number}")
        return
    try:
        loaded = json.loads(content)
    except ValueError as error:
        raise UsageError(f"{path}: not JSON ({error})") from None
    if isinstance(loaded, dict) and isinstance(loaded.get("annotations"), list):
        loaded = loaded["annotations"]
    if isinstance(loaded, dict):
        loaded = [{"key": key, "captions": [v] if isinstance(v, str) else v} for key, v in loaded.items()]
    if not isinstance(loaded, list):
        raise UsageError(f"{path}: expected a list of captions or an object of them")
    for number, record in enumerate(loaded):
        if not isinstance(record, dict):
            raise UsageError(f"{path}: entry {number} is no object")
        yield f"{path}: entry {number}", record


def _object(line: str, where: str) -> Mapping[str, Any]:
    try:
        loaded = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{where}: not JSON ({error})") from None
    if not isinstance(loaded, dict):
        raise UsageError(f"{where}: expected an object")
    return loaded
