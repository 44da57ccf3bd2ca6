"""Content digests of files, remembered by path, size and time of change, so that a model is hashed once."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

_CHUNK_BYTES = 1 << 20


def checkpoint_digest(root: Path, files: Iterable[Path], remembered: Iterable[Path]) -> str:
    """A digest of the names (within `root`) and the whole contents of all files, 32 hexadecimal digits.

    Those in `remembered` (the big ones) are hashed again only when their size or time of change differ from the
    last time. Where the checkpoint lies does not matter.
    """
    cache = _read_cache()
    known = dict(cache)
    total = hashlib.blake2b(digest_size=16)
    big = set(remembered)
    for path in sorted({*files, *big}):
        if path in big:
            key = _cache_key(path)
            digest = known.get(key) or _file_digest(path)
            known[key] = digest
        else:
            digest = _file_digest(path)
        total.update(f"{path.relative_to(root).as_posix()}\0{digest}\n".encode())
    if known != cache:
        _write_cache(known)
    return total.hexdigest()


def _file_digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=32)
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def _cache_key(path: Path) -> str:
    stat = path.stat()
    return f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}"


def cache_folder() -> Path:
    """Where this user's caches lie. RuntimeError where there is no home directory."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "vila2-fast"


def _cache_path() -> Path:
    return cache_folder() / "digests.json"


def _read_cache() -> dict[str, str]:
    try:
        cache = json.loads(_cache_path().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # RuntimeError: no home directory
        return {}
    if not isinstance(cache, dict):
        return {}
    return {key: value for key, value in cache.items() if isinstance(value, str)}


def _write_cache(cache: dict[str, str]) -> None:
    """Replace the cache whole. A cache that cannot be written only costs time."""
    try:
        path = _cache_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(cache, file)
        Path(name).replace(path)
    except (OSError, RuntimeError):
        pass
