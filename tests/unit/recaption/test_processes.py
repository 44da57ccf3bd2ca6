"""One process a device, with a captioner that needs no model: real processes, real signals, real folders."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.recaption.fakes import FakeCaptioner
from tests.unit.recaption.test_pipeline import COUNT, captions, is_complete, make, photos
from vila2.config import RecaptionSettings
from vila2.data.done import DoneSet
from vila2.data.rows import Row
from vila2.data.source import Shard, Source
from vila2.errors import UsageError, VilaError
from vila2.recaption.devices import Device, list_devices, settings_of
from vila2.recaption.interrupt import Interrupts
from vila2.recaption.joined import Life, join_progress
from vila2.recaption.pipeline import run
from vila2.recaption.processes import Notice, run_on_devices
from vila2.recaption.stats import Progress, RunSummary
from vila2.recaption.work import cut_share, decode_workers, share_of
from vila2.types import Status

__all__ = ["photos"]  # a fixture

COMMAND = (sys.executable, "-m", "tests.unit.recaption.fake_worker")


def devices(count: int, **environment: str) -> list[Device]:
    return [Device(f"process {number}", "cpu", environment) for number in range(count)]


def go(settings: RecaptionSettings, where: list[Device], **more: object) -> RunSummary:
    return run_on_devices(settings, where, command=COMMAND, cores=4, **more)  # type: ignore[arg-type]


def reference(photos: Path, **values: object) -> dict[tuple[object, ...], object]:
    settings = make(photos, **{**values, "out": str(photos.parent / "reference")})
    run(settings, open_model=lambda _: FakeCaptioner())
    return captions(settings)


class Killer:
    """Sends a signal to the process of a rank, once, when it has committed some parts."""

    def __init__(self, settings: RecaptionSettings, rank: int, number: int = signal.SIGKILL) -> None:
        self.settings, self.rank, self.number = settings, rank, number
        self.notices: list[Notice] = []
        self.has_killed = False

    def notify(self, notice: Notice) -> None:
        self.notices.append(notice)

    def observe(self, progress: Progress) -> None:
        parts = Path(self.settings.out) / "parts"
        if self.has_killed or len(list(parts.glob(f"part-r{self.rank:05d}-*.parquet"))) < 2:
            return
        self.has_killed = True
        os.kill(next(n.pid for n in self.notices if n.rank == self.rank), self.number)

    @property
    def events(self) -> list[str]:
        return [notice.event for notice in self.notices if notice.rank == self.rank]


def test_processes_share_a_source_and_make_one_run_of_it(photos: Path) -> None:
    settings = make(photos, prompt=["brief", "ocr"], rows_per_part=3)
    seen: list[Progress] = []
    summary = go(settings, devices(3), observe=seen.append)
    assert captions(settings) == reference(photos, prompt=["brief", "ocr"])
    assert is_complete(settings, ("brief", "ocr"))
    assert (summary.images, summary.captions, summary.restarts) == (COUNT, 2 * COUNT, 0)
    assert (summary.devices, summary.status) == (["process 0", "process 1", "process 2"], {"ok": 2 * COUNT})
    out = Path(settings.out)
    assert [path.name for path in out.glob("summary*.json")] == ["summary.json"]
    assert json.loads((out / "summary.json").read_text())["images"] == COUNT
    assert {path.name.split("-")[1] for path in out.glob("parts/*.parquet")} == {"r00000", "r00001", "r00002"}
    assert seen
    assert all(progress.images <= progress.total_images == COUNT for progress in seen)
    again = go(settings, devices(2))
    assert (again.images, again.rows, again.already_done) == (0, 0, 2 * COUNT)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_is_killed_is_replaced_and_its_work_is_neither_lost_nor_done_twice(
    photos: Path, number: int
) -> None:
    settings = make(photos, prompt=["brief", "ocr"], rows_per_part=2, commit_seconds=0.05)
    killer = Killer(settings, 1, number)
    summary = go(settings, devices(2, FAKE_PAUSE="0.1"), observe=killer.observe, notify=killer.notify)
    assert killer.events == ["started", "died", "started", "finished"]
    assert captions(settings) == reference(photos, prompt=["brief", "ocr"])
    assert is_complete(settings, ("brief", "ocr"))
    assert (summary.restarts, summary.images, summary.rows) == (1, COUNT, 2 * COUNT)
    assert summary.status == {"ok": 2 * COUNT}
    detail = next(notice.detail for notice in killer.notices if notice.event == "died")
    assert detail.endswith("restart 1 of 3")
    assert "SIGKILL" in detail or number == signal.SIGTERM


def test_a_process_that_always_dies_is_given_up_after_the_others_have_finished(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vila2.recaption.processes.RESTART_AFTER_S", 0.01)
    settings = make(photos, prompt_text="About {original}.", rows_per_part=1)
    notices: list[Notice] = []
    with pytest.raises(
        VilaError, match=r"process 1 was given up: its process died 4 times .* SIGSEGV"
    ) as failed:
        go(settings, devices(2, FAKE_POISON="original 8"), notify=notices.append)
    assert "the kernel has burnt" in str(failed.value)
    assert "\n" not in str(failed.value)
    done = {index for _, index, _ in captions(settings)}
    assert done == set(range(COUNT)) - {8, 9, 10, 11}
    assert [n.event for n in notices if n.rank == 1] == ["started", "died"] * 3 + ["started", "given_up"]
    assert go(settings, devices(1)).images == 4
    assert captions(settings) == reference(photos, prompt_text="About {original}.")


def test_a_crash_in_python_is_a_death_with_its_message(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vila2.recaption.processes.RESTART_AFTER_S", 0.01)
    with pytest.raises(
        VilaError, match="exit code 1: RuntimeError: CUDA error: an illegal access; what it lacks"
    ):
        go(make(photos), [Device("GPU 0", "cpu", {"FAKE_CRASH": "1"})])


def test_what_is_wrong_for_one_ends_all_and_is_said_as_it_is(photos: Path) -> None:
    where = [*devices(1, FAKE_PAUSE="5"), Device("GPU 1", "cpu", {"FAKE_REFUSE": "1"})]
    start = time.monotonic()
    with pytest.raises(UsageError, match=r"^GPU 1: no memory is left: lower --batch-size$"):
        go(make(photos), where)
    assert time.monotonic() - start < 15 + 12


def test_a_request_to_stop_reaches_all_and_the_run_goes_on_later(photos: Path) -> None:
    settings = make(photos, rows_per_part=1)
    interrupts = Interrupts()

    def observe(progress: Progress) -> None:
        if progress.captions >= 3:
            interrupts.request()

    summary = go(settings, devices(2, FAKE_PAUSE="0.15"), observe=observe, interrupts=interrupts)
    assert summary.interrupted
    early = captions(settings)
    assert 3 <= len(early) == summary.rows < COUNT
    assert go(settings, devices(2)).images == COUNT - len(early)
    assert captions(settings) == reference(photos)


def test_processes_stop_when_their_supervisor_is_gone(photos: Path) -> None:
    settings = make(photos, rows_per_part=1)
    order = {"settings": settings.model_dump(mode="json", by_alias=True), "cut": {"first": 0, "stop": COUNT}}
    process = subprocess.Popen(
        COMMAND,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "FAKE_PAUSE": "0.2"},
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(order).encode() + b"\n")
    process.stdin.flush()
    deadline = time.monotonic() + 60
    while not any(Path(settings.out).glob("parts/*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.communicate(timeout=60)  # which closes the standard input first
    assert process.returncode == 0
    assert 0 < len(captions(settings)) < COUNT
    go(settings, devices(1))
    assert captions(settings) == reference(photos)


class _Shard:
    def __init__(self, name: str, length: int) -> None:
        self.name, self.length = name, length

    def __len__(self) -> int:
        return self.length


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    done=st.sets(st.tuples(st.integers(0, 4), st.integers(0, 8))),
    count=st.integers(1, 5),
    limit=st.none() | st.integers(1, 30),
    rank=st.integers(0, 1),
)
def test_cuts_share_what_is_left_without_overlap(
    lengths: list[int], done: set[tuple[int, int]], count: int, limit: int | None, rank: int
) -> None:
    shards: list[Shard] = [_Shard(f"s{number}", length) for number, length in enumerate(lengths)]  # type: ignore[list-item]
    source = Source("folder", "x", shards)
    marks = DoneSet()
    for shard, index in done:
        if shard < len(lengths) and index < lengths[shard]:
            for prompt in ("a", "b"):
                marks._mark(f"s{shard}", prompt, np.array([index]))
    values = {"source": "x", "out": "y", "rank": rank, "world_size": 2, "limit": limit}
    settings = RecaptionSettings.model_validate(values)
    cuts = cut_share(source, settings, ("a", "b"), marks, count)

    def places(ranges: list[object]) -> list[tuple[str, int]]:
        return [(r.shard.name, i) for r in ranges for i in range(r.start, r.stop)]  # type: ignore[attr-defined]

    mine = [
        places(share_of(source, settings.model_copy(update={"rank": 7, "world_size": 9}), cut))  # type: ignore[arg-type]
        for cut in cuts
    ]
    assert [place for part in mine for place in part] == places(share_of(source, settings))  # type: ignore[arg-type]
    todo = [sum(not marks.is_done(shard, "a", index) for shard, index in part) for part in mine]
    assert max(todo) - min(todo) <= 1
    assert [cut.num_pending for cut in cuts] == todo


def test_the_bar_of_all_processes_keeps_what_a_dead_one_has_committed() -> None:
    def told(images: int, total: int, captions: int) -> dict[str, object]:
        numbers = {"seconds": 1.0, "waiting_decode": 1, "waiting_model": 2, "in_model": 3, "errors": 0}
        drafts = {"drafted": 0, "accepted": 0, "tokens_per_step": 1.0}
        return {
            "images": images, "total_images": total, "captions": captions, "tokens": 10 * captions,
            "bottleneck": "language", "drafts": drafts, **numbers,
        }  # fmt: skip

    lives = [Life(10), Life(10)]
    assert join_progress(lives, 0.5).total_images == 20
    assert join_progress(lives, 0.5).eta_s is None
    lives[0].update(told(4, 10, 4))
    lives[1].update(told(6, 10, 6))
    both = join_progress(lives, 5.0)
    assert (both.images, both.total_images, both.captions, both.tokens) == (10, 20, 10, 100)
    assert (both.eta_s, both.captions_per_s, both.tokens_per_s, both.in_model) == (5.0, 2.0, 20.0, 6)
    row = Row("k", "s", 0, "p", Status.OK, "d", caption="two words", num_tokens=10)
    lives[1].count([row] * 3)  # of six captions, three were committed when it died
    lives[1].end()
    assert join_progress(lives, 6.0).captions == 7
    lives[1].update(told(0, 7, 0))
    after = join_progress(lives, 7.0)
    assert (after.images, after.total_images, after.captions, after.tokens) == (7, 20, 7, 70)


def test_devices_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [d.name for d in list_devices("cpu:2", lambda: 0)] == ["CPU process 0", "CPU process 1"]
    assert [d.environment for d in list_devices("all", lambda: 2)] == [
        {"CUDA_VISIBLE_DEVICES": "0"},
        {"CUDA_VISIBLE_DEVICES": "1"},
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 7,GPU-ab")
    given = list_devices("0,2", lambda: 3)
    assert [(d.name, d.kind) for d in given] == [("GPU 0", "cuda"), ("GPU 2", "cuda")]
    assert [d.environment["CUDA_VISIBLE_DEVICES"] for d in given] == ["4", "GPU-ab"]
    with pytest.raises(UsageError, match="there is no GPU 3; torch sees 3"):
        list_devices("1,3", lambda: 3)
    with pytest.raises(UsageError, match="torch sees no GPU here; use --devices cpu:N"):
        list_devices("all", lambda: 0)


def test_what_a_process_is_given_of_the_machine(photos: Path) -> None:
    settings = make(photos, devices="cpu:3", rank=1, world_size=2, decode_workers=7)
    mine = settings_of(settings, 2, list_devices("cpu:3", lambda: 0), 16)
    assert (mine.rank, mine.world_size, mine.threads, mine.decode_workers, mine.device) == (5, 6, 5, 2, "cpu")
    assert mine.processes_on_cpu == 3
    few = settings_of(make(photos, threads=2), 0, list_devices("cpu:3", lambda: 0), 16)
    assert few.threads == 1
    gpus = list_devices("all", lambda: 8)
    on_gpu = settings_of(make(photos).model_copy(update={"decode_workers": None}), 0, gpus, 64)
    assert (on_gpu.threads, on_gpu.decode_workers, on_gpu.device) == (8, 8, "cuda")


@pytest.mark.parametrize("cores", [1, 2, 5, 16, 96])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("threads", [None, 1, 6])
def test_processes_on_one_host_divide_its_cores(
    photos: Path, cores: int, count: int, threads: int | None
) -> None:
    """Of models no more threads than cores or `--threads`, and half as many that decode; but each has one."""
    settings = make(photos, threads=threads, devices=f"cpu:{count}").model_copy(
        update={"decode_workers": None}
    )
    given = list_devices(f"cpu:{count}", lambda: 0)
    each = [settings_of(settings, number, given, cores) for number in range(count)]
    assert sum(mine.threads or 0 for mine in each) <= max(threads or cores, count)
    assert sum(mine.decode_workers or 0 for mine in each) <= max((threads or cores) // 2, count)
    assert all(mine.threads and mine.decode_workers for mine in each)


def test_decode_threads_go_by_threads_beside_a_model_on_the_cpu(photos: Path) -> None:
    plain = make(photos).model_copy(update={"decode_workers": None})
    on_cpu, on_gpu = SimpleNamespace(is_on_gpu=False), SimpleNamespace(is_on_gpu=True)

    def workers(where: object, **change: int) -> int:
        return decode_workers(plain.model_copy(update=change), where)  # type: ignore[arg-type]

    assert [workers(on_cpu, threads=count) for count in (1, 2, 3, 8, 100)] == [1, 1, 1, 4, 16]
    assert workers(on_cpu, threads=1, decode_workers=5) == 5
    assert workers(on_gpu, threads=1) == workers(on_cpu) >= 2


@pytest.mark.parametrize("spec", ["", "gpu", "cpu", "cpu:0", "1,", "1,1", "0-3"])
def test_other_devices_are_refused(photos: Path, spec: str) -> None:
    with pytest.raises(UsageError, match="devices"):
        make(photos, devices=spec)
