"""The KV budget of a card, reckoned for VILA1.5-8B, with no card at hand."""

import pytest

from vila2.engine.gpu_memory import activation_bytes, kv_budget
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


def test_an_h100_holds_an_8b_model_and_a_large_cache():
    weights = 16 * GIB
    budget = kv_budget(VILA_8B, free=80 * GIB - weights, total=80 * GIB, share=0.9, **STEPS)
    assert 50 * GIB < budget < 56 * GIB
    assert budget + weights + activation_bytes(VILA_8B, *STEPS.values()) < 0.9 * 80 * GIB


def test_more_at_once_leaves_less_for_the_cache():
    small = kv_budget(VILA_8B, free=60 * GIB, total=80 * GIB, share=0.9, **{**STEPS, "max_batch_tokens": 512})
    large = kv_budget(VILA_8B, free=60 * GIB, total=80 * GIB, share=0.9, **STEPS)
    assert large < small


def test_a_small_card_is_told_what_to_lower():
    with pytest.raises(UsageError, match=r"of 16\.0 GiB --gpu-memory 0\.9 allows 14\.4 GiB.*--batch-size"):
        kv_budget(VILA_8B, free=GIB, total=16 * GIB, share=0.9, **STEPS)
