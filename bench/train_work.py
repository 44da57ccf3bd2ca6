"""What both sides of bench/bench_train.py train: conversations of mixed length about an image each, from a seed."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

HEADER = 5  # tokens before the image
FIRST_TOKEN = 8  # the special tokens below it appear in no text


@dataclass(frozen=True)
class Conversation:
    """`text` follows the header and the image; `in_loss` marks its answers."""

    header: NDArray[np.int64]
    text: NDArray[np.int64]
    in_loss: NDArray[np.bool_]
    pixels: NDArray[np.uint8]  # (side, side, 3)


def conversation(index: int, vocab: int, side: int, longest: int, seed: int) -> Conversation:
    """Turns as `turn_lengths` draws them, of random tokens."""
    rng = np.random.default_rng((seed, index))
    parts, marks = [], []
    for question, answer in turn_lengths(rng):
        parts.append(rng.integers(FIRST_TOKEN, vocab, question + answer))
        marks.append(np.arange(question + answer) >= question)
    text, in_loss = np.concatenate(parts)[:longest], np.concatenate(marks)[:longest]
    return Conversation(
        rng.integers(FIRST_TOKEN, vocab, HEADER),
        text,
        in_loss,
        rng.integers(0, 256, (side, side, 3), dtype=np.uint8),
    )


def turn_lengths(rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    """One to six turns; a question has 6 to 20 tokens, an answer 4 to 150, most of them short."""
    for _ in range(int(rng.integers(1, 7))):
        yield int(rng.integers(6, 21)), int(np.clip(rng.lognormal(3.0, 0.8), 4, 150))


def write_llava(folder: Path, count: int, side: int, seed: int = 0) -> Path:
    """A LLaVA file of `count` such conversations of letters, and a JPEG a record beside it; returns the file."""
    from PIL import Image

    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz ", dtype=np.uint8)
    records = []
    (folder / "images").mkdir(parents=True)
    for index in range(count):
        rng = np.random.default_rng((seed, index))
        turns = []
        for lengths in turn_lengths(rng):
            for speaker, length in zip(("human", "gpt"), lengths, strict=True):
                # A letter at each end: what is trimmed would change the length.
                text = b"x" + rng.choice(letters, length - 2).tobytes() + b"x"
                turns.append({"from": speaker, "value": text.decode()})
        turns[0]["value"] = "<image>\n" + turns[0]["value"]
        name = f"images/{index:06d}.jpg"
        pixels = rng.integers(0, 256, (side, side * 4 // 3, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name, quality=80)
        records.append({"id": str(index), "image": name, "conversations": turns})
    path = folder / "conversations.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def conversations(count: int, vocab: int, side: int, longest: int = 512, seed: int = 0) -> list[Conversation]:
    return [conversation(i, vocab, side, longest, seed) for i in range(count)]


def batches(items: list[Conversation], size: int) -> Iterator[list[Conversation]]:
    for start in range(0, len(items) - size + 1, size):
        yield items[start : start + size]


# Shapes of checkpoints that `build` writes: a model's training time does not depend on its weights.
NANO = {
    "vision": {
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 3,
        "image_size": 120,
        "patch_size": 12,
        "projection_dim": 192,
    },
    "text": {
        "vocab_size": 1536,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 5,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "max_position_embeddings": 2048,
    },
}
LLAVA_SMALL = {
    "vision": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
        "projection_dim": 512,
    },
    "text": {
        "vocab_size": 49153,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 2048,
    },
}
SHAPES = {"nano": NANO, "llava-small": LLAVA_SMALL}


def build(out: Path, name: str) -> None:
    """A LLaVA checkpoint of random weights and the shapes of `name`, in float32, in the transformers layout."""
    import torch
    from make_tiny_llava import byte_tokenizer
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    vision, text = CLIPVisionConfig(**SHAPES[name]["vision"]), SHAPES[name]["text"]
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(
            **text,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,  # the whole tower, so that neither side runs a layer in vain
        vision_feature_select_strategy="default",
    )
    LlavaForConditionalGeneration(config).save_pretrained(out)
    side = {"height": vision.image_size, "width": vision.image_size}
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": vision.image_size}, crop_size=side),
        tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(out)
