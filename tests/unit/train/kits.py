"""What an encoder needs of a checkpoint, for each generation, without weights: made in a moment."""

import json
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Learnt

from tests.tiny_tokenizers import (
    CHATML,
    LLAVA_TEMPLATE,
    SENTENCES,
    byte_tokenizer,
    llama_tokenizer,
    write_tokenizer,
)
from vila2.model.decoder import DecoderConfig
from vila2.model.images import ImageProcessor
from vila2.model.projector import ProjectorConfig
from vila2.model.tokenizer import Tokenizer, load_tokenizer
from vila2.model.vision import VisionConfig
from vila2.model.vlm import ModelConfig
from vila2.train.encode import ExampleEncoder

LLAMA_3_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
_TEMPLATES = {"vila15": "vicuna_v1", "melting": "vicuna_v1", "llama_3": "llama_3", "hermes-2": "hermes-2"}
NAMES = ("vila15", "melting", "nvila", "lite", "llava", "llama_3", "hermes-2")


@dataclass(frozen=True)
class Kit:
    tokenizer: Tokenizer
    config: ModelConfig

    @property
    def processor(self) -> ImageProcessor:
        return self.config.image_processor()

    def encoder(self, template: str | None = None, **options: object) -> ExampleEncoder:
        return ExampleEncoder(self.tokenizer, self.config, self.processor, template, **options)

    def ids(self, text: str, specials: bool = False) -> list[int]:
        """What transformers makes of a text by itself."""
        return list(self.tokenizer.inner(text, add_special_tokens=specials)["input_ids"])


def spaced_llama_tokenizer(extra: tuple[str, ...] = ()) -> Learnt:
    """`llama_tokenizer` whose tokens hold a space at most in front, as all of Llama's do."""
    learnt = Learnt(models.BPE(unk_token="<unk>"))
    learnt.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learnt.pre_tokenizer = pre_tokenizers.Split(Regex("▁[^▁]*"), "isolated")
    learnt.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    model = json.loads(learnt.to_str())["model"]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for token in model["vocab"]:
        vocab.setdefault(token, len(vocab))
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Learnt(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer, tokenizer.decoder = learnt.normalizer, llama_tokenizer().decoder
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", *extra])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@lru_cache
def kit(name: str, chat_template: str | None = None) -> Kit:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        if name == "vila15":
            write_tokenizer(path, spaced_llama_tokenizer(), bos="<s>", eos="</s>", unk="<unk>")
        elif name == "melting":
            write_tokenizer(path, llama_tokenizer(), bos="<s>", eos="</s>", unk="<unk>")
        elif name == "llava":
            template = chat_template or LLAVA_TEMPLATE
            extended = spaced_llama_tokenizer(extra=("<image>", "<pad>"))
            write_tokenizer(path, extended, bos="<s>", eos="</s>", unk="<unk>", chat_template=template)
        elif name == "llama_3":
            write_tokenizer(path, byte_tokenizer(LLAMA_3_TOKENS), eos="<|end_of_text|>")
        else:
            chatml = byte_tokenizer(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
            write_tokenizer(path, chatml, eos="<|im_end|>", chat_template=chat_template or CHATML)
        tokenizer = load_tokenizer(path)
    nvila = name in ("nvila", "lite")
    config = model_config(
        len(tokenizer),
        mode="dynamic" if name == "lite" else "resize",
        token_newline=nvila,
        template={
            "vila15": "vicuna_v1",
            "melting": "vicuna_v1",
            "llama_3": "llama_3",
            "hermes-2": "hermes-2",
        }.get(name, "auto"),
    )
    if nvila:
        tokenizer.add_image_token()
    return Kit(tokenizer, config)


def model_config(
    vocab: int,
    *,
    mode: str = "resize",
    token_newline: bool = False,
    template: str = "auto",
    positions: int = 4096,
) -> ModelConfig:
    """Images of 16 pixels: 4 visual tokens a tile."""
    vision = VisionConfig(
        "siglip", 16, 4, 16, 24, 2, 2, "gelu_pytorch_tanh", 1e-6, select_feature="cls_patch"
    )
    decoder = DecoderConfig(vocab, 24, 40, 2, 4, 2, 6, positions)
    return ModelConfig(
        vision,
        ProjectorConfig("mlp_downsample", 16, 24),
        decoder,
        mode,
        16,
        max_tiles=4,
        token_newline=token_newline,
        template=template,
    )


def picture(shade: int = 127, width: int = 20) -> NDArray[np.uint8]:
    return np.full((20, width, 3), shade, dtype=np.uint8)
