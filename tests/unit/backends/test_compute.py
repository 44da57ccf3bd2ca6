"""Which arithmetic a precision means, on CPUs that this machine is not; and what of it lets drafts be taken."""

from pathlib import Path

import pytest
import torch

from tests.checkpoints import write_llava
from vila2.backends import compute
from vila2.backends.compute import BF16_PRODUCTS, plan_compute, takes_torch_bf16
from vila2.backends.native import open_checkpoint
from vila2.errors import UsageError
from vila2.ops.native import Capabilities, native
from vila2.ops.threads import set_threads

needs_native = pytest.mark.skipif(native is None, reason="vila2._C is not built")


@pytest.mark.parametrize(
    ("features", "packs_pairs", "expected"),
    [
        ({}, False, False),
        ({"avx512_bf16": True}, True, False),
        ({"avx512_bf16": True}, False, True),  # another instruction set is forced
        ({"avx512_bf16": True, "amx_bf16": True}, True, True),
    ],
)
def test_whose_bf16_products_a_cpu_takes(features, packs_pairs, expected, monkeypatch):
    monkeypatch.delenv(BF16_PRODUCTS, raising=False)
    monkeypatch.setattr(compute, "capabilities", lambda: Capabilities("any", **features))
    monkeypatch.setattr(compute, "rounds_rows", lambda: packs_pairs)
    assert takes_torch_bf16() == expected
    for choice in ("own", "torch"):
        monkeypatch.setenv(BF16_PRODUCTS, choice)
        assert takes_torch_bf16() == (choice == "torch")
    monkeypatch.setenv(BF16_PRODUCTS, "mkl")
    with pytest.raises(UsageError, match="VILA2_BF16_PRODUCTS=mkl: expected own or torch"):
        takes_torch_bf16()


@needs_native
def test_only_packed_products_are_the_same_in_any_batch():
    assert not plan_compute("cpu", "bf16", False, True).is_batch_invariant
    assert not plan_compute("cpu", "fp8", False, False).is_batch_invariant
    assert not plan_compute("cuda", "bf16", False, False).is_batch_invariant
    for precision in ("float32", "bf16", "int8"):
        assert plan_compute("cpu", precision, False, False).is_batch_invariant
        assert plan_compute("cpu", precision, True, True).is_batch_invariant  # --deterministic


@needs_native
@pytest.mark.parametrize("products", ["own", "torch"])
def test_drafts_are_left_unused_where_products_depend_on_the_batch(tmp_path: Path, monkeypatch, products):
    """A caption is written faster for a draft, never differently: torch's products could tip a close choice."""
    monkeypatch.setenv(BF16_PRODUCTS, products)
    captioner = open_checkpoint(write_llava(tmp_path / "m"), device="cpu", precision="bf16", threads=1)
    assert (captioner.engine.limits.max_draft > 0) == (products == "own")
    assert ("without drafts" in captioner.description) == (products == "torch")
    assert captioner.engine.model.vision.position_embedding.dtype == (
        torch.float32 if products == "own" else torch.bfloat16
    )


@needs_native
def test_threads_are_obeyed_by_torch_and_by_our_own(tmp_path: Path):
    assert native is not None
    checkpoint = write_llava(tmp_path / "m")
    try:
        for count in (1, 3):
            open_checkpoint(checkpoint, device="cpu", precision="float32", threads=count)
            assert (torch.get_num_threads(), native.num_threads()) == (count, count)
    finally:
        set_threads(1)
