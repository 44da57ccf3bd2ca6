"""Several processes of torchrun as one trainer: who they are, and a model sharded among them by FSDP2.

The model's code knows nothing of this. The tower and each block of the decoder are gathered when they are called,
everything else when the loss is.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from vila2.errors import UsageError
from vila2.model.images import PreparedImage
from vila2.model.vlm import VisionLanguageModel
from vila2.ops.cross_entropy import IGNORED
from vila2.train.examples import VISUAL_TOKEN
from vila2.train.loss import batch_loss

if TYPE_CHECKING:
    from vila2.train.batches import PackedBatch

_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes of a run, and which of them this is."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Does this process write what is written once?"""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until all have come here."""
        if self.world_size > 1:
            self.sum([0.0])

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the processes; every one gets the same bits."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(total)
        return [float(value) for value in total]

    def gather(self, value: Any) -> list[Any]:
        """Everybody's value, by rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        distributed.all_gather_object(values, value)
        return values


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """Join the processes that torchrun started; alone where it did not. `device` is auto, cpu or cuda."""
    kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError("device cuda: this torch sees no CUDA device; use device cpu or auto")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = torch.device("cuda", local_rank) if kind == "cuda" else torch.device("cpu")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world_size == 1:
        yield Processes(0, 1, chosen)
        return
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=_TIMEOUT)
    try:
        yield Processes(distributed.get_rank(), world_size, chosen)
    finally:
        distributed.destroy_process_group()


class LossOf(nn.Module):
    """A model's loss as the forward of a module, which is what FSDP hooks on to.

    Sharded, all processes must call the same parts in the same order, so a batch without images gets one there.
    """

    def __init__(self, model: VisionLanguageModel, device: torch.device, sharded: bool) -> None:
        super().__init__()
        self.model, self.device, self.sharded = model, device, sharded
        self._blank: PreparedImage | None = None

    def forward(self, batch: "PackedBatch") -> Tensor:
        """The summed loss of the batch."""
        if self.sharded and not batch.images:
            batch = _with_image(batch, self._blank_image())
        return batch_loss(self.model, batch, self.device)[0]

    def _blank_image(self) -> PreparedImage:
        if self._blank is None:
            config = self.model.config
            pixels = np.zeros((config.image_size, config.image_size, 3), dtype=np.uint8)
            self._blank = config.image_processor().prepare(pixels, 1)
        return self._blank


def _with_image(batch: "PackedBatch", image: PreparedImage) -> "PackedBatch":
    """The batch with an image in a segment of its own, without labels: what it adds to loss and gradients is zero."""
    end, rows = len(batch.token_ids), image.num_tokens

    def longer(values: NDArray[np.int64], more: ArrayLike) -> NDArray[np.int64]:
        return np.concatenate((values, np.asarray(more, dtype=np.int64)))

    return replace(
        batch,
        token_ids=longer(batch.token_ids, np.full(rows, VISUAL_TOKEN)),
        labels=longer(batch.labels, np.full(rows, IGNORED)),
        positions=longer(batch.positions, np.arange(rows)),
        segments=longer(batch.segments, [[end, end + rows, end, end]]),
        images=[image],
        visual_rows=np.arange(end, end + rows),
    )


def shard(loss: LossOf, processes: Processes) -> None:
    """Spread parameters, gradients and so the optimiser's state over the processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(processes.device.type, (processes.world_size,))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    # The tower is gathered as a whole: how often its layers run depends on a process's images.
    for block in (loss.model.vision, *loss.model.decoder.layers, loss):
        fully_shard(block, mesh=mesh, mp_policy=policy)


@torch.no_grad()
def copy_whole(target: Tensor, value: Tensor) -> None:
    """Copy the whole tensor `value`, which every process has, into `target`, sharded or not."""
    if isinstance(target, DTensor):
        value = value.to(target.device, target.dtype)
        value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(value)


def whole_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with every shard gathered, on the CPU. All processes must call it; each gets the whole."""
    gathered: dict[int, Tensor] = {}  # tied weights are one tensor under two names
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in gathered:
            value = tensor.detach()
            gathered[id(tensor)] = (value.full_tensor() if isinstance(value, DTensor) else value).cpu()
        state[name] = gathered[id(tensor)]
    return state
