"""The HTTP side: routes, keys, limits, and what an answer or an error looks like on the wire.

An ASGI application on Starlette. The chat endpoint speaks ASGI itself, for every microsecond here is taken from the
model on a machine with few cores.
"""

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from vila2.serve.answers import DONE, Answer, error_event, error_of, model_entry, to_json
from vila2.serve.chat import ApiError
from vila2.serve.desk import Desk, Prepared
from vila2.serve.metrics import CONTENT_TYPE, Metrics
from vila2.types import Caption

JSON = b"application/json"
CHAT_PATH = "/v1/chat/completions"
Result = TypeVar("Result")
BODY_TIMEOUT_S = 60.0  # a body that comes slower than this keeps others out


class KeyCheck:
    """Compares the request's key in constant time. Without a key of its own it lets everybody in."""

    def __init__(self, key: str | None) -> None:
        self._expected = None if key is None else b"Bearer " + key.encode()

    def __call__(self, scope: Scope) -> None:
        if self._expected is None:
            return
        given = _header(scope, b"authorization")
        if not given.startswith(b"Bearer "):
            raise ApiError(
                401,
                "You didn't provide an API key: send it as Authorization: Bearer KEY",
                headers={"www-authenticate": "Bearer"},
            )
        if not hmac.compare_digest(given, self._expected):
            raise ApiError(401, "Incorrect API key provided", code="invalid_api_key",
                           headers={"www-authenticate": "Bearer"})  # fmt: skip


class ChatEndpoint:
    """POST /v1/chat/completions."""

    def __init__(self, desk: Desk, metrics: Metrics, check: KeyCheck, model: str, max_body: int) -> None:
        self._desk, self._metrics, self._check = desk, metrics, check
        self._model, self._max_body = model, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = time.perf_counter()
        try:
            self._check(scope)
            size = self._size(scope)
            self._desk.admit(size)
            try:
                body = await _read_body(receive, self._max_body)
                prepared = await self._desk.prepare(body)
                del body
                if prepared.chat.stream:
                    await self._stream(prepared, receive, send, start)
                else:
                    await self._answer(prepared, receive, send)
            finally:
                self._desk.leave(size)
            self._metrics.seconds.observe(time.perf_counter() - start)
        except ApiError as error:
            self._count(error)
            await send_error(error, send)
        except _ClientGone:
            self._metrics.count("aborted")

    def _size(self, scope: Scope) -> int:
        """The bytes of the body, or the most that it may have. ApiError if it is too large or no JSON."""
        kind = _header(scope, b"content-type").partition(b";")[0].strip().lower()
        if kind != JSON:  # a browser sends anything else to any site without asking first
            raise ApiError(415, "the body must be JSON, with content-type: application/json")
        length = _header(scope, b"content-length")
        size = int(length) if length.isdigit() else self._max_body
        if size > self._max_body:
            raise _too_large(self._max_body)
        return size

    async def _answer(self, prepared: Prepared, receive: Receive, send: Send) -> None:
        caption = await _unless_gone(self._desk.caption(prepared), receive)
        if caption.error is not None:
            raise error_of(caption)
        self._note(caption)
        body = Answer(self._model).whole(caption)
        await send(_start(200, len(body)))
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, prepared: Prepared, receive: Receive, send: Send, start: float) -> None:
        """Server-sent events. An error before the first is an error as any other."""
        write = self._write(prepared, send, start)
        await _unless_gone(write, receive)

    async def _write(self, prepared: Prepared, send: Send, start: float) -> None:
        answer = Answer(self._model)
        has_begun = False
        pieces = self._desk.pieces(prepared)
        try:
            async for news in pieces:
                caption = news.caption
                if caption is not None and caption.error is not None:
                    if not has_begun:
                        raise error_of(caption)
                    self._count(error_of(caption))
                    await send(_more(error_event(error_of(caption)) + DONE, more=False))
                    return
                event = answer.piece(news.piece) if news.piece else b""
                if not has_begun:
                    has_begun = True
                    self._metrics.first_seconds.observe(time.perf_counter() - start)
                    await send(_EVENT_STREAM)
                    event = answer.first() + event
                if caption is not None:
                    self._note(caption)
                    event += answer.last(caption)
                    event += answer.usage(caption) if prepared.chat.include_usage else b""
                    event += DONE
                await send(_more(event, more=caption is None))
        finally:
            await pieces.aclose()  # type: ignore[attr-defined]  # an async generator

    def _note(self, caption: Caption) -> None:
        self._metrics.count("ok")
        self._metrics.prompt_tokens.inc(caption.num_prompt_tokens)
        self._metrics.new_tokens.inc(caption.num_tokens)

    def _count(self, error: ApiError) -> None:
        outcome = "busy" if error.status in (429, 503) else "failed" if error.status >= 500 else "refused"
        self._metrics.count(outcome)


