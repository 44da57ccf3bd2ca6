"""One exchange with an OpenAI-compatible server: what is sent, what counts as an answer, and what went wrong.

A server's words are untrusted text. The key goes into the request's header and nowhere else: it is cut out of
whatever comes back, and no message, log or repr holds it.
"""

import asyncio
import json
import os
import re
import sys
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from enum import Enum
from time import time

import httpx

from vila2.errors import UsageError

if sys.version_info >= (3, 11):
    from asyncio import timeout
else:
    from async_timeout import timeout

MAX_ANSWER_BYTES = 8 << 20  # no caption is near it; a server that sends on and on shall not fill our memory
CONNECT_S = 15.0
_SHOWN_CHARS = 200
_BUSY = (408, 409, 425, 429, 503, 529)
_FATAL = (401, 402, 403, 404, 405, 407)


class Trouble(str, Enum):
    """Whose fault an exchange without an answer is, as far as it shows."""

    BUSY = "busy"  # the server asks for patience: nothing is wrong with the request
    DOWN = "down"  # no connection: the request was never seen
    FAULT = (
        "fault"  # 5xx, a stall, a body cut short, something else than JSON: the server's or this request's
    )
    REFUSED = "refused"  # a 4xx about this request
    FATAL = "fatal"  # a key, URL or model that will not do for any request


class ExchangeError(Exception):
    """An exchange without an answer. `retry_after_s` is what the server asked for, if it did."""

    def __init__(self, trouble: Trouble, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.trouble, self.retry_after_s = trouble, retry_after_s


@dataclass(frozen=True, slots=True)
class ChatReply:
    """What the model said; `refused` if the server or the model itself marked it as a refusal."""

    text: str
    finish_reason: str = "stop"
    refused: bool = False
    num_prompt_tokens: int = 0
    num_tokens: int = 0


class Secret:
    """The API key: in an environment variable or absent. Never shown."""

    def __init__(self, variable: str) -> None:
        self.variable = variable
        self._key = os.environ.get(variable, "").strip()
        if any(not "!" <= char <= "~" for char in self._key):
            raise UsageError(f"the key in {variable} holds spaces or characters that no HTTP header may hold")

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._key}"} if self._key else {}

    def hide(self, text: str) -> str:
        """The text without the key, should the server have sent it back."""
        return text.replace(self._key, "***") if self._key else text

    def hint(self) -> str:
        """What to do about a key that is refused or missing."""
        if self._key:
            return f" (the key in {self.variable} is not accepted)"
        return f" (put the key into {self.variable})"


