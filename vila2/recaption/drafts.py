"""Drafts: texts that captions will resemble, so that an engine can write them faster. They never change a caption.

From the second round on the previous caption of the same image is the best there is. It comes from the sample itself
(its original, or another text column) or from the output folder of an earlier run.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vila2.config import DRAFT_COLUMN, RecaptionSettings, nearest
from vila2.data.done import encoded
from vila2.data.parts import list_parts, read_columns, read_part
from vila2.errors import OutputError, UsageError
from vila2.recaption.feed import Job
from vila2.recaption.output import Finished
from vila2.recaption.prompts import PromptSet, sample_values
from vila2.types import Sample

FIRST_DRAFTED_ROUND = 2
_PARTS_IN_MEMORY = 8
_MAX_NAMESAKES = 16  # rows of one key that are looked at
_COLUMNS = ("key", "shard", "index", "prompt", "caption")


class Drafts(Protocol):
    def of(self, sample: Sample, prompt: str) -> str:
        """The draft of a sample's caption, or an empty text where there is none."""
        ...


def open_drafts(settings: RecaptionSettings, prompts: PromptSet) -> Drafts | None:
    """What `settings.draft` names; None for no drafts. Raises UsageError or OutputError.

    `auto` drafts from the originals from the second round on. In the first they are the web's alt-texts, which
    nobody's captions resemble; in later ones a model has written them or there is little to lose, because a
    sequence whose draft is no good stops using it after a few tokens.
    """
    choice = settings.draft
    if choice == "auto":
        choice = "original" if settings.round >= FIRST_DRAFTED_ROUND else "off"
    if choice == "off":
        return None
    if choice == "original":
        return _Column("original")
    if choice.startswith(DRAFT_COLUMN):
        return _Column(choice.removeprefix(DRAFT_COLUMN))
    return EarlierRun(_folder(choice, settings), prompts.names)


def with_drafts(jobs: Iterable[Job], drafts: Drafts | None) -> Iterator[Job]:
    """The jobs, each with the drafts of its prompts."""
    for job in jobs:
        if drafts is None or job.sample.error is not None:
            yield job
        else:
            yield replace(job, drafts={name: drafts.of(job.sample, name) for name in job.prompts})


class _Column:
    """A text of the sample, whichever the prompt."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._checked = False

    def of(self, sample: Sample, prompt: str) -> str:
        values = sample_values(sample)
        # What the very first sample lacks is most likely a typo.
        if not self._checked and self.name not in values:
            raise UsageError(
                f"--draft {DRAFT_COLUMN}{self.name}: the first sample has no such column"
                f"{nearest(self.name, list(values))}; it has: {', '.join(sorted(values))}"
            )
        self._checked = True
        return values.get(self.name, "")


class EarlierRun:
    """The captions of an output folder: by place and key where the source is the same, else by key and prompt.

    Keeps some 40 bytes a row and a few parts in memory. Rows are found by hashes; what they hold is compared.
    """

    def __init__(self, out: Path, prompts: Iterable[str]) -> None:
        known = Finished(out).prompts.names
        if not set(prompts) & set(known):
            raise UsageError(
                f"--draft {out}: it holds no captions of {', '.join(prompts)}, but of {', '.join(known)}"
            )
        self._parts = list_parts(out)
        places: list[NDArray[np.int64]] = []
        keys: list[NDArray[np.int64]] = []
        for _, table in read_columns(out, _COLUMNS[:4], ("shard", "prompt")):
            shards, names = encoded(table, "shard"), encoded(table, "prompt")
            shard_of, name_of = shards.codes.tolist(), names.codes.tolist()
            rows = zip(table["key"].to_pylist(), shard_of, table["index"].to_pylist(), name_of, strict=True)
            both = [
                (
                    hash((shards.values[shard], index, names.values[name])),
                    hash((key, names.values[name])),
                )
                for key, shard, index, name in rows
            ]
            pairs = np.array(both, np.int64).reshape(-1, 2)
            places.append(pairs[:, 0])
            keys.append(pairs[:, 1])
        starts = np.cumsum([0, *(len(part) for part in places)])
        self._starts = starts[:-1]
        self._places, self._keys = _Lookup(places), _Lookup(keys)
        self._tables: OrderedDict[int, pa.Table] = OrderedDict()

    def of(self, sample: Sample, prompt: str) -> str:
        """The earlier caption of this sample for this prompt. Raises OutputError for a part that does not parse."""
        found = self._places.find(hash((sample.shard, sample.index, prompt)))
        found += self._keys.find(hash((sample.key, prompt)))
        for number in found:
            part = int(np.searchsorted(self._starts, number, side="right")) - 1
            row = number - int(self._starts[part])
            table = self._table(part)
            if row < table.num_rows and (
                table["key"][row].as_py() == sample.key and table["prompt"][row].as_py() == prompt
            ):
                return str(table["caption"][row].as_py())
        return ""

    def _table(self, part: int) -> pa.Table:
        if part in self._tables:
            self._tables.move_to_end(part)
        else:
            self._tables[part] = read_part(self._parts[part], _COLUMNS)
            if len(self._tables) > _PARTS_IN_MEMORY:
                self._tables.popitem(last=False)
        return self._tables[part]


class _Lookup:
    """Row numbers by a hash of the row."""

    def __init__(self, hashes: list[NDArray[np.int64]]) -> None:
        joined = np.concatenate([np.zeros(0, np.int64), *hashes])
        self._order = np.argsort(joined, kind="stable")
        self._hashes = joined[self._order]

    def find(self, value: int) -> list[int]:
        first = int(np.searchsorted(self._hashes, value, side="left"))
        last = int(np.searchsorted(self._hashes, value, side="right"))
        numbers: list[int] = self._order[first : min(last, first + _MAX_NAMESAKES)].tolist()
        return numbers


def _folder(name: str, settings: RecaptionSettings) -> Path:
    out = Path(name).expanduser()
    if out.resolve() == Path(settings.out).expanduser().resolve():
        raise UsageError(f"--draft {name}: this is where the new captions go; name an earlier run's folder")
    try:
        Finished(out)
    except OutputError as error:
        raise UsageError(
            f"--draft {name}: neither off, auto, original or {DRAFT_COLUMN}NAME, nor an earlier run's folder: {error}"
        ) from None
    return out
