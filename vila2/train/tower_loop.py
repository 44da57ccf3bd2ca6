"""The loop that trains a tower behind heads that are thrown away: Muon for its matrices, AdamW for the rest."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vila2.errors import OutputError
from vila2.model.vision import VisionTower
from vila2.train.optim import ParamGroup, build_optimizer
from vila2.world import WorldSettings
from vila2.world.lexicon import SIGN_WORDS

_LEAST = 0.1  # of the learning rate, at the end


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerRun:
    """How long and on what a tower is trained. `keep` patches of each image go through it, those that vary most."""

    steps: int
    batch: int
    keep: int
    themes: tuple[str, ...] = ()  # of the world, as in WorldSettings
    sign_words: int = len(SIGN_WORDS)
    muon_lr: float = 8e-3
    adamw_lr: float = 2e-3
    warmup: int = 60
    seed: int = 0
    log_every: int = 50
    probe_every: int = 200

    def world(self, image_size: int) -> WorldSettings:
        """The world as it is, which probes are drawn from."""
        return WorldSettings(
            image_size=image_size, seed=self.seed, themes=self.themes, sign_words=self.sign_words
        )


class TowerPair(nn.Module):
    """A tower and what is trained with it; `forward(*batch, keep)` is the loss of a batch."""

    def __init__(self, vision: VisionTower) -> None:
        super().__init__()
        self.vision = vision


def fit(
    pair: TowerPair,
    run: TowerRun,
    make: Callable[[int], tuple[Any, ...]],
    probe: Callable[[], str],
    report: Callable[[str], None],
) -> float:
    """Train `pair` in place on the batches that `make(step)` gives; returns the seconds that it took.

    OutputError if the loss is no number any more.
    """
    optimizer = build_optimizer(_groups(pair, run), "float32")
    started, loss_sum = time.perf_counter(), 0.0
    for step, batch in enumerate(_ahead(make, run.steps)):
        loss = pair(*batch, run.keep)
        if not torch.isfinite(loss):
            raise OutputError(f"the tower's loss is {loss.item()} at step {step}: lower its learning rates")
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.clip_grad_norm(1.0)
        optimizer.step(_scale(step, run))
        loss_sum += loss.item()
        if (step + 1) % run.log_every == 0:
            rate = (step + 1) * run.batch / (time.perf_counter() - started)
            report(f"step {step + 1}/{run.steps} loss {loss_sum / run.log_every:.4f} {rate:.1f} images/s")
            loss_sum = 0.0
        if (step + 1) % run.probe_every == 0 and step + 1 < run.steps:
            report(probe())
    return time.perf_counter() - started


def _groups(pair: TowerPair, run: TowerRun) -> list[ParamGroup]:
    named = list(pair.named_parameters())
    blocks = {name: (pair.vision.config.width,) * 3 for name, _ in named if name.endswith("qkv.weight")}
    vision = [item for item in named if item[0].startswith("vision.")]
    heads = [item for item in named if not item[0].startswith("vision.")]
    return [
        ParamGroup("vision", vision, run.muon_lr, 0.0, "muon", adamw_lr=run.adamw_lr, blocks=blocks),
        ParamGroup("heads", heads, run.adamw_lr, 0.0, "adamw"),
    ]


def _scale(step: int, run: TowerRun) -> float:
    """Warm-up, then down to a tenth in a straight line over the last half."""
    left = (run.steps - step) / run.steps
    return min(1.0, (step + 1) / run.warmup, max(_LEAST, 2 * left))


def _ahead(make: Callable[[int], tuple[Any, ...]], count: int) -> Iterator[tuple[Any, ...]]:
    """The batches in order, each made by another thread while the one before it is used."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(make, 0)
        for step in range(count):
            batch = coming.result()
            if step + 1 < count:
                coming = pool.submit(make, step + 1)
            yield batch
