"""`export`: an output folder becomes what trainers read, whole or not at all.

Rows come in the source's order. The source itself is opened only for what rows do not hold: the images, and the
text fields that a prompt's wording names.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from vila2.config import nearest
from vila2.data.verify import iter_rows
from vila2.errors import OutputError, UsageError
from vila2.recaption.formats import (
    Entry,
    save_image,
    write_jsonl,
    write_llava,
    write_vila,
    write_webdataset,
)
from vila2.recaption.merge import Merge, Merged, Turn, merge
from vila2.recaption.output import Finished
from vila2.recaption.prompts import BUILTIN_FIELDS
from vila2.types import Sample, Status

Format = Literal["jsonl", "llava", "webdataset", "vila"]
_BATCH = 256  # samples that are read from the source together


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What goes into an export. `prompts` empty: all. `statuses`: which captions are good enough."""

    format: Format
    merge: Merge = "replace"
    prompts: tuple[str, ...] = ()
    statuses: tuple[Status, ...] = (Status.OK,)
    keep_originals: bool = False  # a sample without a usable caption stays, with its original alone
    copy_images: bool = False  # llava: write the images too, where they are no files
    captions_only: bool = False  # webdataset: no images


@dataclass(frozen=True, slots=True)
class ExportSummary:
    folder: Path
    written: int
    left_out: int  # samples without a usable caption


def export(out: Path, target: Path, options: ExportOptions, *, force: bool = False) -> ExportSummary:
    """Write the captions of `out` into the folder `target`. Raises UsageError, OutputError or SourceError."""
    finished = Finished(out)
    _check(finished, options)
    if target.exists() and not force:
        raise UsageError(f"{target} exists already: choose another --to, or add --force to replace it")
    partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        entries = _Entries(finished, options)
        written = _write(entries, partial, finished, options)
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        elif target.exists():
            target.unlink()
        partial.rename(target)
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return ExportSummary(target, written, entries.left_out)


def _check(finished: Finished, options: ExportOptions) -> None:
    names = finished.prompts.names
    for name in options.prompts:
        if name not in names:
            hint = nearest(name, list(names))
            raise UsageError(
                f"{finished.out} holds no captions of a prompt {name!r}{hint}: {', '.join(names)}"
            )
    if options.format == "vila" and options.merge == "qa":
        raise UsageError("the vila format holds one caption a sample: use --merge replace or concat")
    if (
        options.format == "llava"
        and not options.copy_images
        and finished.source_kind in ("webdataset", "parquet")
    ):
        raise UsageError(
            "a llava export names image files, and this source has none: add --copy-images to write them"
        )


def _write(entries: "_Entries", folder: Path, finished: Finished, options: ExportOptions) -> int:
    if options.format == "jsonl":
        return write_jsonl(entries, folder)
    if options.format == "vila":
        return write_vila(entries, folder)
    if options.format == "webdataset":
        return write_webdataset(entries, folder)

    def image_path(entry: Entry) -> str:
        if options.copy_images:
            return "images/" + save_image(entry, folder / "images")
        if finished.source_kind == "folder":
            return entry.sample.key
        path = entry.sample.fields.get("image")
        if path is None:
            raise UsageError(f"the record {entry.sample.key!r} has several images: add --copy-images")
        return path

    return write_llava(entries, folder, image_path)


class _Entries:
    """The samples to export, one by one; counts those that are left out. Iterate it once."""

    def __init__(self, finished: Finished, options: ExportOptions) -> None:
        self.finished, self.options = finished, options
        self.left_out = 0
        self.names = [n for n in finished.prompts.names if not options.prompts or n in options.prompts]
        self.with_images = options.copy_images or (
            options.format == "webdataset" and not options.captions_only
        )
        wants_questions = options.format == "llava" or options.merge == "qa"
        fields = finished.prompts.question_fields if wants_questions else frozenset()
        names_files = options.format == "llava" and finished.source_kind == "llava"
        self.reads_source = self.with_images or names_files or bool(fields - set(BUILTIN_FIELDS))

    def __iter__(self) -> Iterator[Entry]:
        samples = self._with_source() if self.reads_source else self._samples()
        for sample, captions in samples:
            entry = self._entry(sample, captions)
            if entry is None or (self.with_images and sample.image is None):
                self.left_out += 1
            else:
                yield entry

    def _samples(self) -> Iterator[tuple[Sample, dict[str, str]]]:
        """Each sample as its rows tell it, with its usable captions by prompt."""
        usable = {status.value for status in self.options.statuses}
        for place, rows in groupby(
            iter_rows(self.finished.out), key=lambda row: (row["shard"], row["index"])
        ):
            of_sample = list(rows)
            first = of_sample[0]
            if not any(row["width"] for row in of_sample):
                self.left_out += 1  # an image that does not decode is of no use, whatever its text
                continue
            captions = {row["prompt"]: row["caption"] for row in of_sample if row["status"] in usable}
            yield Sample(*place, first["key"], original=first["original"]), captions

    def _with_source(self) -> Iterator[tuple[Sample, dict[str, str]]]:
        """The same, with the fields and, if wanted, the image that the source holds."""
        shards = {shard.name: shard for shard in self.finished.open_source().shards}
        for name, group in groupby(self._samples(), key=lambda pair: pair[0].shard):
            if name not in shards:
                raise OutputError(f"the source has no shard {name!r} any more: verify names what is wrong")
            for batch in _batches(group, _BATCH):
                read = {s.index: s for s in shards[name].read([sample.index for sample, _ in batch])}
                for sample, captions in batch:
                    found = read[sample.index]
                    image = found.image if self.with_images else None
                    yield replace(sample, image=image, fields=found.fields), captions

    def _entry(self, sample: Sample, captions: dict[str, str]) -> Entry | None:
        chosen = {name: captions[name] for name in self.names if name in captions}
        questions = self._questions(sample, list(chosen) or self.names[:1])
        turns = [Turn(questions.get(name, ""), text) for name, text in chosen.items()]
        merged = merge(sample.original, turns, self.options.merge)
        if merged is None and self.options.keep_originals and sample.original:
            merged = Merged(sample.original.replace("<image>", "<IMAGE>"))
        if merged is None:
            return None
        return Entry(sample, chosen, merged, next(iter(questions.values()), ""))

    def _questions(self, sample: Sample, names: Sequence[str]) -> dict[str, str]:
        if self.options.format != "llava" and self.options.merge != "qa":
            return {}
        return {name: self.finished.prompts.question(name, sample) for name in names}


def _batches(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
