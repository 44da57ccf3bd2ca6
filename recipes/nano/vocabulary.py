"""The tokenizer of nano: learnt from every kind of text that the world writes, in some seconds.

python recipes/nano/vocabulary.py runs/nano/tokenizer
"""

import argparse
from pathlib import Path

from vila2.train.vocabulary import world_corpus, write_vocabulary
from vila2.world import World


def write_tokenizer(out: Path, scenes: int = 6000, vocab_size: int = 1536) -> None:
    """Learn the tokens of the instruction split's texts and write their files."""
    corpus = world_corpus(World(), "instruct", scenes, instructions=True)
    size = write_vocabulary(out, corpus, vocab_size, context=1024)
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
