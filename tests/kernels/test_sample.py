"""Sampling and loop detection in Triton against their references."""

import pytest
import torch

pytestmark = pytest.mark.triton


def settings(rows, device, temperature=0.0, top_k=0, top_p=1.0, draws=None):
    return (
        torch.full((rows,), temperature, device=device),
        torch.full((rows,), top_k, dtype=torch.int32, device=device),
        torch.full((rows,), top_p, device=device),
        torch.rand(rows).to(device) if draws is None else draws.to(device),
    )


def no_ban(rows, device):
    return torch.zeros(0, dtype=torch.int32, device=device), torch.zeros(
        rows, dtype=torch.int8, device=device
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 5000])
def test_greedy_takes_the_first_of_equals(vocab, dtype, device):
    from vila2.kernels.sample import sample_triton

    logits = torch.randn(3, vocab).to(device, dtype)
    logits[0] = 1.5
    assert (
        sample_triton(logits, *settings(3, device), *no_ban(3, device)).tolist() == logits.argmax(-1).tolist()
    )
    assert not len(sample_triton(logits[:0], *settings(0, device), *no_ban(0, device)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (0, 0.9), (5, 1.0), (40, 0.7), (1, 0.5), (3000, 0.001)]
)
def test_draws_equal_the_reference(top_k, top_p, dtype, device):
    from vila2.kernels.sample import sample_triton
    from vila2.ops.sampling import sample_reference

    rows = 4
    logits = (torch.randn(rows, 300) * 2).to(device, dtype)
    logits[0] = 0.0  # all equal
    chosen = settings(rows, device, 0.8, top_k, top_p)
    given = (logits, *chosen, *no_ban(rows, device))
    assert sample_triton(*given).tolist() == sample_reference(*given).tolist()


def test_extreme_draws_and_banned_tokens(device):
    from vila2.kernels.sample import sample_triton
    from vila2.ops.sampling import sample_reference

    logits = torch.randn(4, 50, device=device)
    logits[:, 3], logits[:, 9] = 30.0, 20.0
    banned = torch.tensor([3, 9], dtype=torch.int32, device=device)
    is_banned = torch.tensor([1, 0, 1, 0], dtype=torch.int8, device=device)
    draws = torch.tensor([0.0, 0.0, 1 - 2**-24, 1 - 2**-24])
    for temperature in (0.0, 1.0):
        given = (logits, *settings(4, device, temperature, 49, 0.95, draws), banned, is_banned)
        tokens = sample_triton(*given)
        assert tokens.tolist() == sample_reference(*given).tolist()
        assert not {int(tokens[0]), int(tokens[2])} & {3, 9}


def test_draws_have_the_right_frequencies(device):
    from vila2.kernels.sample import sample_triton

    rows = 16
    logits = torch.log(torch.tensor([0.5, 0.25, 0.125, 0.125], device=device)).expand(rows, 4).contiguous()
    draws = (torch.arange(rows) + 0.5) / rows  # each draw once: the counts are exact
    tokens = sample_triton(logits, *settings(rows, device, 1.0, 0, 1.0, draws), *no_ban(rows, device))
    assert torch.bincount(tokens.cpu(), minlength=4).tolist() == [8, 4, 2, 2]


@pytest.mark.parametrize("longest", [6, 2])
def test_loops_are_found_as_by_the_engine(longest, device):
    from vila2.engine.repetition import find_loop_reference
    from vila2.kernels.repetition import append_tokens_triton
    from vila2.ops.sampling import append_reference
    from vila2.types import RepetitionRule

    rule = RepetitionRule(max_period=longest, min_repeats=3, min_tokens=5)
    rows = [
        [1, 2, 3, 1, 2, 3, 1, 2, 3, 4],
        [7] * 10,
        [1, 2, 1, 2, 1, 3, 1, 2, 1, 2],
        list(range(10)),
        [7] * 10,
    ]
    slots = torch.tensor([4, 0, 5, 1, -1], device=device)  # of six; the last row is padding
    rules = torch.tensor(
        [[3, 5, longest]] * 3 + [[0, 5, longest]] + [[3, 5, longest]], dtype=torch.int32, device=device
    )
    states = [
        (
            torch.zeros(6, 12, dtype=torch.int32, device=device),
            torch.zeros(6, dtype=torch.int32, device=device),
            torch.zeros(6, 6, dtype=torch.int32, device=device),
        )
        for _ in range(2)
    ]
    for step in range(10):
        tokens = torch.tensor([row[step] for row in rows], device=device)
        ours = append_tokens_triton(tokens, slots, *states[0], rules)
        assert ours.tolist() == append_reference(tokens, slots, *states[1], rules).tolist()
        expected = [find_loop_reference(row[: step + 1], rule) for row in rows[:3]]
        assert ours.tolist() == [*expected, 0, 0]
    for one, other in zip(*states, strict=True):
        assert torch.equal(one, other)
    assert states[0][0][[4, 0, 5, 1], :10].tolist() == rows[:4]
    assert states[0][1].tolist() == [10, 10, 0, 0, 10, 10]
