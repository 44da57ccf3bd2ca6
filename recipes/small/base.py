"""The base parts of a small model of a small world: `python recipes/small/base.py --out runs/small`.

Each step is skipped when its output is there: a tokenizer, a tower from images and what stands where in them, a decoder
from texts alone, at the same time if there are two threads. What comes out, `OUT/base`, is a VILA checkpoint with a
fresh projector. The tower has seen
names, words and boxes of scenes that no loop captions, and neither part a caption or an answer about an image, nor a
scene of the instruction, dev or held-out splits.

Its world has the names of a few themes and a few words on signs, so that a training takes minutes on a core. The loops
in recipes/ that use it name the same themes and the same image size.
"""

import argparse
import json
import os
import signal
import sys
from dataclasses import asdict
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch

from vila2.config import make_settings
from vila2.model.checkpoint import load_checkpoint
from vila2.model.decoder import DecoderConfig
from vila2.model.projector import ProjectorConfig
from vila2.model.tokenizer import load_tokenizer
from vila2.model.vila_writer import save_vila
from vila2.model.vision import VisionConfig, VisionTower
from vila2.model.vlm import ModelConfig, VisionLanguageModel
from vila2.recaption.interrupt import Interrupts
from vila2.train.located import LocatedSettings, locate_tower
from vila2.train.mixture import derived_seed
from vila2.train.recipe import Recipe
from vila2.train.start import fresh_weights
from vila2.train.tower import fresh_tower
from vila2.train.trainer import Trainer
from vila2.train.vocabulary import world_corpus, write_vocabulary
from vila2.world import World, WorldSettings

PATCH, HEAD, CONTEXT = 12, 32, 512
INTERRUPTED = 130


def model_config(side: int, width: int, layers: int, vocab_size: int) -> ModelConfig:
    """A tower and a Llama of the same width; a visual token for every four patches."""
    heads = width // HEAD
    tower = VisionConfig(
        "siglip", side, PATCH, width, 3 * width, layers, heads, "gelu_pytorch_tanh", 1e-6, -1, "cls_patch"
    )
    decoder = DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=width * 12 // 5,
        num_layers=4,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=HEAD,
        max_positions=CONTEXT,
        tie_embeddings=True,
    )
    return ModelConfig(
        tower, ProjectorConfig("mlp_downsample", width, width), decoder, "resize", side, token_newline=True
    )


def fresh_model(config: ModelConfig, tower: VisionTower, seed: int) -> VisionLanguageModel:
    """A model with this tower, a fresh projector and a fresh decoder."""
    model = VisionLanguageModel.from_config(config)
    model.vision.load_state_dict(tower.state_dict())
    # Not as torch draws them: a head tied to embeddings of size one begins with a loss of a hundred.
    for name, part in (("projector", model.projector), ("decoder", model.decoder)):
        fresh_weights(part, derived_seed(seed, name), config.decoder.num_layers)
    return model


