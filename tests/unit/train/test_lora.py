"""Adapters: at first they change nothing, they alone learn, and merged they compute the same."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.checkpoints import write_vila15
from vila2.model.checkpoint import load_checkpoint
from vila2.model.decoder import DenseAttend
from vila2.model.vlm import VisionLanguageModel
from vila2.train.lora import adapter_targets, adapters_of, add_adapters, merged, save_adapter
from vila2.train.recipe import LoraSettings

SETTINGS = LoraSettings(rank=4, alpha=8, parts=("decoder",))


@pytest.fixture
def model(tmp_path: Path) -> VisionLanguageModel:
    return load_checkpoint(write_vila15(tmp_path / "model"), dtype=torch.float32).model


def hidden(model: VisionLanguageModel) -> Tensor:
    decoder, ids = model.decoder, torch.arange(3, 15)
    attend = DenseAttend(torch.arange(len(ids)), [len(ids)], decoder.cos, decoder.sin)
    found: Tensor = decoder(decoder.embed(ids), attend)
    return found


def train_adapters(model: VisionLanguageModel) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def test_new_adapters_change_nothing_and_learn_alone(model: VisionLanguageModel) -> None:
    before = hidden(model)
    model.projector.requires_grad_(True)
    add_adapters(model, SETTINGS)
    torch.testing.assert_close(hidden(model), before)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.partition(".")[0] for name in learning} == {"projector", "decoder"}
    assert all("lora_" in name for name in learning if name.startswith("decoder."))
    assert len(learning) == 2 * len(adapter_targets(model, SETTINGS)) or any(
        "projector" in n for n in learning
    )


def test_targets_are_what_mixes(model: VisionLanguageModel) -> None:
    both = LoraSettings(parts=("decoder", "vision"))
    names = adapter_targets(model, both)
    assert "decoder.layers.0.qkv" in names
    assert "vision.layers.0.fc1" in names
    assert not any(name.endswith(("lm_head", "patch_embedding")) for name in names)


def test_merged_weights_compute_the_same(model: VisionLanguageModel) -> None:
    plain_names = set(model.state_dict())
    before = hidden(model)
    add_adapters(model, SETTINGS)
    train_adapters(model)
    adapted = hidden(model)
    assert not torch.allclose(adapted, before, atol=1e-3)
    plain = VisionLanguageModel.from_config(model.config)
    state = merged(dict(model.state_dict()), SETTINGS)
    assert set(state) == plain_names
    plain.load_state_dict(state)
    torch.testing.assert_close(hidden(plain), adapted, rtol=1e-4, atol=1e-5)


def test_bfloat16_adapters_are_bfloat16(model: VisionLanguageModel) -> None:
    model.to(torch.bfloat16)
    add_adapters(model, SETTINGS)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_the_saved_adapter_is_peft_s(model: VisionLanguageModel, tmp_path: Path) -> None:
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    add_adapters(model, SETTINGS)
    train_adapters(model)
    adapted = hidden(model)
    save_adapter(tmp_path / "adapter", dict(model.state_dict()), SETTINGS)
    stored = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    fresh = load_checkpoint(tmp_path / "model", dtype=torch.float32).model
    inject_adapter_in_model(
        LoraConfig(**{k: stored[k] for k in ("r", "lora_alpha", "target_modules")}), fresh
    )
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(weights) == len(adapters_of(dict(model.state_dict())))
    result = set_peft_model_state_dict(
        fresh, {k.removeprefix("base_model.model."): v for k, v in weights.items()}
    )
    assert not result.unexpected_keys
    torch.testing.assert_close(hidden(fresh), adapted)
