"""Between the connections and the engine: who is let in, how bodies become requests, where captions go.

Everything but `prepare`'s work belongs to one event loop. Bodies are parsed and images decoded in a few threads, by the
code that recaption decodes with; the engine has a thread of its own.
"""

import asyncio
import math
import os
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Lock

from vila2.backends.native import NativeCaptioner
from vila2.data.decode import DecodeError, DecodeLimits, decode_image, image_digest
from vila2.model.images import PreparedImage
from vila2.serve.chat import IMAGE_MARK, ApiError, ChatLimits, ChatRequest, parse_chat
from vila2.serve.engine_thread import EngineThread, News
from vila2.types import Caption, CaptionRequest

KEPT_IMAGES_BYTES = 64 << 20
_RATE_OVER = 64  # captions
_LONGEST_WAIT_S = 60


@dataclass(frozen=True, slots=True)
class DeskLimits:
    """What is let in: `max_requests` at once, with `max_bytes` of bodies in all."""

    max_requests: int
    max_bytes: int
    decode_workers: int = 0  # 0: by the number of cores
    images: DecodeLimits = field(default_factory=DecodeLimits)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that the engine can take."""

    chat: ChatRequest
    request: CaptionRequest


class Desk:
    """Use as: `open` in the event loop, then `admit`, `prepare`, `caption` or `pieces`, `leave` for each request."""

    def __init__(self, captioner: NativeCaptioner, chat: ChatLimits, limits: DeskLimits) -> None:
        self.captioner, self.chat_limits, self.limits = captioner, chat, limits
        self.engine = EngineThread(captioner, self._deliver)
        self.num_inside = 0
        self.is_closing = False
        self._bytes_inside = 0
        self._listeners: dict[int, asyncio.Future[Caption] | asyncio.Queue[News]] = {}
        self._next_id = 0
        self._ended: deque[float] = deque(maxlen=_RATE_OVER)
        self._kept = _KeptImages(KEPT_IMAGES_BYTES)
        workers = limits.decode_workers or max(2, min(16, (os.cpu_count() or 1) // 2))
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="vila2-decode")

    def open(self) -> None:
        """Start the engine; this event loop hears of its captions."""
        self._loop = asyncio.get_running_loop()
        self.engine.start()

    async def close(self) -> None:
        """Stop the threads. Whatever is under way ends as cancelled."""
        self.is_closing = True
        for listener in self._listeners.values():
            if isinstance(listener, asyncio.Future):
                listener.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self.engine.close)

    # ---- who is let in ----

    def admit(self, num_bytes: int) -> None:
        """Take a place for a body of this size, to be given back with `leave`. ApiError 429 if there is none."""
        if self.is_closing or self.engine.failure:
            raise ApiError(
                503, "the server is shutting down", headers={"retry-after": "1", "connection": "close"}
            )
        is_full = self.num_inside >= self.limits.max_requests
        if is_full or (self.num_inside and self._bytes_inside + num_bytes > self.limits.max_bytes):
            what = f"{self.num_inside} requests" if is_full else f"{self._bytes_inside} bytes of requests"
            raise ApiError(
                429,
                f"the server has {what} under way, as many as it takes: try again later",
                code="rate_limit_exceeded",
                headers={"retry-after": str(self._wait_s())},
            )
        self.num_inside += 1
        self._bytes_inside += num_bytes

    def leave(self, num_bytes: int) -> None:
        self.num_inside -= 1
        self._bytes_inside -= num_bytes
        self._ended.append(time.monotonic())

    def _wait_s(self) -> int:
        """Until about an eighth of the places are free again, by how fast they were lately."""
        if len(self._ended) < 2:
            return 1
        pace = (self._ended[-1] - self._ended[0]) / (len(self._ended) - 1)
        return min(_LONGEST_WAIT_S, max(1, math.ceil(pace * self.limits.max_requests / 8)))

    # ---- bodies to requests ----

    async def prepare(self, body: bytes) -> Prepared:
        """Parse a body and decode its images. ApiError for whatever is wrong with it."""
        self._next_id += 1
        try:
            return await self._loop.run_in_executor(self._pool, self._prepare, self._next_id, body)
        except ApiError:
            raise
        except Exception as error:  # no memory, most likely: it costs this request alone
            raise ApiError(500, f"the request could not be prepared: {type(error).__name__}") from error

    def _prepare(self, number: int, body: bytes) -> Prepared:
        chat = parse_chat(body, self.chat_limits)
        digests = [image_digest(image) for image in chat.images]
        images = tuple(self._image(chat, place, digests[place]) for place in range(len(digests)))
        # Where text stands between images, requests with the same images need not be alike up to the last of them.
        is_plain = len(images) == 1 or IMAGE_MARK not in chat.prompt
        request = CaptionRequest(
            id=number,
            prompt=chat.prompt,
            images=images,
            sampling=chat.sampling,
            image_key=tuple(digests) if images and is_plain else None,
            num_siblings=chat.num_siblings if images and is_plain else 1,
            rng_key=chat.rng_key,
        )
        return Prepared(chat, request)

    def _image(self, chat: ChatRequest, place: int, digest: str) -> PreparedImage:
        count = len(chat.images)
        kept = self._kept.find((digest, count)) if chat.num_siblings > 1 else None
        if kept is not None:
            return kept
        try:
            pixels = decode_image(chat.images[place], self.limits.images).pixels
        except DecodeError as error:
            where = f"image {place + 1} of {count}"
            raise ApiError(400, f"{where}: {error}", param="messages", code=error.kind.value) from None
        prepared = self.captioner.prepare(pixels, count)
        if chat.num_siblings > 1:
            self._kept.keep((digest, count), prepared)
        return prepared

    # ---- captions ----

    async def caption(self, prepared: Prepared) -> Caption:
        """The caption of a request. Cancelled, the request is aborted."""
        request = prepared.request
        future: asyncio.Future[Caption] = self._loop.create_future()
        self._listeners[request.id] = future
        try:
            self.engine.submit(request)
            return await future
        except asyncio.CancelledError:
            self.engine.abort(request.id)
            raise
        finally:
            del self._listeners[request.id]

    async def pieces(self, prepared: Prepared) -> AsyncIterator[News]:
        """The text as it grows; the last piece has the caption. Closed before that, the request is aborted."""
        request = prepared.request
        queue: asyncio.Queue[News] = asyncio.Queue()
        self._listeners[request.id] = queue
        ended = False
        try:
            self.engine.submit(request, stream=True)
            while not ended:
                news = await queue.get()
                ended = news.caption is not None
                yield news
        finally:
            if not ended:
                self.engine.abort(request.id)
            del self._listeners[request.id]

    def _deliver(self, news: list[News]) -> None:
        """Called by the engine's thread, once a step."""
        with suppress(RuntimeError):  # the loop has closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._dispatch, news)

    def _dispatch(self, news: list[News]) -> None:
        for one in news:
            listener = self._listeners.get(one.id)
            if isinstance(listener, asyncio.Queue):
                listener.put_nowait(one)
            elif listener is not None and one.caption is not None and not listener.done():
                listener.set_result(one.caption)


class _KeptImages:
    """The latest images that more requests will come for, as the model wants them. Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._images: OrderedDict[tuple[str, int], PreparedImage] = OrderedDict()
        self._lock = Lock()

    def find(self, key: tuple[str, int]) -> PreparedImage | None:
        with self._lock:
            return self._images.get(key)

    def keep(self, key: tuple[str, int], image: PreparedImage) -> None:
        with self._lock:
            if key in self._images:
                return
            self._images[key] = image
            self._bytes += image.tiles.nbytes
            while self._bytes > self._max_bytes:
                _, oldest = self._images.popitem(last=False)
                self._bytes -= oldest.tiles.nbytes
