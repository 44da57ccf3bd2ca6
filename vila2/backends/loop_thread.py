"""An event loop in a thread of its own, for code that has none."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, TypeVar

Result = TypeVar("Result")
_CLOSE_S = 5.0  # what does not end in time is left to the system


def new_event_loop() -> asyncio.AbstractEventLoop:
    """uvloop's where it is installed: half the work of asyncio's own for a request."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


class LoopThread:
    """Runs coroutines until it is closed."""

    def __init__(self, name: str) -> None:
        self._loop = new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Result]) -> "Future[Result]":
        """Start a coroutine; the future gives its result, and may be cancelled."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self, finish: Callable[[], Awaitable[None]] | None = None) -> None:
        """Cancel what is under way, await `finish`, stop the thread. Callable twice."""
        if not self._thread.is_alive():
            return
        try:
            self.run(self._cancel(finish)).result(_CLOSE_S)
        except (FutureTimeoutError, CancelledError):
            pass
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_CLOSE_S)
            if not self._thread.is_alive():
                self._loop.close()

    async def _cancel(self, finish: Callable[[], Awaitable[None]] | None) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if finish is not None:
            await finish()