class _ClientGone(Exception):
    """The connection has closed: nobody waits for the answer."""


async def _unless_gone(work: Coroutine[Any, Any, Result], receive: Receive) -> Result:
    """Await `work`, and cancel it when the client goes. _ClientGone then."""
    this = asyncio.current_task()
    assert this is not None
    is_gone = has_ended = False

    def stop(watch: "asyncio.Task[None]") -> None:
        nonlocal is_gone
        if not watch.cancelled() and not has_ended:
            is_gone = True
            this.cancel()

    watch = asyncio.ensure_future(_until_gone(receive))
    watch.add_done_callback(stop)
    try:
        return await work
    except asyncio.CancelledError:
        if is_gone:
            raise _ClientGone from None
        raise
    finally:
        has_ended = True
        watch.cancel()


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _read_body(receive: Receive, limit: int) -> bytes:
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body"):  # it is all there already
        return _checked(message.get("body", b""), limit)
    try:
        return await asyncio.wait_for(_read_rest(message, receive, limit), BODY_TIMEOUT_S)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body did not come within {BODY_TIMEOUT_S:g} s") from None


async def _read_rest(message: Message, receive: Receive, limit: int) -> bytes:
    body = bytearray()
    while True:
        if message["type"] == "http.disconnect":
            raise _ClientGone
        body += message.get("body", b"")
        _checked(body, limit)
        if not message.get("more_body"):
            return bytes(body)
        message = await receive()


def _checked(body: Any, limit: int) -> Any:
    if len(body) > limit:
        raise _too_large(limit)
    return body


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than {limit} bytes, the most that this server takes",
                    code="request_too_large", headers={"connection": "close"})  # fmt: skip


def _header(scope: Scope, name: bytes) -> bytes:
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value)
    return b""


_EVENT_STREAM: Message = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")],
}


def _start(status: int, length: int, headers: tuple[tuple[bytes, bytes], ...] = ()) -> Message:
    basic = ((b"content-type", JSON), (b"content-length", str(length).encode()))
    return {"type": "http.response.start", "status": status, "headers": [*basic, *headers]}


def _more(body: bytes, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


async def send_error(error: ApiError, send: Send) -> None:
    body = to_json(error.body())
    headers = tuple((name.encode(), value.encode()) for name, value in error.headers.items())
    await send(_start(error.status, len(body), headers))
    await send({"type": "http.response.body", "body": body})


def make_app(
    desk: Desk, metrics: Metrics, *, key: str | None, model: str, max_body: int
) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """The application. `key` None lets everybody in; with one, only /health is open."""
    check = KeyCheck(key)
    captioner = desk.captioner
    # As many again as the engine takes: while answers and requests travel, the next are decoded and wait.
    parallel = 2 * captioner.room
    longest = captioner.engine.max_total_tokens()
    entry = model_entry(model, captioner.model_digest, int(time.time()), longest, parallel)

    def answered(value: dict[str, Any], status: int = 200) -> Response:
        return Response(to_json(value), status, media_type="application/json")

    async def models(request: Request) -> Response:
        check(request.scope)
        return answered({"object": "list", "data": [entry]})

    async def one_model(request: Request) -> Response:
        check(request.scope)
        if request.path_params["name"] != model:
            raise ApiError(404, f"there is no such model: this server has {model!r}", code="model_not_found")
        return answered(entry)

    async def health(request: Request) -> Response:
        well = desk.engine.is_running and not desk.is_closing
        return answered({"status": "ok" if well else "unavailable"}, 200 if well else 503)

    async def show_metrics(request: Request) -> Response:
        check(request.scope)
        return Response(metrics.render(), headers={"content-type": CONTENT_TYPE})

    async def api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        response = answered(error.body(), error.status)
        response.headers.update(error.headers)
        return response

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        shown = ApiError(error.status_code, f"{request.method} {request.url.path[:100]}: {error.detail}")
        return answered(shown.body(), shown.status)

    chat = ChatEndpoint(desk, metrics, check, model, max_body)
    rest = Starlette(
        routes=[
            Route(CHAT_PATH, chat, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", one_model),
            Route("/health", health),
            Route("/metrics", show_metrics),
        ],
        exception_handlers={ApiError: api_error, HTTPException: http_error},
    )

    # Captions go past Starlette's routes and handlers, which their endpoint does not need.
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        is_chat = scope["type"] == "http" and scope["path"] == CHAT_PATH and scope["method"] == "POST"
        await (chat if is_chat else rest)(scope, receive, send)

    return app
