"""The KV budget of a card, reckoned for VILA1.5-8B, with no card at hand."""

from dataclasses import replace

import pytest
import torch

from tests.checkpoints import write_llava
from vila2.backends.native import open_checkpoint, size_engine
from vila2.engine.cuda_graphs import padded_sizes
from vila2.engine.engine import EngineLimits
from vila2.engine.gpu_memory import (
    activation_bytes,
    fitting_batch_tokens,
    graph_bytes,
    kv_budget,
    out_of_memory,
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


def test_an_h100_holds_an_8b_model_and_a_large_cache():
    weights = 16 * GIB
    budget = kv_budget(VILA_8B, free=80 * GIB - weights, total=80 * GIB, share=0.9, **STEPS, **GRAPHS)
    assert 50 * GIB < budget < 56 * GIB
    others = activation_bytes(VILA_8B, *STEPS.values()) + graph_bytes(VILA_8B, 256, 40)
    assert budget + weights + others < 0.9 * 80 * GIB


def test_more_at_once_leaves_less_for_the_cache():
    small = kv_budget(
        VILA_8B, free=60 * GIB, total=80 * GIB, share=0.9, **{**STEPS, **GRAPHS, "max_batch_tokens": 512}
    )
    large = kv_budget(VILA_8B, free=60 * GIB, total=80 * GIB, share=0.9, **STEPS, **GRAPHS)
    assert large < small


def test_a_small_card_is_told_what_to_lower():
    with pytest.raises(UsageError, match=r"of 16\.0 GiB --gpu-memory 0\.9 allows 14\.4 GiB.*--batch-size"):
        kv_budget(VILA_8B, free=GIB, total=16 * GIB, share=0.9, **STEPS, **GRAPHS)


def test_more_graphs_leave_less_for_the_cache():
    few, many = (
        kv_budget(VILA_8B, free=60 * GIB, total=80 * GIB, share=0.9, **STEPS, num_graphs=count)
        for count in (10, 40)
    )
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


def test_a_card_that_is_full_in_spite_of_it_all_says_what_to_lower():
    message = str(out_of_memory("encoding", free=GIB // 2, total=16 * GIB))
    assert message.startswith(
        "out of GPU memory while encoding: 0.5 GiB of 16.0 GiB are free; lower --batch-size"
    )
    assert "--gpu-memory" in message
    assert "--precision" in message


def test_the_cache_of_an_opened_checkpoint_is_what_the_card_has_left(tmp_path, monkeypatch):
    """The sizes that `--gpu-memory` gives, from the driver's own figures, with no card at hand."""
    captioner = open_checkpoint(write_llava(tmp_path / "tiny"), device="cpu", precision="float32", threads=1)
    config = captioner.checkpoint.config
    plan = replace(captioner.plan, kv_dtype=torch.bfloat16)
    token = 2 * config.decoder.num_layers * config.decoder.num_kv_heads * config.decoder.head_dim * 2

    def sizes(free: int, share: float) -> EngineLimits:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 4 * GIB))
        return size_engine(captioner.checkpoint, plan, "cuda", 512, 64, share)

    others = 4 * GIB - kv_budget(
        config, free=4 * GIB, total=4 * GIB, share=1.0, max_batch_tokens=8192, max_num_seqs=512, vision_batch=64,
        num_graphs=2 * len(padded_sizes(512)),
    )  # fmt: skip
    room = 3000 * token  # less than 512 sequences would like
    assert sizes(others + room, 1.0).num_kv_tokens == 3000
    assert sizes(others + room + 2 * GIB, 0.5).num_kv_tokens == 3000  # half of the card is for others
    with pytest.raises(
        UsageError, match=r"no GPU memory is left for the KV cache: of 4\.0 GiB --gpu-memory 0\.25"
    ):
        sizes(4 * GIB, 0.25)
    with pytest.raises(
        UsageError, match=r"the KV cache of one sequence .* lower --max-new-tokens or free memory"
    ):
        sizes(others + 10 * token, 1.0)


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
