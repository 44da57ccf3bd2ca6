"""`open_source`: from what a user names (a path, a pattern) to shards of samples.

What is named is read as
- a `.tar` file, a pattern of them (`{00000..00012}.tar`, `*.tar`), or a folder with tars below it: WebDataset;
- a `.json` or `.jsonl` file: LLaVA records, images below `image_root` (default: the folder of the file);
- a `.parquet` file, a pattern, or a folder with such files: Parquet;
- any other folder: its images.
A folder that fits two kinds is refused; the prefix `webdataset:`, `folder:` or `parquet:` then says which is meant.
"""

import os
import re
from collections.abc import Callable
from glob import glob
from pathlib import Path

from vila2.data.folder import FolderFiles, folder_shards, make_listing, saved_listing, walk
from vila2.data.llava_json import JsonShard
from vila2.data.parquet_source import ParquetShard, check_columns
from vila2.data.source import Shard, Source
from vila2.data.tar_source import TarShard
from vila2.errors import SourceError

KINDS = ("webdataset", "folder", "llava", "parquet")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MAX_EXPANDED = 1_000_000
_LOOKED_FOR = "looked for .tar, .parquet, .json or .jsonl files, or a folder of images"
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")


def open_source(spec: str | Path, *, image_root: Path | None = None, index_dir: Path | None = None) -> Source:
    """List the samples that `spec` names.

    `index_dir` (made when needed) keeps the places of samples and the listing of an image folder for later
    runs; without it they are kept in memory. Raises SourceError when there is nothing to read there, and
    OutputError when `index_dir` cannot be written.
    """
    kind, _, rest = str(spec).partition(":")
    forced, name = (kind, rest) if kind in KINDS and rest else (None, str(spec))
    if image_root is not None and not image_root.is_dir():
        raise SourceError(f"the image root {image_root} is not a folder")
    path = Path(name).expanduser()
    if path.is_dir():
        return _open_folder(path.resolve(), forced, image_root, index_dir)
    if path.exists():
        files, root = [path.absolute()], path.absolute().parent  # a link may lead to a file of any name
        shown = str(files[0])
    else:
        files, root = _expand(name)
        shown = str(Path(name).expanduser().absolute())
    kind = forced or _kind_of_files(files, name)
    opener = _OPENERS.get(kind)
    if opener is None:
        raise SourceError(f"{name} is not a folder, which the prefix {kind}: asks for")
    return _not_empty(Source(kind, shown, opener(files, root, image_root, index_dir)))


def _not_empty(source: Source) -> Source:
    if not any(len(shard) for shard in source.shards):
        raise SourceError(f"the {source.kind} source {source.root} holds no samples")
    return source


def expand_braces(pattern: str) -> list[str]:
    """All strings of a brace pattern: `{000..012}` counts with the same width, `{a,b}` lists. Raises SourceError."""
    results = [pattern]
    while any(_BRACES.search(result) for result in results):
        expanded: list[str] = []
        for result in results:
            match = _BRACES.search(result)
            choices = _choices(match[1], pattern) if match else [""]
            head, tail = (result[: match.start()], result[match.end() :]) if match else (result, "")
            expanded += [head + choice + tail for choice in choices]
            if len(expanded) > _MAX_EXPANDED:
                raise SourceError(f"the pattern {pattern} stands for more than {_MAX_EXPANDED} files")
        results = expanded
    return results


def _choices(inside: str, pattern: str) -> list[str]:
    counted = _RANGE.fullmatch(inside)
    if counted is None:
        if "," not in inside:
            raise SourceError(f"the pattern {pattern} has a brace that is neither {{00..12}} nor {{a,b}}")
        return inside.split(",")
    first, last = int(counted[1]), int(counted[2])
    if not first <= last < first + _MAX_EXPANDED:
        raise SourceError(f"the range {{{inside}}} in the pattern {pattern} counts down, or too far")
    padded = any(len(end) > 1 and end.startswith("0") for end in counted.groups())  # as a shell counts
    width = max(map(len, counted.groups())) if padded else 0
    return [f"{number:0{width}d}" for number in range(first, last + 1)]


