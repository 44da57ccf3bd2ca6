"""A tower from what stands where: the truth of patches against points, the loss against a plain one, and learning."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from vila2.errors import OutputError
from vila2.model.vision import VisionConfig
from vila2.train import located
from vila2.train.contrastive import lively_features
from vila2.train.located import (
    NOTHING,
    Labels,
    LocatedSettings,
    LocatedWords,
    locate_tower,
    located_recall,
    patch_truth,
    stacked_truth,
)
from vila2.train.tower import fresh_tower
from vila2.world import World, WorldSettings

CONFIG = VisionConfig(
    "siglip", 48, 12, 32, 48, 2, 2, "gelu_pytorch_tanh", 1e-6, select_layer=-1, select_feature="cls_patch"
)
SIDE = 4
WORLD = World(WorldSettings(image_size=48, themes=("home", "farm"), sign_words=4, sign=0.5))
LABELS = Labels(WORLD)


def tiles(count: int) -> Tensor:
    return torch.from_numpy(np.stack([WORLD.render(WORLD.scene("pretrain", i)) for i in range(count)]))


def test_labels_number_the_background_the_names_and_the_words() -> None:
    numbers = [NOTHING, *LABELS.names.values(), *LABELS.words.values()]
    assert numbers == list(range(len(LABELS)))
    assert len(LABELS.words) == 4
    asked = torch.tensor([NOTHING, len(LABELS.names), len(LABELS.names) + 1])
    assert LABELS.is_word(asked).tolist() == [False, False, True]


@pytest.mark.parametrize("side", [1, 3, 10])
def test_a_patch_shows_what_covers_most_of_it(side: int) -> None:
    for index in range(12):
        scene = WORLD.scene("pretrain", index)
        shown, boxes = patch_truth(scene, side, LABELS)
        fine = 400 // side  # points a patch, in each direction
        at = (np.arange(side * fine) + 0.5) / (side * fine)
        things = [(LABELS.names[thing.name], thing.box) for thing in scene.objects]
        if scene.sign:
            things.append((LABELS.words[scene.sign.word], scene.sign.box))
        share = np.zeros((len(things), side, side))
        for row, (_, (x0, y0, x1, y1)) in zip(share, things, strict=True):
            inside = ((at >= y0) & (at < y1))[:, None] & ((at >= x0) & (at < x1))
            row[:] = inside.reshape(side, fine, side, fine).mean(axis=(1, 3))
        share = share.reshape(len(things), -1)
        for patch in range(side * side):
            best = int(share[:, patch].argmax())
            near = np.sort(np.append(share[:, patch], 0.3))
            if near[-1] - near[-2] < 0.02:
                continue  # too close to tell by points
            label, box = things[best] if share[best, patch] > 0.3 else (NOTHING, (0.0,) * 4)
            assert shown[patch] == label
            assert boxes[patch].tolist() == pytest.approx(box)


def test_the_loss_asks_each_kept_patch_what_it_shows_and_where_that_is() -> None:
    torch.manual_seed(0)
    pair = LocatedWords(fresh_tower(CONFIG, 0), len(LABELS))
    images = tiles(5)
    shown, boxes = stacked_truth([WORLD.scene("pretrain", i) for i in range(5)], SIDE, LABELS)
    features, kept = lively_features(pair.vision, images, 9)
    named, weights, apart, there = torch.zeros(()), 0.0, torch.zeros(()), 0
    for image in range(5):
        for place, patch in enumerate(kept[image].tolist()):
            feature = pair.norm(features[image, place])
            label = int(shown[image, patch])
            weight = 0.2 if label == NOTHING else 1.0
            named = named - weight * functional.log_softmax(pair.label(feature), dim=-1)[label]
            weights += weight
            if label != NOTHING:
                apart = apart + (torch.sigmoid(pair.box(feature)) - boxes[image, patch]).abs().sum() / 4
                there += 1
    assert there
    torch.testing.assert_close(pair(images, shown, boxes, 9), named / weights + 2 * apart / there)


def test_an_image_of_nothing_has_a_loss() -> None:
    pair = LocatedWords(fresh_tower(CONFIG, 0), len(LABELS))
    nothing = torch.zeros(2, SIDE * SIDE, dtype=torch.long)
    assert torch.isfinite(pair(tiles(2), nothing, torch.zeros(2, SIDE * SIDE, 4), 99))


def test_recall_counts_patches_and_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = [WORLD.scene("dev", index) for index in range(70)]
    pair = LocatedWords(fresh_tower(CONFIG, 0), len(LABELS))
    truth, _ = stacked_truth(scenes, SIDE, LABELS)
    says: Iterator[Tensor]

    def scores(images: Tensor, keep: int) -> tuple[Tensor, None, None]:
        assert keep == SIDE * SIDE
        return functional.one_hot(next(says), len(LABELS)).float(), None, None

    monkeypatch.setattr(pair, "scores", scores)
    says = iter(truth.split(64))
    assert located_recall(pair, WORLD, LABELS, 70) == (1.0, 1.0)
    says = iter(torch.where(LABELS.is_word(truth), NOTHING, truth).split(64))
    assert located_recall(pair, WORLD, LABELS, 70) == (1.0, 0.0)
    says = iter(torch.where(LABELS.is_word(truth), truth, NOTHING).split(64))
    assert located_recall(pair, WORLD, LABELS, 70) == (0.0, 1.0)


def trained(monkeypatch: pytest.MonkeyPatch, **options: object) -> tuple[list[str], Tensor, dict[str, float]]:
    monkeypatch.setattr(located, "_PROBE", 8)
    usual = {"steps": 8, "batch": 8, "keep": 9, "log_every": 2, "warmup": 2, "themes": ("home", "farm")}
    lines: list[str] = []
    tower = fresh_tower(CONFIG, 0)
    figures = locate_tower(tower, LocatedSettings(**(usual | options)), lines.append)
    return lines, tower.position_embedding.detach(), figures


def test_it_learns_what_stands_where(monkeypatch: pytest.MonkeyPatch) -> None:
    lines, _, figures = trained(
        monkeypatch, steps=80, batch=16, log_every=20, keep=12, sign=0.0, probe_every=40
    )
    losses = [float(line.split()[3]) for line in lines if line.startswith("step")]
    assert losses[-1] < 0.85 * losses[0]
    assert figures["images"] == 80 * 16
    assert sum(line.startswith("patches named") for line in lines) == 1


def test_the_seed_decides_what_it_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    _, first, _ = trained(monkeypatch)
    _, second, _ = trained(monkeypatch)
    _, other, _ = trained(monkeypatch, seed=1)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_a_loss_that_is_no_number_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match="lower its learning rates"):
        trained(monkeypatch, adamw_lr=1e30, warmup=1)
