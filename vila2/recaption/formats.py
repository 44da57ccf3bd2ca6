"""What trainers read: each format takes entries in the source's order and writes files into a folder of its own.

The folder is a temporary one that `export` renames when it is complete, so nothing here needs to be atomic.
"""

import io
import json
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vila2.errors import UsageError
from vila2.recaption.merge import Merged
from vila2.types import Sample

SAMPLES_PER_TAR = 10_000
_EXTENSIONS = {
    b"\xff\xd8": "jpg",
    b"\x89PNG": "png",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II": "tif",
    b"MM": "tif",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One sample for export. `sample.image` is there when the format asked for images."""

    sample: Sample
    captions: dict[str, str]  # by prompt: the usable new ones
    merged: Merged
    question: str  # of the first prompt: what a trainer is asked before `merged.text`


def write_jsonl(entries: Iterable[Entry], folder: Path) -> int:
    """`captions.jsonl`: one object a sample, with `text` merged and the single captions under their prompts."""
    count = 0
    with (folder / "captions.jsonl").open("w", encoding="utf-8") as file:
        for entry in entries:
            file.write(_json(_record(entry)) + "\n")
            count += 1
    return count


def write_llava(entries: Iterable[Entry], folder: Path, image_path: Callable[[Entry], str]) -> int:
    """`llava.json`: a list of conversations. `image_path` says what a record names as its image."""
    count = 0
    with (folder / "llava.json").open("w", encoding="utf-8") as file:
        file.write("[")
        for entry in entries:
            turns: list[tuple[str, str]] = []
            if entry.merged.text:
                turns.append((entry.question, entry.merged.text))
            turns += [(turn.question, turn.answer) for turn in entry.merged.turns]
            conversations = []
            for number, (question, answer) in enumerate(turns):
                mark = "<image>\n" if number == 0 else ""
                conversations.append({"from": "human", "value": mark + question})
                conversations.append({"from": "gpt", "value": answer})
            record = {"id": entry.sample.key, "image": image_path(entry), "conversations": conversations}
            file.write(("," if count else "") + "\n" + _json(record))
            count += 1
        file.write("\n]\n")
    return count


def write_webdataset(entries: Iterable[Entry], folder: Path) -> int:
    """Tars of at most SAMPLES_PER_TAR samples: the image (where the entry has one), .txt and .json."""
    count = 0
    tar: tarfile.TarFile | None = None
    opened = ("", -1)
    in_shard = 0
    try:
        for entry in entries:
            in_shard = in_shard + 1 if entry.sample.shard == opened[0] else 0
            place = (entry.sample.shard, in_shard // SAMPLES_PER_TAR)
            if place != opened or tar is None:
                if tar is not None:
                    tar.close()
                path = folder / _tar_name(*place)
                path.parent.mkdir(parents=True, exist_ok=True)
                tar, opened = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT), place  # noqa: SIM115
            key = f"{entry.sample.index:08d}"  # unique in its shard whatever the sample's own key holds
            if entry.sample.image is not None:
                _add(tar, f"{key}.{image_extension(entry.sample.image)}", entry.sample.image)
            _add(tar, f"{key}.txt", entry.merged.text.encode())
            _add(tar, f"{key}.json", _json(_record(entry)).encode())
            count += 1
    finally:
        if tar is not None:
            tar.close()
    return count


def write_vila(entries: Iterable[Entry], folder: Path) -> int:
    """VILA's sidecar store: `<shard>.json`, a dictionary of key -> {"output": caption} (facts: coyo_recap.py)."""
    count = 0
    shard: str | None = None
    captions: dict[str, dict[str, str]] = {}

    def save() -> None:
        if shard is None:
            return
        path = folder / f"{_safe(shard)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_json(captions), encoding="utf-8")

    for entry in entries:
        if entry.merged.turns:
            raise UsageError("the vila format holds one caption a sample: use --merge replace or concat")
        if entry.sample.shard != shard:
            save()
            shard, captions = entry.sample.shard, {}
        captions[entry.sample.key] = {"output": entry.merged.text}
        count += 1
    save()
    return count


def save_image(entry: Entry, folder: Path) -> str:
    """Write the entry's image below `folder`; returns its path relative to it."""
    assert entry.sample.image is not None  # the caller asked for images
    stem = Path(_safe(entry.sample.shard)).with_suffix("")
    relative = stem / f"{entry.sample.index:08d}.{image_extension(entry.sample.image)}"
    path = folder / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(entry.sample.image)
    return relative.as_posix()


def image_extension(image: bytes) -> str:
    """The usual extension for these bytes; `bin` if they are nothing that we know."""
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp"
    return next((extension for magic, extension in _EXTENSIONS.items() if image.startswith(magic)), "bin")


def _record(entry: Entry) -> dict[str, Any]:
    record: dict[str, Any] = {
        "key": entry.sample.key,
        "shard": entry.sample.shard,
        "index": entry.sample.index,
        "original": entry.sample.original,
        "text": entry.merged.text,
        "captions": entry.captions,
    }
    if entry.merged.turns:
        record["turns"] = [{"question": t.question, "answer": t.answer} for t in entry.merged.turns]
    return record


def _tar_name(shard: str, number: int) -> str:
    path = Path(_safe(shard))
    stem = path.with_suffix("") if path.suffix in (".tar", ".parquet", ".json", ".jsonl") else path
    return f"{stem}.tar" if number == 0 else f"{stem}-{number:05d}.tar"


def _safe(shard: str) -> str:
    """A shard's name as a path that stays in its folder."""
    return "/".join(part.replace("..", "__") for part in shard.split("/") if part not in ("", ".", ".."))


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # no owner and no time: the same export gives the same bytes
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
