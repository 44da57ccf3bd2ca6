"""A client of OpenAI-compatible servers for code without an event loop: the loop runs in a thread of its own."""

import asyncio
import json
from collections.abc import Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from vila2.backends import OUR_SERVER
from vila2.backends.http_fleet import ChatSettings, Fleet, RequestFailed, Server
from vila2.backends.http_wire import ChatReply, ExchangeError, Trouble
from vila2.backends.loop_thread import LoopThread
from vila2.errors import VilaError

__all__ = ["ChatClient", "ChatReply", "ChatSettings", "RequestFailed", "ServedModel"]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """An entry of a server's list of models. `digest` names the weights where the server says so, as ours does;
    `is_ours`: it is `vila2-fast serve` that answers; `parallel`: how many requests fill it, 0 if it does not say."""

    name: str
    digest: str = ""
    is_ours: bool = False
    parallel: int = 0


class ChatClient:
    """Thread-safe. Use as a context manager, or call `close`."""

    def __init__(self, settings: ChatSettings) -> None:
        self.settings = settings
        self.fleet = Fleet(settings)
        self._thread = LoopThread("vila2-http")

    def submit(self, body: dict[str, Any], home: Hashable = None) -> "Future[ChatReply]":
        """Send a chat completion, `model` filled in; the future may be cancelled. See `Fleet.ask` for what it raises.

        Requests with the same `home` (an image) go to the same server while it has room.
        """
        content = json.dumps({"model": self.settings.model, **body}, ensure_ascii=False).encode()
        return self._thread.run(self.fleet.ask(content, home))

    def models(self) -> dict[str, list[ServedModel] | None]:
        """What each server, by its URL, lists at /models; None for one that has no such list or is not there.

        VilaError if none is there, or if one says that the key or the URL will not do.
        """
        return self._thread.run(self._models()).result()

    def stats(self) -> dict[str, float]:
        """Counters since the client was opened; what is in flight, and the limit on it, are of now."""
        fleet = self.fleet
        return {
            "requests": fleet.num_requests,
            "retries": fleet.num_retries,
            "busy": fleet.num_busy,
            "faults": fleet.num_faults,
            "in_flight": fleet.in_flight,
            "limit": fleet.room,
            "server_s": fleet.server_s,
        }

    def close(self) -> None:
        """Cancel what is under way. Callable twice."""
        self._thread.close(self.fleet.close)

    def __enter__(self) -> "ChatClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _models(self) -> dict[str, list[ServedModel] | None]:
        servers = self.fleet.servers
        found = await asyncio.gather(*(self._models_of(server) for server in servers), return_exceptions=True)
        troubles = {}
        for server, result in zip(servers, found, strict=True):
            if isinstance(result, ExchangeError):
                troubles[server] = result
            elif isinstance(result, BaseException):
                raise result
        for server, error in troubles.items():
            if error.trouble is Trouble.FATAL or len(troubles) == len(servers):
                raise VilaError(f"{server.name}: {error}")
        return {
            server.name: result if isinstance(result, list) else None
            for server, result in zip(servers, found, strict=True)
        }

    async def _models_of(self, server: Server) -> list[ServedModel] | None:
        try:
            listed = json.loads(await self.fleet.get(server, "models"))["data"]
            return [
                ServedModel(
                    str(entry["id"]),
                    _digest_of(entry),
                    entry.get("owned_by") == OUR_SERVER,
                    _parallel_of(entry),
                )
                for entry in listed
            ]
        except ExchangeError as error:
            if str(error).startswith(("HTTP 404", "HTTP 405", "HTTP 501")):  # many servers have no list
                return None
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None


def _digest_of(entry: dict[str, Any]) -> str:
    digest = entry.get("digest")
    if isinstance(digest, str) and len(digest) == 32 and all(char in "0123456789abcdef" for char in digest):
        return digest
    return ""


def _parallel_of(entry: dict[str, Any]) -> int:
    number = entry.get("parallel")
    return number if isinstance(number, int) and number > 0 else 0
