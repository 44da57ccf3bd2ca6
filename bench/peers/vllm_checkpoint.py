"""A LLaVA checkpoint of transformers 5 under the tensor names that vLLM wants: `vllm_checkpoint.py CHECKPOINT OUT`."""

import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

OURS, THEIRS = "vision_tower.", "vision_tower.vision_model."


def main(checkpoint: Path, out: Path) -> None:
    shutil.copytree(checkpoint, out)
    tensors = load_file(checkpoint / "model.safetensors")
    renamed = {
        name if THEIRS in name else name.replace(OURS, THEIRS): tensor for name, tensor in tensors.items()
    }
    save_file(renamed, out / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
