"""The base parts of nano, in one command: `python recipes/nano/base.py` (somewhat more than two hours on one core).

Three steps, each skipped when its output is there: a tokenizer, a tower from images, first with alt-texts and then with
what stands where in them, a decoder from the world's texts. What comes out, `runs/nano/base`, is a VILA checkpoint with
a fresh projector; recipes/nano/nano.toml goes on from it. Neither part has seen a label of the instruction or held-out
splits.
"""

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from vocabulary import write_tokenizer

from vila2.cli.main import main as vila2_fast
from vila2.model.decoder import DecoderConfig
from vila2.model.projector import ProjectorConfig
from vila2.model.tokenizer import load_tokenizer
from vila2.model.vila_writer import save_vila
from vila2.model.vision import VisionConfig
from vila2.model.vlm import ModelConfig, VisionLanguageModel
from vila2.train.located import LocatedSettings, locate_tower
from vila2.train.tower import TowerSettings, fresh_tower, train_tower

HERE = Path(__file__).resolve().parent
VISION = VisionConfig("siglip", 120, 12, 192, 768, 6, 6, "gelu_pytorch_tanh", 1e-6, -1, "cls_patch")


def model_config(vocab_size: int) -> ModelConfig:
    """What nano is: 100 patches, 25 visual tokens, a Llama of width 256."""
    decoder = DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=576,
        num_layers=4,
        num_heads=8,
        num_kv_heads=4,
        head_dim=32,
        max_positions=1024,
        tie_embeddings=True,
    )
    projector = ProjectorConfig("mlp_downsample", VISION.width, decoder.hidden_size)
    return ModelConfig(VISION, projector, decoder, "resize", VISION.image_size, token_newline=True)


def make_tower(out: Path, tokenizer: Path, alt_steps: int, located_steps: int, seed: int) -> None:
    """A VILA checkpoint whose tower is trained and whose decoder is a fresh one."""

    def report(line: str) -> None:
        print(line, flush=True)

    tower = fresh_tower(VISION, seed)
    alt = TowerSettings(steps=alt_steps, seed=seed)
    located = LocatedSettings(steps=located_steps, seed=seed)
    figures = {"alt_texts": asdict(alt) | train_tower(tower, tokenizer, alt, report)}
    figures["located"] = asdict(located) | locate_tower(tower, located, report)
    torch.manual_seed(seed)
    config = model_config(len(load_tokenizer(tokenizer)))
    model = VisionLanguageModel.from_config(config)
    model.vision.load_state_dict(tower.state_dict())
    save_vila(out, model, tokenizer, config)
    (out / "tower.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def make_decoder(out: Path, parts: Path, steps: int | None, threads: int) -> None:
    """Runs decoder.toml on the tokenizer and the tower in `parts`. SystemExit if that fails."""
    settings = [f"model.vision.weights={parts / 'tower'}", f"model.tokenizer={parts / 'tokenizer'}"]
    if steps is not None:
        settings += [f"stage.{stage}.steps={steps}" for stage in ("decoder", "places")]
    arguments = ["train", str(HERE / "decoder.toml"), "--out", str(out), "--threads", str(threads)]
    if code := vila2_fast([*arguments, *(word for setting in settings for word in ("--set", setting))]):
        raise SystemExit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/nano"))
    parser.add_argument("--vocabulary-scenes", type=int, default=6000)
    parser.add_argument("--tower-steps", type=int, default=300, help="on alt-texts, of 128 images")
    parser.add_argument("--located-steps", type=int, default=2000, help="on what stands where, of 64 images")
    parser.add_argument("--decoder-steps", type=int, help="in each of its stages [those of decoder.toml]")
    parser.add_argument("--seed", type=int, default=0, help="of the tower")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer, tower, base = args.out / "tokenizer", args.out / "tower", args.out / "base"
    if not (tokenizer / "tokenizer_config.json").is_file():
        write_tokenizer(tokenizer, args.vocabulary_scenes)
    if not (tower / "tower.json").is_file():
        make_tower(tower, tokenizer, args.tower_steps, args.located_steps, args.seed)
    make_decoder(args.out / "decoder", args.out, args.decoder_steps, args.threads)
    if not base.exists():
        base.symlink_to(Path("decoder", "02-places", "checkpoint"))
    print(f"the base parts -> {base}")


if __name__ == "__main__":
    main()