def make_tower(
    out: Path, config: ModelConfig, tokenizer: Path, settings: LocatedSettings, threads: int
) -> None:
    """A VILA checkpoint whose tower is trained, and nothing else."""
    if parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    tower = fresh_tower(config.vision, settings.seed)
    figures = locate_tower(tower, settings, lambda line: print(line, flush=True))
    save_vila(out, fresh_model(config, tower, settings.seed), tokenizer, config)
    figures = asdict(settings) | figures
    (out / "tower.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def make_decoder(
    out: Path, start: Path, world: WorldSettings, steps: tuple[int, int], seed: int, threads: int
) -> bool:
    """Train the decoder on texts: a scene comes as its layout in words. False if it was interrupted.

    First captions and questions of all kinds, until it looks names up in the layout. Then mostly questions about where
    things are and how many: asked among all others, those stayed at chance.
    """
    options = {"themes": world.themes, "sign_words": world.sign_words}
    everything: dict[str, Any] = {
        "kind": "world",
        "split": "pretrain",
        "texts": ["layout", "detailed", "questions"],
        "options": options | {"per_image": 7},
    }
    crowded = {"object_counts": (0.1, 0.25, 0.35, 0.3), "repeat": 0.4}
    places: dict[str, Any] = {
        "kind": "world",
        "weight": 0.75,
        "split": "pretrain",
        "start": 1_000_000,
        "texts": ["layout", "questions"],
        "options": options | crowded | {"per_image": 14, "tasks": ["relation", "position", "count"]},
    }
    usual: dict[str, Any] = {
        "train": ["decoder"],
        "batch_examples": 24,
        "lr": 1e-2,
        "optimizer": "muon",
        "adamw_lr": 2e-3,
        "schedule": "wsd",
        "min_lr": 0.05,
        "log_every": 10,
        "save_minutes": 2.0,
    }
    stages = [
        usual
        | {
            "name": "decoder",
            "steps": steps[0],
            "decay": 0.5,
            "warmup": min(40, steps[0]),
            "data": [everything],
        },
        usual
        | {
            "name": "places",
            "steps": steps[1],
            "decay": 0.4,
            "warmup": min(20, steps[1]),
            "data": [places, everything | {"weight": 0.25, "start": 2_000_000}],
        },
    ]
    values = {"base": str(start), "out": str(out), "seed": seed, "precision": "float32", "device": "cpu"}
    values |= {"threads": threads, "measure_ceiling": False, "stage": stages}
    interrupts = Interrupts()
    interrupts.grace_s = 1e6  # a step is finished before it stops
    with interrupts.installed():
        return not Trainer(make_settings(Recipe, values), interrupts=interrupts).run().interrupted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/small"))
    parser.add_argument("--themes", default="home,farm,street,market")
    parser.add_argument("--sign-words", type=int, default=20)
    parser.add_argument("--image-size", type=int, default=96, help=f"a multiple of {2 * PATCH}")
    parser.add_argument("--width", type=int, default=160, help=f"a multiple of {HEAD}")
    parser.add_argument("--layers", type=int, default=4, help="of the tower")
    parser.add_argument("--tokens", type=int, default=768)
    parser.add_argument("--tower-steps", type=int, default=1600, help="of 64 images each")
    parser.add_argument("--decoder-steps", type=int, default=1500, help="of 24 scenes each")
    parser.add_argument(
        "--place-steps", type=int, default=900, help="the decoder's last, on where things are"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    world = WorldSettings(themes=tuple(args.themes.split(",")), sign_words=args.sign_words)
    tokenizer, start, tower, base = (args.out / name for name in ("tokenizer", "start", "tower", "base"))
    if not (tokenizer / "tokenizer_config.json").is_file():
        corpus = world_corpus(World(world), "pretrain", 1500)
        write_vocabulary(tokenizer, corpus, args.tokens, context=CONTEXT)
    config = model_config(args.image_size, args.width, args.layers, len(load_tokenizer(tokenizer)))
    if not (start / "config.json").is_file():
        save_vila(
            start, fresh_model(config, fresh_tower(config.vision, args.seed), args.seed), tokenizer, config
        )
    settings = LocatedSettings(
        steps=args.tower_steps,
        keep=(args.image_size // PATCH) ** 2 // 2,
        seed=args.seed,
        themes=world.themes,
        sign_words=world.sign_words,
    )
    aside = None
    if not (tower / "tower.json").is_file():
        work = (tower, config, tokenizer, settings, max(args.threads // 2, 1))
        if args.threads > 1:
            # Ended with this process, which alone is told of interrupts: the tower begins again, the decoder goes on.
            aside = get_context("spawn").Process(target=make_tower, args=work, daemon=True)
            aside.start()
        else:
            make_tower(*work)
    steps = args.decoder_steps, args.place_steps
    threads = args.threads - args.threads // 2 if aside else args.threads
    if not make_decoder(args.out / "decoder", start, world, steps, args.seed, threads):
        sys.exit(INTERRUPTED)
    if aside:
        aside.join()
        if aside.exitcode:
            sys.exit("the tower failed")
    if not (base / "config.json").is_file():
        trained = load_checkpoint(
            args.out / "decoder" / "02-places" / "checkpoint", dtype=torch.float32
        ).model
        trained.vision.load_state_dict(load_checkpoint(tower, dtype=torch.float32).model.vision.state_dict())
        save_vila(base, trained, tokenizer, config)
    print(f"the base parts -> {base}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
