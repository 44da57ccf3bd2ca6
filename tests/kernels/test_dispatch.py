"""The ops reach their kernels: each op as CUDA would call it, its kernel in the interpreter, against its reference."""

import importlib

import pytest
import torch

pytestmark = pytest.mark.triton

OPS = (
    "activations",
    "attention",
    "cross_entropy",
    "downsample",
    "norms",
    "patches",
    "rope",
    "sampling",
    "token_quant",
)


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Ops take the path of CUDA tensors, whatever the device; returns the names of the kernels that were launched."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    for name in OPS:
        module = importlib.import_module(f"vila2.ops.{name}")
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


def test_norms_and_activations(as_on_cuda, device):
    from vila2.ops.activations import gelu, gelu_reference, silu_mul, silu_mul_reference
    from vila2.ops.norms import add_rms_norm, layer_norm, layer_norm_reference, rms_norm, rms_norm_reference

    x, weight = torch.randn(3, 16, device=device), torch.randn(16, device=device)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6))
    torch.testing.assert_close(
        layer_norm(x, weight, weight, 1e-6), layer_norm_reference(x, weight, weight, 1e-6)
    )
    torch.testing.assert_close(gelu(x, "gelu"), gelu_reference(x, "gelu"))
    torch.testing.assert_close(silu_mul(x), silu_mul_reference(x))
    residual = torch.ones_like(x)
    assert add_rms_norm(x, residual, weight, 1e-6)[1] is residual
    assert as_on_cuda == [
        "_rms_norm_kernel",
        "_layer_norm_kernel",
        "_gelu_kernel",
        "_silu_mul_kernel",
        "_rms_norm_kernel",
    ]


def test_training(as_on_cuda, device):
    from vila2.ops.activations import silu_mul
    from vila2.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
    from vila2.ops.norms import add_rms_norm
    from vila2.ops.rope import apply_rope, rope_tables

    x, weight = torch.randn(3, 16, device=device, requires_grad=True), torch.randn(16, device=device)
    y, _ = add_rms_norm(x, torch.zeros_like(x), weight, 1e-6)
    cos, sin = (table.to(device) for table in rope_tables(8, 10000.0, 4))
    positions = torch.arange(3, device=device)
    rotated = apply_rope(y.view(3, 2, 8), positions, cos, sin).view(3, 16)
    head = torch.randn(20, 8, device=device, requires_grad=True)
    labels = torch.tensor([1, -100, 19], device=device)
    loss = linear_cross_entropy(silu_mul(rotated), head, labels)
    loss.backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    expected = linear_cross_entropy_reference(silu_mul(rotated).detach(), head.detach(), labels)
    torch.testing.assert_close(loss.detach(), expected)
    assert {
        "_rms_norm_backward_kernel",
        "_rope_kernel",
        "_silu_mul_backward_kernel",
        "_softmax_error_kernel",
    } <= set(as_on_cuda)


def test_packed_attention_rotates_in_the_kernel(as_on_cuda, device, monkeypatch):
    from vila2.ops import segments
    from vila2.ops.rope import rope_tables

    layout = torch.tensor([(0, 3, 0, 0), (3, 5, 0, 3), (5, 9, 0, 3), (9, 12, 9, 9)])
    q, k, v = (torch.randn(12, heads, 8, device=device, requires_grad=True) for heads in (4, 2, 2))
    positions = torch.tensor([0, 1, 2, 3, 4, 3, 4, 5, 6, 0, 1, 2], device=device)
    given = (positions, *(table.to(device) for table in rope_tables(8, 1e4, 8)), layout, 0.3)
    monkeypatch.setattr(segments, "is_native_training", lambda *tensors: False)
    padded = segments.pad_segments(layout, 12, q.device, skips_masks=True)
    grads = []
    for attend, more in (
        (segments.rotary_segment_attention, (padded,)),
        (segments.rotary_segment_attention_reference, ()),
    ):
        out = attend(q, k, v, *given, *more)
        grads.append((out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert as_on_cuda == 4 * ["_rope_kernel"]  # q and k, and back


def test_attention_takes_the_kernel_of_the_step(as_on_cuda, device):
    from vila2.ops.attention import paged_attention, paged_attention_reference, rope_store
    from vila2.ops.rope import rope_tables

    q, cache = torch.randn(2, 2, 16, device=device), torch.randn(2, 3, 2, 4, 16, device=device)
    tables = torch.tensor([[0, 1], [2, 0]], dtype=torch.int32, device=device)
    starts, contexts = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 1, 2], [6, 3]))
    given = (q, *cache, tables, starts, contexts, 0.25)
    expected = paged_attention_reference(*given)
    for longest, kernel in ((None, "_prefill_kernel"), (1, "_span_kernel")):
        torch.testing.assert_close(paged_attention(*given, longest), expected, rtol=1e-5, atol=1e-5)
        assert as_on_cuda.pop() == kernel
    at = torch.tensor([0, 1], device=device)
    rope_store(q, q, q, at, at, *(t.to(device) for t in rope_tables(16, 1e4, 4)), *cache)
    assert as_on_cuda == ["_rope_store_kernel"]


def test_images_sampling_and_bytes(as_on_cuda, device):
    from vila2.ops.downsample import downsample_norm
    from vila2.ops.patches import image_patches
    from vila2.ops.sampling import append_tokens, sample
    from vila2.ops.token_quant import quantize_tokens

    images = torch.zeros(1, 4, 4, 3, dtype=torch.uint8, device=device)
    assert image_patches(images, 2, (0.5,) * 3, (0.5,) * 3, torch.float32).shape == (1, 4, 12)
    ones = torch.ones(32, device=device)
    assert downsample_norm(torch.randn(1, 4, 8, device=device), 2, True, ones, ones, 1e-6).shape == (1, 1, 32)
    values, flags = torch.zeros(1, device=device), torch.zeros(1, dtype=torch.int8, device=device)
    counts = torch.zeros(1, dtype=torch.int32, device=device)
    tokens = sample(torch.randn(1, 9, device=device), values, counts, values + 1, values, counts[:0], flags)
    history, runs = (
        torch.zeros(1, 4, dtype=torch.int32, device=device),
        torch.zeros(1, 3, dtype=torch.int32, device=device),
    )
    rules = torch.zeros(1, 3, dtype=torch.int32, device=device)
    append_tokens(tokens, counts.long(), history, counts.clone(), runs, rules)
    quantize_tokens(torch.randn(2, 8, device=device), torch.int8)
    assert as_on_cuda == [
        "_patches_kernel",
        "_downsample_norm_kernel",
        "_sample_kernel",
        "_append_kernel",
        "_quantize_kernel",
    ]
