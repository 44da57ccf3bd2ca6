"""Activation checkpointing: a block keeps its input and computes the rest again when gradients are wanted."""

from functools import partial

from torch.utils.checkpoint import checkpoint

from vila2.model.vlm import VisionLanguageModel


def checkpoint_blocks(model: VisionLanguageModel) -> None:
    """Do so for every block of the tower and the decoder. The model's code stays as it is."""
    for block in (*model.vision.layers, *model.decoder.layers):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