def _expand(name: str) -> tuple[list[Path], Path]:
    """The files of a pattern, and the folder that all their names are relative to. Raises SourceError.

    A brace pattern may name files that are missing, as long as one is there: each becomes a MISSING_FILE sample.
    """
    if not re.search(r"[{*?\[]", name):
        raise SourceError(f"{name} does not exist; {_LOOKED_FOR}")
    names: list[str] = []
    for one in expand_braces(os.path.expanduser(name)):  # noqa: PTH111 - a pattern is not a path
        names += sorted(glob(one, recursive=True)) if re.search(r"[*?\[]", one) else [one]  # noqa: PTH207 - absolute or not
    files = [Path(one).absolute() for one in dict.fromkeys(names)]
    if not any(file.exists() for file in files):
        raise SourceError(f"no file fits {name}; {_LOOKED_FOR}")
    return files, Path(os.path.commonpath([file.parent for file in files]))


def _kind_of_files(files: list[Path], name: str) -> str:
    suffixes = {file.suffix.lower() for file in files}
    if suffixes == {".tar"}:
        return "webdataset"
    if suffixes == {".parquet"}:
        return "parquet"
    if suffixes <= {".json", ".jsonl", ".ndjson"} and len(files) == 1:
        return "llava"
    _refuse_compressed(files)
    found = ", ".join(sorted(suffix or "no extension" for suffix in suffixes))
    raise SourceError(f"{name} is no source that can be read ({found}); {_LOOKED_FOR}")


def _open_folder(root: Path, forced: str | None, image_root: Path | None, index_dir: Path | None) -> Source:
    listing = saved_listing(root, index_dir) if forced in (None, "folder") else None
    if listing is None:
        found = walk(root)
        kind = forced or _kind_of_folder(root, found)
        if kind != "folder":
            names = found.tars if kind == "webdataset" else found.parquets
            if not names:
                raise SourceError(f"no {kind} files in the folder {root}")
            shards = _OPENERS[kind]([root / file for file in names], root, image_root, index_dir)
            return _not_empty(Source(kind, str(root), shards))
        if not found.images:
            raise SourceError(f"no images in the folder {root}; {_LOOKED_FOR}")
        listing = make_listing(root, found, index_dir)
    return Source("folder", str(root), folder_shards(root, listing))


def _kind_of_folder(root: Path, found: FolderFiles) -> str:
    """The kind of a folder. Tars beside Parquet files are WebDataset: img2dataset writes both."""
    if found.images and (found.tars or found.parquets):
        other = "tars" if found.tars else "Parquet files"
        prefix = "webdataset" if found.tars else "parquet"
        raise SourceError(
            f"the folder {root} holds both images and {other}; say which with folder:{root} or {prefix}:{root}"
        )
    if found.tars:
        return "webdataset"
    if found.images:
        return "folder"
    if found.parquets:
        return "parquet"
    _refuse_compressed([root / name for name in found.compressed_tars])
    raise SourceError(f"nothing to caption in the folder {root}; {_LOOKED_FOR}")


def _refuse_compressed(files: list[Path]) -> None:
    """Raise SourceError if one of the files is a compressed tar, by its name or its first bytes."""
    for file in files:
        try:
            with file.open("rb") as opened:
                head = opened.read(6)
        except OSError:
            continue  # becomes an error sample later
        if head.startswith(_COMPRESSED):
            raise SourceError(
                f"{file} is compressed, so its members cannot be reached one by one; unpack it to a plain .tar"
            )


def _tar_shards(
    files: list[Path], root: Path, image_root: Path | None, index_dir: Path | None
) -> list[Shard]:
    _refuse_compressed(files)
    return [TarShard(file, file.relative_to(root).as_posix(), index_dir) for file in files]


def _parquet_shards(
    files: list[Path], root: Path, image_root: Path | None, index_dir: Path | None
) -> list[Shard]:
    shards = [ParquetShard(file, file.relative_to(root).as_posix(), image_root or root) for file in files]
    check_columns(shards)
    return list(shards)


def _json_shards(
    files: list[Path], root: Path, image_root: Path | None, index_dir: Path | None
) -> list[Shard]:
    if len(files) != 1:
        raise SourceError(f"one LLaVA file is read at a time; {len(files)} were named")
    shard = JsonShard(files[0], image_root or root, index_dir)
    if len(shard) == 0:
        raise SourceError(f"{files[0]} holds no records")
    return [shard]


_OPENERS: dict[str, Callable[[list[Path], Path, Path | None, Path | None], list[Shard]]] = {
    "webdataset": _tar_shards,
    "parquet": _parquet_shards,
    "llava": _json_shards,
}
