"""From the data entries of a recipe to a mixture."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vila2.errors import UsageError
from vila2.train.examples import Document
from vila2.train.mixture import Mixture, TrainSource
from vila2.train.world_source import WorldSource

if TYPE_CHECKING:
    from vila2.train.recipe import DataSettings


class _First:
    """The first `limit` documents of a source."""

    def __init__(self, source: TrainSource, limit: int) -> None:
        self.source, self.name = source, source.name
        self.length = limit if source.length is None else min(limit, source.length)

    def document(self, index: int) -> Document:
        return self.source.document(index)


def open_mixture(entries: Sequence["DataSettings"], seed: int = 0) -> Mixture:
    """The mixture of a recipe's data entries. Raises UsageError, SourceError or OutputError."""
    names = [f"{number}-{entry.kind}" for number, entry in enumerate(entries)]
    sources = [open_train_source(entry, name) for entry, name in zip(entries, names, strict=True)]
    return Mixture(sources, [entry.weight for entry in entries], seed)


def open_train_source(entry: "DataSettings", name: str) -> TrainSource:
    """The source of one data entry. `name` appears in keys and positions, so it must not change in a run."""
    source = _open(entry, name)
    return source if entry.limit is None else _First(source, entry.limit)


def _open(entry: "DataSettings", name: str) -> TrainSource:
    if entry.kind == "world":
        return WorldSource(
            name,
            split=entry.split,
            texts=entry.texts,
            scenes=entry.scenes,
            start=entry.start,
            image_size=entry.image_size,
            seed=entry.seed,
            style=entry.style,
            options=entry.options,
        )
    raise UsageError(f"{name}: unknown kind of data {entry.kind!r}")
