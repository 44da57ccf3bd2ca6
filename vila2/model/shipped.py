"""The checkpoints that ship inside the package, by name."""

from pathlib import Path

SHIPPED = ("nano", "nano-base")
_FOLDER = Path(__file__).resolve().parent.parent / "checkpoints"


def checkpoint_path(name: str | Path) -> Path:
    """The folder of a shipped checkpoint by its name, unless a folder of that name is here; else `name` as a path."""
    path = Path(name)
    return _FOLDER / str(name) if str(name) in SHIPPED and not path.exists() else path
