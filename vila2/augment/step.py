"""A step of a loop: what it does, what it reads, where it writes, and when it is complete.

A step owns a folder, named after it. It is complete when `step.json` lies there with the key that the plan gives it
now: a digest of its kind, its settings and the digests of what it reads. So a change in the recipe, or in an earlier
result, is noticed where it matters and nowhere else.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

from vila2.data.files import atomic_write, write_error
from vila2.errors import OutputError

Kind = Literal[
    "source", "base", "boxes", "captions", "train", "recaption", "evaluate", "gate", "gain", "compare"
]
RUN = "{run}"  # stands for the run folder in settings, so that a moved folder is still complete
FILE_NAME = "step.json"
BEGUN = "begun.json"


@dataclass(frozen=True, slots=True)
class Step:
    """`settings`: all that decides what comes out, as JSON values. `needs`: the steps whose folders it reads.
    `after`: those that only have to be through, such as gates. `free`: what only decides how it is carried out.
    `why`: in a few words, for the plan."""

    name: str
    kind: Kind
    settings: dict[str, Any]
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    free: dict[str, Any] = field(default_factory=dict)
    why: str = ""

    def key(self, digests: Mapping[str, str]) -> str:
        """What names this step's outcome, given the digests of its inputs."""
        return digest_of([self.kind, self.settings, {need: digests[need] for need in self.needs}])

    @property
    def waits_for(self) -> tuple[str, ...]:
        """Every step that has to be complete before this one begins."""
        return (*self.needs, *self.after)

    @property
    def is_judgement(self) -> bool:
        """One that takes next to nothing, and is done anew when the recipe judges otherwise."""
        return self.kind in ("gate", "gain", "compare")

    def folder(self, run: Path) -> Path:
        return run / self.name


def place(values: Any, run: Path) -> Any:
    """`values` with RUN replaced by the run folder, however deep it stands."""
    if isinstance(values, str):
        return values.replace(RUN, str(run))
    if isinstance(values, Mapping):
        return {name: place(value, run) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [place(value, run) for value in values]
    return values


def digest_of(values: Any) -> str:
    """32 hexadecimal digits of a JSON value."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return blake2b(text.encode(), digest_size=16).hexdigest()


def digest_of_stream(pieces: Iterator[bytes]) -> str:
    hashed = blake2b(digest_size=16)
    for piece in pieces:
        hashed.update(piece)
    return hashed.hexdigest()


def digest_of_file(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:
        return digest_of_stream(iter(lambda: file.read(1 << 20), b""))


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file that the loop wrote, or None if there is no file. OutputError if it is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OutputError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise OutputError(f"{path} is not what this command wrote there: remove it, or choose another --out")
    return value


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all. OutputError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise write_error(path, error) from error
