"""The KV budget of a card, reckoned for VILA1.5-8B, with no card at hand."""

import pytest
import torch

from tests.checkpoints import write_llava
from vila2.backends.native import open_checkpoint
from vila2.engine.gpu_memory import (
    CardPlan,
    activation_bytes,
    fitting_batch_tokens,
    graph_bytes,
    is_out_of_memory,
    out_of_memory,
    reckon_needs,
)
from vila2.errors import UsageError
from vila2.model.decoder import DecoderConfig
from vila2.model.projector import ProjectorConfig
from vila2.model.vision import VisionConfig
from vila2.model.vlm import ModelConfig

GIB = 2**30
VILA_8B = ModelConfig(
    VisionConfig(
        "siglip", 384, 14, 1152, 4304, 27, 16, "gelu_pytorch_tanh", 1e-6, select_feature="cls_patch"
    ),
    ProjectorConfig("mlp_downsample", 1152, 4096, column_major=True),
    DecoderConfig(128256, 4096, 14336, 32, 32, 8, 128, 8192),
    "resize",
    384,
)
STEPS = {"max_batch_tokens": 8192, "max_num_seqs": 256, "vision_batch": 64}
GRAPHS = {"num_graphs": 40}


def plan(free: int, total: int = 80 * GIB, share: float = 0.9, **sizes: int) -> CardPlan:
    needs = reckon_needs(VILA_8B, **{**STEPS, **GRAPHS, "images": 384, **sizes})
    return CardPlan(total, free, share, needs, needs)


def test_an_h100_holds_an_8b_model_and_a_large_cache():
    weights = 16 * GIB
    card = plan(80 * GIB - weights)
    assert 50 * GIB < card.kv_bytes < 56 * GIB
    assert card.needs.images == 384 * 196 * 4096 * 2
    assert card.kv_bytes + weights + card.needs.total == int(0.9 * 80 * GIB)


def test_more_at_once_leaves_less_for_the_cache():
    assert plan(60 * GIB).kv_bytes < plan(60 * GIB, max_batch_tokens=512).kv_bytes
    assert plan(60 * GIB).kv_bytes < plan(60 * GIB, images=1).kv_bytes


def test_a_small_card_is_told_what_to_lower():
    with pytest.raises(UsageError, match=r"of 16\.0 GiB --gpu-memory 0\.9 allows 14\.4 GiB.*--batch-size"):
        _ = plan(GIB, 16 * GIB).kv_bytes


def test_more_graphs_leave_less_for_the_cache():
    few, many = (plan(60 * GIB, num_graphs=count).kv_bytes for count in (10, 40))
    assert few - many == graph_bytes(VILA_8B, 256, 40) - graph_bytes(VILA_8B, 256, 10) > 0


def test_steps_shrink_to_what_is_left_with_everything_in_place():
    most = activation_bytes(VILA_8B, *STEPS.values())
    assert fitting_batch_tokens(VILA_8B, free=most, **STEPS) == 8192
    assert fitting_batch_tokens(VILA_8B, free=most - 1, **STEPS) == 4096
    least = activation_bytes(VILA_8B, 256, 256, 64)
    assert fitting_batch_tokens(VILA_8B, free=least, **STEPS) == 256
    with pytest.raises(
        UsageError, match=r"too small for the first step: .* GiB are left, and 256 sequences need"
    ):
        fitting_batch_tokens(VILA_8B, free=least - 1, **STEPS)
    # What was measured counts, not what is reckoned.
    assert fitting_batch_tokens(VILA_8B, free=most // 2, **STEPS, steps=most // 2) == 8192
    assert fitting_batch_tokens(VILA_8B, free=most, **STEPS, steps=most + 2**20) == 4096


def test_a_card_that_is_full_in_spite_of_it_all_says_what_to_lower():
    message = str(out_of_memory("encoding", free=GIB // 2, total=16 * GIB))
    assert message.startswith(
        "out of GPU memory while encoding: 0.5 GiB of 16.0 GiB are free; lower --batch-size"
    )
    assert "--gpu-memory" in message
    assert "--precision" in message


@pytest.mark.parametrize(
    "place", ["vila2.backends.native.load_checkpoint", "vila2.engine.engine.ModelRunner"]
)
def test_no_memory_at_the_start_is_one_line_with_sizes(tmp_path, monkeypatch, place):
    def full(*args, **more):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    path = write_llava(tmp_path / "tiny")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (GIB, 16 * GIB))
    monkeypatch.setattr(place, full)
    with pytest.raises(
        UsageError, match=r"^out of GPU memory while the model, its cache .* are made: 1\.0 GiB of 16"
    ):
        open_checkpoint(path, device="cpu", precision="float32", threads=1)


@pytest.mark.parametrize(
    ("error", "is_full"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_says_that_memory_has_ended(error, is_full):
    assert is_out_of_memory(error) == is_full
