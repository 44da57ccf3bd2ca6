"""Manifest, locks, the done set, verify and ordered rows."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.data.test_writer import FakeShard, source
from tests.unit.data.write_some import row
from vila2.data.done import DoneSet
from vila2.data.lock import RunLock
from vila2.data.manifest import Manifest
from vila2.data.parts import list_parts
from vila2.data.rows import Row, to_table
from vila2.data.source import Source, assign
from vila2.data.verify import iter_rows, verify
from vila2.data.writer import PartWriter
from vila2.errors import OutputError
from vila2.types import ErrorKind, Status

# -- manifest --------------------------------------------------------------------------------------


def test_manifest(tmp_path: Path) -> None:
    first = Manifest({"source": "a", "sampling": {"seed": 1, "top_p": 1.0}, "prompts": ["x"]}, {"vila2": "1"})
    assert Manifest.load(tmp_path / "out") is None
    assert first.ensure(tmp_path / "out") == first
    later = Manifest(dict(first.settings), {"vila2": "2"})
    assert later.ensure(tmp_path / "out") == first  # another version may go on
    changed = Manifest(
        {"source": "a", "sampling": {"seed": 2, "top_p": 1.0}, "new": True, "prompts": ["x", "y"]}
    )
    with pytest.raises(OutputError) as caught:
        changed.ensure(tmp_path / "out")
    message = str(caught.value)
    assert "sampling.seed was 1, is now 2" in message
    assert 'prompts was ["x"], is now ["x", "y"]' in message
    assert "new was (not set), is now true" in message
    assert "top_p" not in message
    assert "source" not in message
    assert "\n" not in message


def test_manifest_compares_what_json_keeps(tmp_path: Path) -> None:
    settings = {"stop": ("a", "b"), "path": Path("/x"), "empty": {}, "none": None}
    Manifest(settings).ensure(tmp_path)
    Manifest(dict(settings)).ensure(tmp_path)
    with pytest.raises(OutputError, match="none was null, is now 0"):
        Manifest(settings | {"none": 0}).ensure(tmp_path)
    with pytest.raises(OutputError, match="none was null, is now"):
        Manifest({name: value for name, value in settings.items() if name != "none"}).ensure(tmp_path)


def test_manifest_that_does_not_parse(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"settings": 3, "versions": {}}', "\0"):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(OutputError, match="is not a manifest"):
            Manifest({}).ensure(tmp_path)


def test_parts_without_a_manifest_are_left_alone(tmp_path: Path) -> None:
    PartWriter(tmp_path, rows_per_part=1).add(row(0, "p"))
    with pytest.raises(OutputError, match=r"holds parts but no manifest\.json"):
        Manifest({}).ensure(tmp_path)


def test_manifest_of_the_first_process_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Manifest({"a": 1}).ensure(tmp_path)
    answers = [None, Manifest.load(tmp_path)]
    monkeypatch.setattr(Manifest, "load", lambda out_dir: answers.pop(0))
    with pytest.raises(OutputError, match="a was 1, is now 2"):
        Manifest({"a": 2}).ensure(tmp_path)


# -- locks -----------------------------------------------------------------------------------------


def test_locks(tmp_path: Path) -> None:
    with RunLock(tmp_path, 0, 2) as lock:
        assert lock.is_guarded
        with pytest.raises(OutputError, match="rank 0 is already at work"), RunLock(tmp_path, 0, 2):
            pass
        with RunLock(tmp_path, 1, 2):
            pass
        with (
            pytest.raises(OutputError, match="with world size 2, this process has 3"),
            RunLock(tmp_path, 1, 3),
        ):
            pass
    with RunLock(tmp_path, 0, 3), RunLock(tmp_path, 2, 3):
        pass


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    script = (
        "import sys, time, pathlib; from vila2.data.lock import RunLock\n"
        f"with RunLock(pathlib.Path({str(tmp_path)!r})): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match=f"process {process.pid} on"), RunLock(tmp_path):
            pass
        process.kill()
    with RunLock(tmp_path):
        pass


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(38, "no locks here")

    monkeypatch.setattr("fcntl.flock", refuse)
    with RunLock(tmp_path) as lock:
        assert not lock.is_guarded


# -- done ------------------------------------------------------------------------------------------


def failed(index: int, prompt: str, kind: ErrorKind = ErrorKind.NO_IMAGE) -> Row:
    return Row(f"k{index}", "s.tar", index, prompt, Status.ERROR, "m", error_kind=kind, error="e")


def write(out_dir: Path, rows: list[Row], rows_per_part: int = 4) -> None:
    writer = PartWriter(out_dir, rows_per_part=rows_per_part)
    for one in rows:
        writer.add(one)
    writer.flush()


def test_done_set(tmp_path: Path) -> None:
    assert DoneSet.load(tmp_path).num_rows == 0
    assert DoneSet.load(tmp_path).pending("s.tar", 2, 5, ["p"]).tolist() == [2, 3, 4]
    write(
        tmp_path,
        [row(0, "p"), row(0, "q"), row(2, "p"), failed(3, "p"), row(9, "p", "t.tar"), failed(1, "q")],
    )
    done = DoneSet.load(tmp_path)
    assert done.num_rows == 6
    assert dict(done.counts) == {"ok": 4, "error": 2}
    assert done.is_done("s.tar", "p", 3)
    assert not done.is_done("s.tar", "p", 1)
    assert not done.is_done("s.tar", "p", 10_000)
    assert not done.is_done("other.tar", "p", 0)
    assert done.missing_prompts("s.tar", 1, ("p", "q")) == ("p",)
    assert done.pending("s.tar", 0, 6, ("p", "q")).tolist() == [1, 2, 3, 4, 5]
    assert done.pending("s.tar", 0, 6, ("p",)).tolist() == [1, 4, 5]
    assert done.pending("t.tar", 8, 12, ("p",)).tolist() == [8, 10, 11]
    assert done.pending("t.tar", 9, 9, ("p",)).tolist() == []
    assert [(e.part.name[-8:-8], e.rows.tolist()) for e in done.errors] == [("", [3]), ("", [0])]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 50), st.sampled_from("pq")), unique=True))
def test_done_set_is_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, places: list[tuple[str, int, str]]
) -> None:
    out_dir = tmp_path_factory.mktemp("out")
    write(out_dir, [row(index, prompt, shard) for shard, index, prompt in places], rows_per_part=7)
    done = DoneSet.load(out_dir)
    for shard in "ab":
        for index in range(52):
            lacking = tuple(p for p in "pq" if (shard, index, p) not in places)
            assert done.missing_prompts(shard, index, ("p", "q")) == lacking
    assert [(r["shard"], r["index"], r["prompt"]) for r in iter_rows(out_dir)] == sorted(places)


def test_a_part_that_does_not_parse_is_named(tmp_path: Path) -> None:
    write(tmp_path, [row(i, "p") for i in range(8)])
    bad = list_parts(tmp_path)[1]
    bad.write_bytes(bad.read_bytes()[:-30])
    for read in (DoneSet.load, lambda out: verify(out, source(s=8)), lambda out: list(iter_rows(out))):
        with pytest.raises(OutputError, match=bad.name) as caught:
            read(tmp_path)
        assert "\n" not in str(caught.value)


def test_many_rows_load_quickly(tmp_path: Path) -> None:
    table = to_table(row(i, "p") for i in range(1000))
    (tmp_path / "parts").mkdir()
    many = pa.concat_tables([table] * 200).combine_chunks()  # 200,000 rows in one part
    many = many.set_column(2, "index", pa.array(np.arange(200_000)))
    pq.write_table(many, tmp_path / "parts" / "part-r00000-000000.parquet", compression="zstd")
    start = time.monotonic()
    assert DoneSet.load(tmp_path).num_rows == 200_000
    assert time.monotonic() - start < 5  # row by row it takes longer; here some 0.02 s are usual


# -- verify ----------------------------------------------------------------------------------------


def test_verify(tmp_path: Path) -> None:
    rows = [row(i, "p") for i in range(5)] + [
        failed(0, "q"),
        row(1, "q"),
        row(1, "q"),
        row(1, "q"),
        row(7, "q"),
    ]
    write(tmp_path, [*rows, row(0, "p", "gone.tar")], rows_per_part=3)
    report = verify(tmp_path, source(s=5, empty=0), ["p", "q"])
    assert not report.is_complete
    assert (report.num_samples, report.num_rows) == (5, 11)
    assert (report.missing.count, report.missing.examples) == (3, [("s.tar", i, "q") for i in (2, 3, 4)])
    assert (report.duplicate.count, report.duplicate.examples) == (2, [("s.tar", 1, "q")])
    assert report.unknown.count == 2
    assert set(report.unknown.examples) == {("s.tar", 7, "q"), ("gone.tar", 0, "p")}
    assert dict(report.by_status) == {"ok": 10, "error": 1}
    assert dict(report.by_error_kind) == {"no_image": 1}
    assert verify(tmp_path, source(s=5)).prompts == ("p", "q")
    assert verify(tmp_path, source(s=5), ["p"]).unknown.count == 6
    assert verify(tmp_path, source(s=5), ["p", "q", "r"]).missing.count == 8


def test_verify_of_nothing(tmp_path: Path) -> None:
    assert verify(tmp_path, source(s=5)).missing.count == 5
    assert verify(tmp_path, source(s=5), ["p", "q"]).missing.count == 10


# -- ordered rows ----------------------------------------------------------------------------------


def test_rows_come_in_order_with_few_parts_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    order = np.argsort(np.arange(400) + rng.uniform(0, 30, 400))  # nearly in order, as captions are finished
    write(tmp_path, [row(int(i), "p") for i in order], rows_per_part=20)
    opened: list[int] = []
    import vila2.data.verify as module

    plain = module.read_part
    monkeypatch.setattr(module, "read_part", lambda path: opened.append(len(seen)) or plain(path))
    seen: list[int] = []
    for one in iter_rows(tmp_path):
        seen.append(one["index"])
        assert json.dumps(one)
    assert seen == list(range(400))
    assert len(opened) == 20
    for number, at in enumerate(opened):
        assert at >= number * 20 - 60  # no part is read long before its first row is due


# -- splitting -------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 40), max_size=8), st.integers(1, 12))
def test_assign(lengths: list[int], world_size: int) -> None:
    shards = [FakeShard(f"{i}", length) for i, length in enumerate(lengths)]
    whole = Source("fake", "here", shards)  # type: ignore[arg-type]
    shares = [assign(whole, rank, world_size) for rank in range(world_size)]
    placed = [
        (part.shard.name, i) for share in shares for part in share for i in range(part.start, part.stop)
    ]
    assert placed == [(shard.name, i) for shard in shards for i in range(shard.length)]
    sizes = [sum(map(len, share)) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert sum(sizes) == len(whole)


def test_assign_refuses_wrong_ranks() -> None:
    for rank, world_size in ((1, 1), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="rank"):
            assign(source(s=3), rank, world_size)
