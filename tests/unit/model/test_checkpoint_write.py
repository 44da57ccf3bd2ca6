"""Checkpoints written: our VILA layout reads back bit for bit, here and in transformers; pickles are converted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, SiglipVisionModel

from tests.checkpoints import write_llava, write_nvila, write_vila15
from vila2.errors import CheckpointError, OutputError
from vila2.model.checkpoint import LoadedCheckpoint, inspect_checkpoint, load_checkpoint, save_vila
from vila2.model.convert import convert_checkpoint

CLIP = {"model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"], "hidden_act": "quick_gelu"}
S2 = {"s2": True, "s2_scales": "70,140", "s2_max_split_size": 70, "mm_hidden_size": 64}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
NO_NEWLINE = json.dumps({"_target_": "llava.model.encoders.BasicImageEncoder", "end_tokens": None})
MODELS: dict[str, Callable[[Path], Path]] = {
    "vila1.5": write_vila15,
    "vila1.5, bf16": lambda path: write_vila15(path, dtype=torch.bfloat16),
    "vila1.5, tied, stretched": lambda path: write_vila15(
        path, llm={"tie_word_embeddings": True, "rope_scaling": LLAMA3_ROPE, "head_dim": 24}
    ),
    "vila1.5, s2": lambda path: write_vila15(path, root=S2),
    "vila1.5, linear, pad": lambda path: write_vila15(
        path, projector="linear", root={"image_aspect_ratio": "pad"}
    ),
    "vila1.5, clip": lambda path: write_vila15(
        path, vision=CLIP, projector="mlp2x_gelu", root={"image_aspect_ratio": None}
    ),
    "nvila": write_nvila,
    "nvila, dynamic": lambda path: write_nvila(path, mode="dynamic", projector="mlp_downsample_3x3_fix"),
    "nvila, resize": lambda path: write_nvila(path, mode="resize"),
    "nvila, no newline": lambda path: write_nvila(path, root={"image_encoder": NO_NEWLINE}),
    "llava": write_llava,
    "llava, full features": lambda path: write_llava(path, root={"vision_feature_select_strategy": "full"}),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def load(path: Path, dtype: torch.dtype = torch.float32) -> LoadedCheckpoint:
    return load_checkpoint(path, dtype=dtype)


def tokenizer_folder(path: Path) -> Path:
    return inspect_checkpoint(path).layout.tokenizer_folder


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_reads_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    path = MODELS[name](tmp_path / "model")
    dtype = torch.bfloat16 if "bf16" in name else torch.float32
    first = load(path, dtype)
    save_vila(tmp_path / "a copy", first.model, tokenizer_folder(path), first.config)
    second = load(tmp_path / "a copy", dtype)
    other = second.model.state_dict()
    assert other.keys() == first.model.state_dict().keys()
    for key, tensor in first.model.state_dict().items():
        assert other[key].dtype == tensor.dtype
        assert torch.equal(other[key], tensor), key
    assert second.image_processor == first.image_processor
    assert second.config.template == first.config.template
    assert second.config.token_newline == first.config.token_newline
    assert second.config.projector == first.config.projector
    assert second.config.decoder == first.config.decoder
    assert second.tokenizer.eos_ids == first.tokenizer.eos_ids
    assert second.tokenizer.image_token_id == first.tokenizer.image_token_id
    assert second.config.vision.num_tokens == first.config.vision.num_tokens


def test_a_saved_model_of_the_same_config_has_the_same_config(tmp_path: Path) -> None:
    first = load(write_nvila(tmp_path / "model"))
    save_vila(tmp_path / "a", first.model, tmp_path / "model" / "llm", first.config)
    second = load(tmp_path / "a")
    save_vila(tmp_path / "b", second.model, tmp_path / "a" / "llm", second.config)
    assert load(tmp_path / "b").config == second.config
    assert inspect_checkpoint(tmp_path / "b").digest == second.digest


def test_a_big_model_is_written_in_shards_and_leaves_nothing_of_an_earlier_save(tmp_path: Path) -> None:
    first = load(write_vila15(tmp_path / "model"))
    files = sorted((tmp_path / "model" / "llm").glob("tokenizer*"))
    other = load(write_vila15(tmp_path / "other", seed=5))
    save_vila(tmp_path / "saved", other.model, files, other.config)
    save_vila(tmp_path / "saved", first.model, files, first.config, max_shard_bytes=50_000)
    names = sorted(path.name for path in (tmp_path / "saved" / "llm").glob("*.safetensors"))
    assert len(names) > 3
    assert names[0].startswith("model-00001-of-0")
    state = load(tmp_path / "saved").model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in first.model.state_dict().items())
    save_vila(tmp_path / "saved", other.model, files, other.config)
    assert [p.name for p in (tmp_path / "saved" / "llm").glob("model*")] == ["model.safetensors"]
    assert torch.equal(load(tmp_path / "saved").model.decoder.norm.weight, other.model.decoder.norm.weight)


def test_an_interrupted_save_is_no_checkpoint(tmp_path: Path) -> None:
    first = load(write_vila15(tmp_path / "model"))
    save_vila(tmp_path / "saved", first.model, [], first.config)
    with pytest.raises(FileNotFoundError):
        save_vila(tmp_path / "saved", first.model, [tmp_path / "missing"], first.config)
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        inspect_checkpoint(tmp_path / "saved")


def test_transformers_reads_the_parts_that_we_write(tmp_path: Path) -> None:
    first = load(write_vila15(tmp_path / "model"))
    save_vila(tmp_path / "saved", first.model, tmp_path / "model" / "llm", first.config)
    llm, info = LlamaForCausalLM.from_pretrained(tmp_path / "saved" / "llm", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(llm.lm_head.weight, first.model.decoder.lm_head.weight)
    tower, info = SiglipVisionModel.from_pretrained(
        tmp_path / "saved" / "vision_tower", output_loading_info=True
    )
    unread = {name for name in info["missing_keys"] if "head" not in name and "post_layernorm" not in name}
    assert not unread
    tiles = torch.randint(0, 256, (2, 70, 70, 3), dtype=torch.uint8)
    with torch.no_grad():
        ours = first.model.vision(tiles)
        pixels = (tiles.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
        theirs = tower(pixels, output_hidden_states=True).hidden_states[-1]
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_a_projector_without_bias_has_no_place_in_the_vila_layout(tmp_path: Path) -> None:
    path = write_llava(tmp_path / "model")
    config = json.loads((path / "config.json").read_text()) | {"multimodal_projector_bias": False}
    (path / "config.json").write_text(json.dumps(config))
    tensors = load_file(path / "model.safetensors")
    biases = [name for name in tensors if "projector" in name and name.endswith("bias")]
    save_file(
        {name: tensor for name, tensor in tensors.items() if name not in biases}, path / "model.safetensors"
    )
    loaded = load(path)
    assert not loaded.config.projector.bias
    with pytest.raises(ValueError, match="without bias"):
        save_vila(tmp_path / "saved", loaded.model, path, loaded.config)


# ---- pickles ----


def pickle_weights(folder: Path, name: str = "pytorch_model.bin", shards: int = 1, **wrap: Any) -> None:
    """Replace the safetensors of a folder by what torch.save made of old."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save({wrap["under"]: tensors} if wrap else tensors, folder / name)
        return
    weight_map = {}
    for number in range(shards):
        part = {key: tensors[key] for key in list(tensors)[number::shards]}
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_pickled_vila_checkpoint_is_converted(tmp_path: Path) -> None:
    path = write_vila15(tmp_path / "old", num_shards=1)
    expected = load(path).model.state_dict()
    pickle_weights(path / "llm", shards=3)
    pickle_weights(path / "vision_tower")
    pickle_weights(path / "mm_projector", "mm_projector.bin", under="state_dict")
    torch.save({"lr": 1}, path / "training_args.bin")
    with pytest.raises(CheckpointError, match="vila2-fast convert"):
        inspect_checkpoint(path)
    written = convert_checkpoint(path, tmp_path / "new")
    assert len(written) == 5
    assert all(file.is_file() for file in written)
    assert not [file for file in (tmp_path / "new").rglob("*") if file.suffix in (".bin", ".pt", ".pth")]
    state = load(tmp_path / "new").model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())


