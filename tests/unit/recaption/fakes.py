"""A captioner without a model: answers are a function of the request, in an order of its own."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vila2.types import Caption, CaptionRequest, FinishReason

Answer = Callable[[CaptionRequest], Caption]


def say(text: str, reason: FinishReason = FinishReason.STOP) -> Answer:
    return lambda request: Caption(request.id, text, tuple(range(len(text.split()))), reason, 7)


def echo(request: CaptionRequest) -> Caption:
    """A caption that depends on everything that may decide it, and on nothing else."""
    text = (
        f"{request.prompt} | {request.images[0]} | {request.rng_key % 1000} {request.sampling.temperature}."
    )
    return Caption(request.id, text, tuple(range(len(text.split()))), FinishReason.STOP, 7)


class FakeCaptioner:
    """Holds up to `room` requests and answers the newest first, so that order never agrees with the source's."""

    model_digest = "fake-digest"
    model_name = "fake"
    description = "canned answers"

    def __init__(self, answer: Answer = echo, room: int = 4) -> None:
        self.answer, self.room = answer, room
        self.requests: list[CaptionRequest] = []
        self.prepared = 0
        self.closed = False

    def prepare(self, image: NDArray[np.uint8]) -> Any:
        self.prepared += 1
        return int(image.sum())

    def caption(self, requests: Iterable[CaptionRequest | None]) -> Iterator[Caption]:
        source = iter(requests)
        held: list[CaptionRequest] = []
        exhausted = False
        while not exhausted or held:
            while not exhausted and len(held) < self.room:
                try:
                    request = next(source)
                except StopIteration:
                    exhausted = True
                    break
                if request is None:
                    break
                self.requests.append(request)
                held.append(request)
            if held:
                yield self.answer(held.pop())

    def stats(self) -> dict[str, float]:
        return {"vision_s": 0.0, "language_s": 0.0, "new_tokens": float(len(self.requests))}

    def close(self) -> None:
        self.closed = True
