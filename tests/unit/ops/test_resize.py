"""The resize kernel against its reference, on shapes that reach every path of it."""

import ctypes
import mmap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vila2.ops.native import native
from vila2.ops.resize import HAS_RESIZE, Interpolation, resize_pixels, resize_reference

needs_kernel = pytest.mark.skipif(not HAS_RESIZE, reason="vila2._C is not built, or has no resize")
Pixels = NDArray[np.uint8]


def noise(height: int, width: int, seed: int = 0) -> Pixels:
    """Every second image is black and white: the sums then overshoot on both sides."""
    values = np.random.default_rng([height, width, seed]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return (values > 127).astype(np.uint8) * np.uint8(255) if seed % 2 else values


# Narrower than a vector, wider than several, one pixel, one row; many taps; one axis only; no change at all.
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("new", [(1, 1), (7, 31), (48, 48), (96, 11), (130, 55)])
@pytest.mark.parametrize(
    "old", [(1, 1), (2, 3), (3, 90), (90, 3), (1, 48), (48, 1), (31, 33), (48, 48), (7, 600), (301, 31)]
)
def test_the_kernel_is_the_reference(
    old: tuple[int, int], new: tuple[int, int], interpolation: Interpolation
) -> None:
    for seed in range(2):
        image = noise(*old, seed)
        ours = resize_pixels(image, *new, interpolation)
        assert np.array_equal(ours, resize_reference(image, *new, interpolation))


@settings(max_examples=60)
@given(*[st.integers(1, 70)] * 4, st.sampled_from(["bilinear", "bicubic"]), st.integers(0, 3))
def test_any_size(
    height: int, width: int, new_height: int, new_width: int, interpolation: Interpolation, seed: int
) -> None:
    image = noise(height, width, seed)
    ours = resize_pixels(image, new_height, new_width, interpolation)
    assert np.array_equal(ours, resize_reference(image, new_height, new_width, interpolation))


def test_a_photograph_of_usual_size() -> None:
    image = noise(480, 640)
    assert np.array_equal(
        resize_pixels(image, 384, 384, "bicubic"), resize_reference(image, 384, 384, "bicubic")
    )


def test_a_constant_stays_itself() -> None:
    image = np.full((33, 77, 3), (0, 128, 255), np.uint8)
    for size in ((12, 12), (200, 50)):
        assert (resize_pixels(image, *size, "bicubic") == (0, 128, 255)).all()


@needs_kernel
@pytest.mark.parametrize("new", [(5, 9), (40, 3), (3, 300)])
@pytest.mark.parametrize("old", [(1, 1), (3, 2), (10, 40), (41, 7)])
def test_nothing_is_read_behind_the_image(old: tuple[int, int], new: tuple[int, int]) -> None:
    """The image ends where a page ends that the kernel may not read: doing so would end the process."""
    page = mmap.PAGESIZE
    pages = mmap.mmap(-1, 2 * page)
    first = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(first + page), page, 0) == 0
    image = noise(*old)
    edge: Pixels = np.frombuffer(pages, np.uint8, image.size, page - image.size).reshape(image.shape)
    edge[:] = image
    ours = resize_pixels(edge, *new, "bicubic")
    libc.mprotect(ctypes.c_void_p(first + page), page, mmap.PROT_READ | mmap.PROT_WRITE)
    assert np.array_equal(ours, resize_reference(image, *new, "bicubic"))


def test_any_memory_layout() -> None:
    image = noise(20, 30)
    frozen = image.copy()
    frozen.flags.writeable = False
    expected = resize_reference(image, 9, 11, "bicubic")
    for variant in (frozen, np.asfortranarray(image), np.repeat(image, 2, axis=1)[:, ::2]):
        assert np.array_equal(resize_pixels(variant, 9, 11, "bicubic"), expected)


def test_what_is_no_image_is_refused() -> None:
    for bad in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"uint8 \(height, width, 3\)"):
            resize_pixels(bad, 2, 2, "bicubic")
    with pytest.raises(ValueError, match="0 x 2, bicubic"):
        resize_pixels(noise(3, 3), 0, 2, "bicubic")
    with pytest.raises(ValueError, match="2 x 2, lanczos"):
        resize_pixels(noise(3, 3), 2, 2, "lanczos")  # type: ignore[arg-type]


@needs_kernel
def test_the_kernel_checks_its_arguments() -> None:
    image, out = noise(4, 4), np.empty((2, 2, 3), np.uint8)
    frozen = out.copy()
    frozen.flags.writeable = False
    for arguments in (
        (image.astype(np.float32), out, "bicubic", False),
        (image[:, :, :2].copy(), out, "bicubic", False),
        (image[:, ::2], out, "bicubic", False),
        (image, np.empty((0, 2, 3), np.uint8), "bicubic", False),
        (image, frozen, "bicubic", False),
        (image, out, "lanczos", False),
    ):
        with pytest.raises((ValueError, BufferError)):
            native.resize(*arguments)
