"""The base parts of a small model of a small world: `python recipes/small/base.py --out runs/small`.

Three steps, each skipped when its output is there: a tokenizer, a tower from images and noisy alt-texts, a decoder
from texts alone. What comes out, `OUT/base`, is a VILA checkpoint with a fresh projector. Neither part has seen a
caption, an answer or a box of an image, nor a scene of the instruction, dev or held-out splits.

The world has 50 names of four themes and 20 words on signs, so that a training takes minutes on a core.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from vila2.model.decoder import DecoderConfig
from vila2.model.projector import ProjectorConfig
from vila2.model.tokenizer import load_tokenizer
from vila2.model.vila_writer import save_vila
from vila2.model.vision import VisionConfig
from vila2.model.vlm import ModelConfig, VisionLanguageModel
from vila2.train.tower import TowerSettings, fresh_tower, train_tower, write_figures
from vila2.train.vocabulary import write_vocabulary
from vila2.world import World, WorldSettings, texts

HERE = Path(__file__).resolve().parent
THEMES = ("home", "farm", "street", "market")  # as in decoder.toml and in the loops that start from this base
SIGN_WORDS = 20
TOKENS, CONTEXT = 768, 512
VISION = VisionConfig("siglip", 96, 12, 192, 576, 4, 3, "gelu_pytorch_tanh", 1e-6, -1, "cls_patch")


def corpus(scenes: int) -> Iterator[str]:
    """Every kind of text that this world writes."""
    world = World(WorldSettings(themes=THEMES, sign_words=SIGN_WORDS))
    for index in range(scenes):
        scene = world.scene("pretrain", index)
        yield texts.alt_text(scene, world.settings.alt).text
        for kind, prompts in texts.CAPTION_PROMPTS.items():
            yield prompts[index % len(prompts)]
            yield texts.caption_for(scene, kind)
        yield texts.layout(scene)
        for question in texts.questions(scene, limit=8):
            yield f"{question.question} {question.answer}"


def model_config(vocab_size: int) -> ModelConfig:
    """64 patches, 16 visual tokens, a Llama of width 192."""
    decoder = DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=448,
        num_layers=4,
        num_heads=3,
        num_kv_heads=3,
        head_dim=64,
        max_positions=CONTEXT,
        tie_embeddings=True,
    )
    projector = ProjectorConfig("mlp_downsample", VISION.width, decoder.hidden_size)
    return ModelConfig(VISION, projector, decoder, "resize", VISION.image_size, token_newline=True)


def make_tower(out: Path, tokenizer: Path, steps: int, seed: int) -> None:
    """A VILA checkpoint whose tower is trained and whose decoder is a fresh one."""
    tower = fresh_tower(VISION, seed)
    settings = TowerSettings(
        steps=steps, seed=seed, batch=96, keep=24, sign=0.3, themes=THEMES, sign_words=SIGN_WORDS
    )
    figures = train_tower(tower, tokenizer, settings, lambda line: print(line, flush=True))
    torch.manual_seed(seed)
    config = model_config(len(load_tokenizer(tokenizer)))
    model = VisionLanguageModel.from_config(config)
    model.vision.load_state_dict(tower.state_dict())
    save_vila(out, model, tokenizer, config)
    write_figures(out / "tower.json", settings, figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/small"))
    parser.add_argument("--tower-steps", type=int, default=600)
    parser.add_argument("--decoder-steps", type=int, default=900)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer, tower, base = args.out / "tokenizer", args.out / "tower", args.out / "base"
    if not (tokenizer / "tokenizer_config.json").is_file():
        write_vocabulary(tokenizer, corpus(3000), TOKENS, context=CONTEXT)
    if not (tower / "tower.json").is_file():
        make_tower(tower, tokenizer, args.tower_steps, args.seed)
    command = [
        sys.executable,
        "-m",
        "vila2.cli",
        "train",
        str(HERE / "decoder.toml"),
        "--out",
        str(args.out / "decoder"),
    ]
    command += [
        "--threads",
        str(args.threads),
        "--set",
        f"base={tower}",
        "--set",
        f"stage.decoder.steps={args.decoder_steps}",
    ]
    subprocess.run(command, check=True)
    if not base.exists():
        base.symlink_to(Path("decoder", "01-decoder", "checkpoint"))
    print(f"the base parts -> {base}")


if __name__ == "__main__":
    main()
