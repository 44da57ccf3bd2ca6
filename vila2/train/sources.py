"""From the data entries of a recipe to a mixture."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vila2.train.examples import Document
from vila2.train.mixture import Mixture, TrainSource
from vila2.train.recaption_source import open_recaption
from vila2.train.sample_source import SampleSource
from vila2.train.text_sources import open_interleaved, open_llava, open_text
from vila2.train.world_source import WorldSource

if TYPE_CHECKING:
    from vila2.train.recipe import DataSettings


def open_mixture(entries: Sequence["DataSettings"], seed: int = 0, cache: Path | None = None) -> Mixture:
    """The mixture of a recipe's data entries. Raises UsageError, SourceError or OutputError.

    `cache`: a folder that keeps the places of records for later runs; without it they are looked for each time.
    """
    sources = [
        open_train_source(entry, f"{number}-{entry.kind}", cache) for number, entry in enumerate(entries)
    ]
    return Mixture(sources, [entry.weight for entry in entries], seed)


def open_train_source(entry: "DataSettings", name: str, cache: Path | None = None) -> TrainSource:
    """The source of one data entry. `name` appears in keys and positions, so it must not change in a run."""
    source = _open(entry, name, cache)
    return source if entry.limit is None else _First(source, entry.limit)


class _First:
    """The first `limit` documents of a source."""

    def __init__(self, source: TrainSource, limit: int) -> None:
        self._source, self.name = source, source.name
        self.length = limit if source.length is None else min(limit, source.length)
        self.stretch = getattr(source, "stretch", 1)

    def document(self, index: int) -> Document:
        return self._source.document(index)


def _open(entry: "DataSettings", name: str, cache: Path | None) -> TrainSource:
    path = entry.path or ""  # the recipe has checked that kinds that need one have it
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
    if entry.kind == "webdataset":
        return SampleSource(name, path, entry.prompt)
    if entry.kind == "recaption":
        return open_recaption(
            name, path, mode=entry.mode, prompts=entry.prompts, image_root=entry.image_root, cache=cache
        )
    if entry.kind == "llava":
        return open_llava(name, path, entry.image_root, cache)
    if entry.kind == "text":
        return open_text(name, path, cache)
    return open_interleaved(name, path, entry.image_root, entry.max_images, cache)
