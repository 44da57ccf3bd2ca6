"""rope_store and paged_attention against their references, and the independence of rows from their company."""

import pytest
import torch
from torch import Tensor

from vila2.ops.attention import (
    paged_attention,
    paged_attention_reference,
    rope_store,
    rope_store_reference,
)
from vila2.ops.native import native
from vila2.ops.rope import apply_rope, rope_tables
from vila2.ops.threads import set_threads

FLOAT_TYPES = [torch.float32, torch.bfloat16]


def int32(values: list[int] | list[list[int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


class Batch:
    """Sequences of (new tokens, past tokens) over shuffled blocks; what lies outside their contexts is NaN."""

    def __init__(
        self,
        sequences: list[tuple[int, int]],
        *,
        heads: int = 4,
        kv_heads: int = 2,
        dim: int = 16,
        block_size: int = 8,
        dtype: torch.dtype = torch.float32,
        cache_dtype: torch.dtype = torch.float32,
    ) -> None:
        rng = torch.Generator().manual_seed(len(sequences) * 1000 + dim)
        lengths = [new + past for new, past in sequences]
        blocks_each = [-(-length // block_size) for length in lengths]
        order = torch.randperm(sum(blocks_each) + 3, generator=rng).tolist()
        self.k_cache = torch.full((len(order), kv_heads, block_size, dim), torch.nan)
        self.v_cache = self.k_cache.clone()
        tables = []
        for length, count in zip(lengths, blocks_each, strict=True):
            blocks, order = order[:count], order[count:]
            for at in range(length):
                slot = (blocks[at // block_size], slice(None), at % block_size)
                self.k_cache[slot] = torch.randn(kv_heads, dim, generator=rng)
                self.v_cache[slot] = torch.randn(kv_heads, dim, generator=rng)
            tables.append(blocks)
        widest = max([1, *blocks_each])
        self.tables = int32([row + [-1] * (widest - len(row)) for row in tables]).view(-1, widest)
        self.starts = int32([0, *torch.tensor([new for new, _ in sequences]).cumsum(0).tolist()])
        self.lens = int32(lengths)
        self.q = torch.randn(int(self.starts[-1]), heads, dim, generator=rng).to(dtype)
        self.k_cache, self.v_cache = self.k_cache.to(cache_dtype), self.v_cache.to(cache_dtype)
        self.scale = dim**-0.5

    def run(self, attention=paged_attention) -> Tensor:
        return attention(self.q, self.k_cache, self.v_cache, self.tables, self.starts, self.lens, self.scale)

    def rows(self, sequence: int, first: int, count: int) -> Tensor:
        """The same `count` query tokens of one sequence, alone and as if the later ones were not there yet."""
        start, end = int(self.starts[sequence]), int(self.starts[sequence + 1])
        length = int(self.lens[sequence]) - (end - start) + first + count
        return paged_attention(
            self.q[start + first : start + first + count],
            self.k_cache,
            self.v_cache,
            self.tables[sequence : sequence + 1],
            int32([0, count]),
            int32([length]),
            self.scale,
        )


SHAPES = [
    {"heads": 4, "kv_heads": 2, "dim": 16},
    {"heads": 3, "kv_heads": 3, "dim": 64},
    {"heads": 9, "kv_heads": 3, "dim": 64, "block_size": 16},
    {"heads": 7, "kv_heads": 1, "dim": 80, "block_size": 5},
    {"heads": 2, "kv_heads": 1, "dim": 72, "block_size": 32},
    {"heads": 5, "kv_heads": 5, "dim": 6, "block_size": 1},
    {"heads": 100, "kv_heads": 2, "dim": 8},
    {"heads": 2, "kv_heads": 2, "dim": 256, "block_size": 64},
]
MIXED = [(1, 0), (5, 0), (1, 130), (70, 60), (0, 4), (17, 64), (1, 63), (2, 62)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cache_dtype", FLOAT_TYPES)
@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_attention_equals_its_reference(shape, cache_dtype, dtype):
    batch = Batch(MIXED, dtype=dtype, cache_dtype=cache_dtype, **shape)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(
        batch.run(), batch.run(paged_attention_reference), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cache_dtype", FLOAT_TYPES)
@pytest.mark.skipif(native is None, reason="vila2._C is not built")
def test_a_row_depends_only_on_its_own_context(shape, cache_dtype):
    batch = Batch(MIXED, cache_dtype=cache_dtype, **shape)
    whole = batch.run()
    for sequence, (new, _) in enumerate(MIXED):
        rows = whole[int(batch.starts[sequence]) : int(batch.starts[sequence + 1])]
        for chunk in (1, 2, 3, 16, 70):
            for first in range(0, new, chunk):
                count = min(chunk, new - first)
                assert torch.equal(rows[first : first + count], batch.rows(sequence, first, count))


@pytest.mark.skipif(native is None, reason="vila2._C is not built")
def test_threads_and_block_sizes_change_no_bit():
    try:
        set_threads(1)
        one = Batch(MIXED, block_size=4).run()
        set_threads(2)
        two = Batch(MIXED, block_size=4).run()
    finally:
        set_threads(1)
    assert torch.equal(one, two)


def test_large_scores_do_not_overflow():
    batch = Batch([(40, 100)])
    batch.q *= 1000
    torch.testing.assert_close(batch.run(), batch.run(paged_attention_reference), rtol=1e-4, atol=1e-4)


def test_attention_of_nothing():
    batch = Batch([(0, 3), (0, 0)])
    assert batch.run().shape == (0, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tables": int32([[0, 99]])}, "block_tables"),
        ({"tables": int32([[0, -1]])}, "block_tables"),
        ({"tables": int32([[0, 1]]).long()}, "block_tables"),
        ({"lens": int32([2])}, "context_lens"),
        ({"lens": int32([17])}, "context_lens"),
        ({"lens": int32([9, 9])}, "context_lens"),
        ({"starts": int32([0, 4])}, "query_starts"),
        ({"starts": int32([1, 3])}, "query_starts"),
        ({"q": torch.zeros(3, 3, 16)}, "q: expected a multiple of the cache's heads"),
        ({"q": torch.zeros(3, 4, 8)}, "q: expected shape"),
        ({"v_cache": torch.zeros(2, 2, 8, 8)}, "v_cache"),
    ],
)
@pytest.mark.skipif(native is None, reason="vila2._C is not built")
def test_attention_refuses_what_it_cannot_read(change, message):
    batch = Batch([(3, 6)])
    for name, value in change.items():
        setattr(batch, name, value)
    with pytest.raises(ValueError, match=message):
        batch.run()


def rope_inputs(tokens: int, dtype: torch.dtype, dim: int = 20) -> dict[str, Tensor]:
    """q (T, 4, D), k and v (T, 2, D) as slices of one qkv tensor."""
    torch.manual_seed(tokens)
    qkv = torch.randn(tokens, 8, dim).to(dtype)
    cos, sin = rope_tables(dim, 10000.0, 300)
    return {
        "q": qkv[:, :4],
        "k": qkv[:, 4:6],
        "v": qkv[:, 6:],
        "positions": torch.randint(0, 300, (tokens,)),
        "slots": torch.randperm(8 * 40)[:tokens],
        "cos": cos,
        "sin": sin,
    }


@pytest.mark.parametrize("tokens", [0, 1, 5, 300])
@pytest.mark.parametrize("dim", [2, 20, 64])
@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("cache_dtype", FLOAT_TYPES)
def test_rope_store_equals_its_reference(tokens, dim, dtype, cache_dtype):
    inputs = rope_inputs(tokens, dtype, dim)
    caches = [torch.zeros(40, 2, 8, dim, dtype=cache_dtype) for _ in range(4)]
    rotated = rope_store(**inputs, k_cache=caches[0], v_cache=caches[1])
    expected = rope_store_reference(**inputs, k_cache=caches[2], v_cache=caches[3])
    # Beside a rounding to bfloat16, one more unit in the last place may show.
    tolerance = 1e-5 if torch.bfloat16 not in (dtype, cache_dtype) else 2e-2
    torch.testing.assert_close(rotated, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(caches[0], caches[2], rtol=tolerance, atol=tolerance)
    assert torch.equal(caches[1], caches[3])


@pytest.mark.parametrize("store", [rope_store, rope_store_reference])
def test_slot_minus_one_is_not_written(store):
    inputs = rope_inputs(3, torch.float32)
    caches = torch.zeros(2, 40, 2, 8, 20)
    rotated = store(**inputs | {"slots": torch.tensor([9, -1, 0])}, k_cache=caches[0], v_cache=caches[1])
    expected = rope_store_reference(
        **inputs, k_cache=torch.zeros(40, 2, 8, 20), v_cache=torch.zeros(40, 2, 8, 20)
    )
    torch.testing.assert_close(rotated, expected)
    assert torch.equal(caches[1, [1, 0], :, [1, 0]], inputs["v"][[0, 2]])
    assert (
        int((caches != 0).flatten(-2).any(-1).sum()) == 2 * 2 * 2
    )  # keys and values of two heads in two slots


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": torch.tensor([0, 1, 300])}, "positions"),
        ({"positions": torch.tensor([0, 1, -1])}, "positions"),
        ({"slots": torch.tensor([0, 1, 320])}, "slots"),
        ({"slots": torch.tensor([0, -2, 3])}, "slots"),
        ({"slots": torch.tensor([0, 1, 3], dtype=torch.int32)}, "slots"),
        ({"k": torch.zeros(3, 1, 20)}, "k: expected shape"),
        ({"cos": torch.zeros(300, 9)}, "cos"),
    ],
)
@pytest.mark.skipif(native is None, reason="vila2._C is not built")
def test_rope_store_refuses_what_it_cannot_write(change, message):
    inputs = rope_inputs(3, torch.float32) | change
    with pytest.raises(ValueError, match=message):
        rope_store(**inputs, k_cache=torch.zeros(40, 2, 8, 20), v_cache=torch.zeros(40, 2, 8, 20))


def test_rope_keeps_scores_when_both_sides_move():
    cos, sin = rope_tables(32, 10000.0, 100)
    q, k = torch.randn(1, 1, 32), torch.randn(1, 1, 32)

    def score(q_position: int, k_position: int) -> Tensor:
        turned = [apply_rope(x, torch.tensor([at]), cos, sin) for x, at in ((q, q_position), (k, k_position))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(7, 3), score(90, 86), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "default"},
        {"type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ],
    ids=str,
)
def test_rope_tables_equal_those_of_transformers(scaling):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {"rope_theta": 500000.0, **({"rope_type": "default"} | (scaling or {}))}
    parameters["rope_type"] = parameters.pop("type", parameters["rope_type"])
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=2, max_position_embeddings=16384, rope_parameters=parameters
    )
    positions = torch.arange(16384)[None]
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    ours = rope_tables(128, 500000.0, 16384, scaling)
    torch.testing.assert_close(ours[0], cos[0, :, :64], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours[1], sin[0, :, :64], rtol=1e-6, atol=1e-6)


def test_unknown_rope_scaling_is_refused():
    with pytest.raises(ValueError, match="yarn"):
        rope_tables(8, 1e4, 10, {"rope_type": "yarn", "factor": 2.0})
