"""Attention over packed segments: the definition against a dense mask, each path against the definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vila2.ops import segments as module
from vila2.ops.rope import rope_tables
from vila2.ops.segments import (
    pad_segments,
    rotary_segment_attention,
    rotary_segment_attention_reference,
    segment_attention,
    segment_attention_reference,
)
from vila2.ops.threads import set_threads

torch.set_num_threads(1)

LAYOUTS = {
    "empty": [],
    "one row": [(0, 1, 0, 0)],
    "one": [(0, 37, 0, 0)],
    "two": [(0, 5, 0, 0), (5, 38, 0, 0)],
    "prefix and branches": [(0, 7, 0, 0), (7, 12, 0, 7), (12, 13, 0, 7), (13, 38, 0, 7)],
    "two prefixes": [(0, 3, 0, 0), (3, 9, 0, 3), (9, 20, 9, 9), (20, 30, 9, 20), (30, 38, 9, 20)],
    "rows in no segment": [(2, 7, 0, 0), (11, 14, 2, 7)],
    "empty segments": [(0, 0, 0, 0), (4, 4, 0, 2), (38, 38, 0, 0), (0, 4, 38, 38), (4, 30, 0, 4)],
    "a branch of a branch": [(0, 4, 0, 0), (4, 9, 0, 4), (9, 38, 4, 9)],
}
ROWS = 38


def inputs(heads, kv_heads, dim, rows=ROWS, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(rows, count, dim, generator=generator, dtype=torch.float32).to(dtype).requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    ]


def as_tensor(layout):
    return torch.tensor(layout, dtype=torch.int64).reshape(-1, 4)


def dense(q, k, v, layout, scale):
    """By a mask over all rows, in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    mask = torch.zeros(len(q), len(q), dtype=torch.bool)
    for start, end, prefix_start, prefix_end in layout:
        for row in range(start, end):
            mask[row, start : row + 1] = True
            mask[row, prefix_start:prefix_end] = True
    shared = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(shared, dim=1) for x in (k, v))
    scores = torch.einsum("thd,lhd->htl", q, k) * scale
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0)
    return torch.einsum("htl,lhd->thd", weights, v).flatten(1)


def gradients(function, q, k, v, *rest):
    out = function(q, k, v, *rest)
    if not out.requires_grad:  # nothing to attend to
        return out, tuple(torch.zeros_like(x) for x in (q, k, v))
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape)
    return out, torch.autograd.grad((out.double() * weights).sum(), (q, k, v))


