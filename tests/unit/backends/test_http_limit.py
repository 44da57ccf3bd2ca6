"""The limit on requests at once, against simulated servers: it finds what they can take."""

from collections.abc import Callable
from itertools import pairwise

import pytest

from vila2.backends.http_limit import AdaptiveLimit


def drive(
    limit: AdaptiveLimit, latency: Callable[[int], float], rounds: int, supply: int = 10**6
) -> list[int]:
    """`rounds` times as many requests as the limit allows, all at once; returns the limit after each round."""
    values = []
    for _ in range(rounds):
        count = min(limit.value, supply)
        tickets = [limit.begin(n + 1) for n in range(count)]
        for ticket in tickets:
            limit.succeeded(ticket, latency(count))
        values.append(limit.value)
    return values


def test_it_rises_to_the_maximum_while_nobody_waits() -> None:
    limit = AdaptiveLimit(100)
    values = drive(limit, lambda n: 0.5, 12)
    assert values[:5] == [8, 16, 32, 64, 100]
    assert set(values[4:]) == {100}


@pytest.mark.parametrize("capacity", [1, 6, 20, 50])
def test_it_stays_near_what_the_server_does_at_once(capacity: int) -> None:
    """Beyond its capacity a server lets requests wait: latency grows with them, and the rate does not."""
    limit = AdaptiveLimit(256)
    values = drive(limit, lambda n: max(1.0, n / capacity), 60)
    late = values[20:]
    assert max(late) <= max(2 * capacity, 8)
    assert min(late) >= min(capacity / 2, 4)


def test_a_batching_server_is_filled_although_its_latency_grows() -> None:
    """32 at once take twice as long as one: still 16 times the rate."""
    limit = AdaptiveLimit(64)
    assert drive(limit, lambda n: 1.0 + n / 32, 12)[-1] == 64


def test_one_sign_of_overload_is_one_cut() -> None:
    limit = AdaptiveLimit(64)
    drive(limit, lambda n: 1.0, 4)
    assert limit.value == 64
    tickets = [limit.begin(n + 1) for n in range(64)]
    assert [limit.overloaded(ticket) for ticket in tickets] == [True] + [False] * 63
    assert limit.value == 44
    assert limit.overloaded(limit.begin(1))  # sent after the cut: the cut was not enough
    assert limit.value == 30
    for _ in range(20):
        limit.overloaded(limit.begin(1))
    assert limit.value == 1


def test_it_recovers_after_a_rest_and_more_carefully() -> None:
    limit = AdaptiveLimit(64)
    drive(limit, lambda n: 1.0, 4)
    limit.overloaded(limit.begin(1))
    values = drive(limit, lambda n: 1.0, 30)
    assert values[0] == 44
    assert values[-1] == 64
    steps = [after / before for before, after in pairwise(values)]
    assert max(steps) < 1.3


def test_it_does_not_rise_on_a_trickle_of_requests() -> None:
    limit = AdaptiveLimit(64)
    for _ in range(40):
        limit.succeeded(limit.begin(1), 1.0)
    assert limit.value == 4


def test_answers_from_before_a_change_do_not_count() -> None:
    limit = AdaptiveLimit(64)
    old = [limit.begin(n + 1) for n in range(4)]
    limit.overloaded(old[0])
    for ticket in old[1:] * 10:
        limit.succeeded(ticket, 0.001)
    assert limit.value == 2


def test_small_maxima() -> None:
    limit = AdaptiveLimit(1)
    drive(limit, lambda n: 1.0, 5)
    assert limit.value == 1
    limit.overloaded(limit.begin(1))
    assert limit.value == 1
