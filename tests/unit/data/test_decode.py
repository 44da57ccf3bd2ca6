"""Decoding against Pillow, pixel by pixel, and every way in which bytes can fail to be an image."""

import io
import struct
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

import vila2.data.decode as decode_module
from tests.unit.data.odd_images import encode, exif, jpeg, picture
from vila2.data.decode import DecodeError, DecodeLimits, decode_image, image_digest
from vila2.types import ErrorKind

# pytest undoes the filter that decode.py sets; `test_silent` shows that it works.
pytestmark = pytest.mark.filterwarnings(r"ignore::UserWarning:PIL\.")

DEFAULT = DecodeLimits()


def pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def decoded(data: bytes, **options: bool) -> np.ndarray:
    result = decode_image(data, **options)
    pixels = result.pixels
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.shape == (result.height, result.width, 3)
    return pixels


def kind_of(data: bytes, limits: DecodeLimits = DEFAULT) -> ErrorKind:
    with pytest.raises(DecodeError) as caught:
        decode_image(data, limits)
    assert "\n" not in str(caught.value)
    assert caught.value.error.kind is caught.value.kind
    return caught.value.kind


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quality": 40, "subsampling": 2},
        {"subsampling": 0},
        {"progressive": True},
        {"optimize": True, "restart_marker_rows": 1},
    ],
)
@pytest.mark.parametrize("size", [(40, 28), (33, 17), (5, 7), (64, 64)])
def test_jpeg_is_exact(size: tuple[int, int], options: dict[str, object]) -> None:
    data = jpeg(*size, **options)
    np.testing.assert_array_equal(decoded(data), pillow(data))


def test_grey_and_cmyk_jpeg_are_exact() -> None:
    grey = encode(picture(channels=1)[..., 0], "JPEG")
    np.testing.assert_array_equal(decoded(grey), pillow(grey))
    cmyk = encode(Image.fromarray(picture()).convert("CMYK"), "JPEG")
    np.testing.assert_array_equal(decoded(cmyk), pillow(cmyk))


def test_rgb_coded_jpeg_is_exact() -> None:
    data = jpeg(keep_rgb=True)
    np.testing.assert_array_equal(decoded(data), pillow(data))


@pytest.mark.parametrize(
    "data",
    [
        encode(picture(), "PNG"),
        encode(picture(), "BMP"),
        encode(picture(), "TIFF"),
        encode(picture(), "TIFF", compression="tiff_lzw"),
        encode(picture(), "WEBP", lossless=True),
        encode(picture(), "WEBP", quality=50),
        encode(picture(channels=1)[..., 0], "PNG"),
        encode(Image.fromarray(picture()).convert("P"), "PNG"),
        encode(Image.fromarray(picture()).convert("P"), "GIF"),
        encode(Image.fromarray(picture()).convert("1"), "PNG"),
        encode(Image.fromarray(picture()).convert("CMYK"), "TIFF"),
        encode(Image.fromarray(picture()).convert("YCbCr"), "TIFF"),
    ],
)
def test_other_formats_are_exact(data: bytes) -> None:
    np.testing.assert_array_equal(decoded(data), pillow(data))


def test_pillow_alone_gives_the_same_jpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, turned = jpeg(), jpeg(exif=exif(5))
    both = decoded(plain), decoded(turned)
    monkeypatch.setattr(decode_module, "simplejpeg", None)
    np.testing.assert_array_equal(decoded(plain), both[0])
    np.testing.assert_array_equal(decoded(turned), both[1])


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(format_name: str, orientation: int) -> None:
    options = {"lossless": True} if format_name == "WEBP" else {}
    upright = encode(picture(), format_name, **options)
    data = encode(picture(), format_name, exif=exif(orientation), **options)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    np.testing.assert_array_equal(decoded(data), np.asarray(expected))
    np.testing.assert_array_equal(decoded(data, apply_orientation=False), pillow(upright))


@pytest.mark.parametrize(
    "tag", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"]
)
def test_a_broken_exif_block_is_ignored(tag: bytes) -> None:
    plain = jpeg()
    data = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(tag) + 2) + tag + plain[2:]
    np.testing.assert_array_equal(decoded(data), pillow(plain))


