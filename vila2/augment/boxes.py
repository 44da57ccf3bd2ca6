"""Which records with boxes a grounding specialist learns from: the filters of VILA² (arXiv 2407.17453, appendix A.2).

Boxes are `[xmin,ymin,xmax,ymax]`, either whole numbers from 000 to 999 or shares from 0 to 1; what comes out always
has the first form. A record is dropped if a box is not one, if a box covers more than `max_area` of the image, or if
one thing has more than `max_same` boxes.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vila2.augment.context import Context, Outcome
from vila2.augment.step import Step, digest_of_file
from vila2.data.files import make_folder, replacing, write_error
from vila2.data.llava_json import build_index
from vila2.errors import SourceError, UsageError
from vila2.train.examples import SkippedDocument
from vila2.train.records import read_record

FILE_NAME = "boxes.jsonl"
SCALE = 1000
_BRACKETS = re.compile(r"\[([^\[\]]*)\]")
_NUMBER = r"\s*-?\d+(?:\.\d+)?\s*"
_FOUR = re.compile(rf"{_NUMBER}(?:,{_NUMBER}){{3}}")
_LABEL = re.compile(r"([^\W\d_][\w'-]*)[\s:,(]*$")


class BadBoxes(Exception):
    """Why a record is not learnt from, in a word."""


def run_boxes(step: Step, context: Context) -> Outcome:
    """The records that pass, as JSON lines with absolute image paths left as they are."""
    settings = context.settings(step)
    path, folder = Path(settings["path"]).expanduser(), step.folder(context.run)
    make_folder(folder)
    dropped: Counter[str] = Counter()
    kept = 0
    try:
        with replacing(folder / FILE_NAME) as temporary, temporary.open("w", encoding="utf-8") as file:
            for record in _records(path):
                try:
                    good = filtered(record, settings["max_area"], settings["max_same"])
                except BadBoxes as reason:
                    dropped[str(reason)] += 1
                    continue
                kept += 1
                file.write(json.dumps(good, ensure_ascii=False) + "\n")
    except OSError as error:
        raise write_error(folder / FILE_NAME, error) from error
    if not kept:
        raise UsageError(f"{step.name}: no record of {path} passes its filters: {dict(dropped)}")
    return Outcome(digest_of_file(folder / FILE_NAME), metrics={"kept": kept, "dropped": dict(dropped)})


def filtered(record: Any, max_area: float, max_same: int) -> dict[str, Any]:
    """The record with its boxes as three-digit numbers. BadBoxes says why it is not one to learn from."""
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        raise BadBoxes("no conversation")
    counts: Counter[str] = Counter()
    turns, boxes = [], 0
    for turn in record["conversations"]:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise BadBoxes("no conversation")
        text, found = _rewritten(turn["value"], max_area, counts if turn.get("from") == "gpt" else Counter())
        boxes += found
        turns.append({**turn, "value": text})
    if not boxes:
        raise BadBoxes("no box")
    if max(counts.values(), default=0) > max_same:
        raise BadBoxes("too many of one kind")
    return {**record, "conversations": turns}


def _rewritten(text: str, max_area: float, counts: Counter[str]) -> tuple[str, int]:
    pieces: list[str] = []
    end = found = 0
    label = ""
    for match in _BRACKETS.finditer(text):
        if not _FOUR.fullmatch(match[1]):
            continue
        box = _digits([float(number) for number in match[1].split(",")], match[1])
        if _area(box) > max_area:
            raise BadBoxes("box too large")
        between = text[end : match.start()]
        named = _LABEL.search(between)
        label = named[1].lower() if named else label  # a list of boxes after one name
        counts[label] += 1
        found += 1
        pieces += [between, "[" + ",".join(f"{number:03d}" for number in box) + "]"]
        end = match.end()
    return "".join([*pieces, text[end:]]), found


def _digits(numbers: list[float], written: str) -> list[int]:
    """Whole numbers from 0 to 999. BadBoxes where they are no box."""
    shares = "." in written or all(number in (0, 1) for number in numbers)
    if shares:
        if not all(0 <= number <= 1 for number in numbers):
            raise BadBoxes("box outside the image")
        numbers = [min(round(number * SCALE), SCALE - 1) for number in numbers]
    if not all(0 <= number < SCALE for number in numbers):
        raise BadBoxes("box outside the image")
    box = [int(number) for number in numbers]
    if box[0] >= box[2] or box[1] >= box[3]:
        raise BadBoxes("box without an area")
    return box


def _area(box: list[int]) -> float:
    """As a share of the image; 999 is its far edge."""
    return (box[2] - box[0]) * (box[3] - box[1]) / (SCALE - 1) ** 2


def _records(path: Path) -> Iterator[Any]:
    """The records of a LLaVA file, one that does not parse as None. SourceError if it is no such file."""
    if not path.is_file():
        raise SourceError(f"{path} is not a file: records with boxes are one .json or .jsonl file")
    places = {(int(offset), int(size)) for offset, size, _ in build_index(path)["place"]}
    for offset, size in sorted(places):
        yield _record(path, offset, size)


def _record(path: Path, offset: int, size: int) -> Any:
    try:
        return read_record(path, offset, size)
    except SkippedDocument:
        return None
