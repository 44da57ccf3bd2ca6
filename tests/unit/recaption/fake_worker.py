"""A process of `--devices` with the fake captioner; FAKE_PAUSE slows it, FAKE_POISON is a prompt that kills it."""

import os
import signal
import sys
import time

from tests.unit.recaption.fakes import FakeCaptioner, echo
from vila2.config import RecaptionSettings
from vila2.errors import UsageError
from vila2.recaption.worker import work
from vila2.types import Caption, CaptionRequest


def _answer(request: CaptionRequest) -> Caption:
    time.sleep(float(os.environ.get("FAKE_PAUSE", "0")))
    poison = os.environ.get("FAKE_POISON")
    if poison is not None and poison in request.prompt:
        os.write(2, b"the kernel has burnt\n")
        os.kill(os.getpid(), signal.SIGSEGV)
    return echo(request)


def _open(settings: RecaptionSettings) -> FakeCaptioner:
    sys.stdout.write("noise of a library\n")  # must not disturb the protocol
    sys.stdout.flush()
    if "FAKE_REFUSE" in os.environ:
        raise UsageError("no memory is left: lower --batch-size")
    if "FAKE_CRASH" in os.environ:
        raise RuntimeError("CUDA error:\n an illegal access")
    return FakeCaptioner(_answer, room=1)


if __name__ == "__main__":
    sys.exit(work(_open))
