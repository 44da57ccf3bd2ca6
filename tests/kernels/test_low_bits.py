"""Products in FP8 and with weights in 4 bits, by Triton and by the reference."""

import importlib
from collections import Counter
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.triton

FP8 = torch.float8_e4m3fn
SHAPES = (
    (0, 16, 8),
    (1, 1, 1),
    (3, 300, 70),
    (17, 129, 5),
    (2, 4, 256, 130),
    (70, 1000, 33),
)  # rows, depth, columns


def needs_fp8(device: str) -> None:
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no FP8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp8_product(shape, dtype, device, near):
    from vila2.kernels.fp8_linear import fp8_product_triton
    from vila2.ops.fp8 import fp8_product_reference, quantize_fp8_weight
    from vila2.ops.token_quant import quantize_tokens_reference

    needs_fp8(device)
    *rows, depth, columns = shape
    x = torch.randn(*rows, depth, device=device)
    for bias in (None, torch.randn(columns, device=device)):
        weight = quantize_fp8_weight(torch.randn(columns, depth, device=device) / depth**0.5, bias)
        values, scales = quantize_tokens_reference(x, FP8)
        y = fp8_product_triton(values, scales, weight.values, weight.scales, weight.bias, dtype)
        expected = fp8_product_reference(values, scales, weight, dtype)
        # The matrix units add with fewer bits than float32 has.
        tolerance = near(dtype) if device == "cpu" or dtype != torch.float32 else near(dtype, 100)
        torch.testing.assert_close(y, expected, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int4_product_and_spread(shape, dtype, device, near):
    from vila2.kernels.int4_linear import int4_linear_triton, int4_spread_triton
    from vila2.ops.int4 import int4_linear_reference, quantize_int4_weight

    *rows, depth, columns = shape
    x = torch.randn(*rows, depth, device=device).to(dtype)
    for bias in (None, torch.randn(columns, device=device)):
        weight = quantize_int4_weight(torch.randn(columns, depth, device=device) / depth**0.5, bias)
        y = int4_linear_triton(x, weight.values, weight.scales, weight.zeros, weight.bias)
        torch.testing.assert_close(y, int4_linear_reference(x, weight), **near(dtype))
        spread = int4_spread_triton(weight.values, weight.scales, weight.zeros, depth, dtype)
        torch.testing.assert_close(spread, weight.dequantized().to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("splits", [1, 2, 3, 7])
def test_split_sums_are_those_of_the_whole(splits, device, monkeypatch, near):
    """However many programs share the depth, and where the last of them has fewer groups."""
    from vila2.kernels import int4_linear
    from vila2.ops.int4 import int4_linear_reference, quantize_int4_weight

    launched = []
    kernel = int4_linear._int4_product_kernel
    monkeypatch.setattr(int4_linear, "num_processors", lambda device: max(1, splits // 2 + splits % 2))
    monkeypatch.setattr(int4_linear, "_LEAST_GROUPS", 1)
    monkeypatch.setattr(int4_linear, "_int4_product_kernel", _Recorded(kernel, launched))
    x, bias = torch.randn(4, 7 * 128 + 5, device=device), torch.randn(20, device=device)
    weight = quantize_int4_weight(torch.randn(20, x.shape[1], device=device), bias)
    y = int4_linear.int4_linear_triton(x, weight.values, weight.scales, weight.zeros, weight.bias)
    torch.testing.assert_close(y, int4_linear_reference(x, weight), rtol=1e-4, atol=1e-3)
    assert launched[0][2] >= splits if splits > 1 else launched[0][2] in (1, 2)


class _Recorded:
    """A kernel that notes its grids."""

    def __init__(self, kernel: object, grids: list[tuple[int, ...]]) -> None:
        self.kernel, self.grids = kernel, grids

    def __getitem__(self, grid: tuple[int, ...]) -> object:
        self.grids.append(grid)
        return self.kernel[grid]  # type: ignore[index]


def test_weights_of_another_shape_are_refused(device):
    from vila2.kernels.fp8_linear import fp8_product_triton
    from vila2.kernels.int4_linear import int4_linear_triton

    x = torch.zeros(2, 256, device=device)
    values = torch.zeros(2, 4, 64, dtype=torch.uint8, device=device)
    scales, zeros = torch.zeros(2, 4, device=device), torch.zeros(2, 4, dtype=torch.uint8, device=device)
    with pytest.raises(ValueError, match=r"must be \(3, columns, 64\)"):
        int4_linear_triton(torch.zeros(2, 257, device=device), values, scales, zeros, None)
    with pytest.raises(ValueError, match="zeros beside"):
        int4_linear_triton(x, values, scales[:1], zeros, None)
    with pytest.raises(ValueError, match="float8_e4m3fn of one depth"):
        fp8_product_triton(x, x[:, 0], x, x[:, 0], None, torch.float32)


def _all_on_kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every op takes the path of CUDA tensors; torch's own FP8 product stays out, as it needs a GPU.

    Returns the names of the kernels that are launched from now on.
    """
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    for path in (Path(__file__).parents[2] / "vila2" / "ops").glob("*.py"):
        module = importlib.import_module(f"vila2.ops.{path.stem}")
        if hasattr(module, "is_triton"):
            monkeypatch.setattr(module, "is_triton", lambda *tensors: True)
        for refuses in ("is_native", "is_native_training"):
            if hasattr(module, refuses):
                monkeypatch.setattr(module, refuses, lambda *tensors: False)
    launched: list[str] = []
    for kind in (InterpretedFunction, JITFunction):
        launch = kind.__getitem__

        def record(self, grid, launch=launch):
            launched.append(self.fn.__name__)
            return launch(self, grid)

        monkeypatch.setattr(kind, "__getitem__", record)
    return launched


@pytest.mark.parametrize("most_rows", [0, 256], ids=["spread", "fused"])
def test_the_op_multiplies_few_rows_from_4_bits_and_spreads_for_many(most_rows, device, monkeypatch):
    from vila2.ops import int4

    launched = _all_on_kernels(monkeypatch)
    monkeypatch.setattr(int4, "MAX_FUSED_ROWS", most_rows)
    monkeypatch.setattr(int4, "_MOST_SPREAD", 7 * 300)  # columns come in parts, the last of them short
    x = torch.randn(2, 3, 300, device=device).bfloat16()
    weight = int4.quantize_int4_weight(torch.randn(33, 300, device=device), torch.randn(33, device=device))
    expected = int4.int4_linear_reference(x, weight)
    torch.testing.assert_close(int4.int4_linear(x, weight), expected, rtol=2e-2, atol=0.2)
    assert set(launched) == {"_int4_product_kernel" if most_rows else "_int4_spread_kernel"}
    assert int4.int4_linear(x[:0], weight).shape == (0, 3, 33)


@pytest.mark.parametrize("precision", ["fp8", "int4"])
def test_a_whole_model_through_the_kernels(precision, device, monkeypatch):
    """Image to logits: every product, norm and activation of a tiny model by its kernel, against the references."""
    from tests.unit.model.test_quantize import logits_of, make_model
    from vila2.model.quantize_cuda import quantize_fp8, quantize_int4

    if device == "cuda":
        pytest.skip("the tiny model's steps are built on the CPU; gpu_check runs whole models on a GPU")
    model = make_model(activation="gelu_pytorch_tanh", qkv_bias=True)
    model = quantize_fp8(model) if precision == "fp8" else quantize_int4(model)
    with torch.inference_mode():
        expected = logits_of(model).float()
        launched = _all_on_kernels(monkeypatch)
        got = logits_of(model).float()
    counts = Counter(launched)
    if precision == "fp8":  # 3 layers of 4 products, tower and decoder, and the projector's 2
        rounded = (
            "_rms_norm_kernel",
            "_layer_norm_kernel",
            "_silu_mul_kernel",
            "_gelu_kernel",
            "_quantize_kernel",
        )
        assert counts["_fp8_product_kernel"] == 4 * 3 + 4 * len(model.vision.layers) + 2
        assert all(counts[name] for name in rounded)
    else:
        assert counts["_int4_product_kernel"] == 4 * 3
    assert float((got - expected).norm()) < 0.02 * float(expected.norm())
