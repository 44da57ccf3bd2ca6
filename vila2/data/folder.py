"""A folder of images, with or without a .txt, .caption or .json of the same name beside each.

Sorted by path and cut into shards of 10,000. The listing is saved in `index_dir` at the first run and used again by
the later ones, so that a file that is added or removed in between changes no other image's identity: an added one
is not seen (caption it into a new output folder), a removed one becomes a MISSING_FILE row.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vila2.data.local_index import Index, index_path, load_index, pack_strings, save_index, unpack_string
from vila2.data.reading import (
    IMAGE_EXTENSIONS,
    MAX_TEXT_BYTES,
    TEXT_EXTENSIONS,
    BadSample,
    printable,
    read_file,
    read_image_file,
    read_sidecar,
)
from vila2.data.source import Shard, pick_indices
from vila2.errors import OutputError, SourceError
from vila2.types import Sample

IMAGES_PER_SHARD = 10_000


@dataclass(slots=True)
class FolderFiles:
    """What a walk found, as paths relative to the folder, each list sorted; `texts` is a set of all sidecars."""

    images: list[str]
    texts: set[str]
    tars: list[str]
    compressed_tars: list[str]
    parquets: list[str]


def walk(root: Path) -> FolderFiles:
    """List `root` recursively. Follows symbolic links, each real folder once; skips names that begin with a dot."""
    found = FolderFiles([], set(), [], [], [])
    visited: set[tuple[int, int]] = set()
    pending = [""]
    while pending:
        relative = pending.pop()
        try:
            status = os.stat(os.path.join(root, relative))  # noqa: PTH116, PTH118 - a Path per file is slow
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(os.path.join(root, relative)) as entries:  # noqa: PTH118
                listed = sorted(entries, key=lambda entry: entry.name)
        except OSError as exc:
            raise SourceError(f"cannot list {root / relative}: {exc.strerror}") from exc
        for entry in listed:
            if entry.name.startswith("."):
                continue
            path = f"{relative}/{entry.name}" if relative else entry.name
            if entry.is_dir():
                pending.append(path)
            else:
                _sort_in(found, path)
    for paths in (found.images, found.tars, found.compressed_tars, found.parquets):
        paths.sort()
    return found


def _sort_in(found: FolderFiles, path: str) -> None:
    stem, _, extension = path.lower().rpartition(".")
    if extension in IMAGE_EXTENSIONS:
        found.images.append(path)
    elif extension in TEXT_EXTENSIONS:
        found.texts.add(path)
    elif extension == "tar":
        found.tars.append(path)
    elif extension == "tgz" or stem.endswith(".tar"):
        found.compressed_tars.append(path)
    elif extension == "parquet":
        found.parquets.append(path)


def saved_listing(root: Path, index_dir: Path | None) -> Index | None:
    """The listing of an earlier run, if there is one. Raises OutputError if it is there but damaged."""
    path = _listing_path(root, index_dir)
    if path is None or not path.exists():
        return None
    listing = load_index(path)
    if listing is None:
        raise OutputError(f"the listing of images {path} is damaged; caption into a new output folder")
    return listing


def make_listing(root: Path, found: FolderFiles, index_dir: Path | None) -> Index:
    """The listing of `found`, saved in `index_dir`; another process that was first wins."""
    sidecars = [_sidecar(image, found.texts) for image in found.images]
    listing = pack_strings("image", [os.fsencode(image) for image in found.images])
    listing |= pack_strings("sidecar", [os.fsencode(sidecar) for sidecar in sidecars])
    path = _listing_path(root, index_dir)
    if path is None:
        return listing
    try:
        save_index(path, listing, exclusive=True)
    except FileExistsError:
        return saved_listing(root, index_dir) or listing
    return listing


def _listing_path(root: Path, index_dir: Path | None) -> Path | None:
    return index_path(index_dir, "folder", str(root)) if index_dir is not None else None


def _sidecar(image: str, texts: set[str]) -> str:
    stem = image.rpartition(".")[0]
    return next((path for ext in TEXT_EXTENSIONS if (path := f"{stem}.{ext}") in texts), "")


def folder_shards(root: Path, listing: Index) -> list[Shard]:
    """Cut a listing into shards of IMAGES_PER_SHARD."""
    count = len(listing["image_ends"])
    starts = range(0, count, IMAGES_PER_SHARD)
    return [
        FolderShard(root, f"images-{i:06d}", listing, start, min(start + IMAGES_PER_SHARD, count))
        for i, start in enumerate(starts)
    ]


@dataclass
class FolderShard:
    """The images `start <= i < stop` of a listing. The key of a sample is its path relative to `root`."""

    root: Path
    name: str
    listing: Index
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def read(self, indices: Sequence[int] | None = None) -> Iterator[Sample]:
        for i in pick_indices(len(self), indices):
            yield self._sample(i)

    def _sample(self, i: int) -> Sample:
        image = unpack_string(self.listing, "image", self.start + i)
        sidecar = unpack_string(self.listing, "sidecar", self.start + i)
        key = printable(image)
        try:
            original, fields = self._texts(sidecar)
            data = read_image_file(self.root / os.fsdecode(image), key)
        except BadSample as exc:
            return Sample(self.name, i, key, error=exc.error)
        return Sample(self.name, i, key, data, original, fields)

    def _texts(self, sidecar: bytes) -> tuple[str, dict[str, str]]:
        if not sidecar:
            return "", {}
        shown = printable(sidecar)
        data = read_file(self.root / os.fsdecode(sidecar), shown, MAX_TEXT_BYTES)
        return read_sidecar(data, shown.rpartition(".")[2], shown)
