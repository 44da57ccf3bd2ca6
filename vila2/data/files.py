"""Every change that a run makes on disk goes through this file, so that it is atomic and can be tested by faults.

A file appears whole or not at all: it is written under a temporary name in the same folder, synced, renamed, and
the folder is synced. Tests set the environment variable `VILA2_FAULT` (test-only, never set it in a real run):
`kill:N` ends the process with SIGKILL at the N-th file operation, `enospc:N`, `edquot:N` and `eio:N` let that
operation fail as the operating system would. N counts from 1.
"""

import errno
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vila2.errors import OutputError

TMP_SUFFIX = ".tmp"
DEAD_AFTER_S = 3600.0  # no process takes this long over one file
_NO_SYNC_OF_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)
_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


class _Fault:
    """Counts file operations and strikes at the N-th one."""

    def __init__(self, setting: str) -> None:
        self.kind, _, number = setting.partition(":")
        self.at = int(number) if self.kind else 0
        self.count = 0
        self.lock = threading.Lock()

    def point(self) -> None:
        if not self.at:
            return
        with self.lock:
            self.count += 1
            strike = self.count == self.at
        if strike and self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if strike:
            number = getattr(errno, self.kind.upper())
            raise OSError(number, os.strerror(number))


_fault = _Fault(os.environ.get("VILA2_FAULT", ""))


def atomic_write(path: Path, data: bytes | memoryview, *, exclusive: bool = False) -> None:
    """Put `data` at `path`, whole or not at all; the folder must exist.

    With `exclusive`, an existing file is left alone and FileExistsError is raised: of several processes that
    write the same file at the same time, one wins. Raises OSError; the temporary file is then removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}{TMP_SUFFIX}")
    try:
        _write_synced(temporary, memoryview(data))
        _fault.point()
        if exclusive:
            _rename_new(temporary, path)
        else:
            os.replace(temporary, path)  # noqa: PTH105 - the call that the docstring promises
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fault.point()
    sync_folder(path.parent)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path for another library to write to; when the block ends, it becomes `path`, whole or not at all.

    For files that are too large to hold in memory once more. Raises OSError; the temporary file is then removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}{TMP_SUFFIX}")
    try:
        _fault.point()
        yield temporary
        _fault.point()
        sync_file(temporary)
        _fault.point()
        os.replace(temporary, path)  # noqa: PTH105 - the call that the docstring promises
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fault.point()
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Make what was written to a file survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_synced(path: Path, data: memoryview) -> None:
    _fault.point()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        half = len(data) // 2
        for piece in (data[:half], data[half:]):  # two writes, so that a fault can leave half a file
            _fault.point()
            while piece:
                piece = piece[os.write(fd, piece) :]  # noqa: PLW2901 - what is left of the piece
        _fault.point()
        os.fsync(fd)
    finally:
        os.close(fd)


def _rename_new(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except OSError as exc:
        if exc.errno not in _NO_HARD_LINKS:
            raise
        if path.exists():  # a file system without hard links: the check and the rename are then two steps
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.replace(temporary, path)  # noqa: PTH105
    else:
        temporary.unlink()


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut, where the file system can do so."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as exc:
        if exc.errno not in _NO_SYNC_OF_FOLDERS:
            raise
    finally:
        os.close(fd)


def remove_leftovers(folder: Path, pattern: str, min_age_s: float = 0.0) -> None:
    """Remove the temporary files of a dead run whose final name matches the glob `pattern`.

    Where a living process may be writing such a file, `min_age_s` leaves the young ones alone. Raises OSError.
    """
    for path in folder.glob(f".{pattern}.*{TMP_SUFFIX}"):
        with suppress(FileNotFoundError):  # another process cleans up as well
            if path.stat().st_mtime <= time.time() - min_age_s:
                path.unlink()


def make_folder(folder: Path) -> None:
    """Create `folder` and its parents. Raises OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise write_error(folder, exc) from exc


def write_error(path: Path, exc: OSError) -> OutputError:
    """The one line that a user sees when the operating system refuses a write."""
    reason = os.strerror(exc.errno) if exc.errno else str(exc)
    full = exc.errno in (errno.ENOSPC, errno.EDQUOT)
    advice = "free some space, then run the same command again" if full else "then run the same command again"
    prefix = "" if full else "make the folder writable, "
    return OutputError(f"cannot write {path}: {reason}; {prefix}{advice} (all earlier captions are kept)")
