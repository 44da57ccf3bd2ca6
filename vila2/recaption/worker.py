"""One process of `--devices`: takes its order from standard input, works on its cut, and says how it goes.

Standard output carries JSON lines for the supervisor (vila2.recaption.processes) and nothing else; what libraries print
goes to standard error. When standard input ends the supervisor is gone, and the process stops as at Ctrl-C.
"""

import json
import os
import signal
import sys
import threading
from dataclasses import asdict
from functools import partial
from typing import Any, TextIO

from vila2.backends import open_captioner
from vila2.config import RecaptionSettings, make_settings
from vila2.errors import VilaError
from vila2.recaption.interrupt import Interrupts
from vila2.recaption.pipeline import OpenModel, run
from vila2.recaption.stats import Progress
from vila2.recaption.work import Cut

INTERRUPTED = 130


def work(open_model: OpenModel = open_captioner) -> int:
    """Carry out the order on standard input; returns the exit code."""
    protocol = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    order = json.loads(_read_line(0))
    settings = make_settings(RecaptionSettings, order["settings"])
    interrupts = Interrupts()
    with interrupts.installed():
        threading.Thread(target=_watch, name="vila2-supervisor", daemon=True).start()
        try:
            summary = run(
                settings,
                observe=partial(_tell_progress, protocol),
                interrupts=interrupts,
                open_model=open_model,
                cut=Cut(**order["cut"]),
            )
        except VilaError as error:
            _tell(protocol, "error", {"type": type(error).__name__, "message": str(error)})
            return error.exit_code
        except KeyboardInterrupt:
            return INTERRUPTED
        except Exception as error:
            if os.environ.get("VILA2_TRACEBACK"):
                raise
            _tell(protocol, "failure", {"message": f"{type(error).__name__}: {' '.join(str(error).split())}"})
            return 1
    _tell(protocol, "summary", summary.to_json())
    return 0


def _tell_progress(protocol: TextIO, progress: Progress) -> None:
    _tell(protocol, "progress", asdict(progress))


def _tell(protocol: TextIO, kind: str, values: dict[str, Any]) -> None:
    try:
        protocol.write(json.dumps({"kind": kind, **values}) + "\n")
        protocol.flush()
    except BrokenPipeError:
        pass  # nobody listens any more: `_watch` stops the run


def _read_line(fd: int) -> bytes:
    # Byte by byte and below Python's buffers: a thread that sits in a buffered read at the end crashes the interpreter.
    line = bytearray()
    while (byte := os.read(fd, 1)) not in (b"", b"\n"):
        line += byte
    return bytes(line)


def _watch() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(work())
