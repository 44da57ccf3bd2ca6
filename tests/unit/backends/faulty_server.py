"""An OpenAI-compatible server on this machine that answers from the request's content, and fails on demand.

`decide(request)` names what happens to each request; without it all is well. The server may die and come back on its
port.
"""

import base64
import hashlib
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Fault:
    """`status` and `body` are sent as they are; `how` is "stall", "close" (at once), "cut" (mid-body) or ""."""

    status: int = 500
    body: str = "out of order"
    headers: tuple[tuple[str, str], ...] = ()
    how: str = ""


@dataclass(frozen=True)
class Asked:
    """One request as the server saw it."""

    number: int  # counted from 0
    body: dict[str, Any]
    headers: dict[str, str]
    path: str
    at: float
    in_flight: int  # this one included

    @property
    def content(self) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = self.body["messages"][0]["content"]
        return parts

    @property
    def text(self) -> str:
        return " ".join(part["text"] for part in self.content if part["type"] == "text")

    @property
    def image(self) -> bytes:
        """The encoded bytes of the first image."""
        url = next(part["image_url"]["url"] for part in self.content if part["type"] == "image_url")
        return base64.b64decode(url.partition("base64,")[2])


Decide = Callable[[Asked], Fault | None]


def answer_to(asked: Asked) -> str:
    """A caption that depends on image and prompt, so that a mix-up shows."""
    return f"{asked.text}: {hashlib.sha256(asked.image).hexdigest()[:12]}."


def completion(text: Any, finish_reason: str = "stop", **message: Any) -> dict[str, Any]:
    choice = {"message": {"role": "assistant", "content": text, **message}, "finish_reason": finish_reason}
    return {"choices": [choice], "usage": {"prompt_tokens": 11, "completion_tokens": len(str(text).split())}}


@dataclass
class FaultyServer:
    """Use as `with running(...) as server`."""

    decide: Decide = lambda asked: None
    answer: Callable[[Asked], dict[str, Any]] = lambda asked: completion(answer_to(asked))
    delay_s: float | Callable[[int], float] = 0.0  # of an answer; may depend on how many are in flight
    models: Any = field(default_factory=lambda: {"data": [{"id": "m"}]})  # None: there is no such list
    port: int = 0
    asked: list[Asked] = field(default_factory=list)
    answered: Counter[str] = field(default_factory=Counter)
    most_in_flight: int = 0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._in_flight = 0
        self._over = threading.Event()
        self._connections: set[socket.socket] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        self._over.clear()
        self._http = _Http(("127.0.0.1", self.port), self)
        self.port = self._http.server_address[1]
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Die: connections break, the port is closed."""
        self._over.set()
        self._http.shutdown()
        self._http.server_close()
        with self._lock:
            connections, self._connections = self._connections, set()
        for connection in connections:
            _break(connection)
        self._thread.join()


@contextmanager
def running(**settings: Any) -> Iterator[FaultyServer]:
    server = FaultyServer(**settings)
    server.start()
    try:
        yield server
    finally:
        server.stop()


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], server: FaultyServer) -> None:
        self.state = server
        super().__init__(address, _Handler)

    def handle_error(self, *_: Any) -> None:
        pass  # a broken connection is what the tests ask for


def _break(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Http

    def setup(self) -> None:
        super().setup()
        self.state = self.server.state
        with self.state._lock:
            self.state._connections.add(self.connection)

    def finish(self) -> None:
        with self.state._lock:
            self.state._connections.discard(self.connection)
        super().finish()

    def do_GET(self) -> None:
        models = self.state.models
        if models is None:
            self._send(404, "no such path")
        elif isinstance(models, Fault):
            self._send(models.status, models.body)
        else:
            self._send(200, json.dumps(models))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        state = self.state
        with state._lock:
            state._in_flight += 1
            state.most_in_flight = max(state.most_in_flight, state._in_flight)
            headers = {name.lower(): value for name, value in self.headers.items()}
            asked = Asked(len(state.asked), body, headers, self.path, time.monotonic(), state._in_flight)
            state.asked.append(asked)
        try:
            fault = state.decide(asked)
            if fault is None:
                self._answer(asked)
            else:
                self._fail(fault)
        finally:
            with state._lock:
                state._in_flight -= 1

    def _answer(self, asked: Asked) -> None:
        delay = self.state.delay_s
        self.state._over.wait(delay if isinstance(delay, float) else delay(asked.in_flight))
        self._send(200, json.dumps(self.state.answer(asked)))
        with self.state._lock:
            self.state.answered[answer_to(asked) if len(asked.content) > 1 else asked.text] += 1

    def _fail(self, fault: Fault) -> None:
        if fault.how == "stall":
            self.state._over.wait(30)
        if fault.how in ("stall", "close"):
            self.close_connection = True
            _break(self.connection)
            return
        self._send(fault.status, fault.body, fault.headers, cut=fault.how == "cut")

    def _send(
        self, status: int, text: str, headers: tuple[tuple[str, str], ...] = (), cut: bool = False
    ) -> None:
        data = text.encode()
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("content-length", str(len(data) + 100 * cut))
        self.end_headers()
        self.wfile.write(data)
        if cut:
            self.close_connection = True
            _break(self.connection)

    def log_message(self, *_: Any) -> None:
        pass
