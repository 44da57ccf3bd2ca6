"""Token embeddings against torch's, bit for bit, in every pair of types; and ids that are no rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vila2.ops.embedding import embed, embed_reference
from vila2.ops.native import native
from vila2.ops.threads import set_threads

TYPES = [torch.float32, torch.bfloat16]


def rows(count: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(width)).to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 70),
    st.integers(1, 50),
    st.integers(1, 300),
    st.sampled_from(TYPES),
    st.sampled_from(TYPES),
)
def test_any_shape(count, size, width, table_type, dtype):
    table = rows(size, width, table_type)
    ids = torch.randint(0, size, (count,), generator=torch.Generator().manual_seed(count))
    with torch.no_grad():
        assert torch.equal(embed(ids, table, dtype), embed_reference(ids, table, dtype))


@pytest.mark.parametrize("dtype", TYPES)
def test_a_long_batch_of_a_wide_model_on_several_threads(dtype):
    table = rows(1000, 4096, torch.bfloat16)
    ids = torch.randint(0, 1000, (3000,), generator=torch.Generator().manual_seed(0))
    try:
        set_threads(3)
        found = embed(ids, table, dtype)
    finally:
        set_threads(1)
    assert torch.equal(found, embed_reference(ids, table, dtype))


def test_special_values_stay():
    table = torch.tensor([[torch.nan, torch.inf, -torch.inf, -0.0, 1e-45, 3.4e38]])
    ids = torch.zeros(3, dtype=torch.int64)
    assert torch.equal(
        embed(ids, table, torch.float32).view(torch.int32), table.view(torch.int32).expand(3, -1)
    )
    narrow = embed(ids, table, torch.bfloat16)
    expected = embed_reference(ids, table, torch.bfloat16)
    assert torch.equal(narrow.nan_to_num(), expected.nan_to_num())
    assert torch.equal(narrow.isnan(), expected.isnan())


def test_strided_ids_and_gradients():
    table = rows(20, 8, torch.float32)
    ids = torch.arange(20)[::3]
    assert torch.equal(embed(ids, table, torch.float32), table[::3])
    wanting = table.clone().requires_grad_()
    embed(ids, wanting, torch.float32).sum().backward()
    assert wanting.grad is not None
    assert torch.equal(wanting.grad[:, 0] != 0, torch.arange(20) % 3 == 0)


@pytest.mark.skipif(not hasattr(native, "embed"), reason="vila2._C is not built")
@pytest.mark.parametrize("wrong", [-1, 20, 2**62, -(2**62)])
def test_an_id_that_is_no_row_is_an_error(wrong):
    with pytest.raises(ValueError, match=f"ids: expected rows of the table, which has 20, got {wrong}"):
        embed(torch.tensor([1, wrong, 2]), rows(20, 8, torch.float32), torch.float32)


@pytest.mark.skipif(not hasattr(native, "embed"), reason="vila2._C is not built")
def test_wrong_types_and_shapes_are_refused():
    assert native is not None
    table, out = rows(20, 8, torch.float32), torch.empty(2, 8)
    ids = torch.tensor([1, 2])
    for name, arguments in {
        "ids": (ids.int(), table, out),
        "table": (ids, table.half(), out),
        "out": (ids, table, torch.empty(3, 8)),
    }.items():
        with pytest.raises(ValueError, match=name):
            native.embed(*arguments)
    with pytest.raises(ValueError, match="table: expected a contiguous tensor"):
        native.embed(ids, rows(8, 20, torch.float32).t(), out)
