"""Patches of images, and the projector's down-sampling with its norm, in Triton against their references."""

import pytest
import torch

pytestmark = pytest.mark.triton

MEAN, STD = (0.48, 0.45, 0.4), (0.26, 0.27, 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "patch"), [((0, 8, 8), 4), ((2, 28, 28), 14), ((1, 33, 20), 16), ((3, 7, 5), 3)]
)
def test_patches(shape, patch, dtype, device, near):
    from vila2.kernels.patches import image_patches_triton
    from vila2.ops.patches import image_patches_reference

    images = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, device=device)
    expected = image_patches_reference(images, patch, MEAN, STD, dtype)
    torch.testing.assert_close(image_patches_triton(images, patch, MEAN, STD, dtype), expected, **near(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("column_major", [False, True])
@pytest.mark.parametrize(
    ("tiles", "side", "factor", "width"), [(2, 5, 2, 12), (1, 4, 2, 64), (2, 7, 3, 10), (0, 4, 2, 8)]
)
def test_downsample_norm(tiles, side, factor, width, column_major, dtype, device, near):
    from vila2.kernels.downsample import downsample_norm_triton
    from vila2.ops.downsample import downsample_norm_reference

    features = torch.randn(tiles, side * side, width).to(device, dtype)
    weight, bias = (torch.randn(factor**2 * width).to(device, dtype) for _ in range(2))
    expected = downsample_norm_reference(features, factor, column_major, weight, bias, 1e-5)
    actual = downsample_norm_triton(features, side, factor, column_major, weight, bias, 1e-5)
    torch.testing.assert_close(actual, expected, **near(dtype, 2))


def test_a_norm_of_another_width_is_refused(device):
    from vila2.kernels.downsample import downsample_norm_triton

    x = torch.zeros(1, 4, 8, device=device)
    with pytest.raises(ValueError, match="weight and bias"):
        downsample_norm_triton(x, 2, 2, False, x[0, 0], x[0, 0], 1e-5)
