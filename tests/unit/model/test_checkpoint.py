"""Checkpoints read: each layout, how the generations are told apart, types, digests."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints import write_llava, write_nvila, write_vila15
from vila2.model import checkpoint as checkpoint_module
from vila2.model.checkpoint import inspect_checkpoint, load_checkpoint
from vila2.model.vila_format import is_nvila

WRITERS: dict[str, Callable[..., Path]] = {
    "vila1.5": write_vila15,
    "nvila": write_nvila,
    "llava": write_llava,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.set_num_threads(1)
    return tmp_path / "cache" / "vila2-fast" / "digests.json"


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None takes a key away."""
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_loads_and_says_what_it_is(tmp_path: Path, kind: str) -> None:
    path = WRITERS[kind](tmp_path / "model")
    info = inspect_checkpoint(path)
    loaded = load_checkpoint(path, dtype=torch.float32)
    assert info.kind == kind
    assert loaded.config == info.config
    assert loaded.digest == info.digest
    parameters = list(loaded.model.parameters())
    assert sum(parameter.numel() for parameter in parameters) == info.num_parameters
    assert info.num_bytes == 4 * info.num_parameters
    assert info.dtypes == {"F32": info.num_parameters}
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in parameters)
    assert not loaded.model.training


def test_the_three_kinds_differ_where_they_should(tmp_path: Path) -> None:
    vila15 = inspect_checkpoint(write_vila15(tmp_path / "VILA1.5-3b")).config
    nvila = inspect_checkpoint(write_nvila(tmp_path / "nvila")).config
    llava = inspect_checkpoint(write_llava(tmp_path / "llava")).config
    assert [c.projector.column_major for c in (vila15, nvila, llava)] == [True, False, False]
    assert [c.token_newline for c in (vila15, nvila, llava)] == [False, True, False]
    assert [c.template for c in (vila15, nvila, llava)] == ["vicuna_v1", "auto", "auto"]
    assert [c.image_mode for c in (vila15, nvila, llava)] == ["resize", "dynamic_s2", "center_crop"]
    assert nvila.s2_scales == (56, 112, 168)
    assert nvila.projector.input_width == 3 * nvila.vision.width
    assert [c.decoder.qkv_bias for c in (vila15, nvila, llava)] == [False, True, False]


