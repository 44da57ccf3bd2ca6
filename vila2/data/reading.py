"""Bytes of images and texts from files that we do not trust: paths that escape, odd files, odd encodings."""

import errno
import json
import os
import stat
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from vila2.types import ErrorKind, SampleError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
TEXT_EXTENSIONS = ("txt", "caption", "json")  # in order of preference for the original caption
CAPTION_FIELDS = ("caption", "text", "original", "alt", "alt_text", "alttext", "txt", "description", "title")
MAX_TEXT_BYTES = 1 << 20
MAX_IMAGE_BYTES = 1 << 29


class BadSample(Exception):
    """What is wrong with one sample. Stays inside vila2.data: a reader turns it into `Sample.error`."""

    def __init__(self, kind: ErrorKind, message: str) -> None:
        super().__init__(message)
        self.error = SampleError(kind, message.encode("utf-8", "backslashreplace").decode())


def safe_join(root: Path, relative: str) -> Path:
    """`root / relative`, which must stay inside `root` after symbolic links are followed. Raises BadSample."""
    parts = PurePosixPath(relative).parts
    if not parts or "\0" in relative:
        raise BadSample(ErrorKind.BAD_RECORD, f"not a path: {relative!r}")
    if PurePosixPath(relative).is_absolute() or PureWindowsPath(relative).drive or ".." in parts:
        raise BadSample(
            ErrorKind.UNSAFE_PATH, f"the path must be relative and stay in its folder: {relative!r}"
        )
    path = root / relative
    try:
        inside = os.path.realpath(path).startswith(os.path.join(os.path.realpath(root), ""))  # noqa: PTH118
    except (OSError, ValueError) as exc:
        raise BadSample(ErrorKind.READ_ERROR, f"cannot resolve {relative!r}: {exc}") from exc
    if not inside:
        raise BadSample(ErrorKind.UNSAFE_PATH, f"a symbolic link leads out of the folder: {relative!r}")
    return path


def read_image_file(path: Path, shown: str) -> bytes:
    """The bytes of an image file; `shown` names it in messages. Raises BadSample."""
    data = read_file(path, shown, MAX_IMAGE_BYTES)
    if not data:
        raise BadSample(ErrorKind.EMPTY_FILE, f"the file has 0 bytes: {shown}")
    return data


def read_file(path: Path, shown: str, max_bytes: int) -> bytes:
    """The bytes of a regular file. Raises BadSample: missing, unreadable, larger than `max_bytes`, a pipe."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not block us
        with os.fdopen(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise BadSample(ErrorKind.READ_ERROR, f"not a regular file: {shown}")
            if status.st_size > max_bytes:
                raise BadSample(ErrorKind.READ_ERROR, f"larger than {max_bytes} bytes: {shown}")
            return file.read()
    except FileNotFoundError as exc:
        raise BadSample(ErrorKind.MISSING_FILE, f"no such file: {shown}") from exc
    except OSError as exc:
        missing = exc.errno == errno.ENOTDIR
        kind = ErrorKind.MISSING_FILE if missing else ErrorKind.READ_ERROR
        raise BadSample(kind, f"cannot read {shown}: {exc.strerror or exc}") from exc


def decode_text(data: bytes, shown: str) -> str:
    """UTF-8 text, stripped. Raises BadSample."""
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as exc:
        raise BadSample(ErrorKind.BAD_TEXT, f"not UTF-8 at byte {exc.start}: {shown}") from exc


def parse_json(text: str, shown: str) -> Any:
    """The JSON value in `text`; control characters inside strings are accepted. Raises BadSample."""
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError) as exc:
        raise BadSample(ErrorKind.BAD_RECORD, f"not JSON ({exc}): {shown}") from exc


def text_fields(record: Any, shown: str) -> dict[str, str]:
    """The string fields of a JSON object (empty for any other value). Raises BadSample on lone surrogates."""
    if not isinstance(record, dict):
        return {}
    fields = {str(name): value for name, value in record.items() if isinstance(value, str)}
    for name, value in fields.items():
        check_text(name, shown)
        check_text(value, shown)
    return fields


def check_text(text: str, shown: str) -> str:
    """`text`, if it can be written as UTF-8. JSON escapes can spell half a surrogate pair. Raises BadSample."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise BadSample(ErrorKind.BAD_TEXT, f"half a surrogate pair in {shown}") from exc
    return text


def pick_caption(fields: dict[str, str]) -> str:
    """The original caption among named texts: the first of CAPTION_FIELDS that is there, whatever its case."""
    by_name = {name.lower(): value for name, value in reversed(fields.items())}
    return next((by_name[name].strip() for name in CAPTION_FIELDS if by_name.get(name, "").strip()), "")


def read_sidecar(data: bytes, extension: str, shown: str) -> tuple[str, dict[str, str]]:
    """The original caption and the named texts of a .txt, .caption or .json beside an image. Raises BadSample."""
    if len(data) > MAX_TEXT_BYTES:
        raise BadSample(ErrorKind.BAD_TEXT, f"larger than {MAX_TEXT_BYTES} bytes: {shown}")
    text = decode_text(data, shown)
    if extension != "json":
        return text, {}
    fields = text_fields(parse_json(text, shown), shown) if text else {}
    return pick_caption(fields), fields


def printable(name: bytes | str) -> str:
    """A file name as text that UTF-8 can hold: bytes that are not UTF-8 appear as \\xNN."""
    raw = os.fsencode(name) if isinstance(name, str) else name
    return raw.decode("utf-8", "backslashreplace")


def unique_key(key: str, seen: dict[str, int]) -> str:
    """`key`, or `key#2`, `key#3`, ... if it was seen before. `seen` remembers keys and their last number."""
    if key not in seen:
        seen[key] = 1
        return key
    count = seen[key] + 1
    while (candidate := f"{key}#{count}") in seen:
        count += 1
    seen[key] = count
    seen[candidate] = 1
    return candidate
