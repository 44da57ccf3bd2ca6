"""The bounded queues between the source, the decode threads and the captioner: the one file that owns them.

One thread reads the source, several decode, the caller polls. A queue is bounded by count and by bytes, so memory
stays flat whatever the source holds. An exception in any thread is raised, as itself, by the next `poll`.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from vila2.types import Sample, SampleError

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Job:
    """A sample, the prompts that it still lacks a caption for, and drafts of some of those captions."""

    sample: Sample
    prompts: tuple[str, ...]
    drafts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A job with its image prepared for the captioner, or with the reason why it has none."""

    job: Job
    prepared: Any = None
    error: SampleError | None = None
    width: int = 0
    height: int = 0
    image_digest: str = ""
    num_bytes: int = 0


class _Closed(Exception):
    """The queue was closed: no more puts, and no more gets once it is empty."""


class _Queue(Generic[Item]):
    """First in, first out, bounded by count and bytes; one item passes whatever its size."""

    def __init__(self, max_items: int, max_bytes: int) -> None:
        self.max_items, self.max_bytes = max_items, max_bytes
        self._items: deque[tuple[Item, int]] = deque()
        self._bytes = 0
        self._closed = False
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: Item, num_bytes: int) -> None:
        """Wait for room. Raises _Closed when the queue closes meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._has_room(num_bytes))
            if self._closed:
                raise _Closed
            self._items.append((item, num_bytes))
            self._bytes += num_bytes
            self._changed.notify_all()

    def get(self, timeout_s: float | None) -> Item | None:
        """The next item; None when none came in time. Raises _Closed when there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._items) or self._closed, timeout_s)
            if self._items:
                item, num_bytes = self._items.popleft()
                self._bytes -= num_bytes
                self._changed.notify_all()
                return item
            if self._closed:
                raise _Closed
            return None

    def close(self, *, drop: bool = False) -> None:
        with self._changed:
            self._closed = True
            if drop:
                self._items.clear()
                self._bytes = 0
            self._changed.notify_all()

    def _has_room(self, num_bytes: int) -> bool:
        if not self._items:
            return True
        return len(self._items) < self.max_items and self._bytes + num_bytes <= self.max_bytes


class Feed:
    """Reads jobs in one thread and loads them in `workers` others, ahead of whoever polls."""

    def __init__(
        self,
        jobs: Iterable[Job],
        load: Callable[[Job], Loaded],
        *,
        workers: int,
        max_ready: int = 32,
        max_bytes: int = 256 * 2**20,
    ) -> None:
        self._load = load
        self._encoded: _Queue[Job] = _Queue(2 * workers, max_bytes // 4)
        self._ready: _Queue[Loaded] = _Queue(max_ready, max_bytes)
        self._failure: BaseException | None = None
        self._lock = threading.Lock()
        self._num_loading = workers
        self.ended = False  # every job was polled, or the feed was closed
        self.num_jobs = 0  # read so far
        self.read_s = 0.0
        self.decode_s = 0.0  # summed over the threads
        self._threads = [threading.Thread(target=self._read, args=(jobs,), name="vila2-read", daemon=True)]
        self._threads += [
            threading.Thread(target=self._work, name=f"vila2-decode-{number}", daemon=True)
            for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def num_encoded(self) -> int:
        return len(self._encoded)

    @property
    def num_ready(self) -> int:
        return len(self._ready)

    def poll(self, timeout_s: float = 0.0) -> Loaded | None:
        """A loaded job, in no particular order; None when none is ready in time or when the feed has ended."""
        if self.ended:
            return None
        try:
            loaded = self._ready.get(timeout_s)
        except _Closed:
            self.ended = True
            loaded = None
        if self._failure is not None:
            self.ended = True
            raise self._failure
        return loaded

    def close(self) -> None:
        """Stop the threads and drop what is queued. Waits only a moment: a read that hangs must not hang us."""
        self.ended = True
        self._encoded.close(drop=True)
        self._ready.close(drop=True)
        deadline = time.monotonic() + 2.0
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _read(self, jobs: Iterable[Job]) -> None:
        try:
            start = time.perf_counter()
            for job in jobs:
                self.read_s += time.perf_counter() - start
                self._encoded.put(job, len(job.sample.image or b""))
                self.num_jobs += 1
                start = time.perf_counter()
            self._encoded.close()
        except _Closed:
            pass
        except BaseException as error:
            self._fail(error)

    def _work(self) -> None:
        try:
            while True:
                job = self._encoded.get(None)
                if job is None:  # cannot be: no timeout
                    continue
                start = time.perf_counter()
                loaded = self._load(job)
                with self._lock:
                    self.decode_s += time.perf_counter() - start
                self._ready.put(loaded, loaded.num_bytes)
        except _Closed:
            with self._lock:
                self._num_loading -= 1
                last = self._num_loading == 0
            if last:
                self._ready.close()
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            if self._failure is None:
                self._failure = error
        self._encoded.close(drop=True)
        self._ready.close(drop=True)
