"""What the decoder's products meet on calibration images: the rows by which 4-bit weights are scaled and clipped."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vila2.backends.quality import Reference, follow
from vila2.model.quantize_cuda import decoder_products
from vila2.model.vlm import VisionLanguageModel

ROWS = 512  # of each product; 8B-sized, they take 3.5 GB in float32


@torch.inference_mode()
def product_inputs(model: VisionLanguageModel, reference: Reference, rows: int = ROWS) -> dict[str, Tensor]:
    """Inputs (rows, depth) float32 of each product of the decoder's blocks, by the names of `decoder_products`.

    They are drawn evenly from the prompts and answers that `reference` was told, the same rows for every product.
    """
    found: dict[str, list[Tensor]] = {}
    a_text = -(-rows // len(reference.told))
    for told in reference.told:
        handles = [
            product.register_forward_pre_hook(_keep(found.setdefault(name, []), a_text))
            for name, product in decoder_products(model)
        ]
        try:
            follow(model, told.prompt, told.image, told.answer, torch.float32)
        finally:
            _remove(handles)
    return {name: torch.cat(parts)[:rows] for name, parts in found.items()}


def _keep(parts: list[Tensor], count: int) -> Callable[[nn.Module, tuple[Tensor]], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor]) -> None:
        x = inputs[0]
        at = torch.linspace(0, len(x) - 1, min(count, len(x)), device=x.device).long()
        parts.append(x[at].float())

    return hook


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