def agree(actual, expected, tolerance=2e-5):
    for ours, theirs in zip((actual[0], *actual[1]), (expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=tolerance, atol=tolerance)


@pytest.fixture(params=["fast", "padded"])
def path(request, monkeypatch):
    """Each path of `segment_attention`: `_C`, and torch's attention on padded segments."""
    if request.param == "padded":
        monkeypatch.setattr(module, "is_native_training", lambda *tensors: False)


@pytest.mark.parametrize("heads", [(3, 3, 8), (6, 2, 16), (4, 1, 5)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.usefixtures("path")
def test_each_path_equals_a_dense_mask(layout, heads):
    q, k, v = inputs(*heads)
    expected = gradients(dense, q, k, v, layout, 0.3)
    agree(gradients(segment_attention_reference, q, k, v, as_tensor(layout), 0.3), expected)
    agree(gradients(segment_attention, q, k, v, as_tensor(layout), 0.3), expected)


@pytest.mark.parametrize("heads", [(3, 3, 8), (6, 2, 16)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_batches_without_masks_equal_a_dense_mask(layout, heads):
    q, k, v = inputs(*heads)
    padded = pad_segments(as_tensor(layout), ROWS, q.device, skips_masks=True)
    plain = all(prefix_start == prefix_end for _, _, prefix_start, prefix_end in layout)
    assert not plain or all(bucket.visible is None for bucket in padded.buckets)
    expected = gradients(dense, q, k, v, layout, 0.3)
    agree(gradients(segment_attention, q, k, v, as_tensor(layout), 0.3, padded), expected)


@pytest.mark.parametrize("skips_masks", [False, True])
def test_padded_layers_read_no_value_on_the_host(skips_masks):
    """Meta tensors have none: what would make the host wait for a GPU is an error."""
    layout, meta = as_tensor(LAYOUTS["prefix and branches"]), torch.device("meta")
    padded = pad_segments(layout, ROWS, meta, skips_masks=skips_masks)
    q, k, v = (x.detach().to(meta).requires_grad_() for x in inputs(4, 2, 8))
    tables = (torch.empty(60, 4, device=meta) for _ in range(2))
    positions = torch.empty(ROWS, dtype=torch.int64, device=meta)
    out = rotary_segment_attention(q, k, v, positions, *tables, layout, 0.3, padded)
    out.sum().backward()
    assert q.grad.shape == q.shape


def test_the_reference_has_true_gradients():
    q, k, v = (x.detach().double().requires_grad_() for x in inputs(4, 2, 3, rows=14))
    layout = as_tensor([(0, 4, 0, 0), (4, 9, 0, 4), (9, 13, 0, 4)])
    assert torch.autograd.gradcheck(lambda *x: segment_attention_reference(*x, layout, 0.5), (q, k, v))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_packing(data):
    sizes = st.integers(0, 70)
    layout, row = [], 0
    for _ in range(data.draw(st.integers(0, 4))):
        prefix = data.draw(sizes)
        layout.append((row, row + prefix, row, row))
        first, row = row, row + prefix
        for _ in range(data.draw(st.integers(0, 4))):
            length = data.draw(sizes)
            layout.append((row, row + length, first, first + prefix))
            row += length
    q, k, v = inputs(4, 2, 8, rows=row, seed=row)
    expected = gradients(segment_attention_reference, q, k, v, as_tensor(layout), 0.35)
    agree(gradients(segment_attention, q, k, v, as_tensor(layout), 0.35), expected)


@pytest.mark.parametrize("heads", [(2, 1, 64), (1, 1, 80), (9, 3, 40), (1, 1, 256), (20, 1, 16)], ids=str)
@pytest.mark.usefixtures("path")
def test_long_segments_and_wide_heads(heads):
    layout = as_tensor([(0, 150, 0, 0), (150, 171, 0, 150), (171, 430, 0, 150)])
    q, k, v = inputs(*heads, rows=430)
    expected = gradients(segment_attention_reference, q, k, v, layout, 0.2)
    agree(gradients(segment_attention, q, k, v, layout, 0.2), expected, tolerance=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(4, 2, 10), (3, 3, 64)], ids=str)
@pytest.mark.usefixtures("path")
def test_rotary_attention_equals_its_reference(heads, dtype):
    q, k, v = inputs(*heads, dtype=dtype)
    positions = torch.randint(0, 60, (ROWS,), generator=torch.Generator().manual_seed(0))
    arguments = (positions, *rope_tables(heads[2], 100.0, 60), as_tensor(LAYOUTS["two prefixes"]), 0.3)
    expected = gradients(rotary_segment_attention_reference, q, k, v, *arguments)
    actual = gradients(rotary_segment_attention, q, k, v, *arguments)
    agree(actual, expected, 3e-5 if dtype == torch.float32 else 6e-2)


def test_the_same_bits_on_any_number_of_threads():
    layout = as_tensor([(0, 150, 0, 0), (150, 171, 0, 150), (171, 430, 0, 150), (430, 500, 430, 430)])
    q, k, v = inputs(6, 2, 32, rows=500)
    results = []
    try:
        for threads in (1, 3):
            set_threads(threads)
            out, grads = gradients(segment_attention, q, k, v, layout, 0.2)
            results.append((out, *grads))
    finally:
        set_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_graph_may_be_walked_twice():
    q, k, v = inputs(4, 2, 16)
    out = segment_attention(q, k, v, as_tensor(LAYOUTS["prefix and branches"]), 0.3).square().sum()
    first = torch.autograd.grad(out, (q, k, v), retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(out, (q, k, v)), strict=True):
        assert torch.equal(a, b)


def test_large_scores_do_not_overflow():
    q, k, v = (x.detach() * 60 for x in inputs(2, 2, 16))
    layout = as_tensor(LAYOUTS["prefix and branches"])
    out = segment_attention(q, k, v, layout, 1.0)
    torch.testing.assert_close(out, segment_attention_reference(q, k, v, layout, 1.0), rtol=1e-4, atol=1e-3)


def test_views_of_one_tensor():
    joined = torch.randn(ROWS, 8, 16, requires_grad=True)
    layout = as_tensor(LAYOUTS["two prefixes"])

    def attend(function):
        out = function(joined[:, :4], joined[:, 4:6], joined[:, 6:], layout, 0.25)
        return out, torch.autograd.grad(out.square().sum(), joined)

    agree(attend(segment_attention), attend(segment_attention_reference))


def test_bfloat16_within_its_precision():
    q, k, v = inputs(4, 2, 16, dtype=torch.bfloat16)
    layout = as_tensor(LAYOUTS["prefix and branches"])
    expected = gradients(
        segment_attention_reference, *(x.detach().float().requires_grad_() for x in (q, k, v)), layout, 0.25
    )
    agree(gradients(segment_attention, q, k, v, layout, 0.25), expected, tolerance=3e-2)


@pytest.mark.parametrize(
    ("segments", "words"),
    [
        ([(0, 39, 0, 0)], "must lie in the 38 rows"),
        ([(5, 4, 0, 0)], "must lie in the 38 rows"),
        ([(0, 4, -1, 0)], "must lie in the 38 rows"),
        ([(0, 4, 0, 0), (10, 20, 0, 0), (3, 5, 0, 0)], "must not overlap"),
    ],
)
def test_segments_out_of_range_are_refused(segments, words):
    q, k, v = inputs(2, 2, 4)
    for function in (segment_attention, segment_attention_reference):
        with pytest.raises(ValueError, match=words):
            function(q, k, v, as_tensor(segments), 1.0)


def test_positions_out_of_range_are_refused():
    q, k, v = inputs(2, 2, 4)
    arguments = (*rope_tables(4, 100.0, 30), as_tensor([(0, 4, 0, 0)]), 1.0)
    with pytest.raises((ValueError, IndexError)):
        rotary_segment_attention(q, k, v, torch.full((ROWS,), 30), *arguments)


def test_wrong_shapes_are_refused():
    q, k, v = inputs(3, 2, 4)
    with pytest.raises(ValueError, match="do not belong together"):
        segment_attention(q, k, v, as_tensor([(0, 4, 0, 0)]), 1.0)
    with pytest.raises(ValueError, match=r"int64 \(S, 4\)"):
        segment_attention(k, k, v, torch.zeros(2, 3, dtype=torch.int64), 1.0)
    with pytest.raises(ValueError, match=r"int64 \(S, 4\)"):
        segment_attention(k, k, v, torch.zeros(2, 4, dtype=torch.int32), 1.0)