def test_alpha_is_composited_on_white() -> None:
    rgb = picture()
    alpha = np.linspace(0, 255, rgb.shape[1]).astype(np.uint8)
    rgba = np.dstack([rgb, np.broadcast_to(alpha, rgb.shape[:2])])
    weight = alpha[None, :, None] / 255.0
    expected = rgb * weight + 255 * (1 - weight)
    for data in (encode(rgba, "PNG"), encode(rgba, "WEBP", lossless=True, exact=True), encode(rgba, "TIFF")):
        assert np.abs(decoded(data) - expected).max() <= 1
        assert (decoded(data)[:, 0] == 255).all()


def test_transparent_palette_and_grey() -> None:
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.paste(1, (0, 0, 4, 8))
    pixels = decoded(encode(palette, "PNG", transparency=0))
    assert (pixels[:, :4] == (200, 100, 50)).all()
    assert (pixels[:, 4:] == 255).all()
    assert (decoded(encode(palette, "GIF", transparency=0))[:, 4:] == 255).all()
    grey = encode(Image.new("L", (8, 8), 7), "PNG", transparency=7)
    assert (decoded(grey) == 255).all()
    grey_alpha = encode(Image.new("LA", (8, 8), (100, 0)), "PNG")
    assert (decoded(grey_alpha) == 255).all()


def test_16_bits_are_scaled() -> None:
    values = np.linspace(0, 65535, 64 * 8).astype(np.uint16).reshape(8, 64)
    expected = np.rint(values / 257.0).astype(np.uint8)
    for format_name in ("PNG", "TIFF"):
        pixels = decoded(encode(values, format_name))
        np.testing.assert_array_equal(pixels, np.repeat(expected[..., None], 3, axis=2))


def test_16_bit_colour_png() -> None:
    values = np.linspace(0, 65535, 8 * 8 * 3).astype(">u2").reshape(8, 8, 3)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(b"\0" + row.tobytes() for row in values)
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    assert np.abs(decoded(data) - values / 257.0).max() <= 1


def test_float_and_32_bit_tiff() -> None:
    ramp = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    expected = np.rint(ramp * 255).astype(np.uint8)
    np.testing.assert_array_equal(decoded(encode(ramp, "TIFF"))[..., 0], expected)
    np.testing.assert_array_equal(decoded(encode(ramp * 255, "TIFF"))[..., 0], expected)
    broken = ramp.copy()
    broken[0, 0], broken[0, 1] = np.nan, np.inf
    assert decoded(encode(broken, "TIFF"))[0, 0, 0] == 0
    wide = (np.arange(64, dtype=np.int32) * 100_000).reshape(8, 8)
    assert decoded(encode(wide, "TIFF"))[-1, -1, 0] == 255


@pytest.mark.parametrize("format_name", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_many(format_name: str) -> None:
    frames = [Image.fromarray(np.full((12, 12, 3), value, np.uint8)) for value in (40, 200, 90)]
    options = {"lossless": True} if format_name == "WEBP" else {}
    data = encode(frames[0], format_name, save_all=True, append_images=frames[1:], **options)
    assert (decoded(data) == 40).all()


def test_what_is_no_image() -> None:
    assert kind_of(b"") is ErrorKind.EMPTY_FILE
    assert kind_of(b"\0" * 100) is ErrorKind.NOT_AN_IMAGE
    assert kind_of(b"<!DOCTYPE html><html>404</html>") is ErrorKind.NOT_AN_IMAGE
    assert kind_of(b"\0\0\0\x1cftypavif" + b"\0" * 60) is ErrorKind.NOT_AN_IMAGE
    assert kind_of(b"%PDF-1.4") is ErrorKind.NOT_AN_IMAGE
    postscript = encode(picture(), "EPS")  # a format that Pillow would open, and run a program for
    assert kind_of(postscript) is ErrorKind.NOT_AN_IMAGE


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.9])
def test_truncated(format_name: str, share: float) -> None:
    data = encode(picture(200, 150), format_name)
    assert kind_of(data[: int(len(data) * share)]) is ErrorKind.CORRUPT_IMAGE


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_nothing_but_a_signature(format_name: str) -> None:
    data = encode(picture(), format_name)
    for length in (3, 8, 12, 20):
        assert kind_of(data[:length]) in (ErrorKind.CORRUPT_IMAGE, ErrorKind.NOT_AN_IMAGE)


