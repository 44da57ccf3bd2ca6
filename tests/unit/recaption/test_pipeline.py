import io
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.unit.recaption.fakes import Answer, FakeCaptioner, echo, say
from vila2.config import RecaptionSettings, make_settings
from vila2.data.shards import open_source
from vila2.data.verify import iter_rows, verify
from vila2.errors import OutputError, SourceError, UsageError
from vila2.recaption.estimate import estimate
from vila2.recaption.interrupt import Interrupts
from vila2.recaption.pipeline import run
from vila2.recaption.stats import Progress, RunSummary
from vila2.types import Caption, CaptionRequest, FinishReason

COUNT = 12


def image_bytes(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (9 + seed % 3, 11, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(COUNT):
        (folder / f"{i:03d}.png").write_bytes(image_bytes(i))
        (folder / f"{i:03d}.txt").write_text(f"original {i}")
    return folder


def make(photos: Path, **values: object) -> RecaptionSettings:
    base = {"source": str(photos), "model": "m", "out": str(photos.parent / "out"), "decode_workers": 2}
    return make_settings(RecaptionSettings, {**base, **values})


def go(settings: RecaptionSettings, answer: Answer = echo, room: int = 4, **more: object) -> RunSummary:
    return run(settings, open_model=lambda _: FakeCaptioner(answer, room), **more)  # type: ignore[arg-type]


def rows(settings: RecaptionSettings) -> list[dict[str, object]]:
    return list(iter_rows(Path(settings.out)))


def captions(settings: RecaptionSettings) -> dict[tuple[object, ...], object]:
    return {(row["shard"], row["index"], row["prompt"]): row["caption"] for row in rows(settings)}


def is_complete(settings: RecaptionSettings, prompts: tuple[str, ...]) -> bool:
    return verify(Path(settings.out), open_source(settings.source), prompts).is_complete


def test_a_run_writes_every_row_once_with_a_summary(photos: Path) -> None:
    settings = make(photos, prompt=["brief", "ocr"], rows_per_part=5, round=2)
    summary = go(settings)
    assert is_complete(settings, ("brief", "ocr"))
    assert (summary.images, summary.captions, summary.status) == (COUNT, 2 * COUNT, {"ok": 2 * COUNT})
    stored = json.loads((Path(settings.out) / "summary.json").read_text())
    assert stored == summary.to_json()
    assert {"list_source", "load_model", "read_source", "decode_images", "write", "vision"} <= stored[
        "stage_s"
    ].keys()
    row = rows(settings)[0]
    assert row["original"] == "original 0"
    assert (row["width"], row["height"], row["round"], row["model_digest"]) == (11, 9, 2, "fake-digest")


def test_progress_is_reported_with_its_bottleneck(photos: Path) -> None:
    def answer(request: CaptionRequest) -> Caption:
        time.sleep(0.05)
        return echo(request)

    seen: list[Progress] = []
    go(make(photos), answer, room=1, observe=seen.append)
    assert 5 <= len(seen) <= 12  # some times a second, and at the start and the end
    assert (seen[0].images, seen[0].bottleneck, seen[-1].images) == (0, "starting", COUNT)
    last = seen[-1]
    assert 0 < last.images <= last.total_images == COUNT
    assert last.eta_s is not None
    assert last.captions_per_s > 1
    assert {progress.bottleneck for progress in seen} <= {"starting", "reading", "decode", "language"}


def test_the_same_command_again_does_nothing_more(photos: Path) -> None:
    settings = make(photos)
    go(settings)
    before = captions(settings)
    again = go(settings, say("never"))
    assert (again.images, again.already_done) == (0, COUNT)
    assert captions(settings) == before


@pytest.mark.parametrize("room", [1, 7])
def test_limits_ranks_and_batches_do_not_change_a_caption(photos: Path, room: int) -> None:
    whole = make(photos)
    go(whole)
    parts = {"out": str(photos.parent / f"parts{room}"), "rows_per_part": 2}
    assert go(make(photos, limit=3, **parts), room=room).images == 3
    for rank in (1, 0):
        go(make(photos, rank=rank, world_size=2, **parts), room=room)
    assert is_complete(make(photos, **parts), ("detailed",))
    assert captions(make(photos, **parts)) == captions(whole)


def test_a_limit_counts_over_all_ranks(photos: Path) -> None:
    shares = [go(make(photos, limit=5, rank=rank, world_size=3)).images for rank in range(3)]
    assert (sum(shares), sorted(shares)) == (5, [1, 2, 2])


def test_other_settings_into_the_same_folder_are_refused_by_name(photos: Path) -> None:
    go(make(photos, limit=1))
    with pytest.raises(OutputError, match=r"seed was 0, is now 1"):
        go(make(photos, seed=1))
    with pytest.raises(OutputError, match=r"prompts\.brief"):
        go(make(photos, prompt=["brief"]))
    go(make(photos, batch_size=2, threads=1, limit=2))


def test_bad_images_are_rows_and_are_redone_when_asked(photos: Path) -> None:
    bad = {f"{i:03d}.png": body for i, body in ((2, b""), (5, b"no image"), (7, image_bytes(7)[:60]))}
    for name, body in bad.items():
        (photos / name).write_bytes(body)
    settings = make(photos, prompt=["brief", "ocr"], rows_per_part=5)
    summary = go(settings)
    assert summary.error_kind == {"empty_file": 2, "not_an_image": 2, "corrupt_image": 2}
    assert summary.errors_in_output == 6
    assert is_complete(settings, ("brief", "ocr"))
    assert (go(settings).images, go(settings).errors_in_output) == (0, 6)
    for i in (2, 5):
        (photos / f"{i:03d}.png").write_bytes(image_bytes(i))
    again = go(make(photos, prompt=["brief", "ocr"], rows_per_part=5, retry_errors=True))
    assert (again.images, again.status, again.errors_in_output) == (3, {"ok": 4, "error": 2}, 2)
    assert is_complete(settings, ("brief", "ocr"))
    statuses = [row["status"] for row in rows(settings)]
    assert (statuses.count("ok"), statuses.count("error")) == (22, 2)


def test_errors_of_a_stopped_run_and_what_it_lacked_are_done_together(photos: Path) -> None:
    (photos / "001.png").write_bytes(b"")
    go(make(photos, limit=4))
    (photos / "001.png").write_bytes(image_bytes(1))
    summary = go(make(photos, retry_errors=True))
    assert (summary.images, summary.status) == (COUNT - 3, {"ok": COUNT - 3})
    assert is_complete(make(photos), ("detailed",))


class Broken(Exception):
    pass


def test_a_captioner_that_fails_midway_loses_no_finished_row(photos: Path) -> None:
    left = [5]

    def answer(request: CaptionRequest) -> Caption:
        left[0] -= 1
        if left[0] < 0:
            raise Broken("out of memory")
        return echo(request)

    settings = make(photos)
    with pytest.raises(Broken, match="out of memory"):
        go(settings, answer)
    assert len(rows(settings)) == 5
    assert go(settings).images == COUNT - 5
    assert is_complete(settings, ("detailed",))


def test_a_prepare_that_fails_surfaces_as_itself(photos: Path) -> None:
    class Failing(FakeCaptioner):
        def prepare(self, image: NDArray[np.uint8]) -> object:
            raise Broken("no such mode")

    with pytest.raises(Broken, match="no such mode"):
        run(make(photos), open_model=lambda _: Failing())


def test_a_source_that_fails_surfaces_as_itself(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vila2.data.folder import FolderShard

    def failing(self: object, indices: object = None) -> Iterator[object]:
        raise SourceError("the disk is gone")
        yield

    monkeypatch.setattr(FolderShard, "read", failing)
    with pytest.raises(SourceError, match="the disk is gone"):
        go(make(photos))


def test_a_run_that_fails_before_it_starts_leaves_nothing(photos: Path) -> None:
    def refuse(settings: RecaptionSettings) -> FakeCaptioner:
        raise UsageError("no such model")

    settings = make(photos)
    with pytest.raises(UsageError):
        run(settings, open_model=refuse)
    assert not Path(settings.out).exists()
    (photos / "zzz.png").write_bytes(image_bytes(1))
    assert go(settings).images == COUNT + 1


def test_a_stop_commits_what_is_finished_and_the_next_run_goes_on(photos: Path) -> None:
    interrupts = Interrupts()

    def answer(request: CaptionRequest) -> Caption:
        if request.id == 4:
            interrupts.request()
        return echo(request)

    settings = make(photos)
    summary = go(settings, answer, interrupts=interrupts)
    assert summary.interrupted
    assert 0 < summary.images < COUNT
    assert len(rows(settings)) == summary.images
    assert go(settings).images == COUNT - summary.images
    assert is_complete(settings, ("detailed",))


class SlowModel:
    """Answers three requests, and then hangs in a step of the model, where it is sent `times` Ctrl-C."""

    def __init__(self, times: int) -> None:
        self.times = times

    def __call__(self, request: CaptionRequest) -> Caption:
        if request.id == 3:
            threading.Thread(target=self._send, daemon=True).start()
            time.sleep(30)
        return echo(request)

    def _send(self) -> None:
        for _ in range(self.times):
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGINT)


def test_what_is_in_flight_is_dropped_after_the_grace_period(photos: Path) -> None:
    interrupts = Interrupts(grace_s=0.3)
    settings = make(photos)
    start = time.monotonic()
    with interrupts.installed():
        summary = go(settings, SlowModel(times=1), room=1, interrupts=interrupts)
    assert time.monotonic() - start < 25
    assert (summary.interrupted, summary.images) == (True, 3)
    assert len(rows(settings)) == 3


def test_a_second_signal_ends_at_once(photos: Path) -> None:
    interrupts = Interrupts(grace_s=60)
    with interrupts.installed(), pytest.raises(KeyboardInterrupt):
        go(make(photos), SlowModel(times=2), room=1, interrupts=interrupts)


def test_old_rows_are_committed_though_the_part_is_not_full(photos: Path) -> None:
    settings = make(photos, commit_seconds=0.05)
    committed: list[int] = []

    def answer(request: CaptionRequest) -> Caption:
        time.sleep(0.03)
        committed.append(len(list((Path(settings.out) / "parts").glob("*.parquet"))))
        return echo(request)

    go(settings, answer, room=1)
    assert committed[-1] >= 2
    assert is_complete(settings, ("detailed",))


def test_a_dry_run_counts_and_probes_and_writes_nothing(photos: Path) -> None:
    settings = make(photos, prompt=["brief", "ocr"])
    models: list[FakeCaptioner] = []

    def opened(_: RecaptionSettings) -> FakeCaptioner:
        models.append(FakeCaptioner())
        return models[-1]

    result = estimate(settings, open_model=opened)
    assert (result.samples, result.pending_images, result.prompts, result.probed) == (COUNT, COUNT, 2, 8)
    assert result.seconds == pytest.approx(result.probe_s * COUNT / 8)
    assert result.disk_bytes > 0
    assert models[0].closed
    assert not Path(settings.out).exists()
    go(settings)
    before = sorted(Path(settings.out).rglob("*"))
    assert estimate(settings, open_model=opened).pending_images == 0
    assert sorted(Path(settings.out).rglob("*")) == before


def test_loops_are_counted_in_the_summary(photos: Path) -> None:
    def answer(request: CaptionRequest) -> Caption:
        reason = FinishReason.REPETITION if request.sampling.temperature == 0 else FinishReason.LENGTH
        return Caption(request.id, "A whole sentence here. And a", (1, 2), reason)

    summary = go(make(photos), answer)
    assert summary.rates["retried"] == 1.0
    assert summary.rates["looped_attempts"] == 0.5
    assert summary.rates["trimmed"] == 1.0
    assert {row["caption"] for row in rows(make(photos))} == {"A whole sentence here."}
