"""The language model of a materialised checkpoint to fp8 or int4 (AWQ), by NVIDIA's ModelOpt, calibrated on prompts.

Calibration runs whole prompts, images included, through the language model: its activations are then those of
captioning and not those of news text.
"""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vila2.errors import CheckpointError, UsageError
from vila2.model.causal_lm import load_causal_lm
from vila2.model.checkpoint import LoadedCheckpoint
from vila2.model.prompt import VISUAL_TOKEN, build_prompt
from vila2.world import World, WorldSettings

RECIPES = {"fp8": "FP8_DEFAULT_CFG", "int4": "INT4_AWQ_CFG"}
QUANT_FILE = "hf_quant_config.json"
NUM_SCENES = 64


@dataclass(frozen=True, slots=True)
class Calibration:
    """Images, RGB (height, width, 3), and what is asked of them."""

    name: str
    images: Sequence[NDArray[np.uint8]]
    prompt: str = "Describe the image in detail."

    @property
    def digest(self) -> str:
        total = hashlib.blake2b(self.prompt.encode(), digest_size=12)
        for image in self.images:
            total.update(repr(image.shape).encode() + image.tobytes())
        return total.hexdigest()


def scenes(count: int = NUM_SCENES) -> Calibration:
    """Scenes of the synthetic world: at hand everywhere, the same everywhere."""
    world = World(WorldSettings())
    images = [world.render(world.scene("dev", index)) for index in range(count)]
    return Calibration(f"{count} scenes of the world", images)


def quantise_folder(model: Path, loaded: LoadedCheckpoint, precision: str, calibration: Calibration) -> None:
    """Replace the weights in `model`/llm by quantised ones, in the format that TensorRT-LLM reads.

    UsageError without ModelOpt; CheckpointError if it writes no quantised checkpoint.
    """
    try:
        import modelopt.torch.quantization as quantization
        from modelopt.torch.export import export_hf_checkpoint
    except ImportError as error:
        raise UsageError(
            f"--precision {precision} needs NVIDIA's ModelOpt ({error}): pip install nvidia-modelopt[hf]"
        ) from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = model / "llm"
    language_model = load_causal_lm(folder, torch.bfloat16, device)
    embeddings = list(_prompt_embeddings(loaded, calibration))

    def forward(quantised: Any) -> None:
        with torch.inference_mode():
            for one in embeddings:
                quantised(inputs_embeds=one.to(device))

    quantization.quantize(language_model, getattr(quantization, RECIPES[precision]), forward)
    for stale in folder.glob("model*.safetensors*"):
        stale.unlink()
    export_hf_checkpoint(language_model, export_dir=str(folder))
    if not (folder / QUANT_FILE).is_file():
        raise CheckpointError(f"ModelOpt wrote no {QUANT_FILE}: this version of it does not fit TensorRT-LLM")
    shutil.copyfile(folder / QUANT_FILE, model / QUANT_FILE)  # TensorRT-LLM looks for it in the root


@torch.inference_mode()
def _prompt_embeddings(loaded: LoadedCheckpoint, calibration: Calibration) -> "list[Tensor]":
    """Each prompt as the language model sees it: (1, tokens, hidden), visual tokens in their places."""
    found = []
    table = loaded.model.decoder.embed_tokens
    for pixels in calibration.images:
        image = loaded.image_processor.prepare(pixels)
        prompt = build_prompt(
            loaded.config.template, calibration.prompt, [image], loaded.tokenizer, loaded.config
        )
        ids = torch.tensor(prompt.token_ids)
        embedded = table(ids.clamp(min=0)).clone()
        embedded[ids == VISUAL_TOKEN] = loaded.model.encode_images([image])[0].to(embedded.dtype)
        found.append(embedded[None])
    return found
