"""What is trained on: one line for each image, with its captions joined as the round's rule says.

Every model of a loop, round 0 and the controls included, reads such a file through the same source of data, so that
two of them differ in their texts and in nothing else.
"""

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import groupby
from pathlib import Path
from typing import Any

from vila2.augment.context import Context, Outcome
from vila2.augment.source import index_folder, original_records
from vila2.augment.step import Step
from vila2.data.files import make_folder, replacing, write_error
from vila2.data.shards import open_source
from vila2.data.verify import iter_rows
from vila2.errors import UsageError
from vila2.recaption.merge import Merged, Turn, merge
from vila2.recaption.output import Finished
from vila2.recaption.prompts import BUILTIN_FIELDS
from vila2.types import Sample, Status

FILE_NAME = "captions.jsonl"
Records = Iterator[dict[str, Any]]
Place = tuple[str, int]


def run_captions(step: Step, context: Context) -> Outcome:
    """Write `captions.jsonl`: {shard, index, key, text, turns}, by shard and index."""
    settings = context.settings(step)
    folder = step.folder(context.run)
    make_folder(folder)
    records = _MODES[settings["mode"]]({**settings, "index": index_folder(context.run)})
    counts = {"images": 0, "changed": 0, "turns": 0, "words": 0}
    hashed = blake2b(digest_size=16)
    try:
        with replacing(folder / FILE_NAME) as temporary, temporary.open("wb") as file:
            for record in records:
                counts["changed"] += record.pop("changed", False)
                counts["images"] += 1
                counts["turns"] += len(record.get("turns", ()))
                counts["words"] += len(record["text"].split())
                line = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "replace")
                hashed.update(line)
                file.write(line)
    except OSError as error:
        raise write_error(folder / FILE_NAME, error) from error
    if not counts["images"]:
        raise UsageError(f"{step.name}: no image of the source has a text to train on")
    words = counts.pop("words") / counts["images"]
    return Outcome(hashed.hexdigest(), metrics={**counts, "words": words}, images=counts["images"])


def read_captions(folder: Path) -> Records:
    """The records of a step's file."""
    with (folder / FILE_NAME).open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _original(settings: Mapping[str, Any]) -> Records:
    return original_records(open_source(settings["source"], index_dir=settings["index"]))


def _new(settings: Mapping[str, Any]) -> Records:
    """The originals joined with what one or several outputs say; an image without a good caption keeps its own."""
    answers = _Answers(settings["outputs"], with_questions=False)
    how = settings["merge"]
    return _joined(_originals(settings), answers, lambda record, turns: merge(record["text"], turns, how))


def _turns(settings: Mapping[str, Any]) -> Records:
    """A caption, and the answers of specialists as questions and answers after it."""
    answers = _Answers(settings["outputs"], with_questions=True, prompts=settings.get("prompts"))
    records = read_captions(Path(settings["onto"])) if "onto" in settings else _originals(settings)
    return _joined(records, answers, lambda record, turns: merge(record["text"], turns, "qa"))


def _truth(settings: Mapping[str, Any]) -> Records:
    """The originals joined with captions that are known to be true."""
    captions = true_captions(settings["truth"])
    for record in _originals(settings):
        caption = captions.get(record["key"])
        merged = None if caption is None else merge(record["text"], [Turn("", caption)], settings["merge"])
        yield _with(record, merged)


def _unrelated(settings: Mapping[str, Any]) -> Records:
    """Each original with other images' originals after it, until it is as long as the caption it stands against."""
    texts = [record["text"] for record in _originals(settings)]
    like = read_captions(Path(settings["like"]))
    for record, long in zip(_originals(settings), like, strict=True):
        wanted = len(long["text"].split())
        draw = random.Random(f"{settings['seed']}/{record['shard']}/{record['index']}")
        lines, length = [record["text"]], len(record["text"].split())
        while length < wanted:
            lines.append(texts[draw.randrange(len(texts))] or "-")
            length += len(lines[-1].split())
        yield {**record, "text": "\n".join(lines), "changed": len(lines) > 1}


_MODES: dict[str, Callable[[Mapping[str, Any]], Records]] = {
    "original": _original,
    "new": _new,
    "turns": _turns,
    "truth": _truth,
    "unrelated": _unrelated,
}


def true_captions(truth: str) -> dict[str, str]:
    """key -> the caption that says all that is so, of a world's folder; or what a file of captions says."""
    path = Path(truth)
    if path.is_file() and path.suffix in (".json", ".jsonl"):
        from vila2.evaluate.caption_files import read_captions as read_file

        return read_file(path)
    from vila2.evaluate.truths import read_truths
    from vila2.world.texts import detailed_caption

    return {key: detailed_caption(scene) for key, scene in read_truths(path).items()}


def _originals(settings: Mapping[str, Any]) -> Records:
    return read_captions(Path(settings["originals"]))


def _joined(
    records: Records, answers: "_Answers", join: Callable[[dict[str, Any], list[Turn]], Merged | None]
) -> Records:
    """Each record with the answers about its image. Both come by shard and index."""
    for record in records:
        turns = answers.of(record)
        yield _with(record, join(record, turns) if turns else None)


def _with(record: dict[str, Any], merged: Merged | None) -> dict[str, Any]:
    if merged is None:
        return record
    turns = [{"question": turn.question, "answer": turn.answer} for turn in merged.turns]
    return {**record, "text": merged.text, **({"turns": turns} if turns else {}), "changed": True}


class _Answers:
    """The good captions of several outputs, image by image, read side by side in order of shard and index."""

    def __init__(
        self, outputs: Iterable[str], with_questions: bool, prompts: Sequence[str] | None = None
    ) -> None:
        self._outputs = [_Output(Path(output), with_questions, prompts) for output in outputs]

    def of(self, record: Mapping[str, Any]) -> list[Turn]:
        place = (record["shard"], record["index"])
        return [turn for output in self._outputs for turn in output.at(place, record)]


class _Output:
    def __init__(self, folder: Path, with_questions: bool, prompts: Sequence[str] | None) -> None:
        self._finished = Finished(folder)
        self._with_questions, self._prompts = with_questions, prompts
        missing = self._finished.prompts.question_fields - set(BUILTIN_FIELDS)
        if with_questions and missing:
            raise UsageError(
                f"{folder}: its prompt wants the field {min(missing)!r} of each sample; a question that is trained on "
                "must stand without"
            )
        self._groups = groupby(iter_rows(folder), key=lambda row: (row["shard"], row["index"]))
        self._here: tuple[Place, list[dict[str, Any]]] | None = None
        self._next()

    def at(self, place: Place, record: Mapping[str, Any]) -> list[Turn]:
        while self._here is not None and self._here[0] < place:
            self._next()
        if self._here is None or self._here[0] != place:
            return []
        good = [
            row
            for row in self._here[1]
            if row["status"] == Status.OK.value and (self._prompts is None or row["prompt"] in self._prompts)
        ]
        order = {name: number for number, name in enumerate(self._finished.prompts.names)}
        good.sort(key=lambda row: order.get(row["prompt"], len(order)))
        return [Turn(self._question(row, record), row["caption"]) for row in good]

    def _question(self, row: Mapping[str, Any], record: Mapping[str, Any]) -> str:
        if not self._with_questions:
            return ""
        sample = Sample(record["shard"], record["index"], record["key"], original=record["text"])
        return self._finished.prompts.question(row["prompt"], sample)

    def _next(self) -> None:
        found = next(self._groups, None)
        self._here = None if found is None else (found[0], list(found[1]))
