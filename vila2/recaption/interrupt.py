"""Ctrl-C and SIGTERM, made orderly: the first asks the run to stop, a grace period later or at the second it must.

Only the main thread may install signal handlers; elsewhere `Interrupts` is a flag that a caller sets.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

GRACE_S = 5.0


class GraceOver(Exception):
    """What was in flight did not finish within the grace period: drop it."""


class Interrupts:
    """Whether the run was asked to stop, and by what means it is torn out of a long step.

    Outside `orderly()` there is nothing to finish, so the first signal is an ordinary KeyboardInterrupt.
    """

    def __init__(self, grace_s: float = GRACE_S) -> None:
        self.grace_s = grace_s
        self.requested = False
        self._orderly = False
        self._shielded = 0
        self._grace_over = False

    def request(self) -> None:
        self.requested = True

    @contextmanager
    def installed(self) -> Iterator["Interrupts"]:
        """Handle SIGINT and SIGTERM inside the block. Not in the main thread: nothing is installed."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        handlers = {signal.SIGINT: self._on_stop, signal.SIGTERM: self._on_stop}
        if hasattr(signal, "SIGALRM"):
            handlers[signal.SIGALRM] = self._on_alarm
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield self
        finally:
            self._disarm()
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def orderly(self) -> Iterator[None]:
        """The first signal inside the block only asks; GraceOver ends the block when the grace period is over."""
        self._orderly = True
        try:
            yield
            self._orderly = False  # from here on, a grace period that ends has nothing to end
        except GraceOver:
            pass  # what was in flight is dropped; the next run does it again
        finally:
            self._disarm()
            self._orderly = False

    @contextmanager
    def shield(self) -> Iterator[None]:
        """The end of the grace period waits for this block: a part that is being committed is finished."""
        self._shielded += 1
        try:
            yield
        finally:
            self._shielded -= 1
        if self._grace_over and not self._shielded and self._orderly:
            raise GraceOver

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        if self.requested or not self._orderly:
            self.requested = True
            raise KeyboardInterrupt
        self.requested = True
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, self.grace_s)

    def _on_alarm(self, number: int, frame: FrameType | None) -> None:
        if self._shielded:
            self._grace_over = True
        elif self._orderly:
            raise GraceOver

    def _disarm(self) -> None:
        if hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread():
            signal.setitimer(signal.ITIMER_REAL, 0)
        self._grace_over = False
