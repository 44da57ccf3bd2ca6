"""The threads of `_C`: several callers at once, a fork, and changes of the count."""

import os
import threading

import pytest
import torch

from vila2.ops.linear import linear, pack
from vila2.ops.native import native
from vila2.ops.threads import set_threads

pytestmark = pytest.mark.skipif(native is None, reason="vila2._C is not built")


@pytest.fixture
def product():
    """A call that is large enough to be split, and what it gives with one thread."""
    rng = torch.Generator().manual_seed(0)
    packed = pack(torch.randn(512, 256, generator=rng), None, torch.float32)
    x = torch.randn(9, 256, generator=rng)
    set_threads(1)
    yield packed, x, linear(x, packed)
    set_threads(1)


def test_any_number_of_threads(product):
    packed, x, expected = product
    for count in (4, 1, 3, 2, 3):
        set_threads(count)
        for _ in range(50):
            assert torch.equal(linear(x, packed), expected)


def test_callers_at_the_same_time(product):
    packed, x, expected = product
    set_threads(3)
    wrong: list[int] = []

    def work() -> None:
        wrong.extend(i for i in range(200) if not torch.equal(linear(x, packed), expected))

    callers = [threading.Thread(target=work) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_after_a_fork(product):
    """A child has none of its parent's threads: it must start its own and not wait for them."""
    packed, x, expected = product
    native.set_num_threads(2)
    assert torch.equal(linear(x, packed), expected)
    child = os.fork()
    if child == 0:
        y = torch.empty_like(expected)
        packed.multiply(x, y)
        os._exit(0 if y.tolist() == expected.tolist() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
