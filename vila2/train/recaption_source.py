"""What `vila2-fast recaption` wrote, to train on: an output folder with its source, or an export of it.

- an output folder (manifest.json): captions from its parts, images from the source that it names. `mode` joins old and
  new text: `original` (alone), `new` (alone), `concat` (the original first), `qa` (the original, and each new caption
  as the answer to its prompt);
- a `webdataset` or `llava` export, which is complete in itself;
- a `jsonl` or `vila` export, whose images come from the source named by `image_root`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from hashlib import blake2b
from itertools import groupby
from pathlib import Path
from typing import Any

from vila2.config import nearest
from vila2.data.manifest import FILE_NAME
from vila2.data.parts import list_parts
from vila2.data.shards import open_source
from vila2.data.verify import iter_rows
from vila2.errors import SourceError, UsageError
from vila2.recaption.merge import Merge, Turn, merge
from vila2.recaption.output import Finished
from vila2.recaption.prompts import BUILTIN_FIELDS, MissingFieldError
from vila2.train.examples import Conversation, Document, LazyImage, SkippedDocument
from vila2.train.mixture import TrainSource
from vila2.train.records import LineRecords, Records, RecordStore
from vila2.train.sample_source import Samples, SampleSource, defused
from vila2.train.text_sources import open_llava
from vila2.types import Sample, Status

MODES: dict[str, Merge | None] = {"original": None, "new": "replace", "concat": "concat", "qa": "qa"}


def open_recaption(
    name: str,
    path: str,
    *,
    mode: str | None = None,
    prompts: Sequence[str] = (),
    image_root: str | None = None,
    cache: Path | None = None,
) -> TrainSource:
    """The source of an output folder or of an export. Raises UsageError, SourceError or OutputError."""
    folder = Path(path).expanduser()
    if mode is not None and mode not in MODES:
        raise UsageError(f"{name}: no mode {mode!r}{nearest(mode, list(MODES))}: {', '.join(MODES)}")
    if not folder.exists():
        raise SourceError(f"{name}: {folder} does not exist")
    if (folder / FILE_NAME).is_file():
        return RecaptionSource(name, folder, mode or "new", prompts, cache)
    if mode is not None or prompts:
        raise UsageError(
            f"{name}: mode and prompts are for an output folder; {folder} was exported with its own"
        )
    if (folder / "llava.json").is_file():
        return open_llava(name, str(folder / "llava.json"), image_root, cache)
    if folder.suffix == ".tar" or any(folder.rglob("*.tar")):
        return SampleSource(name, str(folder))
    if image_root is None:
        raise UsageError(f"{name}: the export {folder} holds no images: name their source with image_root")
    lines = folder if folder.is_file() else folder / "captions.jsonl"
    if lines.suffix == ".jsonl" and lines.is_file():
        return _ExportSource(name, LineRecords([lines], cache), Samples(open_source(image_root)))
    sidecars = sorted(folder.rglob("*.json"))
    if not sidecars:
        raise SourceError(f"{folder} is neither the output of a recaption run nor an export of one")
    samples = Samples(open_source(image_root))
    store = RecordStore(_sidecar_records(sidecars, folder, samples), _kept(cache, "vila", sidecars))
    if len(store) == 0:
        raise SourceError(f"none of the captions in {folder} is of a sample of {image_root}")
    return _ExportSource(name, store, samples)


class RecaptionSource:
    """The samples of an output folder that have rows, each with its captions that are OK."""

    def __init__(
        self, name: str, out: Path, mode: str, prompts: Sequence[str] = (), cache: Path | None = None
    ) -> None:
        self.name, self.mode = name, mode
        self._finished = Finished(out)
        names = self._finished.prompts.names
        for prompt in prompts:
            if prompt not in names:
                hint = nearest(prompt, list(names))
                raise UsageError(
                    f"{name}: {out} holds no captions of a prompt {prompt!r}{hint}: {', '.join(names)}"
                )
        self._prompts = [prompt for prompt in names if not prompts or prompt in prompts]
        self._records: Records = RecordStore(_output_records(out), _kept(cache, "output", list_parts(out)))
        if len(self._records) == 0:
            raise SourceError(f"{out} holds no captions yet: run vila2-fast recaption first")
        self._samples = Samples(self._finished.open_source())
        self.stretch = self._samples.stretch
        # A wording may name fields that only the source knows.
        self._needs_fields = bool(self._finished.prompts.question_fields - set(BUILTIN_FIELDS))

    @property
    def length(self) -> int:
        return len(self._records)

    def document(self, index: int) -> Document:
        record = self._records[index]
        shard, number = record["shard"], record["index"]
        key = f"{self.name}/{shard}/{record['key']}"
        if not record["decoded"]:
            raise SkippedDocument("corrupt_image", f"{key}: the image did not decode when it was captioned")
        original = defused(record["original"].strip())
        captions = {name: record["captions"][name] for name in self._prompts if name in record["captions"]}
        how = MODES[self.mode]
        text = original
        turns: tuple[Conversation, ...] = ()
        if how is not None:
            sample = Sample(shard, number, record["key"], original=record["original"])
            merged = merge(original, self._answered(sample, captions, how), how)
            if merged is None:
                raise SkippedDocument("no_caption", f"{key}: no usable caption")
            text, turns = merged.text, _as_conversations(merged.turns)
        if not text and not turns:
            raise SkippedDocument("no_text", f"{key}: the sample had no text")
        return _document(key, text, turns, LazyImage(partial(_image_of, self._samples, shard, number)))

    def _answered(self, sample: Sample, captions: Mapping[str, str], how: Merge) -> list[Turn]:
        if how != "qa":
            return [Turn("", caption) for caption in captions.values()]
        if self._needs_fields:
            sample = self._samples.at(sample.shard, sample.index)
        try:
            asked = {name: self._finished.prompts.question(name, sample) for name in captions}
        except MissingFieldError as error:
            raise SkippedDocument("bad_prompt", f"{sample.key}: {error}") from None
        return [Turn(asked[name], caption) for name, caption in captions.items()]


class _ExportSource:
    """Exported records {shard, index, text, turns}, with the images of the source that they came from."""

    def __init__(self, name: str, records: Records, samples: Samples) -> None:
        self.name, self._records, self._samples = name, records, samples
        self.stretch = samples.stretch

    @property
    def length(self) -> int:
        return len(self._records)

    def document(self, index: int) -> Document:
        record = self._records[index]
        key = f"{self.name}/{index}"
        try:
            shard, number, text = str(record["shard"]), int(record["index"]), str(record["text"])
            turns = [Turn(str(turn["question"]), str(turn["answer"])) for turn in record.get("turns", [])]
        except (KeyError, TypeError, ValueError):
            raise SkippedDocument("bad_record", f"{key}: not a record of an export") from None
        if not text.strip() and not turns:
            raise SkippedDocument("no_text", f"{key}: the record has no text")
        image = LazyImage(partial(_image_of, self._samples, shard, number))
        return _document(key, text.strip(), _as_conversations(turns), image)


def _document(key: str, text: str, turns: tuple[Conversation, ...], image: LazyImage) -> Document:
    return Document(key, "caption" if text else "conversation", (image,), text, turns)


def _as_conversations(turns: Sequence[Turn]) -> tuple[Conversation, ...]:
    return tuple(((turn.question, turn.answer),) for turn in turns)


def _image_of(samples: Samples, shard: str, index: int) -> bytes:
    sample = samples.at(shard, index)
    if sample.image is None:
        reason = "no_image" if sample.error is None else sample.error.kind.value
        raise SkippedDocument(reason, f"{shard} {sample.key}: its image cannot be read any more")
    return sample.image


def _output_records(out: Path) -> Iterator[dict[str, Any]]:
    """One record a sample: its place, its original text and its usable captions by prompt."""
    for (shard, index), rows in groupby(iter_rows(out), key=lambda row: (row["shard"], row["index"])):
        of_sample = list(rows)
        captions = {row["prompt"]: row["caption"] for row in of_sample if row["status"] == Status.OK.value}
        yield {
            "shard": shard,
            "index": index,
            "key": of_sample[0]["key"],
            "original": of_sample[0]["original"],
            "decoded": any(row["width"] for row in of_sample),
            "captions": captions,
        }


def _sidecar_records(files: Sequence[Path], folder: Path, samples: Samples) -> Iterator[dict[str, Any]]:
    """VILA's sidecars `<shard>.json`, {key: {"output": caption}}, as records, in the source's order."""
    by_shard = {file.relative_to(folder).as_posix().removesuffix(".json"): file for file in files}
    for shard in samples.source.shards:
        file = by_shard.get(shard.name)
        if file is None:
            continue
        try:
            captions = json.loads(file.read_text(encoding="utf-8"))
            said = {str(key): str(value["output"]) for key, value in captions.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SourceError(f"{file} is not a caption file of VILA's form: {error}") from None
        for sample in shard.read():
            if sample.key in said and sample.error is None:
                yield {"shard": shard.name, "index": sample.index, "text": said[sample.key]}


def _kept(cache: Path | None, kind: str, files: Sequence[Path]) -> Path | None:
    """Where the records of these files are kept: another name as soon as one of them changes."""
    if cache is None:
        return None
    states = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return cache / f"{kind}-{blake2b(repr(states).encode(), digest_size=16).hexdigest()}.records"
