"""The training of a contrastive tower (`vila2.train.contrastive`) on the world's images and alt-texts.

It sees what the web would give and no truth: scenes of the pretraining split with alt-texts that are short, and at
times vague or wrong.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vila2.model.tokenizer import load_tokenizer
from vila2.model.vision import VisionConfig, VisionTower
from vila2.train.contrastive import WordContrast
from vila2.train.tower_loop import TowerRun, fit
from vila2.world import AltNoise, Scene, World, texts

_PROBE_KEEP = 50  # patches of a scene of up to five objects
_PROBE = 512  # scenes of the dev split on which the tower names what it sees
_COUNTED = 4096  # alt-texts from which the odds of the words come
_PLACE_STD = 0.7  # of positions: patches have half of it at first, and several times as much when trained


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerSettings(TowerRun):
    """What a tower is trained with.

    Words that more than `common` of the alt-texts say ("photo", "of") tell nothing of an image and are left out.
    """

    batch: int = 128
    keep: int = 40
    object_counts: tuple[float, ...] = (0.75, 0.25)  # pictures of one thing or two, as most on the web are
    sign: float = 0.5  # of the images
    alt_sign: float = 0.7  # of the alt-texts of images with a sign: they say its word
    common: float = 0.02


def fresh_tower(config: VisionConfig, seed: int) -> VisionTower:
    """A tower with normalisation to -1..1, weights drawn from `seed`, and positions that begin as sines and cosines.

    Positions of the usual size (0.02) stayed a thirtieth of the patches' for all of a short training: such a model
    knows what there is and not where.
    """
    torch.manual_seed(seed)
    tower = VisionTower(config, (0.5,) * 3, (0.5,) * 3)
    side = config.image_size // config.patch_size
    with torch.no_grad():
        tower.position_embedding.copy_(_PLACE_STD * math.sqrt(2) * sines(side, config.width))
    return tower


def sines(side: int, width: int) -> Tensor:
    """Sines and cosines (side * side, width) of rows and columns, with periods from 3 patches to 6 times the side.

    Half of the columns is of the row and half of the column, as in MAE (arXiv 2111.06377). `width` divides by 4.
    """
    slowest, fastest = 2 * math.pi / (6 * side), 2 * math.pi / 3
    rates = torch.exp(torch.linspace(math.log(fastest), math.log(slowest), width // 4))
    angles = torch.arange(side)[:, None] * rates
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = line[:, None].expand(side, side, -1), line[None].expand(side, side, -1)
    return torch.cat([rows, columns], dim=-1).reshape(side * side, width)


def train_tower(
    tower: VisionTower,
    tokenizer_folder: str | Path,
    settings: TowerSettings,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, float]:
    """Train `tower` in place; returns its figures. OutputError if the loss is no number any more."""
    torch.manual_seed(settings.seed + 1)
    tokenizer = load_tokenizer(tokenizer_folder)
    pair = WordContrast(tower, len(tokenizer))
    usual = World(settings.world(tower.config.image_size))
    world = World(
        replace(
            usual.settings,
            object_counts=settings.object_counts,
            sign=settings.sign,
            alt=AltNoise(sign=settings.alt_sign),
        )
    )

    def words(scene: Scene) -> list[int]:
        # With a space before the first word, as every other word has one: else it is cut in another way.
        return tokenizer.encode(f" {texts.alt_text(scene, world.settings.alt).text}")

    said = Counter(word for index in range(_COUNTED) for word in set(words(world.scene("pretrain", index))))
    common = {word for word, count in said.items() if count > settings.common * _COUNTED}
    pair.start_shifts({word: count / _COUNTED for word, count in said.items()})

    def batch(step: int) -> tuple[Tensor, list[list[int]]]:
        scenes = [world.scene("pretrain", step * settings.batch + i) for i in range(settings.batch)]
        tiles = torch.from_numpy(np.stack([world.render(scene) for scene in scenes]))
        return tiles, [[word for word in words(scene) if word not in common] for scene in scenes]

    def recall() -> float:
        return name_recall(pair, usual, tokenizer.encode)

    seconds = fit(pair, settings, batch, lambda: f"names found {recall():.3f}", report)
    return {"images": float(settings.steps * settings.batch), "seconds": seconds, "name_recall": recall()}


@torch.no_grad()
def name_recall(pair: WordContrast, world: World, encode: Callable[[str], list[int]]) -> float:
    """Of the names in dev scenes, the share among the tower's best guesses, as many as the scene has names."""
    names = world.lexicon.names
    labels = [encode(f" {name}") for name in names]
    words = torch.tensor(sorted({token for label in labels for token in label}))
    places = [torch.searchsorted(words, torch.tensor(label)) for label in labels]
    found = total = 0
    for start in range(0, _PROBE, 64):
        scenes = [world.scene("dev", index) for index in range(start, start + 64)]
        tiles = torch.from_numpy(np.stack([world.render(scene) for scene in scenes]))
        scores = pair.logits(tiles, words, _PROBE_KEEP)
        order = torch.stack([scores[:, at].mean(dim=1) for at in places], dim=1).argsort(
            dim=1, descending=True
        )
        for scene, ranked in zip(scenes, order.tolist(), strict=True):
            there = {item.name for item in scene.objects}
            found += len(there & {names[index] for index in ranked[: len(there)]})
            total += len(there)
    return found / total
