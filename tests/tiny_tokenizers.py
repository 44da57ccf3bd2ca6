"""Small tokenizers of the two families that VILA models use, learnt from a few sentences, and chat templates."""

import json
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SENTENCES = (
    "A red square stands to the left of a blue circle on a white table.",
    "Describe this image in detail, from the background to the smallest object.",
    "The photograph shows two dogs running along the beach under a grey sky.",
    "What does the sign say? It says: open from 9 to 17, closed on Sundays.",
    "USER: hello ASSISTANT: a picture of a small house with a green door.",
    "A chat between a curious user and an artificial intelligence assistant.",
)
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As released with LLaVA 1.5 in the transformers layout: it reads a list of typed parts.
LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }} {% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@lru_cache
def llama_tokenizer(extra: tuple[str, ...] = ()) -> Tokenizer:
    """BPE with byte fallback that writes spaces as U+2581 and adds `<s>`, as Llama 2's."""
    learnt = Tokenizer(models.BPE(unk_token="<unk>"))
    learnt.normalizer = _sentencepiece_spaces()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False)
    learnt.train_from_iterator(SENTENCES, trainer)
    model = json.loads(learnt.to_str())["model"]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for token in model["vocab"]:
        vocab.setdefault(token, len(vocab))
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[tuple(pair) for pair in model["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = _sentencepiece_spaces()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", *extra])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def _sentencepiece_spaces() -> normalizers.Normalizer:
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


@lru_cache
def byte_tokenizer(specials: tuple[str, ...]) -> Tokenizer:
    """Byte-level BPE without a BOS, as Qwen2's; `specials` take the first ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def write_tokenizer(
    folder: Path,
    tokenizer: Tokenizer,
    *,
    eos: str,
    bos: str | None = None,
    unk: str | None = None,
    chat_template: str | None = None,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": unk,
        "chat_template": chat_template,
        "model_max_length": 1024,
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps({key: value for key, value in config.items() if value is not None}, indent=2)
    (folder / "tokenizer_config.json").write_text(text)
