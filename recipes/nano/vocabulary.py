"""The tokenizer of nano: learnt from every kind of text that the world writes, in some seconds.

python recipes/nano/vocabulary.py runs/nano/tokenizer
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from vila2.train.vocabulary import write_vocabulary
from vila2.world import World, texts


def corpus(scenes: int) -> Iterator[str]:
    """Captions, questions, layouts, alt-texts and instructions of the instruction split; prompts and names often."""
    world = World()
    for index in range(scenes):
        scene = world.scene("instruct", index)
        yield texts.alt_text(scene, world.settings.alt).text
        for kind, prompts in texts.CAPTION_PROMPTS.items():
            yield prompts[index % len(prompts)]
            yield texts.caption_for(scene, kind)
        yield texts.layout(scene)
        for question in texts.questions(scene, limit=8):
            yield f"{question.question} {question.answer}"
        for question_text, answer in texts.instruction("instruct", index):
            yield f"{question_text} {answer}"


def write_tokenizer(out: Path, scenes: int = 6000, vocab_size: int = 1536) -> None:
    """Learn the tokens of `corpus` and write their files."""
    size = write_vocabulary(out, corpus(scenes), vocab_size, context=1024)
    print(f"{size} tokens -> {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--vocab-size", type=int, default=1536)
    parser.add_argument("--scenes", type=int, default=6000)
    args = parser.parse_args()
    write_tokenizer(args.out, args.scenes, args.vocab_size)


if __name__ == "__main__":
    main()
