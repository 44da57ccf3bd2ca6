"""Two processes with unlike batches against one that has all: the same loss and gradients, and whole weights."""

import multiprocessing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.unit.train.sharded import new_model, one_of_two, plain

PARTS = {"all": ("vision", "projector", "decoder"), "projector": ("projector",)}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_two_processes_have_the_gradients_of_one(parts: tuple[str, ...], tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.unit.train.sharded"])
    both = [context.Process(target=one_of_two, args=(rank, tmp_path, parts)) for rank in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
        if process.exitcode is None:  # it waits for the other's call
            process.kill()
    assert [process.exitcode for process in both] == [0, 0]
    expected = plain(parts)
    weights = {f"gathered/{name}": tensor + 1 for name, tensor in new_model().state_dict().items()}
    for rank in (0, 1):
        found = load_file(tmp_path / f"rank-{rank}.safetensors")
        assert found.keys() == expected.keys() | weights.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name].to(tensor.dtype), tensor, rtol=1e-4, atol=1e-4)
        assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
