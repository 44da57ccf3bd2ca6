"""A vision tower learnt from what stands where: each patch says which thing or word it shows, and the box of that.

Alt-texts alone teach a small tower slowly: after 77,000 images it named two things of five and read one sign in ten,
and nothing that is trained behind it can mend that. So boxes and the words on signs join in, as LocCa
(arXiv 2403.19596) and SigLIP 2 (arXiv 2502.14786) pretrain towers with located captions. The heads are thrown away.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from vila2.model.vision import LayerNorm, VisionTower
from vila2.ops.linear import Linear
from vila2.train.contrastive import lively_features
from vila2.train.tower_loop import TowerPair, TowerRun, fit
from vila2.world import Scene, World
from vila2.world.lexicon import SIGN_WORDS

NOTHING = 0  # the label of a patch of the background
_NOTHING_WEIGHT = 0.2  # most patches show the background, and little is to be learnt from it
_BOX_WEIGHT = 2.0
_COVERED = 0.3  # the share of a patch that a box must cover to label it
_HEAD_STD = 0.02
_PROBE = 512  # dev scenes


@dataclass(frozen=True, slots=True, kw_only=True)
class LocatedSettings(TowerRun):
    """What a tower is trained with: scenes of the pretraining split from number `start` on. `sign`: how many have one.

    Words are learnt last, a while after names: with signs in every other image, from some 40,000 images on.
    """

    batch: int = 64
    keep: int = 48
    sign: float = 0.6
    start: int = 5_000_000  # beyond the scenes that any loop recaptions


def locate_tower(
    tower: VisionTower, settings: LocatedSettings, report: Callable[[str], None] = lambda line: None
) -> dict[str, float]:
    """Train `tower` in place; returns its figures. OutputError if the loss is no number any more."""
    torch.manual_seed(settings.seed + 2)
    side = tower.config.image_size // tower.config.patch_size
    world = World(replace(settings.world(tower.config.image_size), sign=settings.sign))
    labels = Labels(world)
    pair = LocatedWords(tower, len(labels))

    def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
        first = settings.start + step * settings.batch
        scenes = [world.scene("pretrain", first + i) for i in range(settings.batch)]
        return _rendered(world, scenes), *stacked_truth(scenes, side, labels)

    def recall() -> tuple[float, float]:
        return located_recall(pair, world, labels, _PROBE)

    def probe() -> str:
        named, read = recall()
        return f"patches named {named:.3f}, signs read {read:.3f}"

    seconds = fit(pair, settings, batch, probe, report)
    named, read = recall()
    images = float(settings.steps * settings.batch)
    return {"images": images, "seconds": seconds, "patches_named": named, "signs_read": read}


class Labels:
    """Numbers of what patches can show: 0 for the background, then the world's names, then the words on its signs."""

    def __init__(self, world: World) -> None:
        names, words = world.lexicon.names, SIGN_WORDS[: world.settings.sign_words]
        self.names = {name: number for number, name in enumerate(names, 1)}
        self.words = {word: number for number, word in enumerate(words, 1 + len(names))}

    def __len__(self) -> int:
        return 1 + len(self.names) + len(self.words)

    def is_word(self, labels: Tensor) -> Tensor:
        return labels > len(self.names)


def patch_truth(scene: Scene, side: int, labels: Labels) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Label (side * side,) and box (side * side, 4) of what covers most of each patch; zeros for the background."""
    shown = np.full((side, side), NOTHING, np.int64)
    boxes = np.zeros((side, side, 4), np.float32)
    covered = np.full((side, side), _COVERED)
    edges = np.arange(side + 1) / side
    things = [(labels.names[thing.name], thing.box) for thing in scene.objects]
    if scene.sign is not None:
        things.append((labels.words[scene.sign.word], scene.sign.box))
    for label, box in things:
        x0, y0, x1, y1 = box
        wide = np.clip(np.minimum(edges[1:], x1) - np.maximum(edges[:-1], x0), 0, None) * side
        high = np.clip(np.minimum(edges[1:], y1) - np.maximum(edges[:-1], y0), 0, None) * side
        share = high[:, None] * wide
        most = share > covered
        shown[most], boxes[most], covered[most] = label, box, share[most]
    return shown.reshape(-1), boxes.reshape(-1, 4)


class LocatedWords(TowerPair):
    """Tower and two heads for its patches: what a patch shows, and the box of it."""

    def __init__(self, vision: VisionTower, labels: int) -> None:
        super().__init__(vision)
        width = vision.config.width
        self.norm = LayerNorm(width)
        self.label = Linear(width, labels)
        self.box = Linear(width, 4)
        for head in (self.label, self.box):
            nn.init.normal_(head.weight, std=_HEAD_STD)
            assert head.bias is not None
            nn.init.zeros_(head.bias)
        weights = torch.ones(labels)
        weights[NOTHING] = _NOTHING_WEIGHT
        self.weights: Tensor
        self.register_buffer("weights", weights, persistent=False)

    def scores(self, tiles: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (N, keep, labels) and boxes (N, keep, 4) of uint8 tiles (N, S, S, 3), and the patches' numbers."""
        features, kept = lively_features(self.vision, tiles, keep)
        features = self.norm(features)
        return self.label(features), self.box(features).sigmoid(), kept

    def forward(self, tiles: Tensor, labels: Tensor, boxes: Tensor, keep: int) -> Tensor:
        """Cross-entropy of labels (N, patches), plus twice how far the sides of boxes (N, patches, 4) are off."""
        logits, guessed, kept = self.scores(tiles, keep)
        labels = labels.gather(1, kept)
        boxes = boxes.gather(1, kept[:, :, None].expand(-1, -1, 4))
        named = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), self.weights)
        there = labels != NOTHING
        apart = (guessed - boxes).abs().mean(dim=-1)
        return named + _BOX_WEIGHT * (apart * there).sum() / there.sum().clamp(min=1)


@torch.no_grad()
def located_recall(pair: LocatedWords, world: World, labels: Labels, scenes: int) -> tuple[float, float]:
    """Of dev scenes: the share of things' patches that is named, and of signs that most of their patches read."""
    side = pair.vision.config.image_size // pair.vision.config.patch_size
    named = of_things = read = signs = 0
    for start in range(0, scenes, 64):
        some = [world.scene("dev", index) for index in range(start, min(start + 64, scenes))]
        truth, _ = stacked_truth(some, side, labels)
        guesses = pair.scores(_rendered(world, some), side * side)[0].argmax(dim=-1)
        thing = (truth != NOTHING) & ~labels.is_word(truth)
        named += int((guesses[thing] == truth[thing]).sum())
        of_things += int(thing.sum())
        for scene, guess, true in zip(some, guesses, truth, strict=True):
            if scene.sign is not None:
                words = guess[labels.is_word(true)]
                words = words[labels.is_word(words)]
                read += len(words) > 0 and int(words.mode().values) == labels.words[scene.sign.word]
                signs += 1
    return named / max(of_things, 1), read / max(signs, 1)


def stacked_truth(scenes: Sequence[Scene], side: int, labels: Labels) -> tuple[Tensor, Tensor]:
    """`patch_truth` of several scenes: labels (N, patches) and boxes (N, patches, 4)."""
    shown, boxes = zip(*(patch_truth(scene, side, labels) for scene in scenes), strict=True)
    return torch.from_numpy(np.stack(shown)), torch.from_numpy(np.stack(boxes))


def _rendered(world: World, scenes: Sequence[Scene]) -> Tensor:
    """uint8 (N, S, S, 3)."""
    return torch.from_numpy(np.stack([world.render(scene) for scene in scenes]))