def parse_base_url(text: str, what: str = "the base URL") -> httpx.URL:
    """`http://host:8000`, `.../v1` or the full path of its chat completions, as the base of the API. UsageError."""
    try:
        url = httpx.URL(text.strip())
    except httpx.InvalidURL as error:
        raise UsageError(f"{what} {text!r} is not a URL: {error}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise UsageError(f"{what} {text!r} must begin with http:// or https:// and name a host")
    path = url.path.rstrip("/").removesuffix("/chat/completions")
    return url.copy_with(path=path or "/v1")


def shown(url: httpx.URL) -> str:
    """The URL without user, password and query, which may be secrets."""
    return str(url.copy_with(userinfo=b"", query=None))


def login(url: httpx.URL) -> dict[str, str]:
    """The header that a URL's user and password ask for."""
    if not url.userinfo:
        return {}
    coded = b64encode(f"{url.username}:{url.password}".encode()).decode("ascii")
    return {"Authorization": f"Basic {coded}"}


def below(url: httpx.URL, path: str) -> httpx.URL:
    return url.copy_with(path=f"{url.path}/{path}")


async def request(
    transport: httpx.AsyncBaseTransport,
    method: str,
    url: httpx.URL,
    headers: Mapping[str, str],
    body: bytes | None,
    timeout_s: float,
    secret: Secret,
) -> bytes:
    """The whole body of a 200 answer. ExchangeError for anything else, within `timeout_s` in all."""
    waits = {"connect": min(CONNECT_S, timeout_s), "read": timeout_s, "write": timeout_s, "pool": timeout_s}
    try:
        async with timeout(timeout_s):
            # Straight to the transport: httpx's client adds cookies, redirects and logins, which no server of
            # ours needs, and which cost as much as the exchange.
            question = httpx.Request(
                method, url, headers=headers, content=body, extensions={"timeout": waits}
            )
            response = await transport.handle_async_request(question)
            try:
                return await _read(response, secret)
            finally:
                await response.aclose()
    except (asyncio.TimeoutError, httpx.TimeoutException) as error:
        connecting = isinstance(error, httpx.ConnectTimeout)
        reason = "cannot connect" if connecting else "no answer"
        trouble = Trouble.DOWN if connecting else Trouble.FAULT
        raise ExchangeError(trouble, f"{reason} within {timeout_s:g} s") from None
    except (httpx.ConnectError, httpx.ProxyError) as error:
        raise ExchangeError(Trouble.DOWN, f"cannot connect: {_clean(str(error), secret)}") from None
    except httpx.HTTPError as error:  # the network failed, or what came is not HTTP
        reason = _clean(str(error), secret) or type(error).__name__
        raise ExchangeError(Trouble.FAULT, f"the connection broke: {reason}") from None


async def _read(response: httpx.Response, secret: Secret) -> bytes:
    pieces, size = [], 0
    async for piece in response.aiter_bytes():
        pieces.append(piece)
        size += len(piece)
        if size > MAX_ANSWER_BYTES:
            raise ExchangeError(Trouble.FAULT, f"an answer of more than {MAX_ANSWER_BYTES} bytes")
    content = b"".join(pieces)
    if response.status_code == 200:
        return content
    raise _refusal(response, content, secret)


def _refusal(response: httpx.Response, content: bytes, secret: Secret) -> ExchangeError:
    """What an HTTP status other than 200 means."""
    status = response.status_code
    message = f"HTTP {status} {_reason(content, secret)}".strip()
    wait = parse_retry_after(response.headers.get("retry-after"))
    if status in (401, 403):
        return ExchangeError(Trouble.FATAL, message + secret.hint())
    if b"insufficient_quota" in content or status in _FATAL:
        return ExchangeError(Trouble.FATAL, message)
    if status in _BUSY:
        return ExchangeError(Trouble.BUSY, message, wait)
    if status >= 500:
        return ExchangeError(Trouble.FAULT, message, wait)
    if status < 400:
        place = _clean(response.headers.get("location", ""), secret)
        return ExchangeError(Trouble.FATAL, f"{message} (redirected to {place}: give that URL)")
    return ExchangeError(Trouble.REFUSED, message)


def _reason(content: bytes, secret: Secret) -> str:
    """The message inside an error's JSON, or the start of whatever else was sent, as one line."""
    text = content[: 64 * _SHOWN_CHARS].decode("utf-8", "replace")
    try:
        inner = json.loads(text)
    except (ValueError, RecursionError):
        inner = None
    if isinstance(inner, dict):
        error = inner.get("error", inner)
        found = error.get("message") or error.get("detail") if isinstance(error, dict) else error
        text = found if isinstance(found, str) else text
    return _clean(re.sub(r"<[^<>]{0,500}>", " ", text), secret)


def _clean(text: str, secret: Secret) -> str:
    """One printable line without the key, not too long."""
    line = " ".join(secret.hide(text).split())
    line = "".join(char for char in line if char.isprintable())
    return line if len(line) <= _SHOWN_CHARS else line[: _SHOWN_CHARS - 3] + "..."


def parse_retry_after(value: str | None) -> float | None:
    """Seconds from now, from a Retry-After header in either of its forms; None if it says nothing."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time()
        except (ValueError, OverflowError):
            return None
    return max(0.0, seconds) if seconds == seconds else None  # NaN is no time


def parse_reply(content: bytes, secret: Secret) -> ChatReply:
    """A chat completion's JSON. ExchangeError (fault) when it is none."""
    try:
        answer = json.loads(content)
        choice = answer["choices"][0]
        message = choice["message"]
        text, refusal = message.get("content") or "", message.get("refusal")
        reason = choice.get("finish_reason") or "stop"
        # vLLM and our own server name a cut loop as the reason behind the reason.
        reason = "repetition" if choice.get("stop_reason") == "repetition" else reason
        usage = answer.get("usage") or {}
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        start = _reason(content, secret)
        raise ExchangeError(Trouble.FAULT, f"the answer is no chat completion: {start}") from None
    if isinstance(text, list):  # some servers answer in parts
        text = "".join(str(part.get("text", "")) for part in text if isinstance(part, dict))
    prompt_tokens, tokens = (count if isinstance(count, int) and count >= 0 else 0 for count in counts)
    refused = bool(refusal) or reason == "content_filter"
    return ChatReply(secret.hide(str(text or refusal or "")), str(reason), refused, prompt_tokens, tokens)
