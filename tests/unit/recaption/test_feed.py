import threading
import time
from collections.abc import Iterator

import pytest

from vila2.recaption.feed import Feed, Job, Loaded
from vila2.types import Sample


def jobs(count: int, size: int = 1) -> Iterator[Job]:
    for i in range(count):
        yield Job(Sample("s", i, f"k{i}", b"x" * size), ("p",))


def load(job: Job) -> Loaded:
    return Loaded(job, prepared=job.sample.index, num_bytes=1)


def drain(feed: Feed) -> list[int]:
    found = []
    while not feed.ended:
        loaded = feed.poll(5.0)
        if loaded is not None:
            found.append(loaded.prepared)
    return found


@pytest.mark.parametrize("workers", [1, 4])
def test_every_job_comes_out_once(workers: int) -> None:
    feed = Feed(jobs(200), load, workers=workers, max_ready=3)
    assert sorted(drain(feed)) == list(range(200))
    assert feed.poll(0.0) is None
    feed.close()


def test_nothing_to_do_ends_at_once() -> None:
    feed = Feed(iter(()), load, workers=2)
    assert drain(feed) == []
    feed.close()


def test_the_reader_stays_within_the_bounds_while_nobody_polls() -> None:
    taken: list[int] = []

    def counted() -> Iterator[Job]:
        for job in jobs(1000):
            taken.append(job.sample.index)
            yield job

    feed = Feed(counted(), load, workers=2, max_ready=5)
    time.sleep(0.3)
    # 5 ready, 2 in the hands of the workers, 4 encoded, 1 in the hand of the reader
    assert len(taken) <= 12
    feed.close()


def test_bytes_bound_the_queue_too_but_one_item_always_passes() -> None:
    def heavy(job: Job) -> Loaded:
        return Loaded(job, prepared=job.sample.index, num_bytes=1000)

    feed = Feed(jobs(50), heavy, workers=1, max_ready=40, max_bytes=2500)
    time.sleep(0.3)
    assert feed.num_ready == 2
    assert sorted(drain(feed)) == list(range(50))
    alone = Feed(jobs(3, size=10_000), heavy, workers=1, max_bytes=10)
    assert sorted(drain(alone)) == [0, 1, 2]


class Broken(Exception):
    pass


def test_a_failing_source_surfaces_as_itself() -> None:
    def failing() -> Iterator[Job]:
        yield from jobs(3)
        raise Broken("the disk is gone")

    feed = Feed(failing(), load, workers=2)
    with pytest.raises(Broken, match="the disk is gone"):
        drain(feed)
    feed.close()


def test_a_failing_worker_surfaces_as_itself_even_with_full_queues() -> None:
    def failing(job: Job) -> Loaded:
        if job.sample.index == 30:
            raise Broken("cannot load")
        return load(job)

    feed = Feed(jobs(100), failing, workers=3, max_ready=2)
    with pytest.raises(Broken, match="cannot load"):
        drain(feed)
    feed.close()


def test_close_ends_the_threads_of_a_feed_that_nobody_drained() -> None:
    before = threading.active_count()
    feed = Feed(jobs(10_000), load, workers=4, max_ready=2)
    time.sleep(0.05)
    feed.close()
    assert threading.active_count() == before
    assert feed.poll(0.0) is None
