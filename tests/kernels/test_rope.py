"""Rotary positions in Triton against their references: with the store into the cache, and with a backward pass."""

import pytest
import torch

pytestmark = pytest.mark.triton

# (tokens, heads, KV heads, dim)
SHAPES = [(0, 4, 2, 16), (5, 9, 3, 64), (3, 4, 4, 8), (4, 7, 1, 80)]


def tables(dim, device):
    from vila2.ops.rope import rope_tables

    return tuple(table.to(device) for table in rope_tables(dim, 10000.0, 64))


@pytest.mark.parametrize(
    "dtypes", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float32, torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rope_store(shape, dtypes, device, near):
    from vila2.kernels.rope_store import rope_store_triton
    from vila2.ops.attention import rope_store_reference

    tokens, heads, kv_heads, dim = shape
    dtype, cache_dtype = dtypes
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim).to(
        device, dtype
    )  # slices of one tensor, as in the model
    q, k, v = (
        part.unflatten(-1, (-1, dim))
        for part in qkv.split((heads * dim, kv_heads * dim, kv_heads * dim), dim=-1)
    )
    positions = torch.randint(0, 64, (tokens,), device=device)
    slots = torch.randperm(24, device=device)[:tokens]
    cos, sin = tables(dim, device)
    both = torch.randn(2, 6, kv_heads, 4, dim).to(
        device, cache_dtype
    )  # keys and values: blocks with a stride between
    theirs = both.clone()
    expected = rope_store_reference(q, k, v, positions, slots, cos, sin, *theirs)
    actual = rope_store_triton(q, k, v, positions, slots, cos, sin, *both)
    torch.testing.assert_close(actual, expected, **near(dtype))
    torch.testing.assert_close(both, theirs, **near(cache_dtype))


def test_a_negative_slot_is_not_written(device):
    from vila2.kernels.rope_store import rope_store_triton

    q, k, v = (torch.ones(2, 2, 8, device=device) for _ in range(3))
    caches = torch.zeros(2, 3, 2, 4, 8, device=device)
    positions = torch.zeros(2, dtype=torch.int64, device=device)
    rope_store_triton(q, k, v, positions, torch.tensor([-1, 5], device=device), *tables(8, device), *caches)
    assert float(caches[0].sum()) == float(caches[1].sum()) == 2 * 8
    assert float(caches[0, 1, :, 1].sum()) == 2 * 8


def test_heads_apart_are_refused(device):
    from vila2.kernels.rope_store import rope_store_triton

    q = torch.ones(2, 2, 16, device=device)[..., :8]
    k = torch.ones(2, 2, 8, device=device)
    caches = torch.zeros(2, 3, 2, 4, 8, device=device)
    at = torch.zeros(2, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="heads of q"):
        rope_store_triton(q, k, k, at, at, *tables(8, device), *caches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rope_and_its_gradient(shape, dtype, device, near):
    from vila2.kernels.rope import apply_rope_triton
    from vila2.ops.rope import apply_rope_reference

    tokens, heads, _, dim = shape
    wide = torch.randn(tokens, heads + 2, dim).to(device, dtype)
    positions = torch.randint(0, 64, (tokens,), device=device)
    cos, sin = tables(dim, device)
    dy = torch.randn(tokens, heads, dim).to(device, dtype)
    results = []
    for rotate in (apply_rope_triton, apply_rope_reference):
        given = wide.clone().requires_grad_()
        y = rotate(given[:, 1:-1], positions, cos, sin)  # a slice, as q is of qkv
        y.backward(dy)
        results.append((y, given.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, **near(dtype))