def test_a_harmless_oddity_is_left_to_pillow() -> None:
    data = jpeg()
    odd = data[:-2] + b"\0\x11" + data[-2:]  # bytes before the end mark: libjpeg warns, Pillow reads on
    np.testing.assert_array_equal(decoded(odd), pillow(odd))


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_limits(format_name: str) -> None:
    limits = DecodeLimits(max_pixels=1000, min_side=4, max_aspect=10)
    assert kind_of(encode(picture(40, 28), format_name), limits) is ErrorKind.TOO_MANY_PIXELS
    assert kind_of(encode(picture(1, 1), format_name), limits) is ErrorKind.TOO_SMALL
    assert kind_of(encode(picture(3, 20), format_name), limits) is ErrorKind.TOO_SMALL
    assert kind_of(encode(picture(5, 60), format_name), limits) is ErrorKind.EXTREME_ASPECT
    assert decode_image(encode(picture(25, 40), format_name), limits).width == 25


def test_a_bomb_is_refused_by_its_header() -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header
    png += struct.pack(">I", zlib.crc32(b"IHDR" + header)) + struct.pack(">I", 0) + b"IDAT"
    assert kind_of(png) is ErrorKind.TOO_MANY_PIXELS
    canvas = (16_383 - 1).to_bytes(3, "little") * 2
    webp = b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + canvas
    assert kind_of(webp) is ErrorKind.TOO_MANY_PIXELS


def test_the_limit_may_be_raised_beyond_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for format_name in ("JPEG", "PNG", "GIF", "BMP"):
            assert decode_image(encode(picture(), format_name)).width == 40
    assert kind_of(encode(picture(), "TIFF")) is ErrorKind.TOO_MANY_PIXELS


def test_bad_limits_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        DecodeLimits(max_pixels=0)


SEEDS = [
    jpeg(),
    jpeg(progressive=True, exif=exif(6)),
    encode(picture(), "PNG", exif=exif(6)),
    encode(picture(), "WEBP"),
    encode(picture(), "WEBP", lossless=True),
    encode(picture(), "BMP"),
    encode(picture(), "TIFF", compression="tiff_deflate", exif=exif(3)),
    encode(picture(), "TIFF", compression="jpeg"),
    encode(Image.fromarray(picture()).convert("P"), "GIF"),
    encode(Image.fromarray(picture()).convert("CMYK"), "JPEG"),
]


@given(st.sampled_from(SEEDS), st.data())
def test_any_damage_is_a_decode_error_or_pixels(seed: bytes, data: st.DataObject) -> None:
    broken = bytearray(seed)
    for _ in range(data.draw(st.integers(1, 8))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(broken)))
    for damaged in (bytes(broken), bytes(broken[:cut])):
        with suppress(DecodeError):
            decode_image(damaged, DecodeLimits(max_pixels=1_000_000))


DAMAGE_ALL = """
import pathlib, sys
import numpy as np
from vila2.data.decode import DecodeError, DecodeLimits, decode_image

rng = np.random.default_rng(7)
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    seed = np.frombuffer(path.read_bytes(), np.uint8)
    for i in range(60):
        broken = seed.copy()
        places = rng.integers(0, min(len(broken), 400), 3)
        broken[places] = rng.integers(0, 256, 3)
        try:
            decode_image(broken[: len(broken) - 10 * (i % 2)].tobytes(), DecodeLimits(max_pixels=1_000_000))
        except DecodeError:
            pass
"""


def test_silent(tmp_path: Path) -> None:
    """In a process of its own, because pytest takes warnings and log lines for itself."""
    for i, seed in enumerate(SEEDS):
        (tmp_path / f"{i}").write_bytes(seed)
    command = [sys.executable, "-c", DAMAGE_ALL, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_many_threads_agree() -> None:
    jobs = SEEDS * 8
    alone = [decode_image(seed).pixels for seed in SEEDS]
    with ThreadPoolExecutor(8) as pool:
        for i, result in enumerate(pool.map(decode_image, jobs)):
            np.testing.assert_array_equal(result.pixels, alone[i % len(SEEDS)])


def test_digest() -> None:
    assert image_digest(b"a") == image_digest(b"a") != image_digest(b"b")
    assert len(image_digest(b"")) == 32
