"""A checkpoint that cannot work is refused by name, from JSON and headers, before a model is made."""

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import write_llava, write_nvila, write_vila15
from tests.tiny_tokenizers import byte_tokenizer, write_tokenizer
from vila2.errors import CheckpointError
from vila2.model.checkpoint import inspect_checkpoint, load_checkpoint
from vila2.model.vlm import VisionLanguageModel


@pytest.fixture(autouse=True)
def no_model_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: Any) -> None:
        raise AssertionError("a model was made of a checkpoint that should have been refused")

    monkeypatch.setattr(VisionLanguageModel, "from_config", refuse)


def edit_json(name: str, **changes: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        file = path / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def edit_weights(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def rewrite(path: Path) -> None:
        tensors = load_file(path / name)
        change(tensors)
        save_file(tensors, path / name)

    return rewrite


def remove(*names: str) -> Callable[[Path], None]:
    def delete(path: Path) -> None:
        for name in names:
            shutil.rmtree(path / name) if (path / name).is_dir() else (path / name).unlink()

    return delete


def write_bytes(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: (path / name).write_bytes(change((path / name).read_bytes())) and None


def pickled(name: str, at: str) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        (path / name).unlink()
        (path / at).write_bytes(b"\x80\x04")

    return replace


def transpose(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda t: t.update({name: t[name].T.contiguous()})


def quantise(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.qweight"] = torch.zeros(4, 4, dtype=torch.int32)


LLM, TOWER, PROJECTOR = (f"{part}/model.safetensors" for part in ("llm", "vision_tower", "mm_projector"))
VILA: list[tuple[Callable[[Path], None], str]] = [
    (remove("llm"), r"lacks llm/: the checkpoint is incomplete"),
    (remove("mm_projector"), r"lacks mm_projector/"),
    (remove("llm", "vision_tower"), r"lacks llm/, vision_tower/"),
    (remove("config.json"), r"config\.json is missing"),
    (remove(LLM), r"llm holds no weights \(model\.safetensors or model\.safetensors\.index\.json\)"),
    (remove("vision_tower/preprocessor_config.json"), r"vision_tower lacks preprocessor_config\.json"),
    (pickled(LLM, "llm/pytorch_model.bin"), r"pytorch_model\.bin.*`vila2-fast convert \S+ NEW_FOLDER`"),
    (pickled(TOWER, "vision_tower/tower.pt"), r"tower\.pt.*vila2-fast convert"),
    (pickled(PROJECTOR, "mm_projector/mm_projector.pth"), r"mm_projector\.pth.*vila2-fast convert"),
    (write_bytes(LLM, lambda b: b[:-100]), r"bytes where its header promises \d+: download it again"),
    (write_bytes(LLM, lambda b: b + b"\0" * 8), r"bytes where its header promises"),
    (write_bytes(LLM, lambda b: b[:4]), r"not a safetensors file"),
    (write_bytes(LLM, lambda b: b""), r"not a safetensors file"),
    (write_bytes(LLM, lambda b: struct.pack("<Q", 1 << 60) + b[8:]), r"not a safetensors file"),
    (write_bytes(LLM, lambda b: b[:8] + b"x" + b[9:]), r"not a valid safetensors file"),
    (write_bytes("config.json", lambda b: b[:-20]), r"config\.json is not valid JSON"),
    (write_bytes("config.json", lambda b: b"[1]"), r"config\.json holds no JSON object"),
    (
        edit_weights(LLM, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
        r"1 weights are missing: llm: model\.layers\.1\.mlp\.up_proj\.weight",
    ),
    (
        edit_weights(LLM, lambda t: [t.pop(name) for name in list(t) if "layers.1" in name]),
        r"9 weights are missing: .* and 4 more",
    ),
    (
        edit_weights(TOWER, lambda t: t.pop("vision_model.encoder.layers.1.layer_norm2.bias")),
        r"vision_tower: encoder\.layers\.1\.layer_norm2\.bias",
    ),
    (
        edit_weights(PROJECTOR, lambda t: t.update({"layers.9.weight": torch.ones(2)})),
        r"unexpected: layers\.9",
    ),
    (
        edit_weights(LLM, lambda t: t.update({"model.layers.2.a": torch.ones(2)})),
        r"unexpected: model\.layers\.2\.a",
    ),
    (
        edit_weights(TOWER, lambda t: t.update({"vision_model.encoder.layers.7.a.weight": torch.ones(2)})),
        r"unexpected: vision_model\.encoder\.layers\.7",
    ),
    (
        edit_weights(LLM, transpose("model.layers.0.mlp.down_proj.weight")),
        r"model\.layers\.0\.mlp\.down_proj\.weight is \[96, 64\] instead of \[64, 96\]",
    ),
    (
        edit_weights(LLM, quantise),
        r"the weights are quantised \(model\.layers\.0\.self_attn\.q_proj\.qweight\)",
    ),
    (edit_json("llm/config.json", vocab_size=9999), r"instead of \[9999, 64\]"),
    (edit_json("llm/config.json", quantization_config={"quant_method": "awq"}), r"quantised \(awq\)"),
    (edit_json("llm/config.json", model_type="mixtral"), r"language model 'mixtral' is not supported"),
    (
        edit_json(
            "vision_tower/config.json", architectures=["InternVisionModel"], model_type="intern_vit_6b"
        ),
        r"vision tower 'InternVisionModel' is not supported; known are siglip, clip",
    ),
    (
        edit_json("vision_tower/config.json", architectures=["RADIOModel"], model_type="radio"),
        r"vision tower 'RADIOModel'",
    ),
    (
        edit_json("vision_tower/config.json", architectures=["Siglip2VisionModel"], model_type="siglip2"),
        r"vision tower 'Siglip2VisionModel'",
    ),
    (edit_json("mm_projector/config.json", mm_projector_type="resampler"), r"unknown projector 'resampler'"),
    (
        edit_json("mm_projector/config.json", mm_projector_type="mlp2x_gelu"),
        r"weights are missing: mm_projector",
    ),
    (edit_json("config.json", mm_use_im_start_end=True), r"mm_use_im_start_end is set"),
    (edit_json("config.json", ps3=True), r"ps3 is set"),
    (edit_json("config.json", image_aspect_ratio="anyres"), r"image_aspect_ratio 'anyres' is not supported"),
    (edit_json("config.json", mm_vision_select_layer=-9), r"select_layer -9"),
    (edit_json("config.json", mm_vision_select_feature="some"), r"select_feature 'some'"),
    (edit_json("config.json", s2=True, s2_scales="a,b"), r"s2_scales 'a,b'"),
    (edit_json("config.json", s2=True, s2_scales="60,120"), r"do not fit a vision tower of 70"),
    (
        edit_json("vision_tower/preprocessor_config.json", size={"height": 80, "width": 80}),
        r"makes 80 pixels a side, the vision tower reads 70",
    ),
    (edit_json("vision_tower/preprocessor_config.json", size={"height": 80, "width": 70}), r"not square"),
    (edit_json("vision_tower/preprocessor_config.json", resample=0), r"resample 0"),
]


@pytest.mark.parametrize("number", range(len(VILA)))
def test_a_vila_checkpoint_is_refused(tmp_path: Path, number: int) -> None:
    breakage, message = VILA[number]
    path = write_vila15(tmp_path / "model")
    inspect_checkpoint(path)
    breakage(path)
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(path, dtype=torch.float32)
    assert "\n" not in str(error.value)


INDEX = "model.safetensors.index.json"


def edit_index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def rewrite(path: Path) -> None:
        index = json.loads((path / INDEX).read_text())
        change(index["weight_map"])
        (path / INDEX).write_text(json.dumps(index))

    return rewrite


def point_outside(target: str) -> Callable[[Path], None]:
    return edit_index(lambda weight_map: weight_map.update(dict.fromkeys(list(weight_map)[:1], target)))


LLAVA: list[tuple[Callable[[Path], None], str]] = [
    (remove("model-00002-of-00003.safetensors"), r"lacks model-00002-of-00003\.safetensors: .*incomplete"),
    (remove(INDEX), r"model\.safetensors\.index\.json is missing"),
    (point_outside("../other.safetensors"), r"names the file '\.\./other\.safetensors'.*not inside"),
    (point_outside("/etc/passwd"), r"'/etc/passwd'"),
    (point_outside("a/../../b"), r"not inside"),
    (point_outside("..\\b"), r"not inside"),
    (point_outside(""), r"not inside"),
    (point_outside("model-00003-of-00003.safetensors"), r"in files that do not hold them"),
    (edit_index(lambda m: m.clear()), r"has no weight_map"),
    (
        edit_json("config.json", model_type="llava_next"),
        r"unknown kind \(llava_next\); known are VILA1\.5 and NVILA",
    ),
    (edit_json("config.json", vision_feature_layer=[-2, -5]), r"several vision layers"),
    (edit_json("config.json", projector_hidden_act="relu"), r"projector_hidden_act 'relu'"),
    (
        edit_json("config.json", quantization_config={"quant_method": "bitsandbytes"}),
        r"quantised \(bitsandbytes\)",
    ),
    (remove("processor_config.json"), r"lacks preprocessor_config\.json"),
    (edit_json("config.json", text_config=None), r"unknown kind \(llava\)"),
]


@pytest.mark.parametrize("number", range(len(LLAVA)))
def test_a_llava_checkpoint_is_refused(tmp_path: Path, number: int) -> None:
    breakage, message = LLAVA[number]
    path = write_llava(tmp_path / "model", num_shards=3)
    inspect_checkpoint(path)
    breakage(path)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path, dtype=torch.float32)


ODD_VALUES: tuple[Any, ...] = (None, [], {}, "x", -1, 0, 1.5, 10**12, [None], {"a": []})


def odd_variants(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The config with one value at a time, at any depth, replaced by something odd."""
    for key, value in config.items():
        yield from ({**config, key: odd} for odd in ODD_VALUES)
        if isinstance(value, dict):
            yield from ({**config, key: inner} for inner in odd_variants(value))


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (write_nvila, "config.json"),
        (write_nvila, "llm/config.json"),
        (write_nvila, "vision_tower/config.json"),
        (write_nvila, "vision_tower/preprocessor_config.json"),
        (write_nvila, "mm_projector/config.json"),
        (write_llava, "config.json"),
        (write_llava, "processor_config.json"),
    ],
)
def test_no_odd_value_in_a_config_gets_past_as_another_error(
    tmp_path: Path, write: Callable[[Path], Path], name: str
) -> None:
    path = write(tmp_path / "model")
    config = json.loads((path / name).read_text())
    messages = []
    for variant in odd_variants(config):
        (path / name).write_text(json.dumps(variant))
        try:
            inspect_checkpoint(path)
        except CheckpointError as error:
            messages.append(str(error))
    assert messages
    assert not [message for message in messages if "\n" in message]


def test_what_is_no_checkpoint_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist: a checkpoint is a folder"):
        inspect_checkpoint(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        inspect_checkpoint(tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        inspect_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "mm_vision_tower": "openai/clip"}')
    with pytest.raises(CheckpointError, match="layout of the first LLaVA"):
        inspect_checkpoint(tmp_path)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    path = write_nvila(tmp_path / "model")
    rows = inspect_checkpoint(path).config.decoder.vocab_size
    other = byte_tokenizer(tuple(f"<|{i}|>" for i in range(rows + 50)))
    specials = other.to_str().count('"special":true')
    assert other.get_vocab_size() - specials > 0
    write_tokenizer(path / "llm", other, eos="<|1|>")
    with pytest.raises(
        CheckpointError, match=rf"embeddings for {rows}: the tokenizer belongs to another model"
    ):
        load_checkpoint(path, dtype=torch.float32)
