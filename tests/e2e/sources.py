"""Small generated sources of each kind, with good images and with one of every bad input that fits the kind."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def picture(seed: int, format_name: str = "PNG", size: tuple[int, int] = (40, 30)) -> bytes:
    """A smooth random picture, so that every codec has something to do."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (4, 5, 3), np.uint8))
    buffer = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).save(buffer, format_name)
    return buffer.getvalue()


FORMATS = (
    ("jpg", "JPEG"),
    ("png", "PNG"),
    ("webp", "WEBP"),
    ("gif", "GIF"),
    ("bmp", "BMP"),
    ("tiff", "TIFF"),
)

# What is wrong -> the bytes, and the kind of error that they must become.
BAD = {
    "empty": (b"", "empty_file"),
    "html": (b"<html>404</html>", "not_an_image"),
    "cut": (picture(90, "JPEG")[:200], "corrupt_image"),
    "tiny": (picture(91, size=(2, 2)), "too_small"),
    "thread": (picture(92, size=(900, 5)), "extreme_aspect"),
    "bomb": (picture(93, size=(2000, 60)), "too_many_pixels"),
}
MAX_PIXELS = 100_000


def write_folder(folder: Path, count: int, *, bad: bool = False) -> Path:
    """Images of all formats, texts beside some of them; with `bad` one file of each kind in BAD."""
    (folder / "sub").mkdir(parents=True)
    for i in range(count):
        extension, format_name = FORMATS[i % len(FORMATS)]
        path = folder / ("sub" if i % 4 == 3 else "") / f"{i:03d}.{extension}"
        path.write_bytes(picture(i, format_name))
        if i % 2 == 0:
            path.with_suffix(".txt").write_text(f"original of {i}")
    if bad:
        for name, (data, _) in BAD.items():
            (folder / f"bad-{name}.jpg").write_bytes(data)
    return folder


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_tars(folder: Path, count: int, *, bad: bool = False) -> str:
    """Two tars, and with `bad`: bad images, a sample without image, a duplicate key, a cut end. Returns a pattern."""
    folder.mkdir(parents=True)
    for shard in range(2):
        path = folder / f"part-{shard:03d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(shard, count, 2):
                _add(tar, f"{i:05d}.jpg", picture(i, "JPEG"))
                _add(tar, f"{i:05d}.txt", f"original of {i}".encode())
                _add(tar, f"{i:05d}.json", json.dumps({"url": f"http://x/{i}"}).encode())
            if bad and shard == 0:
                for name, (data, _) in BAD.items():
                    _add(tar, f"bad-{name}.jpg", data)
                _add(tar, "no-image.txt", b"only a text")
                _add(tar, "00000.jpg", picture(5, "JPEG"))
                _add(tar, "latin.jpg", picture(6, "JPEG"))
                _add(tar, "latin.txt", "caf\xe9".encode("latin-1"))
        if bad and shard == 1:
            data = path.read_bytes()
            with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
                _add(tar, "last.jpg", picture(8, "JPEG"))
            path.write_bytes(
                data.rstrip(b"\0").ljust(-(-len(data.rstrip(b"\0")) // 512) * 512, b"\0")
                + path.read_bytes()[:800]
            )
    return f"{folder}/part-{{000..001}}.tar"


def write_llava_json(folder: Path, count: int, *, bad: bool = False) -> Path:
    images = folder / "images"
    images.mkdir(parents=True)
    records: list[object] = []
    for i in range(count):
        (images / f"{i}.png").write_bytes(picture(i))
        turns = [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": f"original of {i}"},
        ]
        records.append({"id": f"id{i}", "image": f"{i}.png", "conversations": turns})
    if bad:
        records += [
            {"id": "gone", "image": "gone.png"},
            {"id": "none"},
            {"id": "out", "image": "../x.png"},
            7,
        ]
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path


def write_parquet(folder: Path, count: int, *, bad: bool = False) -> Path:
    folder.mkdir(parents=True)
    images: list[bytes | None] = [picture(i) for i in range(count)]
    texts = [f"original of {i}" for i in range(count)]
    if bad:
        images += [data for data, _ in BAD.values()] + [None]
        texts += [""] * (len(BAD) + 1)
    keys = [f"row{i}" for i in range(len(images))]
    table = pa.table({"id": keys, "image": pa.array(images, pa.binary()), "caption": texts})
    pq.write_table(table, folder / "data.parquet", row_group_size=4)
    return folder
