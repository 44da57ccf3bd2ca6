"""When a run counts as diverged."""

import math
import random

import pytest

from vila2.train.guard import Guard, diverged
from vila2.train.recipe import GuardSettings

SETTINGS = GuardSettings(window=32, deviations=12, margin=1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_stops_at_once(value: float) -> None:
    assert "the loss is" in (Guard(SETTINGS).check(value, 1.0) or "")
    assert "gradient" in (Guard(SETTINGS).check(1.0, value) or "")


def test_a_falling_noisy_loss_passes() -> None:
    guard, noise = Guard(SETTINGS), random.Random(0)
    losses = [6 * math.exp(-step / 50) + 1 + noise.gauss(0, 0.3) for step in range(500)]
    assert [guard.check(loss, 1.0) for loss in losses] == [None] * 500


def test_a_spike_stops_once_enough_is_known() -> None:
    guard = Guard(SETTINGS)
    assert guard.check(50.0, 1.0) is None  # nothing to compare with yet
    for step in range(40):
        assert guard.check(2 + 0.01 * (step % 3), 1.0) is None
    assert guard.check(2.9, 1.0) is None  # within the margin, many deviations away
    reason = guard.check(9.0, 1.0)
    assert reason is not None
    assert "recent median" in reason


def test_a_spike_is_not_remembered() -> None:
    guard = Guard(SETTINGS, [2.0] * 32)
    assert guard.check(9.0, 1.0) is not None
    assert list(guard.recent) == [2.0] * 32


def test_spikes_may_be_allowed() -> None:
    guard = Guard(GuardSettings(deviations=0), [2.0] * 64)
    assert guard.check(1e9, 1.0) is None


def test_a_guard_goes_on_from_its_memory() -> None:
    first = Guard(SETTINGS)
    for loss in (2.0, 2.1) * 20:
        first.check(loss, 1.0)
    assert Guard(SETTINGS, list(first.recent)).limit() == first.limit()


def test_the_message_names_step_keys_and_state() -> None:
    text = str(diverged("stage sft", 12, "the loss is nan", [f"k{n}" for n in range(20)], 10))
    assert "step 12" in text
    assert "k0, k1" in text
    assert "12 more" in text
    assert "state of step 10 is kept" in text
    assert "no state was saved" in str(diverged("stage sft", 1, "x", [], None))
