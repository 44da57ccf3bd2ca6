"""Starting a step as a command of its own: torchrun, Slurm, or whatever the recipe's template says."""

import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from vila2.augment.context import Stopped
from vila2.augment.recipe import Launcher
from vila2.data.files import make_folder
from vila2.errors import UsageError, VilaError
from vila2.recaption.interrupt import Interrupts

LOG = "launch.log"
INTERRUPTED = 130
_POLL_S = 0.2
_GRACE_S = 600.0  # a large state takes minutes to save; a second interrupt does not wait


def command_line(template: str, arguments: Sequence[str], fields: Mapping[str, str]) -> list[str]:
    """The words of a template, with `{arguments}` replaced by words of its own and the fields filled in.

    No shell reads them, so nothing in a path or a name is interpreted. UsageError for a field that does not exist.
    """
    try:
        words = shlex.split(template)
    except ValueError as error:
        raise UsageError(f"launch command {template!r}: {error}") from None
    found: list[str] = []
    for word in words:
        if word == "{arguments}":
            found += arguments
            continue
        for name, value in {**fields, "arguments": shlex.join(arguments), "python": sys.executable}.items():
            word = word.replace(f"{{{name}}}", value)  # noqa: PLW2901 - the word with its fields
        found.append(word)
    return found


def launch(
    launcher: Launcher, arguments: Sequence[str], name: str, folder: Path, interrupts: Interrupts
) -> None:
    """Run the command to its end, once a process; what it prints goes to launch.log.

    VilaError with the log's last line if one fails; Stopped when the run was interrupted, and the commands with it.
    """
    make_folder(folder)
    log = folder / LOG
    started: list[subprocess.Popen[bytes]] = []
    with log.open("ab") as output:
        try:
            for rank in range(launcher.processes):
                process = _start(launcher, arguments, name, folder, rank, output.fileno())
                started.append(process)  # one by one: should the next not start, this one is ended
            _wait(started, interrupts)
        except BaseException:
            _end(started)
            raise
    codes = [process.returncode for process in started]
    failed = next((code for code in codes if code), 0)
    if failed in (INTERRUPTED, -signal.SIGINT, -signal.SIGTERM):
        raise Stopped
    if failed:
        raise VilaError(
            f"{name}: the launched command ended with {failed}: {_last_line(log)} (all of it: {log})"
        )


def _start(
    launcher: Launcher, arguments: Sequence[str], name: str, folder: Path, rank: int, output: int
) -> "subprocess.Popen[bytes]":
    fields = {
        "name": name.replace("/", "-"),
        "folder": str(folder),
        "rank": str(rank),
        "processes": str(launcher.processes),
    }
    shared = ["--rank", str(rank), "--world-size", str(launcher.processes)] if launcher.processes > 1 else []
    words = command_line(launcher.command, [*arguments, *shared], fields)
    try:
        # A session of its own: Ctrl-C in a terminal then reaches it once, from here, and it can save what it has.
        return subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    except OSError as error:
        raise UsageError(f"cannot start {words[0]!r} for {name}: {error.strerror}") from None


def _wait(started: "Sequence[subprocess.Popen[bytes]]", interrupts: Interrupts) -> None:
    """Until all have ended, or one has failed. An interrupt is passed on to them."""
    told = False
    while any(process.poll() is None for process in started):
        if any(process.poll() for process in started) and not told:
            _end(started)
            return
        if interrupts.requested and not told:
            told = True
            for process in started:
                if process.poll() is None:
                    process.send_signal(signal.SIGINT)
        time.sleep(_POLL_S)


def _end(started: "Sequence[subprocess.Popen[bytes]]") -> None:
    """Ask those that still run to stop, and kill them if they do not."""
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    timer = threading.Timer(_GRACE_S, _kill, [started])
    timer.start()
    try:
        for process in started:
            process.wait()
    except BaseException:
        _kill(started)
        raise
    finally:
        timer.cancel()


def _kill(started: "Sequence[subprocess.Popen[bytes]]") -> None:
    for process in started:
        process.kill()


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
