"""The part of a model that TensorRT-LLM does not run: tower and projector, in batches, on their own.

Its own input processor for VILA encodes one prompt at a time in the caller's thread; here all images that are ready
share a pass.
"""

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vila2.backends.engine_dir import read_model_config
from vila2.errors import CheckpointError
from vila2.model.images import PreparedImage
from vila2.model.vlm import ModelConfig, VisionLanguageModel

VISION_FILE = "vision.safetensors"
_PARTS = ("vision", "projector")


def save_vision(model: VisionLanguageModel, folder: Path) -> None:
    """Write the tower and the projector, in the types that they have."""
    state = {name: value for name, value in model.state_dict().items() if name.partition(".")[0] in _PARTS}
    save_file({name: value.contiguous() for name, value in state.items()}, folder / VISION_FILE)


def read_config(values: Mapping[str, Any]) -> ModelConfig:
    """A model's config from the JSON of an engine. CheckpointError if it does not fit."""
    try:
        return read_model_config(values)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the engine's model config is broken ({error}): build the engine again"
        ) from None


class VisionStage:
    """Encodes images of an engine folder."""

    def __init__(self, folder: Path, config: ModelConfig, device: str) -> None:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        with torch.device("meta"):
            self.model = VisionLanguageModel.from_config(config)
        try:
            state = load_file(folder / VISION_FILE)
            for name in _PARTS:
                part = getattr(self.model, name).to(dtype).to_empty(device=device)
                prefix = f"{name}."
                part.load_state_dict(
                    {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
                )
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"{folder / VISION_FILE} cannot be used ({reason}): build it again"
            ) from None
        self.model.requires_grad_(False)
        self.model.eval()
        self.batch = 64 if device == "cuda" else 8

    @torch.inference_mode()
    def encode(self, images: Sequence[PreparedImage]) -> list[Tensor]:
        """Visual tokens (num_tokens, hidden) of each image."""
        found: list[Tensor] = []
        for start in range(0, len(images), self.batch):
            found += self.model.encode_images(images[start : start + self.batch])
        return found


@dataclass(slots=True)
class _Shared:
    tokens: list[Tensor]
    num_left: int  # requests that are still to come


class FeatureCache:
    """Visual tokens of images that further requests will ask for, and no longer."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._shared: OrderedDict[Hashable, _Shared] = OrderedDict()

    def get(self, key: Hashable) -> list[Tensor] | None:
        """The tokens under a key, taken once more; None if they are not here."""
        shared = None if key is None else self._shared.get(key)
        if shared is None:
            return None
        shared.num_left -= 1
        if shared.num_left <= 0:
            del self._shared[key]
        return shared.tokens

    def put(self, key: Hashable, tokens: list[Tensor], num_siblings: int) -> None:
        """Keep what the first of `num_siblings` requests had encoded for the others."""
        if key is None or num_siblings <= 1:
            return
        self._shared[key] = _Shared(tokens, num_siblings - 1)
        while len(self._shared) > self.most:
            self._shared.popitem(last=False)
