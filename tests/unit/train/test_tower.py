"""A tower from alt-texts: its features, its loss against a plain one, and that it learns; the small tokenizer."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from vila2.errors import OutputError
from vila2.model.tokenizer import load_tokenizer
from vila2.model.vision import VisionConfig
from vila2.ops.patches import image_patches
from vila2.train import tower as tower_module
from vila2.train.contrastive import WordContrast, lively_features
from vila2.train.tower import TowerSettings, fresh_tower, sines, train_tower
from vila2.train.vocabulary import ASSISTANT, END, USER, write_vocabulary

CONFIG = VisionConfig(
    "siglip", 48, 12, 32, 48, 2, 2, "gelu_pytorch_tanh", 1e-6, select_layer=-1, select_feature="cls_patch"
)
# Its vocabulary has a few pieces of words, so none is left out as common.
_SHORT = {"steps": 8, "batch": 8, "keep": 6, "log_every": 2, "warmup": 2, "common": 1.0}
TEXTS = ["a red dog left of 12 cats", "two cats at [012,345]", "a dog, a cat", "the sign says HELLO"] * 3


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vocabulary")
    assert write_vocabulary(folder, TEXTS, 300, 512) <= 300
    return folder


def tiles(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 48, 48, 3), dtype=torch.uint8, generator=generator)


def test_all_patches_kept_is_the_tower_itself() -> None:
    tower = fresh_tower(CONFIG, 0)
    torch.testing.assert_close(lively_features(tower, tiles(3), 99)[0], tower(tiles(3)))


def test_the_patches_that_vary_most_are_kept_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    tower = fresh_tower(CONFIG, 0)
    images = torch.full((1, 48, 48, 3), 90, dtype=torch.uint8)
    lively = [14, 3, 9]  # numbers of patches in a grid of 4 x 4
    for number in lively:
        row, column = divmod(number, 4)
        images[0, 12 * row : 12 * row + 12, 12 * column : 12 * column + 12] = tiles(1)[0, :12, :12]
    for layer in tower.layers:
        monkeypatch.setattr(layer, "forward", lambda x: x)
    patches = image_patches(images, 12, (0.5,) * 3, (0.5,) * 3, torch.float32)
    embedded = tower.patch_embedding(patches) + tower.position_embedding
    features, kept = lively_features(tower, images, 3)
    assert kept.tolist() == [sorted(lively)]
    torch.testing.assert_close(features, embedded[:, sorted(lively)])


def test_the_loss_asks_of_every_image_and_word() -> None:
    torch.manual_seed(0)
    pair = WordContrast(fresh_tower(CONFIG, 0), vocab_size=9, size=8)
    texts = [[1, 4, 4], [4, 7], [2]]
    features, _ = lively_features(pair.vision, tiles(3), 5)
    patches = functional.normalize(pair.patch(pair.norm(features)), dim=-1)
    total = torch.zeros(())
    for image, text in zip(patches, texts, strict=True):
        for word in (1, 2, 4, 7):
            similar = pair.log_scale.exp() * (image @ functional.normalize(pair.word.weight[word], dim=0))
            score = similar.exp().mean().log() + pair.shift[word]
            total = total - functional.logsigmoid(score if word in text else -score)
    torch.testing.assert_close(pair(tiles(3), texts, 5), total / 3)


def test_positions_begin_as_waves_that_tell_every_place_apart() -> None:
    places = sines(5, 32)
    assert places.shape == (25, 32)
    distance = torch.cdist(places, places)
    assert distance[~torch.eye(25, dtype=torch.bool)].min() > 0.5
    grid = places.reshape(5, 5, 32)
    assert torch.equal(grid[:, 0, :16], grid[:, 3, :16])  # half of it is the row's alone
    assert torch.equal(grid[0, :, 16:], grid[4, :, 16:])
    assert distance[0, 1] < distance[0, 2]
    assert 0.4 < fresh_tower(CONFIG, 0).position_embedding.std() < 1.0


def test_shifts_start_at_the_odds_of_each_word() -> None:
    pair = WordContrast(fresh_tower(CONFIG, 0), vocab_size=4, size=8)
    pair.start_shifts({1: 0.25, 3: 1.0})
    assert torch.sigmoid(pair.shift).tolist() == pytest.approx([0.0025, 0.25, 0.0025, 0.9975], rel=0.02)


def trained(vocabulary: Path, monkeypatch: pytest.MonkeyPatch, **options: object) -> tuple[list[str], Tensor]:
    monkeypatch.setattr(tower_module, "_PROBE", 8)
    settings = TowerSettings(**(_SHORT | options))
    lines: list[str] = []
    report: Callable[[str], None] = lines.append
    tower = fresh_tower(CONFIG, 0)
    figures = train_tower(tower, vocabulary, settings, report)
    assert figures["images"] == 64
    assert 0 <= figures["name_recall"] <= 1
    return lines, tower.position_embedding.detach()


def test_the_loss_teaches_what_images_show() -> None:
    torch.manual_seed(0)
    pair = WordContrast(fresh_tower(CONFIG, 0), vocab_size=9, size=8)
    pair.start_shifts(dict.fromkeys(range(1, 5), 0.25))
    optimizer = torch.optim.AdamW(pair.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = pair(tiles(4), [[1], [2], [3], [4]], 6)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_the_seed_decides_what_it_learns(vocabulary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, first = trained(vocabulary, monkeypatch, probe_every=4)
    assert sum(line.startswith("step") for line in lines) == 4
    assert sum(line.startswith("names found") for line in lines) == 1
    _, second = trained(vocabulary, monkeypatch)
    _, other = trained(vocabulary, monkeypatch, seed=1)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_a_loss_that_is_no_number_stops_it(vocabulary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match="lower its learning rates"):
        trained(vocabulary, monkeypatch, adamw_lr=1e30, warmup=1)


def test_the_vocabulary_writes_any_text_and_digits_one_by_one(vocabulary: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(vocabulary)
    for text in (*TEXTS, "Ünïcode 漢字 😀\n\ttabs", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [tokenizer.decode([token]) for token in tokenizer.encode("012")] == ["0", "1", "2"]
    assert len(tokenizer.encode(" cats")) < 5
    write_vocabulary(tmp_path, TEXTS, 300, 512)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (vocabulary / name).read_bytes()


def test_the_chat_template_marks_turns_and_ends_answers(vocabulary: Path) -> None:
    tokenizer = load_tokenizer(vocabulary).inner
    turns = [{"role": "user", "content": "a dog?"}, {"role": "assistant", "content": "a cat"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == f"{USER} a dog?{ASSISTANT} a cat{END}"
    asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert asked == f"{USER} a dog?{ASSISTANT}"
