"""DALI on its CPU device, from the real wheel: pixels near the CPU path's, and the same verdict on bad bytes."""

import io
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from vila2.config import RecaptionSettings
from vila2.data.dali import BATCH_SIZE, DaliDecoder, choose_decoder
from vila2.data.decode import DecodeError, DecodeLimits, decode_image
from vila2.errors import UsageError
from vila2.recaption.devices import Device, settings_of
from vila2.recaption.work import decode_workers

dali = pytest.mark.dali


def jpeg(seed: int, size: tuple[int, int] = (61, 47), **options: object) -> bytes:
    """A smooth picture: noise says nothing of how pixels are resampled."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def decoder():
    made = DaliDecoder(device="cpu", batch_size=4, num_threads=1)
    yield made
    made.close()


@dali
def test_pixels_equal_the_cpu_path(decoder):
    grey = io.BytesIO()
    Image.open(io.BytesIO(jpeg(1))).convert("L").save(grey, "JPEG")
    turned = Image.Exif()
    turned[0x0112] = 6
    for data in (jpeg(0), jpeg(1, progressive=True), grey.getvalue(), jpeg(2, exif=turned)):
        [ours], expected = decoder.decode_batch([data]), decode_image(data)
        assert (ours.width, ours.height) == (expected.width, expected.height)
        assert np.abs(ours.pixels.astype(int) - expected.pixels).max() <= 1


@dali
def test_resized_pixels_are_near_pillows():
    resizing = DaliDecoder(device="cpu", side=32, batch_size=2, num_threads=1)
    try:
        data = jpeg(3, (90, 50))
        decoded = resizing.decode(data)
    finally:
        resizing.close()
    assert (decoded.width, decoded.height, decoded.pixels.shape) == (90, 50, (32, 32, 3))
    expected = Image.open(io.BytesIO(data)).resize((32, 32), Image.Resampling.BICUBIC)
    assert np.abs(decoded.pixels.astype(int) - np.asarray(expected)).max() <= 3


@dali
def test_a_bad_image_does_not_cost_its_batch(decoder):
    good, broken = jpeg(4), jpeg(5)[:-200]
    results = decoder.decode_batch([good, broken, good, broken])
    assert [result is not None for result in results] == [True, False, True, False]
    assert decoder.decode_batch([broken]) == [None]
    assert decoder.decode_batch([good])[0] is not None  # the pipeline goes on


@dali
def test_many_threads_get_what_the_cpu_path_gives(decoder):
    png = io.BytesIO()
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(png, "PNG")
    images = [
        *[jpeg(seed) for seed in range(6)],
        png.getvalue(),
        jpeg(7)[:-200],
        b"",
        b"<html>",
        jpeg(8, (2, 300)),
    ]

    def verdict(decode, data):
        try:
            return decode(data).pixels.astype(int)
        except DecodeError as error:
            return error.kind

    with ThreadPoolExecutor(5) as threads:
        ours = list(threads.map(lambda data: verdict(decoder.decode, data), images))
    for one, data in zip(ours, images, strict=True):
        other = verdict(decode_image, data)
        if isinstance(other, np.ndarray):
            assert np.abs(one - other).max() <= 1
        else:
            assert one == other


@dali
def test_limits_hold_before_pixels_are_made():
    small = DaliDecoder(device="cpu", batch_size=1, num_threads=1, limits=DecodeLimits(max_pixels=100))
    try:
        with pytest.raises(DecodeError, match="more than 100 pixels"):
            small.decode(jpeg(9))
    finally:
        small.close()


def test_the_decoder_is_chosen_by_what_is_there(monkeypatch):
    monkeypatch.setattr("vila2.data.dali.has_dali", lambda: True)
    assert choose_decoder("auto", on_gpu=True) == "dali"
    assert choose_decoder("auto", on_gpu=False) == "cpu"
    assert choose_decoder("dali", on_gpu=False) == "dali"
    monkeypatch.setattr("vila2.data.dali.has_dali", lambda: False)
    assert choose_decoder("auto", on_gpu=True) == "cpu"
    assert choose_decoder("cpu", on_gpu=True) == "cpu"
    with pytest.raises(UsageError, match=r"vila2-fast\[gpu\]"):
        choose_decoder("dali", on_gpu=True)


def test_an_unknown_device_is_refused():
    with pytest.raises(ValueError, match="mixed or cpu"):
        DaliDecoder(device="gpu")


def test_enough_threads_wait_to_fill_dalis_batches(monkeypatch):
    settings = RecaptionSettings(source="s", model="m", out="o")
    on_gpu, on_cpu = SimpleNamespace(is_on_gpu=True), SimpleNamespace()
    monkeypatch.setattr("vila2.data.dali.has_dali", lambda: True)
    assert decode_workers(settings, on_gpu) == 2 * BATCH_SIZE
    assert decode_workers(settings, on_cpu) <= 16
    assert decode_workers(settings.model_copy(update={"decode_workers": 3}), on_gpu) == 3
    gpus = [Device(f"GPU {number}", "cuda", {}) for number in range(2)]
    assert settings_of(settings, 0, gpus, 8).decode_workers == 2 * BATCH_SIZE
    monkeypatch.setattr("vila2.data.dali.has_dali", lambda: False)
    assert decode_workers(settings, on_gpu) <= 16
    assert settings_of(settings, 0, gpus, 8).decode_workers == 4
