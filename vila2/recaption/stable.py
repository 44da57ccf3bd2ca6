"""Hashes that are the same in every process and release, unlike Python's own: draws and seeds hang on them."""

import hashlib


def stable_hash(*parts: str | int) -> int:
    """A number in [0, 2**63) from `parts`. Parts are kept apart: ("ab", "c") and ("a", "bc") differ."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        tag = b"i" if isinstance(part, int) else b"s"
        text = str(part).encode("utf-8", "surrogatepass")
        digest.update(tag + len(text).to_bytes(8, "little") + text)
    return int.from_bytes(digest.digest(), "little") >> 1
