"""Prompts to exact tokens: each template, each generation's way with images."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.checkpoints import write_llava, write_nvila, write_vila15
from vila2.errors import UsageError
from vila2.model.checkpoint import LoadedCheckpoint, load_checkpoint
from vila2.model.images import PreparedImage
from vila2.model.prompt import TEMPLATES, build_prompt, check_template, template_of_name, turn_end_ids

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def load(path: Path) -> LoadedCheckpoint:
    return load_checkpoint(path, dtype=torch.float32)


@pytest.fixture(scope="module")
def vila15(tmp_path_factory: pytest.TempPathFactory) -> LoadedCheckpoint:
    return load(write_vila15(tmp_path_factory.mktemp("checkpoints") / "VILA1.5-3b"))


@pytest.fixture(scope="module")
def nvila(tmp_path_factory: pytest.TempPathFactory) -> LoadedCheckpoint:
    return load(write_nvila(tmp_path_factory.mktemp("checkpoints") / "NVILA-8B"))


@pytest.fixture(scope="module")
def lite(tmp_path_factory: pytest.TempPathFactory) -> LoadedCheckpoint:
    path = tmp_path_factory.mktemp("checkpoints") / "NVILA-Lite-8B"
    return load(write_nvila(path, mode="dynamic", projector="mlp_downsample_3x3_fix"))


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> LoadedCheckpoint:
    return load(write_llava(tmp_path_factory.mktemp("checkpoints") / "llava"))


def picture(checkpoint: LoadedCheckpoint, count: int = 1, width: int = 100) -> PreparedImage:
    return checkpoint.image_processor.prepare(np.full((60, width, 3), 127, dtype=np.uint8), count)


def inner(checkpoint: LoadedCheckpoint, text: str, specials: bool = False) -> list[int]:
    """What the transformers tokenizer makes of a text by itself."""
    return list(checkpoint.tokenizer.inner(text, add_special_tokens=specials)["input_ids"])


def test_vila15_tokenises_each_stretch_by_itself(vila15: LoadedCheckpoint) -> None:
    image = picture(vila15)
    prompt = build_prompt(vila15.config.template, "Describe.", [image], vila15.tokenizer, vila15.config)
    before = inner(vila15, f"{SYSTEM} USER: ", specials=True)
    after = inner(vila15, "\nDescribe. ASSISTANT:")
    assert before[0] == vila15.tokenizer.bos_id
    assert prompt.token_ids == before + [-1] * 9 + after
    assert prompt.image_spans == [(len(before), 9, 0, 0)]
    assert prompt.header_length == len(before)
    assert prompt.token_ids.count(vila15.tokenizer.bos_id) == 1


def test_vila15_puts_every_image_in_front_with_a_newline_each(vila15: LoadedCheckpoint) -> None:
    images = [picture(vila15, 2), picture(vila15, 2)]
    prompt = build_prompt("vicuna_v1", "Compare.", images, vila15.tokenizer, vila15.config)
    head = inner(vila15, f"{SYSTEM} USER: ", specials=True)
    newline, tail = inner(vila15, "\n"), inner(vila15, "\nCompare. ASSISTANT:")
    assert prompt.token_ids == head + [-1] * 9 + newline + [-1] * 9 + tail
    second = len(head) + 9 + len(newline)
    assert prompt.image_spans == [(len(head), 9, 0, 0), (second, 9, 1, 0)]


def test_nvila_sets_the_newline_tokens_after_the_features(nvila: LoadedCheckpoint) -> None:
    image = picture(nvila)
    prompt = build_prompt("auto", "Describe.", [image], nvila.tokenizer, nvila.config)
    before = inner(nvila, "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\n")
    after = inner(nvila, "Describe.<|im_end|>\n<|im_start|>assistant\n")
    newline = inner(nvila, "\n")
    assert image.num_tokens > 4
    assert prompt.token_ids == before + [-1] * image.num_tokens + newline + after


def test_nvila_lite_has_a_chunk_and_a_newline_of_text_for_each_tile(lite: LoadedCheckpoint) -> None:
    image = picture(lite, width=120)
    assert image.num_placeholders > 1
    prompt = build_prompt("auto", "Describe.", [image], lite.tokenizer, lite.config)
    length = image.num_tokens // image.num_placeholders
    newline = inner(lite, "\n")
    before = inner(lite, "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\n")
    tile = [-1] * length + newline  # the newline after the features
    between, last = newline, inner(lite, "\nDescribe.<|im_end|>\n<|im_start|>assistant\n")
    middle = (tile + between) * (image.num_placeholders - 1) + tile
    assert prompt.token_ids == before + middle + last
    assert [span[3] for span in prompt.image_spans] == list(range(image.num_placeholders))


def test_several_images_are_not_tiled_and_get_no_newline_of_text(lite: LoadedCheckpoint) -> None:
    images = [picture(lite, 2), picture(lite, 2)]
    prompt = build_prompt("raw", "Compare.", images, lite.tokenizer, lite.config)
    one = [-1] * images[0].num_tokens + inner(lite, "\n")
    assert prompt.token_ids == one + one + inner(lite, "Compare.")


def test_a_newline_that_the_user_wrote_is_not_doubled_for_tiles(lite: LoadedCheckpoint) -> None:
    image = picture(lite, width=120)
    written = build_prompt("auto", "<image>\nDescribe.", [image], lite.tokenizer, lite.config)
    assert written == build_prompt("auto", "Describe.", [image], lite.tokenizer, lite.config)


def test_llava_tokenises_the_whole_text(llava: LoadedCheckpoint) -> None:
    image = picture(llava)
    prompt = build_prompt("auto", "Describe.", [image], llava.tokenizer, llava.config)
    whole = inner(llava, "USER: <image>\nDescribe. ASSISTANT:", specials=True)
    at = whole.index(llava.tokenizer.image_token_id)
    assert prompt.token_ids == whole[:at] + [-1] * 16 + whole[at + 1 :]


def test_images_go_where_the_text_says(vila15: LoadedCheckpoint) -> None:
    images = [picture(vila15, 2), picture(vila15, 2)]
    text = "First <image> then <image> end"
    prompt = build_prompt("raw", text, images, vila15.tokenizer, vila15.config)
    head, middle, tail = (inner(vila15, part) for part in ("First ", " then ", " end"))
    assert prompt.token_ids == [1, *head] + [-1] * 9 + middle + [-1] * 9 + tail


@pytest.mark.parametrize("text", ["<image> and <image>", "<image><image><image>"])
def test_another_number_of_placeholders_than_images_is_an_error(vila15: LoadedCheckpoint, text: str) -> None:
    with pytest.raises(ValueError, match=f"names {text.count('<image>')} images"):
        build_prompt("raw", text, [picture(vila15)], vila15.tokenizer, vila15.config)
    with pytest.raises(ValueError, match="has 0"):
        build_prompt("raw", text, [], vila15.tokenizer, vila15.config)


def test_a_text_without_images_has_no_spans(vila15: LoadedCheckpoint) -> None:
    prompt = build_prompt("plain", "Hello.", [], vila15.tokenizer, vila15.config)
    assert (prompt.token_ids, prompt.image_spans, prompt.header_length) == (
        inner(vila15, "Hello.", specials=True),
        [],
        0,
    )


def test_llama_3_and_hermes_2_are_spelled_as_in_training(nvila: LoadedCheckpoint) -> None:
    config = replace(nvila.config, token_newline=False)
    texts = {}
    for template in ("llama_3", "hermes-2"):
        prompt = build_prompt(template, "Hi", [], nvila.tokenizer, config)
        texts[template] = nvila.tokenizer.inner.decode(prompt.token_ids)
    assert texts["llama_3"] == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "You are a helpful language and vision assistant. You are able to understand the visual content that the "
        "user provides, and assist the user with a variety of tasks using natural language.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert texts["hermes-2"] == (
        "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\nHi<|im_end|><|im_start|>assistant\n"
    )


def test_a_template_that_writes_the_bos_does_not_get_a_second(llava: LoadedCheckpoint) -> None:
    tokenizer = llava.tokenizer
    before = tokenizer.chat_template
    try:
        tokenizer.chat_template = (
            "{{ bos_token }}{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}"
        )
        prompt = build_prompt("auto", "Hi", [], tokenizer, llava.config)
        assert prompt.token_ids.count(1) == 1
    finally:
        tokenizer.chat_template = before


def test_a_template_that_loses_the_image_is_an_error(llava: LoadedCheckpoint) -> None:
    tokenizer = llava.tokenizer
    before = tokenizer.chat_template
    try:
        tokenizer.chat_template = "no images here"
        with pytest.raises(ValueError, match="made 0 <image>s of 1"):
            build_prompt("auto", "Hi", [picture(llava)], tokenizer, llava.config)
    finally:
        tokenizer.chat_template = before


def test_a_token_beyond_the_embeddings_is_an_error_by_name(nvila: LoadedCheckpoint) -> None:
    nvila.tokenizer.inner.add_tokens(["<vila/video>"], special_tokens=True)
    with pytest.raises(ValueError, match="'<vila/video>', for which the model has no embedding"):
        build_prompt("raw", "See <vila/video>", [], nvila.tokenizer, nvila.config)


def test_template_names_are_checked_against_the_known_ones() -> None:
    assert [check_template(name) for name in TEMPLATES] == list(TEMPLATES)
    assert check_template("v1") == "vicuna_v1"
    with pytest.raises(
        UsageError, match=r"unknown template 'vicuna'.*vicuna_v1, llama_3, hermes-2, plain, raw"
    ):
        check_template("vicuna")


@pytest.mark.parametrize(
    ("path", "template"),
    [
        ("models/VILA1.5-3b", "vicuna_v1"),
        ("models/Llama-3-VILA1.5-8B", "llama_3"),
        ("models/VILA1.5-13b-s2", "vicuna_v1"),
        ("VILA1.5-40b/model", "hermes-2"),
        ("models--Efficient-Large-Model--VILA1.5-40b/snapshots/0a1b2c", "hermes-2"),
        ("llama-3-runs/VILA1.5-3b", "vicuna_v1"),
        ("models/mine", None),
    ],
)
def test_the_template_of_a_released_model_is_known_by_name(path: str, template: str | None) -> None:
    assert template_of_name(Path(path)) == template


def test_turn_ends_come_from_the_vocabulary_and_the_template(
    nvila: LoadedCheckpoint, vila15: LoadedCheckpoint, llava: LoadedCheckpoint
) -> None:
    assert turn_end_ids(nvila.tokenizer) == {nvila.tokenizer.token_id("<|im_end|>")}
    assert turn_end_ids(vila15.tokenizer) == set()
    assert turn_end_ids(llava.tokenizer) == set()
    tokenizer, before = nvila.tokenizer, nvila.tokenizer.chat_template
    try:
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|endoftext|>{% endfor %}"
        assert tokenizer.token_id("<|endoftext|>") in turn_end_ids(tokenizer)
    finally:
        tokenizer.chat_template = before
