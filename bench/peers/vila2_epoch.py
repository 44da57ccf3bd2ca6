"""Our whole trainer over one epoch of conversations in files (bench/workers.py has the protocol).

What `vila2-fast train` runs: records and images from disk, the image cache, the thread that works ahead, logs, a saved
state now and then, the checkpoint at the end.
"""

import argparse
import resource
import time
from pathlib import Path
from typing import Any

from train_work import NANO, write_llava
from workers import serve

from vila2.config import make_settings
from vila2.train.progress import TrainProgress
from vila2.train.recipe import Recipe
from vila2.train.trainer import Trainer

BYTES = Path(__file__).parents[2] / "recipes" / "train" / "bytes"


def recipe(folder: Path, records: Path, batch: int, longest: int) -> Recipe:
    """One stage over all records, once; a model of the shapes of nano."""
    vision, text = NANO["vision"], NANO["text"]
    stage = {
        "name": "sft",
        "train": ["vision", "projector", "decoder"],
        "epochs": 1,
        "batch_examples": batch,
        "max_tokens": 4096,
        "max_example_tokens": longest,
        "lr": 3e-4,
        "save_every": 100,
        "data": [{"kind": "llava", "path": str(records), "image_root": str(records.parent)}],
    }
    model = {
        "vision": {
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "width": vision["hidden_size"],
            "num_layers": vision["num_hidden_layers"],
            "num_heads": vision["num_attention_heads"],
        },
        "decoder": {
            "vocab_size": text["vocab_size"],
            "hidden_size": text["hidden_size"],
            "intermediate_size": text["intermediate_size"],
            "num_layers": text["num_hidden_layers"],
            "num_heads": text["num_attention_heads"],
            "max_positions": text["max_position_embeddings"],
            "tie_embeddings": True,
        },
        "tokenizer": str(BYTES),
    }
    values = {"out": str(folder / "run"), "precision": "float32", "model": model, "stage": [stage]}
    return make_settings(Recipe, values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--longest", type=int, required=True)
    args = parser.parse_args()

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        records = write_llava(args.folder, question["examples"], NANO["vision"]["image_size"])
        resident: list[float] = []

        def observe(progress: TrainProgress) -> None:
            resident.append(resident_mib())

        begin = time.perf_counter()
        summary = Trainer(recipe(args.folder, records, args.batch, args.longest), observe=observe).run()
        seconds = time.perf_counter() - begin
        (stage,) = summary.stages
        return {"seconds": seconds, "resident": resident, "images": stage.images, "tokens": stage.tokens}

    serve({}, answer)


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**20


if __name__ == "__main__":
    main()
