"""The threads of `_C`: several callers at once, a fork, changes of the count, and tasks that fail."""

import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from vila2.ops.linear import linear, pack
from vila2.ops.native import native
from vila2.ops.threads import set_threads

pytestmark = pytest.mark.skipif(native is None, reason="vila2._C is not built")

ROOT = Path(__file__).parents[2]


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


def count_threads() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("Threads:"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_change_of_the_count_leaves_no_thread_behind(product):
    packed, x, expected = product
    y = torch.empty_like(expected)
    native.set_num_threads(2)
    packed.multiply(x, y)
    before = count_threads()
    for count in [3, 1, 4, 2] * 25:
        native.set_num_threads(count)
        packed.multiply(x, y)
        assert torch.equal(y, expected)
    assert count_threads() <= before


@pytest.mark.slow
def test_tasks_that_fail(tmp_path):
    """A worker's exception is the caller's, and leaves the pool as it was: in C++, where a task can be made to fail."""
    compiler = shutil.which("c++")
    if not compiler:
        pytest.skip("needs a C++ compiler")
    sources = [ROOT / "tests" / "native" / "check_parallel.cpp", ROOT / "csrc" / "cpu" / "parallel.cpp"]
    program = tmp_path / "check_parallel"
    command = [compiler, "-std=c++17", "-O1", "-I", ROOT / "csrc", *sources, "-o", program, "-pthread"]
    subprocess.run(command, check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
