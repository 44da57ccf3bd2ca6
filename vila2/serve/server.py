"""A server from its settings: the socket, the HTTP loop in a thread of its own, the end of it all.

Uvicorn runs outside the main thread, which thereby keeps the
signals: a stop lets what is under way end first.
"""

import asyncio
import ipaddress
import os
import socket
import threading
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn

from vila2.backends.native import NativeCaptioner
from vila2.data.decode import DecodeLimits
from vila2.errors import UsageError, VilaError
from vila2.serve.app import make_app
from vila2.serve.chat import ChatLimits
from vila2.serve.desk import Desk, DeskLimits
from vila2.serve.metrics import Metrics
from vila2.types import RepetitionRule

KEEP_ALIVE_S = 75  # longer than clients keep theirs, so that it is they who close
BODIES_INSIDE = 16  # of the largest size, at once


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """How a captioner is served. `name` is what clients call the model; sizes are in bytes."""

    name: str
    key: str | None = field(default=None, repr=False)
    max_queue: int = 256  # requests beyond those that the engine writes at once
    max_body: int = 32 << 20
    max_images: int = 16
    images: DecodeLimits = field(default_factory=DecodeLimits)
    decode_workers: int = 0  # 0: by the number of cores
    drain_s: float = 30.0
    repetition: RepetitionRule | None = field(default_factory=RepetitionRule)


def bind(host: str, port: int) -> socket.socket:
    """A socket at this address, not yet listening; port 0 takes a free one. UsageError if it cannot be had."""
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = infos[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, OverflowError, UnicodeError) as error:
        raise UsageError(f"--host {host}: no address: {error}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise UsageError(f"cannot listen at {host} port {port}: {error.strerror or error}") from None
    return listener


def address_of(listener: socket.socket) -> str:
    """The server's base URL."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_public(listener: socket.socket) -> bool:
    """Can other machines reach it?"""
    return not ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def read_key(variable: str | None, file: str | Path | None) -> str | None:
    """The API key from an environment variable or a file; None if neither is named. UsageError without one there."""
    if variable is None and file is None:
        return None
    if file is not None:
        try:
            key, where = Path(file).read_text(encoding="utf-8").strip(), str(file)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise UsageError(f"{file}: cannot read the key: {reason}") from None
    else:
        assert variable is not None
        key, where = os.environ.get(variable, "").strip(), variable
    if not key:
        raise UsageError(f"there is no key in {where}")
    if any(not "!" <= char <= "~" for char in key):
        raise UsageError(f"the key in {where} holds spaces or characters that no HTTP header may hold")
    return key


class Server:
    """Serves a captioner at a socket, from `start` until `stop`. It closes both at the end."""

    def __init__(self, captioner: NativeCaptioner, settings: ServeSettings, listener: socket.socket) -> None:
        self.url = address_of(listener)
        self._captioner, self._listener = captioner, listener
        longest = captioner.engine.max_total_tokens()
        chat = ChatLimits(settings.name, longest, settings.max_images, settings.repetition)
        limits = DeskLimits(
            max_requests=captioner.engine.limits.max_num_seqs + settings.max_queue,
            max_bytes=BODIES_INSIDE * settings.max_body,
            decode_workers=settings.decode_workers,
            images=settings.images,
        )
        self.desk = Desk(captioner, chat, limits)
        metrics = Metrics(captioner.stats, lambda: self.desk.num_inside)
        app = make_app(self.desk, metrics, key=settings.key, model=settings.name, max_body=settings.max_body)
        config = uvicorn.Config(
            app,
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ws="none",
            loop="none",
            lifespan="off",
            backlog=2048,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=max(1, round(settings.drain_s)),
        )
        self._uvicorn = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="vila2-http", daemon=True)
        self._failure: BaseException | None = None

    def start(self) -> None:
        """Returns once requests are answered. VilaError if the server cannot start."""
        self._thread.start()
        while not self._uvicorn.started:
            self._thread.join(0.01)
            if not self._thread.is_alive():
                raise VilaError(f"the server did not start: {self._failure}")

    def stop(self, *, now: bool = False) -> None:
        """Take no more requests; end those under way, or with `now` drop them. Does not wait."""
        if now:
            self._uvicorn.force_exit = True
        self._uvicorn.should_exit = True

    def wait(self) -> None:
        """Until the server has stopped. VilaError if it was the engine that failed."""
        while self._thread.is_alive():
            self._thread.join(0.2)
            if self.desk.engine.failure:
                self.stop()
        self._captioner.close()
        self._listener.close()
        if self.desk.engine.failure:
            raise VilaError(f"the engine failed: {self.desk.engine.failure}")
        if self._failure is not None:
            raise VilaError(f"the server failed: {self._failure}")

    def _run(self) -> None:
        loop = _new_event_loop()
        try:
            loop.run_until_complete(self._serve())
        except BaseException as error:  # SystemExit too: uvicorn's way of saying that it cannot start
            self._failure = error
        finally:
            loop.close()

    async def _serve(self) -> None:
        self.desk.open()
        try:
            await self._uvicorn.serve(sockets=[self._listener])
        finally:
            await self.desk.close()


def _new_event_loop() -> asyncio.AbstractEventLoop:
    """uvloop's where it is installed, which is faster."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop
