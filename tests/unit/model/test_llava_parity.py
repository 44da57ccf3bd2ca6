"""LLaVA against transformers: the same folder read by both gives the same prompt tokens and the same logits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration

from tests.checkpoints import write_llava
from vila2.model.checkpoint import LoadedCheckpoint, inspect_checkpoint, load_checkpoint
from vila2.model.decoder import DenseAttend
from vila2.model.images import PreparedImage
from vila2.model.prompt import PromptTokens, build_prompt

SHAPES = {
    "grouped heads": {},
    "tied, wide heads": {"text": {"tie_word_embeddings": True, "head_dim": 24}},
    "full features of the last layer": {
        "root": {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    },
    "first layers, odd grid": {
        "root": {"vision_feature_layer": 1, "image_seq_length": 25},
        "vision": {"image_size": 70},
    },
    "siglip and qwen2": {
        "text": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
        "root": {"vision_feature_select_strategy": "full"},
        "vision": {"model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh"},
    },
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def noise(height: int, width: int, seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def our_logits(checkpoint: LoadedCheckpoint, prompt: PromptTokens, images: list[PreparedImage]) -> Tensor:
    model = checkpoint.model
    ids = torch.tensor(prompt.token_ids)
    hidden = model.decoder.embed(ids.clamp_min(0))
    visual = model.encode_images(images)
    for start, length, image, _ in prompt.image_spans:
        hidden[start : start + length] = visual[image]
    attend = DenseAttend(torch.arange(len(ids)), [len(ids)], model.decoder.cos, model.decoder.sin)
    return model.decoder.logits(model.decoder(hidden, attend))


def their_model(path: Path) -> LlavaForConditionalGeneration:
    model, info = LlavaForConditionalGeneration.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"]
    return model.eval()


def their_logits(
    model: LlavaForConditionalGeneration, checkpoint: LoadedCheckpoint, prompt: PromptTokens, tiles: Tensor
) -> Tensor:
    config = checkpoint.config
    image_id = model.config.image_token_id
    ids = torch.tensor([[image_id if token < 0 else token for token in prompt.token_ids]])
    inputs: dict[str, Any] = {}
    if len(tiles):
        pixels = (tiles.float() / 255 - torch.tensor(config.image_mean)) / torch.tensor(config.image_std)
        inputs["pixel_values"] = pixels.permute(0, 3, 1, 2)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits[0]


@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_transformers(tmp_path: Path, name: str) -> None:
    path = write_llava(tmp_path / "llava", **SHAPES[name])
    checkpoint, model = load_checkpoint(path, dtype=torch.float32), their_model(path)
    for seed, texts in enumerate(["What is this?", "<image>\nDescribe.", "<image> or <image>? <image>"]):
        count = texts.count("<image>")
        images = [
            checkpoint.image_processor.prepare(noise(40 + 31 * i, 90, seed + i), count) for i in range(count)
        ]
        prompt = build_prompt("vicuna_v1", texts, images, checkpoint.tokenizer, checkpoint.config)
        tiles = torch.from_numpy(np.concatenate([i.tiles for i in images])) if images else torch.empty(0)
        with torch.no_grad():
            ours = our_logits(checkpoint, prompt, images)
            theirs = their_logits(model, checkpoint, prompt, tiles)
        assert ours.shape == theirs.shape
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-4, texts


@pytest.mark.parametrize("generation", ["old", "new", "save_pretrained"])
def test_every_generation_of_weight_names_gives_the_same_model(tmp_path: Path, generation: str) -> None:
    reference = load_checkpoint(write_llava(tmp_path / "new"), dtype=torch.float32)
    path = tmp_path / "other"
    if generation == "save_pretrained":  # whatever the installed transformers writes
        their_model(tmp_path / "new").save_pretrained(path)
        for file in (
            "processor_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
        ):
            (path / file).write_bytes((tmp_path / "new" / file).read_bytes())
        assert inspect_checkpoint(path).config == reference.config
    else:
        write_llava(path, generation=generation)
    state = load_checkpoint(path, dtype=torch.float32).model.state_dict()
    for name, tensor in reference.model.state_dict().items():
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("num_images", [0, 1, 3])
def test_prompt_tokens_equal_the_transformers_processor(tmp_path: Path, num_images: int) -> None:
    path = write_llava(tmp_path / "llava")
    checkpoint = load_checkpoint(path, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(path)
    pictures = [noise(50, 60 + i, i) for i in range(num_images)]
    question = "What does the sign say?"
    content = [{"type": "image"}] * num_images + [{"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    images = [Image.fromarray(picture) for picture in pictures] or None
    expected = processor(images=images, text=text)["input_ids"][0]
    prepared = [checkpoint.image_processor.prepare(picture, num_images) for picture in pictures]
    prompt = build_prompt("auto", question, prepared, checkpoint.tokenizer, checkpoint.config)
    image_id = checkpoint.tokenizer.image_token_id
    assert [image_id if token < 0 else token for token in prompt.token_ids] == list(expected)
    assert len(prompt.image_spans) == num_images
