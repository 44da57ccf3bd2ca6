"""One process a rank: locks that die with their process, in `locks/` of the output folder.

`flock` locks on local disks and on NFS vanish when a process ends in any way, so a killed run leaves nothing to clean
up. On a file system without them a run goes on unguarded, and `RunLock.is_guarded` says so.
"""

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from vila2.data.files import make_folder, write_error
from vila2.errors import OutputError

_BUSY = (errno.EAGAIN, errno.EACCES)
_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)


class RunLock:
    """Holds rank `rank` of `world_size` in `out_dir` while the `with` block runs.

    Entering raises OutputError if this rank is at work already, or any rank of another world size is.
    """

    def __init__(self, out_dir: Path, rank: int = 0, world_size: int = 1) -> None:
        self.folder = out_dir / "locks"
        self.rank = rank
        self.world_size = world_size
        self.is_guarded = False
        self._fd: int | None = None

    def __enter__(self) -> "RunLock":
        make_folder(self.folder)
        try:
            with _Opened(self.folder / "guard.lock") as guard:
                self.is_guarded = _lock(guard, wait=True)
                if self.is_guarded:
                    self._check_others()
                    self._fd = self._take()
        except OSError as exc:
            raise write_error(self.folder, exc) from exc
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fd is not None:
            os.close(self._fd)  # which releases the lock
            self._fd = None

    def _check_others(self) -> None:
        for path in sorted(self.folder.glob("rank-*.lock")):
            with _Opened(path) as fd:
                if _lock(fd):
                    continue  # nobody holds it: left behind by a run that ended
                owner = _owner(fd)
            where = f"process {owner.get('pid')} on {owner.get('host')}"
            if path == self._path():
                raise OutputError(f"rank {self.rank} is already at work in {self.folder.parent}: {where}")
            if owner.get("world_size") != self.world_size:
                raise OutputError(
                    f"{where} is at work in {self.folder.parent} with world size {owner.get('world_size')},"
                    f" this process has {self.world_size}; wait for it, or start with the same world size"
                )

    def _take(self) -> int:
        fd = os.open(self._path(), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _lock(fd)
            owner = {"pid": os.getpid(), "host": socket.gethostname(), "world_size": self.world_size}
            os.ftruncate(fd, 0)
            os.pwrite(fd, json.dumps(owner).encode(), 0)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _path(self) -> Path:
        return self.folder / f"rank-{self.rank:05d}.lock"


@contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, after whoever has it. The file is gone afterwards.

    On a file system without locks nobody waits. Raises OSError if the file cannot be made.
    """
    while True:
        with _Opened(path) as fd:
            _lock(fd, wait=True)
            try:
                current = path.stat()
            except FileNotFoundError:
                continue  # the one before us removed it, and a third may have made it anew
            if not os.path.samestat(current, os.fstat(fd)):
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


class _Opened:
    """A file descriptor for a lock file, closed (and so unlocked) at the end of a `with` block."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> int:
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        return self.fd

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.fd)


def _lock(fd: int, *, wait: bool = False) -> bool:
    """Lock a file; False if another process holds it, or if the file system (asked with `wait`) has no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as exc:
        if exc.errno in (_UNSUPPORTED if wait else _BUSY):
            return False
        raise
    return True


def _owner(fd: int) -> dict[str, object]:
    try:
        stored = json.loads(os.pread(fd, 4096, 0))
    except ValueError:
        return {}
    return stored if isinstance(stored, dict) else {}
