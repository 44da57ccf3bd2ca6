"""One question to an OpenAI-compatible chat endpoint, asked again when the server is busy or the network fails.

The key comes from an environment variable. It goes into the request's header and nowhere else: not into messages,
not into results, and it is cut out of whatever the server sends back.
"""

import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from vila2.errors import UsageError, VilaError

if TYPE_CHECKING:
    import httpx

_BUSY = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_LONGEST_WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """Where and whom to ask. `url` is the server's base (".../v1") or the full path of its chat completions."""

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    timeout_s: float = 120.0
    attempts: int = 6
    first_wait_s: float = 1.0
    temperature: float = 0.0
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise UsageError(f"the judge's URL {self.url!r} must begin with http:// or https://")
        if self.attempts < 1:
            raise ValueError(f"attempts must be at least 1, got {self.attempts}")


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model said; `refused` if the server or the model itself marked it as a refusal."""

    text: str
    refused: bool


@dataclass(slots=True)
class ChatClient:
    """Thread-safe. Use as a context manager, or call `close`."""

    settings: ChatSettings
    sleep: Callable[[float], None] = time.sleep
    num_retries: int = 0
    _key: str = field(init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _client: "httpx.Client" = field(init=False, repr=False)

    def __post_init__(self) -> None:
        try:
            import httpx
        except ImportError:
            raise UsageError('a judge needs httpx: pip install "vila2-fast[eval]"') from None
        self._key = os.environ.get(self.settings.key_variable, "").strip()
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._client = httpx.Client(timeout=self.settings.timeout_s, headers=headers)

    def ask(self, content: Any, system: str = "") -> Reply:
        """Send one user turn (text, or a list of content parts). VilaError when it cannot be answered."""
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": content})
        body = {
            "model": self.settings.model,
            "messages": messages,
            "temperature": self.settings.temperature,
            "max_tokens": self.settings.max_tokens,
        }
        return self._reply(self._post(body))

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> "ChatClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _post(self, body: dict[str, Any]) -> Any:
        import httpx

        url = self.settings.url.rstrip("/")
        if not url.endswith("/chat/completions"):
            url += "/chat/completions"
        for attempt in range(1, self.settings.attempts + 1):
            wait, problem = None, ""
            try:
                response = self._client.post(url, json=body)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
            except httpx.HTTPError as error:
                raise VilaError(f"{url}: {self._clean(str(error))}") from None
            else:
                if response.status_code == 200:
                    return response
                problem = f"HTTP {response.status_code} {self._clean(response.text)[:200]}".strip()
                if response.status_code not in _BUSY:
                    raise VilaError(f"{url}: {problem}{self._hint(response.status_code)}")
                wait = _retry_after(response.headers.get("retry-after"))
            if attempt == self.settings.attempts:
                raise VilaError(f"{url}: no answer in {attempt} attempts, the last: {self._clean(problem)}")
            with self._lock:
                self.num_retries += 1
            backoff = self.settings.first_wait_s * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
            self.sleep(min(wait if wait is not None else backoff, _LONGEST_WAIT_S))
        raise AssertionError

    def _reply(self, response: Any) -> Reply:
        try:
            choice = response.json()["choices"][0]
            message = choice["message"]
            text = message.get("content") or ""
            refusal = message.get("refusal")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise VilaError(
                f"{self.settings.url}: the answer is no chat completion: {self._clean(response.text)[:200]}"
            ) from None
        if isinstance(text, list):  # some servers answer in parts
            text = "".join(part.get("text", "") for part in text if isinstance(part, dict))
        refused = bool(refusal) or choice.get("finish_reason") == "content_filter"
        return Reply(self._hide(str(text or refusal or "")), refused)

    def _hint(self, status: int) -> str:
        if status not in (401, 403):
            return ""
        name = self.settings.key_variable
        return f" (the key in {name} is not accepted)" if self._key else f" (put the key into {name})"

    def _clean(self, text: str) -> str:
        """One line without the key."""
        return self._hide(" ".join(text.split()))

    def _hide(self, text: str) -> str:
        """The text without the key, should the server have sent it back."""
        return text.replace(self._key, "***") if self._key else text


def _retry_after(value: str | None) -> float | None:
    """Seconds from a Retry-After header; its date form is not worth parsing."""
    try:
        return max(0.0, float(value)) if value else None
    except ValueError:
        return None
