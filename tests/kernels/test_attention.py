"""Attention over the paged cache in Triton against its reference: prefill of any lengths, decoding, shared prefixes."""

import pytest
import torch

pytestmark = pytest.mark.triton


def cache_of(lengths, kv_heads, dim, block_size, dtype, device, shared=0):
    """Caches with random values and block tables in random order; the first `shared` blocks are the same for all."""
    counts = [-(-length // block_size) for length in lengths]
    total = sum(counts)
    order = torch.randperm(total + 1, device=device).int()
    tables = torch.zeros(len(lengths), max(counts, default=0) + 1, dtype=torch.int32, device=device)
    first = 0
    for row, count in enumerate(counts):
        tables[row, :count] = order[first : first + count]
        first += count
    tables[:, :shared] = tables[:1, :shared]
    both = torch.randn(2, total + 1, kv_heads, block_size, dim).to(device, dtype)
    return *both, tables


# heads, KV heads, dim, block size
MODELS = [(4, 4, 16, 4), (9, 3, 64, 16), (6, 1, 80, 16), (4, 2, 8, 8)]


# Every model in float32, which shows any error of indexing, and one in bfloat16, which shows those of types.
CASES = [(*model, torch.float32) for model in MODELS] + [(*MODELS[1], torch.bfloat16)]


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "block_size", "dtype"), CASES)
def test_prefill(heads, kv_heads, dim, block_size, dtype, device, near):
    from vila2.kernels.attention_prefill import paged_prefill_triton
    from vila2.ops.attention import paged_attention_reference

    # (new tokens, context): whole prompts, a chunk after a prefix, an empty chunk, decoding rows among them
    chunks = [(5, 5), (1, 37), (0, 3), (40, 110), (1, 1)]
    k_cache, v_cache, tables = cache_of([c for _, c in chunks], kv_heads, dim, block_size, dtype, device)
    counts = torch.tensor([0] + [n for n, _ in chunks])
    starts = counts.cumsum(0).int().to(device)
    contexts = torch.tensor([c for _, c in chunks], dtype=torch.int32, device=device)
    q = torch.randn(int(counts.sum()), heads, dim).to(device, dtype)
    arguments = (q, k_cache, v_cache, tables, starts, contexts, dim**-0.5)
    torch.testing.assert_close(
        paged_prefill_triton(*arguments), paged_attention_reference(*arguments), **near(dtype)
    )


def test_prefill_of_nothing(device):
    from vila2.kernels.attention_prefill import paged_prefill_triton

    k_cache, v_cache, tables = cache_of([], 2, 16, 4, torch.float32, device)
    none = torch.zeros(0, dtype=torch.int32, device=device)
    out = paged_prefill_triton(
        torch.zeros(0, 4, 16, device=device), k_cache, v_cache, tables, none[:1], none, 1.0
    )
    assert out.shape == (0, 64)


@pytest.mark.parametrize("spans", [1, 3])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "block_size", "dtype"), CASES)
def test_decode(heads, kv_heads, dim, block_size, dtype, spans, device, near):
    from vila2.kernels.attention_decode import paged_decode_triton
    from vila2.ops.attention import paged_attention_reference

    lengths = [1, 64, 150]
    k_cache, v_cache, tables = cache_of(lengths, kv_heads, dim, block_size, dtype, device)
    contexts = torch.tensor(lengths, dtype=torch.int32, device=device)
    starts = torch.arange(len(lengths) + 1, dtype=torch.int32, device=device)
    q = torch.randn(len(lengths), heads, dim).to(device, dtype)
    expected = paged_attention_reference(q, k_cache, v_cache, tables, starts, contexts, dim**-0.5)
    actual = paged_decode_triton(q, k_cache, v_cache, tables, contexts, dim**-0.5, spans=spans)
    torch.testing.assert_close(actual, expected, **near(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spans", [1, 2])
def test_decode_with_shared_prefixes(spans, dtype, device, near):
    from vila2.kernels.attention_decode import paged_decode_triton
    from vila2.ops.attention import paged_attention_reference

    heads, kv_heads, dim, block_size = 6, 2, 16, 4
    lengths = [40, 39, 70, 5, 90]
    k_cache, v_cache, tables = cache_of(lengths, kv_heads, dim, block_size, dtype, device)
    tables[2, :8], tables[4, :8] = tables[0, :8], tables[0, :8]  # 0, 2 and 4 share 32 tokens; 1 and 3 nothing
    lens = torch.tensor([32, 0, 32, 0, 32], dtype=torch.int32, device=device)
    group_starts = torch.tensor(
        [0, 3, 3, 3], dtype=torch.int32, device=device
    )  # room for more groups, unused
    members = torch.tensor([0, 2, 4, 0, 0], dtype=torch.int32, device=device)
    contexts = torch.tensor(lengths, dtype=torch.int32, device=device)
    starts = torch.arange(len(lengths) + 1, dtype=torch.int32, device=device)
    q = torch.randn(len(lengths), heads, dim).to(device, dtype)
    expected = paged_attention_reference(q, k_cache, v_cache, tables, starts, contexts, dim**-0.5)
    actual = paged_decode_triton(
        q, k_cache, v_cache, tables, contexts, dim**-0.5, (lens, group_starts, members), spans
    )
    torch.testing.assert_close(actual, expected, **near(dtype))


def test_spans_fill_the_device():
    from vila2.kernels.attention_decode import num_spans

    assert num_spans(256, 8, 4096, 132) == 1
    assert num_spans(1, 8, 4096, 132) == 16  # a span is four tiles at least
    assert num_spans(1, 8, 100, 132) == 1


def test_caches_that_do_not_fit_are_refused(device):
    from vila2.kernels.attention_prefill import check_cache

    cache = torch.zeros(3, 2, 4, 16, device=device)
    with pytest.raises(ValueError, match="belong together"):
        check_cache(torch.zeros(1, 3, 16, device=device), cache, cache)
    with pytest.raises(ValueError, match="contiguous"):
        check_cache(
            torch.zeros(1, 2, 16, device=device), cache.transpose(1, 2).contiguous().transpose(1, 2), cache
        )
