"""`--devices`: one process a device, and the supervisor that starts them, restarts those that die, and sums up.

Each process works on a cut of its own, so no two caption the same sample. What a process has committed is done; what it
had open when it died is done again by its successor, which reads the output folder as any resumed run does. A process
that dies again and again without a new part in between is given up after MAX_RESTARTS, and the others finish first.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from vila2 import errors
from vila2.config import RecaptionSettings
from vila2.data.done import DoneSet
from vila2.data.parts import list_parts, part_rank_and_number
from vila2.data.writer import load_part
from vila2.errors import VilaError
from vila2.recaption.devices import Device, settings_of
from vila2.recaption.interrupt import Interrupts
from vila2.recaption.joined import Life, join_progress, join_summaries
from vila2.recaption.output import discard_index, open_samples, write_summary
from vila2.recaption.pipeline import OBSERVE_EVERY_S, Observe
from vila2.recaption.prompts import choose_prompts
from vila2.recaption.stats import RunSummary
from vila2.recaption.work import Cut, cut_share

MAX_RESTARTS = 3  # of one process, without a new part in between
RESTART_AFTER_S = 1.0  # the second time; twice as long the third time, and so on. The first time is at once
GRACE_S = 15.0  # in which processes that were asked to stop do so by themselves
_COMMAND = (sys.executable, "-m", "vila2.recaption.worker")
_LINES_KEPT = 20  # of a process's standard error, for its last words


@dataclass(frozen=True, slots=True)
class Notice:
    """Something about one process: `event` is started, died, given_up or finished."""

    event: str
    device: str
    rank: int
    pid: int
    detail: str = ""


Notify = Callable[[Notice], None]


def run_on_devices(
    settings: RecaptionSettings,
    devices: Sequence[Device],
    *,
    observe: Observe | None = None,
    notify: Notify | None = None,
    interrupts: Interrupts | None = None,
    command: Sequence[str] = _COMMAND,
    cores: int | None = None,
) -> RunSummary:
    """Caption what is not captioned yet, with one process a device; raises as `pipeline.run` does.

    VilaError too when a process was given up; the others have finished then.
    """
    prompts = choose_prompts(settings)
    try:
        source = open_samples(settings)  # so that the processes find the index and list nothing
        done = DoneSet.load(Path(settings.out).expanduser())
        cuts = cut_share(source, settings, prompts.names, done, len(devices))
        cores = cores or (
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        )
        workers = [
            _Worker(
                device,
                settings_of(settings, number, list(devices), cores),
                cut,
                command,
                Life(cut.num_pending),
            )
            for number, (device, cut) in enumerate(zip(devices, cuts, strict=True))
        ]
        return _Supervisor(
            settings, workers, done.num_rows, observe, notify, interrupts or Interrupts()
        ).run()
    except BaseException:
        discard_index(settings)
        raise


@dataclass(slots=True)
class _Worker:
    """One device's process, or the one that takes its place."""

    device: Device
    settings: RecaptionSettings
    cut: Cut
    command: Sequence[str]
    life: Life
    process: "subprocess.Popen[bytes] | None" = None
    is_over: bool = False
    summary: dict[str, Any] | None = None
    error: VilaError | None = None
    failure: str = ""
    deaths: int = 0  # since the last new part
    restart_at: float = 0.0
    words: deque[str] = field(default_factory=lambda: deque(maxlen=_LINES_KEPT))
    known_parts: set[str] = field(default_factory=set)

    def start(
        self, messages: "queue.Queue[tuple[_Worker, subprocess.Popen[bytes], dict[str, Any] | None]]"
    ) -> None:
        self.known_parts = self.parts()
        self.failure = ""
        self.words.clear()
        environment = {**os.environ, **self.device.environment}
        if self.settings.threads is not None:
            environment["OMP_NUM_THREADS"] = str(self.settings.threads)
        # A session of its own: Ctrl-C in the terminal reaches the supervisor alone, which asks in its own way.
        process = subprocess.Popen(
            list(self.command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        self.process = process
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        order = {
            "settings": self.settings.model_dump(mode="json", by_alias=True),
            "cut": asdict(self.cut),
        }
        listener = threading.Thread(
            target=self._listen, args=(process, process.stdout, messages), daemon=True
        )
        threading.Thread(target=self._overhear, args=(process.stderr,), daemon=True).start()
        listener.start()
        try:
            process.stdin.write(json.dumps(order).encode() + b"\n")
            process.stdin.flush()  # and stays open: its end tells the process that we are gone
        except BrokenPipeError:
            pass  # it has died already, which the listener notices

    def parts(self) -> set[str]:
        """The names of this rank's parts."""
        places = {path.name: part_rank_and_number(path.name) for path in list_parts(self.folder)}
        return {name for name, place in places.items() if place and place[0] == self.settings.rank}

    @property
    def folder(self) -> Path:
        return Path(self.settings.out).expanduser()

    @property
    def is_alive(self) -> bool:
        return self.process is not None

    def signal(self, number: int) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def bury(self) -> str:
        """Note the end of the process, and count what it has committed; returns how it ended."""
        assert self.process is not None
        code = self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            _close(pipe)
        self.process = None
        new = self.parts() - self.known_parts
        for name in sorted(new):
            self.life.count(load_part(self.folder / "parts" / name))
        self.life.end()
        self.deaths = 1 if new else self.deaths + 1
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        last = self.failure or next((line for line in reversed(self.words) if line.strip()), "")
        return f"{how}: {last.strip()}" if last else how

    def _listen(
        self, process: "subprocess.Popen[bytes]", stdout: IO[bytes], messages: "queue.Queue[Any]"
    ) -> None:
        for line in stdout:
            try:
                message = json.loads(line)
            except ValueError:
                continue  # a process that is killed may leave half a line
            messages.put((self, process, message))
        messages.put((self, process, None))

    def _overhear(self, stderr: IO[bytes]) -> None:
        with stderr:
            for line in stderr:
                self.words.append(line.decode(errors="replace"))


class _Supervisor:
    """Starts processes, listens to all of them, and acts on how they end."""

    def __init__(
        self,
        settings: RecaptionSettings,
        workers: list[_Worker],
        already_done: int,
        observe: Observe | None,
        notify: Notify | None,
        interrupts: Interrupts,
    ) -> None:
        self.settings, self.workers, self.already_done = settings, workers, already_done
        self.observe, self.notify, self.interrupts = observe, notify, interrupts
        self.messages: queue.Queue[tuple[_Worker, subprocess.Popen[bytes], dict[str, Any] | None]] = (
            queue.Queue()
        )
        self.restarts = 0
        self.begun: float | None = None  # when the first process had read its first sample
        self.failure: VilaError | None = None
        self.asked_to_stop_at: float | None = None
        interrupts.grace_s = max(interrupts.grace_s, GRACE_S + 5.0)  # the processes have theirs within it
        self.observed = time.monotonic()

    def run(self) -> RunSummary:
        try:
            with self.interrupts.orderly():
                for worker in self.workers:
                    self._start(worker)
                while not all(worker.is_over for worker in self.workers):
                    self._turn()
        finally:
            for worker in self.workers:
                worker.signal(signal.SIGKILL)
        if self.failure is not None:
            raise self.failure
        for worker in self.workers:
            if worker.error is not None:
                raise worker.error  # it was given up; the others have finished
        done = DoneSet.load(Path(self.settings.out).expanduser())
        summary = join_summaries(
            self.settings,
            [(worker.life, worker.summary) for worker in self.workers],
            devices=[worker.device.name for worker in self.workers],
            restarts=self.restarts,
            seconds=time.monotonic() - (self.begun or time.monotonic()),
            interrupted=self.interrupts.requested,
            already_done=self.already_done,
            num_errors=done.counts["error"],
        )
        write_summary(self.settings, summary.to_json())
        return summary

    def _turn(self) -> None:
        try:
            worker, process, message = self.messages.get(timeout=OBSERVE_EVERY_S)
        except queue.Empty:
            pass
        else:
            if process is worker.process:
                self._hear(worker, message)
        now = time.monotonic()
        if self.interrupts.requested or self.failure is not None:
            self._stop(now)
        for worker in self.workers:
            if not worker.is_alive and not worker.is_over and now >= worker.restart_at:
                self._start(worker)
        if self.observe is not None and self.begun is not None and now - self.observed >= OBSERVE_EVERY_S:
            self.observed = now
            self.observe(join_progress([worker.life for worker in self.workers], now - self.begun))

    def _hear(self, worker: _Worker, message: dict[str, Any] | None) -> None:
        if message is None:
            self._ended(worker)
            return
        kind = message.pop("kind", "")
        if kind == "progress":
            worker.life.update(message)
            if self.begun is None:
                self.begun = time.monotonic() - float(message["seconds"])
        elif kind == "summary":
            worker.summary = message
            if self.begun is None:
                self.begun = time.monotonic() - float(message["seconds"])
        elif kind == "failure":
            worker.failure = str(message["message"])
        elif kind == "error":
            error = getattr(errors, str(message["type"]), VilaError)
            worker.error = error(f"{worker.device.name}: {message['message']}")

    def _ended(self, worker: _Worker) -> None:
        pid = worker.process.pid if worker.process is not None else 0
        finished = worker.summary is not None and (
            not worker.summary["interrupted"] or self.asked_to_stop_at is not None
        )
        if finished or worker.error is not None or self.asked_to_stop_at is not None:
            if finished and worker.process is not None:
                worker.process.wait()
                _close(worker.process.stdin)
                worker.process = None
            else:
                worker.bury()
            worker.is_over = True
            if worker.error is not None and self.failure is None:
                self.failure = worker.error  # a wrong setting or a full disk: the others cannot do better
            self._notify("finished", worker, pid)
            return
        how = worker.bury()
        worker.summary = None
        if worker.deaths > MAX_RESTARTS:
            worker.is_over = True
            worker.error = VilaError(
                f"{worker.device.name} was given up: its process died {worker.deaths} times without a new part, the "
                f"last time with {how}; what it lacks is done by the same command again, on other --devices if the "
                "device is at fault"
            )
            self._notify("given_up", worker, pid, how)
            return
        self.restarts += 1
        worker.restart_at = (
            time.monotonic() + 2.0 ** (worker.deaths - 1) - 1.0
        )  # at once, then after 1 s, 3 s
        self._notify("died", worker, pid, f"{how}; restart {worker.deaths} of {MAX_RESTARTS}")

    def _start(self, worker: _Worker) -> None:
        worker.start(self.messages)
        assert worker.process is not None
        self._notify("started", worker, worker.process.pid)

    def _stop(self, now: float) -> None:
        """Ask all processes to commit and end; kill those that have not in time."""
        if self.asked_to_stop_at is None:
            self.asked_to_stop_at = now
            for worker in self.workers:
                worker.signal(signal.SIGTERM)
                worker.is_over = worker.is_over or not worker.is_alive
        elif now - self.asked_to_stop_at > GRACE_S:
            for worker in self.workers:
                worker.signal(signal.SIGKILL)

    def _notify(self, event: str, worker: _Worker, pid: int, detail: str = "") -> None:
        if self.notify is not None:
            self.notify(Notice(event, worker.device.name, worker.settings.rank, pid, detail))


def _close(pipe: IO[bytes] | None) -> None:
    try:
        if pipe is not None:
            pipe.close()
    except BrokenPipeError:
        pass
