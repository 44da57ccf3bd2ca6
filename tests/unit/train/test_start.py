"""Models put together: parts from several folders, fresh parts from the seed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import write_nvila, write_vila15
from vila2.config import make_settings
from vila2.errors import CheckpointError
from vila2.model.checkpoint import load_checkpoint, save_vila
from vila2.train.recipe import ModelSettings, Recipe
from vila2.train.start import Start, assemble, base_digests, load_trained

SHAPES = {"kind": "siglip", "image_size": 56, "patch_size": 14, "width": 32, "num_layers": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vila15(tmp_path_factory.mktemp("start") / "vila")


def put_together(seed: int = 0, **parts: Any) -> Start:
    return assemble(make_settings(ModelSettings, parts), seed, torch.float32, "cpu")


def test_parts_of_a_checkpoint_and_a_fresh_projector(checkpoint: Path) -> None:
    whole = load_checkpoint(checkpoint, dtype=torch.float32).model
    start = put_together(vision=str(checkpoint), decoder=str(checkpoint), generation="vila1.5")
    for part in ("vision", "decoder"):
        for name, tensor in getattr(whole, part).state_dict().items():
            assert torch.equal(getattr(start.model, part).state_dict()[name], tensor)
    fresh = start.model.projector.state_dict()
    assert not torch.equal(fresh["layers.2.weight"], whole.projector.state_dict()["layers.2.weight"])
    assert start.config.projector.column_major
    assert not any(parameter.requires_grad for parameter in start.model.parameters())


def test_parts_in_plain_folders(checkpoint: Path, tmp_path: Path) -> None:
    """A SigLIP with the text half of the whole model beside it, and a language model alone."""
    shutil.copytree(checkpoint / "llm", tmp_path / "llm")
    shutil.copytree(checkpoint / "vision_tower", tmp_path / "siglip")
    tensors = load_file(tmp_path / "siglip" / "model.safetensors")
    save_file(tensors | {"text_model.x": torch.zeros(1)}, tmp_path / "siglip" / "model.safetensors")
    plain = put_together(vision=str(tmp_path / "siglip"), decoder=str(tmp_path / "llm"), template="vicuna_v1")
    whole = put_together(vision=str(checkpoint), decoder=str(checkpoint), template="vicuna_v1")
    assert plain.config == whole.config
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(plain.model.state_dict()[name], tensor), name


def test_fresh_parts_follow_from_the_seed(checkpoint: Path) -> None:
    shapes = {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 2,
        "tie_embeddings": True,
        "max_positions": 256,
    }
    parts = {
        "vision": SHAPES,
        "decoder": shapes,
        "tokenizer": str(checkpoint / "llm"),
        "template": "vicuna_v1",
    }
    one, same, other = put_together(1, **parts), put_together(1, **parts), put_together(2, **parts)
    state = one.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in same.model.state_dict().items())
    assert not torch.equal(
        state["decoder.layers.0.o.weight"], other.model.state_dict()["decoder.layers.0.o.weight"]
    )
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state.values())
    assert one.model.decoder.lm_head.weight is one.model.decoder.embed_tokens.weight
    assert one.config.decoder.vocab_size > 256


def test_a_fresh_model_survives_the_vila_layout(checkpoint: Path, tmp_path: Path) -> None:
    shapes = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "max_positions": 256}
    start = put_together(
        vision=SHAPES, decoder=shapes, tokenizer=str(checkpoint / "llm"), template="vicuna_v1"
    )
    save_vila(tmp_path / "saved", start.model, start.tokenizer_folder, start.config)
    back = load_trained(tmp_path / "saved", torch.float32, "cpu")
    assert back.config == start.config
    for name, tensor in start.model.state_dict().items():
        assert torch.equal(back.model.state_dict()[name], tensor), name


def test_parts_that_do_not_fit_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    other = write_nvila(tmp_path / "nvila")
    with pytest.raises(CheckpointError, match="its projector is"):
        put_together(vision=str(checkpoint), decoder=str(checkpoint), projector=str(other))
    with pytest.raises(CheckpointError, match="no folder"):
        put_together(vision=str(tmp_path / "none"), decoder=str(checkpoint))
    decoder = {"hidden_size": 30, "num_heads": 4}
    with pytest.raises(CheckpointError, match="do not divide"):
        put_together(vision=str(checkpoint), decoder=decoder, tokenizer=str(checkpoint / "llm"))


def test_missing_weights_are_named(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint / "llm", tmp_path / "llm")
    tensors = load_file(tmp_path / "llm" / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "llm" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 weights are missing: model\.norm\.weight"):
        put_together(vision=str(checkpoint), decoder=str(tmp_path / "llm"))


def test_digests_notice_other_contents(checkpoint: Path, tmp_path: Path) -> None:
    def digests(decoder: Path) -> dict[str, str]:
        stage = {
            "name": "a",
            "train": "projector",
            "steps": 1,
            "lr": 1,
            "data": [{"kind": "world", "texts": "alt"}],
        }
        model = {"vision": str(checkpoint), "decoder": str(decoder)}
        return base_digests(make_settings(Recipe, {"model": model, "out": "x", "stage": [stage]}))

    shutil.copytree(checkpoint / "llm", tmp_path / "llm")
    before = digests(tmp_path / "llm")
    assert set(before) == {"vision", "decoder"}
    config = json.loads((tmp_path / "llm" / "config.json").read_text())
    (tmp_path / "llm" / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    after = digests(tmp_path / "llm")
    assert after["vision"] == before["vision"]
    assert after["decoder"] != before["decoder"]