def test_tied_weights_and_the_old_file_format_are_converted(tmp_path: Path) -> None:
    path = write_llava(tmp_path / "old")
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"]
    torch.save(tensors, path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    convert_checkpoint(path, tmp_path / "new")
    decoder = load(tmp_path / "new").model.decoder
    assert torch.equal(decoder.lm_head.weight, decoder.embed_tokens.weight)


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, (self.marker,)  # type: ignore[return-value]


def test_a_pickle_that_holds_code_is_refused_and_not_run(tmp_path: Path) -> None:
    path = write_vila15(tmp_path / "old")
    marker = tmp_path / "ran"
    (path / "llm" / "model.safetensors").unlink()
    torch.save({"weight": Evil(marker)}, path / "llm" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin holds more than tensors"):
        convert_checkpoint(path, tmp_path / "new")
    assert not marker.exists()
    assert sorted(child.name for child in tmp_path.iterdir()) == ["old"]


@pytest.mark.parametrize("content", [b"", b"no torch file", b"PK\x03\x04 cut"])
def test_a_broken_pickle_is_named(tmp_path: Path, content: bytes) -> None:
    path = write_vila15(tmp_path / "old")
    (path / "llm" / "model.safetensors").unlink()
    (path / "llm" / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        convert_checkpoint(path, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_conversions_that_cannot_work_are_refused(tmp_path: Path) -> None:
    path = write_vila15(tmp_path / "old")
    with pytest.raises(CheckpointError, match="nothing to convert"):
        convert_checkpoint(path, tmp_path / "new")
    with pytest.raises(OutputError, match="exists already"):
        convert_checkpoint(path, tmp_path)
    with pytest.raises(OutputError, match="lies inside"):
        convert_checkpoint(path, path / "llm" / "new")
    with pytest.raises(CheckpointError, match="is not a folder"):
        convert_checkpoint(path / "config.json", tmp_path / "new")
    pickle_weights(path / "llm", shards=2)
    (path / "llm" / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match=r"lacks pytorch_model-00002-of-00002\.bin"):
        convert_checkpoint(path, tmp_path / "new")
    (path / "llm" / "pytorch_model.bin.index.json").unlink()
    (path / "llm" / "other.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no index says"):
        convert_checkpoint(path, tmp_path / "new")
    assert sorted(child.name for child in tmp_path.iterdir()) == ["old"]
