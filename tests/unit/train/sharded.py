"""What one of two processes computes in `test_sharding`: losses, gradients, and weights spread and gathered."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

from tests.unit.train.kits import model_config
from vila2.model import vision
from vila2.model.images import PreparedImage
from vila2.model.vlm import VisionLanguageModel
from vila2.train.examples import EncodedExample, Row
from vila2.train.packing import PackedBatch, pack
from vila2.train.sharding import LossOf, Processes, copy_whole, shard, whole_tensors

VOCAB = 50


def new_model() -> VisionLanguageModel:
    torch.manual_seed(3)
    model = VisionLanguageModel.from_config(model_config(VOCAB, mode="dynamic"))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def batch(seed: int, tiles: tuple[int, ...], length: int) -> PackedBatch:
    """One text of `length` tokens after an image of each of these numbers of tiles; (), 0: no row at all."""
    rng = np.random.default_rng(seed)
    images = tuple(
        PreparedImage(rng.integers(0, 256, (n, 16, 16, 3), dtype=np.uint8), "dynamic", None, 4 * n, n, 16, 16)
        for n in tiles
    )
    visual = 4 * sum(tiles)
    text = Row(rng.integers(0, VOCAB, length), np.ones(length, dtype=np.bool_))
    prefix = Row(np.full(visual, -1), np.zeros(visual, dtype=np.bool_))
    return pack([EncodedExample("k", images, prefix, (text,))] if length else [])


def batches(rank: int) -> list[PackedBatch]:
    """Three micro-batches in which the two ranks have unlike numbers of images, tiles and rows."""
    return [
        [batch(0, (3, 2), 9), batch(1, (), 0), batch(2, (1,), 4)],
        [batch(3, (), 7), batch(4, (1,), 5), batch(5, (), 0)],
    ][rank]


def plain(parts: tuple[str, ...]) -> dict[str, Tensor]:
    """The summed loss and the gradients of one process that has every batch."""
    model = new_model()
    learn(model, parts)
    loss_of = LossOf(model, torch.device("cpu"), sharded=False)
    losses = [loss_of(each) for rank in (0, 1) for each in batches(rank) if each.num_labels]
    torch.stack(losses).sum().backward()
    return {"loss": torch.stack(losses).sum().detach()} | gradients(model)


def learn(model: VisionLanguageModel, parts: tuple[str, ...]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.partition(".")[0] in parts)


def gradients(model: VisionLanguageModel) -> dict[str, Tensor]:
    named = [(name, p.grad) for name, p in model.named_parameters() if p.requires_grad]
    return {name: whole(gradient) for name, gradient in named if gradient is not None}


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def one_of_two(rank: int, folder: Path, parts: tuple[str, ...]) -> None:
    """Write rank-N.safetensors: the loss and the gradients, and what becomes of weights on their way."""
    torch.set_num_threads(1)
    vision._TILES_PER_PASS = 2
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    processes = Processes(rank, 2, torch.device("cpu"))
    model = new_model()
    learn(model, parts)
    loss_of = LossOf(model, processes.device, sharded=True)
    shard(loss_of, processes)
    total = 0.0
    for each in batches(rank):
        loss = loss_of(each)
        (2 * loss).backward()  # FSDP averages
        total += float(loss.detach())
    found = {"loss": torch.tensor(processes.sum([total])[0])} | gradients(model)
    with torch.no_grad():
        for parameter in model.parameters():
            copy_whole(parameter, whole(parameter) + 1)
    state = whole_tensors(model)
    found |= {f"gathered/{name}": tensor.clone() for name, tensor in state.items()}
    assert processes.gather(rank) == [0, 1]
    save_file(found, folder / f"rank-{rank}.safetensors")
    processes.barrier()
    distributed.destroy_process_group()
