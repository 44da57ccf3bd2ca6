"""The loss of one packed batch: images to visual tokens, spliced among the text's, through the decoder to its labels.

Only rows that carry a label reach the last layer's MLP and the head. Gradients flow to every part whose parameters
require them; weights of a loaded checkpoint do not until the trainer says so (`requires_grad_`).

On CUDA what a batch needs there is sent once, before the first layer, and the host waits for nothing.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vila2.model.vlm import VisionLanguageModel
from vila2.ops.cross_entropy import IGNORED, check_labels, linear_cross_entropy
from vila2.ops.segments import pad_segments, rotary_segment_attention

if TYPE_CHECKING:
    from vila2.train.batches import PackedBatch


class SegmentAttend:
    """The decoder's `attend` for packed segments: `rotary_segment_attention`.

    `positions` (T,) and `segments` (S, 4), both on the CPU; the tables say on which device the layers are.
    """

    def __init__(self, positions: Tensor, segments: Tensor, cos: Tensor, sin: Tensor) -> None:
        if bool((positions >= len(cos)).any()):
            raise ValueError(f"a position of {int(positions.max())}: the decoder has {len(cos)}")
        self.positions, self.segments, self.cos, self.sin = _upload(positions, cos.device), segments, cos, sin
        # `_C` takes the segments as they are.
        self.padded = None if cos.is_cpu else pad_segments(segments, len(positions), cos.device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return rotary_segment_attention(
            q, k, v, self.positions, self.cos, self.sin, self.segments, q.shape[-1] ** -0.5, self.padded
        )


def batch_loss(
    model: VisionLanguageModel, batch: "PackedBatch", device: str | torch.device
) -> tuple[Tensor, int]:
    """The loss summed over the labels of `batch`, and how many there are. The model must be on `device`."""
    labels = torch.from_numpy(batch.labels)
    rows = torch.nonzero(labels != IGNORED).squeeze(1)
    assert len(rows) == batch.num_labels, (len(rows), batch.num_labels)
    labels = labels[rows]
    check_labels(labels, len(model.decoder.lm_head.weight))
    hidden = batch_hidden(model, batch, device, rows)
    loss = linear_cross_entropy(hidden, model.decoder.lm_head.weight, _upload(labels, device))
    return loss, batch.num_labels


def batch_hidden(
    model: VisionLanguageModel, batch: "PackedBatch", device: str | torch.device, rows: Tensor | None = None
) -> Tensor:
    """The decoder's final-normed hidden states (T, hidden) of a batch, or of some of its `rows` (n,) alone."""
    decoder = model.decoder
    embeddings = decoder.embed(_upload(torch.from_numpy(batch.token_ids).clamp(min=0), device))
    if batch.images:
        visual = torch.cat(model.encode_images(batch.images))
        visual_rows = _upload(torch.from_numpy(batch.visual_rows), device)
        # Not in place: the embedding's gradient leaves out the rows that images took.
        embeddings = embeddings.index_put((visual_rows,), visual.to(embeddings.dtype))
    attend = SegmentAttend(
        torch.from_numpy(batch.positions),
        torch.from_numpy(batch.segments),
        decoder.cos,
        decoder.sin,
    )
    hidden: Tensor = decoder(embeddings, attend, None if rows is None else _upload(rows, device))
    return hidden


def _upload(tensor: Tensor, device: str | torch.device) -> Tensor:
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()  # torch keeps such memory until the copy is through
    return tensor.to(device, non_blocking=True)
