"""Parts appear whole or not at all, whatever happens at any file operation."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import vila2.data.files as files
from tests.unit.data.write_some import PROMPTS, row, write_missing
from vila2.data.done import DoneSet
from vila2.data.files import atomic_write
from vila2.data.parts import list_parts, part_owner
from vila2.data.rows import SCHEMA, Row
from vila2.data.source import Source
from vila2.data.verify import iter_rows, verify
from vila2.data.writer import PartWriter, load_part
from vila2.errors import OutputError
from vila2.types import ErrorKind, FinishReason, Status

NUM_SAMPLES, ROWS_PER_PART = 4, 3  # eight rows: two full parts and a flush
NUM_FILES = 4  # a manifest and three parts
OPERATIONS_PER_FILE = 6  # open, two writes, sync, rename, sync of the folder


class FakeShard:
    def __init__(self, name: str, length: int) -> None:
        self.name, self.length = name, length

    def __len__(self) -> int:
        return self.length

    def read(self, indices: object = None) -> None:
        raise NotImplementedError


def source(**lengths: int) -> Source:
    return Source("fake", "here", [FakeShard(f"{name}.tar", n) for name, n in lengths.items()])  # type: ignore[misc]


def run(out_dir: Path, fault: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "tests.unit.data.write_some",
        str(out_dir),
        str(NUM_SAMPLES),
        str(ROWS_PER_PART),
    ]
    root = Path(__file__).parents[3]
    environment = os.environ | {"VILA2_FAULT": fault}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=root)


def check_whole(out_dir: Path) -> None:
    """Every row exactly once, and nothing left over."""
    assert verify(out_dir, source(s=NUM_SAMPLES), PROMPTS).is_complete
    assert [r["caption"] for r in iter_rows(out_dir)] == [
        f"caption {i} {prompt}" for i in range(NUM_SAMPLES) for prompt in PROMPTS
    ]
    assert not list((out_dir / "parts").glob(".*"))


def test_killed_at_every_file_operation(tmp_path: Path) -> None:
    num_killed = 0
    for n in range(1, 100):
        out_dir = tmp_path / str(n)
        result = run(out_dir, f"kill:{n}")
        before = {path.name: path.read_bytes() for path in list_parts(out_dir)}
        report = verify(out_dir, source(s=NUM_SAMPLES), PROMPTS)
        assert not report.duplicate.count
        assert not report.unknown.count
        committed = report.num_rows
        if result.returncode == 0:
            check_whole(out_dir)
            break
        assert result.returncode == -signal.SIGKILL, result.stderr
        num_killed += 1
        assert committed in (0, 3, 6, 8)
        # The same command again finishes what is missing, and touches nothing that was committed.
        assert write_missing(out_dir, NUM_SAMPLES, ROWS_PER_PART) == 2 * NUM_SAMPLES - committed
        assert {path.name: path.read_bytes() for path in list_parts(out_dir)}.items() >= before.items()
        check_whole(out_dir)
        assert write_missing(out_dir, NUM_SAMPLES, ROWS_PER_PART) == 0
    assert num_killed == NUM_FILES * OPERATIONS_PER_FILE


@pytest.mark.parametrize("n", range(1, OPERATIONS_PER_FILE * NUM_FILES + 1))
def test_a_disk_that_refuses_at_any_operation(
    n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = ("enospc", "edquot", "eio")[n % 3]
    monkeypatch.setattr(files, "_fault", files._Fault(f"{kind}:{n}"))
    with pytest.raises(OutputError) as caught:
        write_missing(tmp_path, NUM_SAMPLES, ROWS_PER_PART)
    assert "\n" not in str(caught.value)
    assert "run the same command again" in str(caught.value)
    assert ("free some space" in str(caught.value)) == (kind != "eio")
    assert not list(tmp_path.rglob("*.tmp"))
    monkeypatch.setattr(files, "_fault", files._Fault(""))
    write_missing(tmp_path, NUM_SAMPLES, ROWS_PER_PART)
    check_whole(tmp_path)


def test_a_second_flush_after_a_failure_writes_no_row_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = PartWriter(tmp_path)
    writer.add(row(0, "p"))
    for n in range(1, 7):  # at the sixth, the sync of the folder, the part is there already
        monkeypatch.setattr(files, "_fault", files._Fault(f"eio:{n}"))
        with pytest.raises(OutputError):
            writer.flush()
    monkeypatch.setattr(files, "_fault", files._Fault(""))
    writer.add(row(1, "p"))
    writer.flush()
    assert writer.flush() is None
    assert [r["index"] for r in iter_rows(tmp_path)] == [0, 1]


def test_the_environment_names_the_fault(tmp_path: Path) -> None:
    result = run(tmp_path, "enospc:9")
    assert result.returncode == 1
    assert "OutputError: cannot write" in result.stderr
    assert "No space left on device" in result.stderr
    assert run(tmp_path, "").stdout == "8\n"
    check_whole(tmp_path)


def test_atomic_write(tmp_path: Path) -> None:
    path = tmp_path / "a"
    atomic_write(path, b"one", exclusive=True)
    with pytest.raises(FileExistsError):
        atomic_write(path, b"two", exclusive=True)
    assert path.read_bytes() == b"one"
    atomic_write(path, b"three")
    atomic_write(tmp_path / "empty", b"")
    assert path.read_bytes() == b"three"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "empty"]


def test_exclusive_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    atomic_write(tmp_path / "a", b"one", exclusive=True)
    with pytest.raises(FileExistsError):
        atomic_write(tmp_path / "a", b"two", exclusive=True)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"one"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "parts").write_text("a file where the folder should be")
    with pytest.raises(OutputError, match="cannot write"):
        PartWriter(tmp_path)


def test_schema_and_storage(tmp_path: Path) -> None:
    full = Row(
        key="k",
        shard="s",
        index=5,
        prompt="p",
        status=Status.ERROR,
        model_digest="m",
        caption="half \ud800 日",
        original="o",
        error_kind=ErrorKind.CORRUPT_IMAGE,
        error="broken",
        num_prompt_tokens=1,
        num_tokens=2,
        finish_reason=FinishReason.ERROR,
        width=3,
        height=4,
        image_digest="d",
        round=7,
    )
    writer = PartWriter(tmp_path, rank=3, world_size=5)
    assert writer.add(full) is None
    part = writer.flush()
    assert part == tmp_path / "parts" / "part-r00003-000000.parquet"
    stored = pq.read_table(part)
    assert stored.schema.equals(SCHEMA)
    assert stored.schema.names == [
        *("key", "shard", "index", "prompt", "caption", "original", "status", "error_kind", "error"),
        *("num_prompt_tokens", "num_tokens", "finish_reason", "width", "height", "image_digest"),
        *("model_digest", "round"),
    ]
    assert stored["caption"].to_pylist() == ["half ? 日"]
    assert stored["status"].to_pylist() == ["error"]
    column = pq.read_metadata(part).row_group(0).column(1)
    assert (column.compression, column.has_dictionary_page) == ("ZSTD", True)
    (again,) = load_part(part)
    assert again == Row(**{name: getattr(full, name) for name in Row.__slots__} | {"caption": "half ? 日"})


def test_a_row_says_why_it_failed() -> None:
    with pytest.raises(ValueError, match="error_kind"):
        Row("k", "s", 0, "p", Status.ERROR, "m")
    with pytest.raises(ValueError, match="error_kind"):
        Row("k", "s", 0, "p", Status.OK, "m", error_kind=ErrorKind.NO_IMAGE)


def test_rows_are_sorted_in_a_part_and_numbers_grow(tmp_path: Path) -> None:
    for _ in range(2):
        writer = PartWriter(tmp_path, rank=1, world_size=2, rows_per_part=2)
        for index in (3, 1):
            writer.add(row(index, "p"))
    other = PartWriter(tmp_path, rank=0, world_size=2, rows_per_part=1)
    other.add(row(0, "p"))
    assert [path.name for path in list_parts(tmp_path)] == [
        "part-r00000-000000.parquet",
        "part-r00001-000000.parquet",
        "part-r00001-000001.parquet",
    ]
    assert [r.index for r in load_part(list_parts(tmp_path)[1])] == [1, 3]
    assert [part_owner(path, 2) for path in list_parts(tmp_path)] == [0, 1, 1]
    assert [part_owner(path, 1) for path in list_parts(tmp_path)] == [0, 0, 0]


def test_leftovers_of_this_rank_only_are_removed(tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    mine, other = parts / ".part-r00000-000004.parquet.1-2.tmp", parts / ".part-r00001-000004.parquet.1-2.tmp"
    mine.touch()
    other.touch()
    PartWriter(tmp_path, rank=0, world_size=2)
    assert not mine.exists()
    assert other.exists()
    assert list_parts(tmp_path) == []


def test_old_leftovers_of_shared_files_are_removed(tmp_path: Path) -> None:
    young, old = tmp_path / ".manifest.json.1-2.tmp", tmp_path / ".manifest.json.3-4.tmp"
    young.touch()
    old.touch()
    os.utime(old, (0, 0))
    files.remove_leftovers(tmp_path, "manifest.json", files.DEAD_AFTER_S)
    assert [path.name for path in tmp_path.iterdir()] == [young.name]


def test_replace_part(tmp_path: Path) -> None:
    failed = Row("k1", "s.tar", 1, "p", Status.ERROR, "m", error_kind=ErrorKind.READ_ERROR, error="e")
    writer = PartWriter(tmp_path, rows_per_part=2)
    writer.add(row(0, "p"))
    part = writer.add(failed)
    assert part is not None
    (errors,) = DoneSet.load(tmp_path).errors
    assert (errors.part, errors.rows.tolist()) == (part, [1])
    rows = load_part(part)
    writer.replace_part(part.name, [rows[0], row(1, "p")])
    assert [r["status"] for r in iter_rows(tmp_path)] == ["ok", "ok"]
    assert DoneSet.load(tmp_path).errors == []
    with pytest.raises(ValueError, match="not for the same samples"):
        writer.replace_part(part.name, [rows[0]])
    with pytest.raises(OutputError):
        writer.replace_part("part-r00000-000009.parquet", [])
