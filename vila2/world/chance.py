"""Draws that are the same on every machine and Python: only `random.random`, whose sequence is promised."""

import hashlib
import random
from bisect import bisect_right
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def stable_hash(*key: object) -> int:
    """64 bits of `key`, the same everywhere."""
    data = "\x1f".join(map(str, key)).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


class Chance:
    """A stream of draws that follows from `key` alone."""

    __slots__ = ("random",)

    def __init__(self, *key: object) -> None:
        self.random = random.Random(stable_hash(*key)).random

    def below(self, rate: float) -> bool:
        return self.random() < rate

    def integer(self, count: int) -> int:
        """0 <= integer < count."""
        return int(self.random() * count)

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.random()

    def pick(self, values: Sequence[T]) -> T:
        return values[int(self.random() * len(values))]

    def weighted(self, values: Sequence[T], cumulative: Sequence[float]) -> T:
        """One of `values`; `cumulative` are the running sums of their weights."""
        return values[min(bisect_right(cumulative, self.random() * cumulative[-1]), len(values) - 1)]

    def shuffled(self, values: Sequence[T]) -> list[T]:
        return self.sample(values, len(values))

    def sample(self, values: Sequence[T], count: int) -> list[T]:
        """Up to `count` of `values`, in random order."""
        rest = list(values)
        count = min(count, len(rest))
        for i in range(count):
            j = i + int(self.random() * (len(rest) - i))
            rest[i], rest[j] = rest[j], rest[i]
        return rest[:count]