def test_weights_land_where_they_belong(tmp_path: Path) -> None:
    path = write_vila15(tmp_path / "model", num_shards=3)
    state = load_checkpoint(path, dtype=torch.float32).model.state_dict()
    llm: dict[str, torch.Tensor] = {}
    for file in (path / "llm").glob("*.safetensors"):
        llm |= load_file(file)
    tower = load_file(path / "vision_tower" / "model.safetensors")
    q, k, v = (llm[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv")
    assert torch.equal(state["decoder.layers.1.qkv.weight"], torch.cat((q, k, v)))
    gate, up = (llm[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    assert torch.equal(state["decoder.layers.0.gate_up.weight"], torch.cat((gate, up)))
    assert torch.equal(state["decoder.lm_head.weight"], llm["lm_head.weight"])
    patch = tower["vision_model.embeddings.patch_embedding.weight"]
    assert torch.equal(state["vision.patch_embedding.weight"], patch.flatten(1))
    biases = [tower[f"vision_model.encoder.layers.1.self_attn.{name}_proj.bias"] for name in "qkv"]
    assert torch.equal(state["vision.layers.1.qkv.bias"], torch.cat(biases))
    assert "vision.layers.2.qkv.bias" not in state  # above the selected layer


@pytest.mark.parametrize("kind", WRITERS)
def test_shards_make_no_difference_but_to_the_digest(tmp_path: Path, kind: str) -> None:
    whole = load_checkpoint(WRITERS[kind](tmp_path / "a"), dtype=torch.float32)
    sharded = load_checkpoint(WRITERS[kind](tmp_path / "b", num_shards=3), dtype=torch.float32)
    other = sharded.model.state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in whole.model.state_dict().items())
    assert whole.digest != sharded.digest


def test_types_are_converted(tmp_path: Path) -> None:
    path = write_vila15(tmp_path / "model", dtype=torch.bfloat16)
    assert inspect_checkpoint(path).dtypes.keys() == {"BF16"}
    as_float = load_checkpoint(path, dtype=torch.float32).model
    as_bf16 = load_checkpoint(path, dtype=torch.bfloat16).model
    assert {p.dtype for p in as_bf16.parameters()} == {torch.bfloat16}
    assert as_bf16.decoder.cos.dtype == torch.float32
    other = as_bf16.state_dict()
    for name, tensor in as_float.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, other[name].float())


@pytest.mark.parametrize("kind", WRITERS)
def test_tied_embeddings_are_one_weight(tmp_path: Path, kind: str) -> None:
    key = "text" if kind == "llava" else "llm"
    path = WRITERS[kind](tmp_path / "model", **{key: {"tie_word_embeddings": True}})
    decoder = load_checkpoint(path, dtype=torch.float32).model.decoder
    assert decoder.lm_head.weight is decoder.embed_tokens.weight


def test_a_llava_config_may_say_for_the_whole_model_that_embeddings_are_tied(tmp_path: Path) -> None:
    path = write_llava(tmp_path / "model", text={"tie_word_embeddings": True})
    config = json.loads((path / "config.json").read_text())
    del config["text_config"]["tie_word_embeddings"]
    (path / "config.json").write_text(json.dumps(config))
    assert inspect_checkpoint(path).config.decoder.tie_embeddings


def test_the_parts_may_lie_in_a_folder_called_model(tmp_path: Path) -> None:
    write_nvila(tmp_path / "run" / "model")
    assert inspect_checkpoint(tmp_path / "run").kind == "nvila"
    assert load_checkpoint(tmp_path / "run", dtype=torch.float32).config.image_mode == "dynamic_s2"


def test_paths_of_the_training_machine_are_not_followed(tmp_path: Path) -> None:
    path = write_vila15(tmp_path / "model")
    decoy = write_vila15(tmp_path / "decoy", seed=9)
    stale = {"_name_or_path": str(decoy), "resume_path": str(decoy)}
    edit(path / "config.json", **stale, llm_cfg={"_name_or_path": str(decoy / "llm")})
    edit(path / "llm" / "config.json", _name_or_path=str(decoy / "llm"))
    ours = load_checkpoint(path, dtype=torch.float32).model.decoder.embed_tokens.weight
    expected = load_file(path / "llm" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("part", ["llm", "vision_tower", "mm_projector"])
def test_a_parts_config_may_be_only_in_the_root_or_only_in_the_part(tmp_path: Path, part: str) -> None:
    path = write_nvila(tmp_path / "model")
    expected = inspect_checkpoint(path).config
    saved = (path / part / "config.json").read_text()
    (path / part / "config.json").unlink()
    assert inspect_checkpoint(path).config == expected
    (path / part / "config.json").write_text(saved)
    edit(path / "config.json", **{f"{part}_cfg": None})
    assert inspect_checkpoint(path).config == expected


def test_s2_and_other_image_modes_are_read(tmp_path: Path) -> None:
    def mode(**root: Any) -> tuple[str, int]:
        path = write_vila15(tmp_path / "model", root=root)
        config = inspect_checkpoint(path).config
        return config.image_mode, config.tokens_per_tile

    assert mode() == ("resize", 9)
    assert mode(image_aspect_ratio="pad") == ("pad", 9)
    assert mode(image_aspect_ratio=None) == ("resize", 9)
    s2 = {"s2": True, "s2_scales": "70,140", "s2_max_split_size": 70, "mm_hidden_size": 64}
    assert mode(**s2) == ("s2", 9)
    clip = {
        "model_type": "clip_vision_model",
        "architectures": ["CLIPVisionModel"],
        "hidden_act": "quick_gelu",
    }
    path = write_vila15(
        tmp_path / "clip",
        vision=clip,
        root={"image_aspect_ratio": None, "mm_vision_select_feature": "patch"},
        projector="mlp2x_gelu",
    )
    config = inspect_checkpoint(path).config
    assert (config.image_mode, config.shortest_edge, config.tokens_per_tile) == ("center_crop", 70, 25)


LLAMA, QWEN = {"model_type": "llama"}, {"model_type": "qwen2"}
OLD, NEW = {"transformers_version": "4.36.2"}, {"transformers_version": "4.46.0"}


@pytest.mark.parametrize(
    ("root", "llm", "projector", "expected"),
    [
        (OLD, LLAMA, OLD, False),
        (NEW, QWEN, NEW, True),
        (OLD, QWEN, OLD, True),
        (NEW, LLAMA, NEW, True),  # NVILA on Llama
        (NEW | {"version": "2.0", "min_tiles": 1}, LLAMA, OLD, False),  # VILA1.5 converted for remote code
        (OLD | {"dynamic_s2": True}, LLAMA, OLD, True),
        (OLD | {"image_aspect_ratio": "dynamic"}, LLAMA, OLD, True),
        (OLD, LLAMA, {}, False),
        (NEW, LLAMA, {}, True),
        ({}, LLAMA, {}, False),
        ({"min_tiles": 1}, LLAMA, {}, True),
        ({"version": "2.0"}, LLAMA, {}, True),
        ({"transformers_version": "?"}, LLAMA, {}, False),
        (NEW | {"vila2_generation": "vila1.5"}, QWEN, NEW, False),
        (OLD | {"vila2_generation": "nvila"}, LLAMA, OLD, True),
    ],
)
def test_generations_are_told_apart(
    root: dict[str, Any], llm: dict[str, Any], projector: dict[str, Any], expected: bool
) -> None:
    assert is_nvila(root, llm, projector) is expected


def test_an_image_encoder_without_newline_is_obeyed(tmp_path: Path) -> None:
    encoder = json.dumps({"_target_": "llava.model.encoders.BasicImageEncoder", "end_tokens": None})
    path = write_nvila(tmp_path / "model", root={"image_encoder": encoder})
    config = inspect_checkpoint(path).config
    assert not config.token_newline
    assert not config.projector.column_major


def test_the_template_in_the_config_comes_first(tmp_path: Path) -> None:
    path = write_vila15(tmp_path / "Llama-3-VILA1.5-8B")
    assert inspect_checkpoint(path).config.template == "llama_3"
    edit(path / "config.json", chat_template="hermes-2")
    assert inspect_checkpoint(path).config.template == "hermes-2"
    assert inspect_checkpoint(write_vila15(tmp_path / "mine")).config.template == "vicuna_v1"


def test_the_engine_learns_what_ends_a_turn(tmp_path: Path) -> None:
    path = write_nvila(tmp_path / "model")
    (path / "llm" / "generation_config.json").write_text('{"eos_token_id": 0}')
    edit(path / "llm" / "tokenizer_config.json", eos_token="<|endoftext|>")
    loaded = load_checkpoint(path, dtype=torch.float32)
    assert loaded.tokenizer.eos_ids == {0, loaded.tokenizer.token_id("<|im_end|>")}


def test_the_digest_is_that_of_the_contents(tmp_path: Path) -> None:
    first = inspect_checkpoint(write_vila15(tmp_path / "a")).digest
    assert inspect_checkpoint(shutil.copytree(tmp_path / "a", tmp_path / "moved")).digest == first
    assert len(first) == 32
    (tmp_path / "a" / "README.md").write_text("not part of the model")
    assert inspect_checkpoint(tmp_path / "a").digest == first
    assert inspect_checkpoint(write_vila15(tmp_path / "b", seed=1)).digest != first
    edit(tmp_path / "a" / "llm" / "tokenizer_config.json", model_max_length=5)
    assert inspect_checkpoint(tmp_path / "a").digest != first


def test_a_changed_weight_changes_the_digest_although_it_is_remembered(tmp_path: Path, cache: Path) -> None:
    path = write_vila15(tmp_path / "a")
    first = inspect_checkpoint(path).digest
    assert len(json.loads(cache.read_text())) == 3
    file = path / "llm" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(1, 1))
    assert inspect_checkpoint(path).digest != first


def test_the_weights_are_hashed_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_vila15(tmp_path / "a")
    first = inspect_checkpoint(path).digest
    hashed: list[str] = []
    digest_module = checkpoint_module.checkpoint_digest.__globals__
    original = digest_module["_file_digest"]
    monkeypatch.setitem(digest_module, "_file_digest", lambda p: hashed.append(p.suffix) or original(p))
    assert inspect_checkpoint(path).digest == first
    assert ".safetensors" not in hashed
    assert ".json" in hashed
    cache.write_text("broken")
    assert inspect_checkpoint(path).digest == first
    assert hashed.count(".safetensors") == 3


def test_a_cache_that_cannot_be_written_costs_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = write_vila15(tmp_path / "a")
    assert inspect_checkpoint(path).digest == inspect_checkpoint(path).digest
