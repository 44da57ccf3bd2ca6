"""The cache of cut images: what comes out is what went in, in one process or several, torn files or full ones."""

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from tests.unit.train.kits import kit, picture
from vila2.errors import UsageError
from vila2.model.images import PreparedImage
from vila2.train.examples import Document, LazyImage
from vila2.train.image_cache import ImageCache

PROCESSOR = kit("lite").processor


def prepared(seed: int, width: int = 20) -> PreparedImage:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, width, 3), dtype=np.uint8)
    return PROCESSOR.prepare(pixels)


def key(number: int) -> bytes:
    return number.to_bytes(4, "little") * 4


def same(one: PreparedImage, other: PreparedImage | None) -> bool:
    if other is None or not np.array_equal(one.tiles, other.tiles):
        return False
    names = ("mode", "grid", "num_tokens", "num_placeholders", "width", "height")
    return all(getattr(one, name) == getattr(other, name) for name in names)


def test_what_is_kept_comes_back_whole(tmp_path: Path) -> None:
    cache = ImageCache(tmp_path, PROCESSOR, 1 << 20)
    images = {key(n): prepared(n, 20 + 20 * (n % 3)) for n in range(40)}
    for name, image in images.items():
        assert cache.get(name) is None
        cache.put(name, image)
        cache.put(name, image)  # a second time changes nothing
    again = ImageCache(tmp_path, PROCESSOR, 1 << 20)
    assert all(same(image, again.get(name)) for name, image in images.items())
    assert (cache.counts.stored, cache.counts.misses, again.counts.hits) == (40, 40, 40)
    assert {image.grid for image in images.values()} > {(1, 1)}


def test_a_full_cache_keeps_what_it_has(tmp_path: Path) -> None:
    size = 20 * (16 * 16 * 3 + 200)
    cache = ImageCache(tmp_path, PROCESSOR, size)
    images = {key(n): prepared(n) for n in range(60)}
    for name, image in images.items():
        cache.put(name, image)
    found = [name for name, image in images.items() if cache.get(name) is not None]
    assert 0 < len(found) < 60
    assert cache.counts.refused == 60 - len(found)
    assert all(same(images[name], cache.get(name)) for name in found)
    assert sum(file.stat().st_size for file in cache.folder.iterdir()) <= size


def test_other_settings_use_other_files(tmp_path: Path) -> None:
    cache = ImageCache(tmp_path, PROCESSOR, 1 << 20)
    cache.put(key(1), prepared(1))
    assert ImageCache(tmp_path, kit("nvila").processor, 1 << 20).get(key(1)) is None


def test_torn_pixels_and_torn_entries_count_as_missing_and_heal(tmp_path: Path) -> None:
    cache = ImageCache(tmp_path, PROCESSOR, 1 << 20)
    image = prepared(1)
    for name in ("tiles.bin", "index.bin"):
        cache.put(key(1), image)
        path = cache.folder / name
        data = bytearray(path.read_bytes())
        at = next(i for i in range(64 if name == "index.bin" else 0, len(data)) if data[i])
        data[at + (20 if name == "index.bin" else 0)] ^= 0xFF
        path.write_bytes(bytes(data))
        assert cache.get(key(1)) is None
    cache.put(key(1), image)
    assert same(image, cache.get(key(1)))
    os.truncate(cache.folder / "tiles.bin", 10)
    assert cache.get(key(1)) is None


def test_a_disk_that_refuses_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ImageCache(tmp_path, PROCESSOR, 1 << 20)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vila2.train.image_cache.os.pwrite", full)
    cache.put(key(1), prepared(1))
    monkeypatch.undo()
    assert cache.get(key(1)) is None
    assert cache.counts.refused == 1


def test_a_cache_too_small_for_a_tile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds not one tile"):
        ImageCache(tmp_path, PROCESSOR, 100)


def fill(folder: Path, first: int) -> None:
    cache = ImageCache(folder, PROCESSOR, 1 << 20)
    for n in range(60):
        number = (first + n) % 60
        name, image = key(number), prepared(number)
        found = cache.get(name)
        assert found is None or same(image, found)
        cache.put(name, image)


def test_several_processes_fill_one_cache(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=fill, args=(tmp_path, first)) for first in (0, 20, 40)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    cache = ImageCache(tmp_path, PROCESSOR, 1 << 20)
    assert all(same(prepared(n), cache.get(key(n))) for n in range(60))
    stored = int.from_bytes((cache.folder / "index.bin").read_bytes()[:8], "little")
    assert stored == sum(len(prepared(n).tiles) for n in range(60))  # each once


def test_an_encoder_decodes_once(tmp_path: Path) -> None:
    loads = []

    def load() -> bytes:
        loads.append(1)
        path = tmp_path / "image.png"
        Pillow.fromarray(picture(9, 40)).save(path)
        return path.read_bytes()

    of = kit("lite")
    for name in ("named", None):
        loads.clear()
        cache = ImageCache(tmp_path / str(name), of.processor, 1 << 20)
        document = Document(
            "k", "conversation", (LazyImage(load, name),), conversations=((("What?", "yes"),),)
        )
        plain = of.encoder().encode(document)
        first, second = (of.encoder(cache=cache).encode(document) for _ in range(2))
        assert same(plain.images[0], first.images[0])
        assert same(plain.images[0], second.images[0])
        assert cache.counts.stored == 1
        assert cache.counts.hits >= 1
        if name:
            assert len(loads) == 3  # twice without the cache (its size is asked for), once with it


def test_the_same_image_is_another_one_among_several(tmp_path: Path) -> None:
    of = kit("lite")
    cache = ImageCache(tmp_path, of.processor, 1 << 20)
    encoder = of.encoder(cache=cache)
    single = Document("k", "conversation", (picture(width=40),), conversations=((("What?", "yes"),),))
    double = Document("k", "conversation", (picture(width=40),) * 2, conversations=((("What?", "yes"),),))
    assert encoder.encode(single).num_tiles > 1
    assert [len(image.tiles) for image in encoder.encode(double).images] == [1, 1]
