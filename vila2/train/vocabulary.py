"""A small tokenizer learnt from a corpus: byte-level BPE, digits one by one, with a short chat template.

Any text can be written in it (bytes are the alphabet); what the corpus says often takes one token. Coordinates are
three digit tokens each, so a model learns them by place.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from vila2.world import World, texts

END = "<|end|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
# No system turn and no line breaks: a small model spends its tokens on the picture. A space before each turn: its first
# word is then the token that the word is elsewhere, and not another one or several.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '" + USER + "' if message['role'] == 'user' else '" + ASSISTANT + "' }}"
    "{{ ' ' + message['content'] }}{% if message['role'] == 'assistant' %}" + END + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)


def world_corpus(world: World, split: str, scenes: int, *, instructions: bool = False) -> Iterator[str]:
    """Every kind of text that `world` writes about the first scenes of a split; prompts and names come often.

    Alt-texts, captions with their prompts, layouts and questions; `instructions` adds those that are about no image.
    """
    for index in range(scenes):
        scene = world.scene(split, index)
        yield texts.alt_text(scene, world.settings.alt).text
        for kind, prompts in texts.CAPTION_PROMPTS.items():
            yield prompts[index % len(prompts)]
            yield texts.caption_for(scene, kind)
        yield texts.layout(scene)
        for question in texts.questions(scene, limit=8):
            yield f"{question.question} {question.answer}"
        if instructions:
            for asked, answer in texts.instruction(split, index):
                yield f"{asked} {answer}"


def write_vocabulary(folder: str | Path, corpus: Iterable[str], vocab_size: int, context: int) -> int:
    """Learn a tokenizer of at most `vocab_size` tokens from `corpus` and write it into `folder`; returns its size.

    The same texts in the same order give the same files. `context` is the model's longest sequence, in tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END, USER, ASSISTANT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(root / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    (root / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return tokenizer.get_vocab_size()
