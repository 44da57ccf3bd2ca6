"""One question to an OpenAI-compatible chat endpoint: how the judge talks to its model.

Retries, waits, the limit on requests at once and the handling of the key are those of `vila2.backends.http_client`.
"""

from dataclasses import dataclass
from types import TracebackType
from typing import Any

from vila2.errors import UsageError, VilaError


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """Where and whom to ask. `url` is the server's base (".../v1") or the full path of its chat completions."""

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    timeout_s: float = 120.0
    patience_s: float = 120.0
    attempts: int = 6
    first_wait_s: float = 1.0
    temperature: float = 0.0
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise UsageError(f"the judge's URL {self.url!r} must begin with http:// or https://")


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model said; `refused` if the server or the model itself marked it as a refusal."""

    text: str
    refused: bool


class ChatClient:
    """Thread-safe. Use as a context manager, or call `close`."""

    def __init__(self, settings: ChatSettings) -> None:
        try:
            from vila2.backends import http_client
        except ModuleNotFoundError as error:
            if error.name not in ("aiohttp", "httpx"):
                raise
            raise UsageError(f'a judge needs {error.name}: pip install "vila2-fast[eval]"') from None
        self.settings = settings
        self._failed = http_client.RequestFailed
        self._client = http_client.ChatClient(
            http_client.ChatSettings(
                urls=(settings.url,),
                model=settings.model,
                key_variable=settings.key_variable,
                timeout_s=settings.timeout_s,
                patience_s=settings.patience_s,
                attempts=settings.attempts,
                first_wait_s=settings.first_wait_s,
            )
        )

    @property
    def num_retries(self) -> int:
        return self._client.fleet.num_retries

    def ask(self, content: Any, system: str = "") -> Reply:
        """Send one user turn (text, or a list of content parts). VilaError when it cannot be answered."""
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": content})
        body = {
            "messages": messages,
            "temperature": self.settings.temperature,
            "max_tokens": self.settings.max_tokens,
        }
        try:
            reply = self._client.submit(body).result()
        except self._failed as error:
            raise VilaError(f"{self.settings.url}: {error}") from None
        return Reply(reply.text, reply.refused)

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> "ChatClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
