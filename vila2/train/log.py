"""The log of a stage: one JSON line a logged step, and TensorBoard beside it where wanted."""

import json
from pathlib import Path
from typing import Any

from vila2.data.files import atomic_write, write_error
from vila2.errors import UsageError


class StageLog:
    """Appends to `log.jsonl`. Opened at `step`, it forgets the lines after: these steps are taken again."""

    def __init__(self, folder: Path, step: int, tensorboard: bool) -> None:
        self.path = folder / "log.jsonl"
        try:
            if self.path.exists():
                kept = [line for line in read_log(self.path) if line["step"] <= step]
                atomic_write(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise write_error(self.path, error) from error
        self._board = _board(folder / "tensorboard", step) if tensorboard else None

    def write(self, line: dict[str, Any]) -> None:
        """One line; it must have a `step`. Numbers also go to TensorBoard."""
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise write_error(self.path, error) from error
        if self._board is not None:
            for name, value in line.items():
                if name != "step" and isinstance(value, int | float):
                    self._board.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last line that a killed process left cut short is no line."""
    *whole, _ = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in whole]


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError(
            "tensorboard = true needs the package tensorboard: pip install 'vila2-fast[train]'"
        ) from None
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
