"""The engine in a thread of its own: requests come in from anywhere as they arrive, and join the batch under way.

One thread adds, steps and aborts, so the engine needs no locks. What it has to say it says once a step, of all
requests together, through `deliver`.
"""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from vila2.backends.native import NativeCaptioner
from vila2.serve.text_stream import TextStream
from vila2.types import Caption, CaptionRequest, ErrorKind, FinishReason, SampleError


@dataclass(frozen=True, slots=True)
class News:
    """What became of a request: a piece of its text, and at last its caption."""

    id: int
    piece: str = ""
    caption: Caption | None = None


@dataclass(frozen=True, slots=True)
class _Order:
    request: CaptionRequest | None = None
    stream: bool = False
    abort: int = -1
    stop: bool = False


class EngineThread:
    """Runs until `close`. Should the engine itself fail, `failure` says how, and every request ends as an error."""

    def __init__(self, captioner: NativeCaptioner, deliver: Callable[[list[News]], None]) -> None:
        self.failure = ""
        self._captioner, self._deliver = captioner, deliver
        self._orders: SimpleQueue[_Order] = SimpleQueue()
        self._waiting: deque[_Order] = deque()
        self._under_way: set[int] = set()
        self._streams: dict[int, TextStream] = {}
        self._thread = threading.Thread(target=self._run, name="vila2-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive() and not self.failure

    @property
    def num_waiting(self) -> int:
        """Requests that the engine has not taken yet."""
        return self._orders.qsize() + len(self._waiting)

    def submit(self, request: CaptionRequest, *, stream: bool = False) -> None:
        """Queue a request; its number must be new. With `stream` its text is delivered as it grows."""
        self._orders.put(_Order(request, stream))

    def abort(self, number: int) -> None:
        """Let go of a request. Nothing more is heard of it, or only what is on its way already."""
        self._orders.put(_Order(abort=number))

    def close(self, timeout_s: float = 10.0) -> None:
        """Stop after the step under way; what has not ended is dropped. Callable twice."""
        self._orders.put(_Order(stop=True))
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            while self._take_orders():
                news = self._admit()
                if self._under_way:
                    news += self._step()
                if news:
                    self._deliver(news)
        except BaseException as error:  # of the engine: no request can go on, and the next might fail alike
            self._fail(error)

    def _take_orders(self) -> bool:
        """Do what was asked for since the last step; wait while there is nothing to do. False at the end."""
        is_idle = not self._under_way and not self._waiting
        try:
            while True:
                order = self._orders.get(block=is_idle)
                is_idle = False
                if order.stop:
                    return False
                if order.request is not None:
                    self._waiting.append(order)
                else:
                    self._drop(order.abort)
        except Empty:
            return True

    def _drop(self, number: int) -> None:
        if number in self._under_way:
            self._captioner.abort(number)
            self._forget(number)
            return
        for order in self._waiting:
            if order.request is not None and order.request.id == number:
                self._waiting.remove(order)
                return

    def _admit(self) -> list[News]:
        """Hand over as many requests as the engine has room for; the news are of those that it cannot take."""
        refused = []
        while self._waiting and len(self._under_way) < self._captioner.room:
            order = self._waiting.popleft()
            request = order.request
            assert request is not None
            try:
                error = self._captioner.add(request)
            except Exception as trouble:  # a chat template is the checkpoint's program: it may fail on a text
                error = SampleError(ErrorKind.BAD_PROMPT, f"{type(trouble).__name__}: {trouble}")
            if error is not None:
                refused.append(News(request.id, caption=failed(request.id, error)))
                continue
            self._under_way.add(request.id)
            if order.stream:
                decode = self._captioner.checkpoint.tokenizer.decode
                self._streams[request.id] = TextStream(decode, request.sampling.stop)
        return refused

    def _step(self) -> list[News]:
        news = []
        for caption in self._captioner.step():
            stream = self._streams.get(caption.id)
            piece = stream.finish(caption.text) if stream is not None else ""
            self._forget(caption.id)
            news.append(News(caption.id, piece, caption))
        if self._streams:
            for number, tokens in self._captioner.engine.written():
                stream = self._streams.get(number)
                if stream is not None and (piece := stream.push(tokens)):
                    news.append(News(number, piece))
        return news

    def _forget(self, number: int) -> None:
        self._under_way.discard(number)
        self._streams.pop(number, None)

    def _fail(self, error: BaseException) -> None:
        self.failure = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        reason = SampleError(ErrorKind.ENGINE_ERROR, "the engine failed, and this server stops")
        numbers = [*self._under_way, *(order.request.id for order in self._waiting if order.request)]
        self._deliver([News(number, caption=failed(number, reason)) for number in numbers])


def failed(number: int, error: SampleError) -> Caption:
    return Caption(number, "", finish_reason=FinishReason.ERROR, error=error)
