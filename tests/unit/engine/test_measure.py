"""What a run takes of a card, measured on a card that does not exist: its memory is counted as torch would count it."""

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import write_llava, write_nvila
from vila2.backends.native import NativeCaptioner, open_checkpoint, size_engine
from vila2.engine.cuda_graphs import DecodeBursts, padded_sizes
from vila2.engine.engine import EngineLimits
from vila2.engine.runner import ModelRunner
from vila2.errors import UsageError

MIB, GIB = 2**20, 2**30
TILE, ROW, GRAPH = 30 * MIB, MIB // 8, 5 * MIB  # what a tile, a row of a step and a graph take here
LIBRARIES = 200 * MIB  # what stays once anything has run


class FakeCard:
    """Counts what the engine's parts take: steps until the cache is emptied, graphs for as long as they are held."""

    def __init__(self, total: int, weights: int) -> None:
        self.total, self.taken = total, weights
        self.reserved = self.peak = self.libraries = 0
        self.calls: list[tuple[str, int]] = []
        self.stolen = 0  # by another process, when graphs are let go

    @property
    def free(self) -> int:
        return self.total - self.taken - self.reserved - self.libraries

    def reserve(self, doing: str, amount: int, size: int) -> None:
        self.calls.append((doing, amount))
        self.libraries = LIBRARIES
        if size > self.free:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.reserved += size
        self.peak = max(self.peak, self.reserved)

    def hold(self, owner: object, size: int) -> None:
        self.calls.append(("graphs", size))
        self.taken += size
        weakref.finalize(owner, self.drop, size)

    def drop(self, size: int) -> None:
        self.taken += self.stolen - size

    def reset(self) -> None:
        self.peak = self.reserved

    def empty(self) -> None:
        self.reserved = 0


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> FakeCard:
    card = FakeCard(16 * GIB, 2 * GIB)
    for name, function in {
        "mem_get_info": lambda: (card.free, card.total),
        "memory_reserved": lambda: card.reserved,
        "max_memory_reserved": lambda: card.peak,
        "reset_peak_memory_stats": card.reset,
        "empty_cache": card.empty,
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, function)
    encode, probe = ModelRunner.encode, ModelRunner.probe

    def encoding(self: ModelRunner, images: list[Any]) -> list[torch.Tensor]:
        tiles = sum(len(image.tiles) for image in images)
        card.reserve("tiles", tiles, tiles * TILE)
        return encode(self, images[:1])  # for real, but for speed not all of them

    def probing(self: ModelRunner, rows: int, block: int, context: int, length: int = 1) -> None:
        # What the tower's stream has reserved stays its own.
        card.reserve("rows", rows * length, rows * length * ROW)
        assert self.cache.shape[2] == 1
        probe(self, 1, block, context, length)

    def warming(self: DecodeBursts) -> None:
        count = (1 + self.groups_prefixes) * len(padded_sizes(self.max_num_seqs))
        card.hold(self.slots, count * GRAPH)

    monkeypatch.setattr(ModelRunner, "encode", encoding)
    monkeypatch.setattr(ModelRunner, "probe", probing)
    monkeypatch.setattr(DecodeBursts, "warm_up", warming)
    return card


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> NativeCaptioner:
    path = write_llava(tmp_path_factory.mktemp("model") / "tiny")
    return open_checkpoint(path, device="cpu", precision="float32", threads=1)


def sizes(
    captioner: NativeCaptioner, batch: int | None = 64, share: float = 0.9, **more: Any
) -> EngineLimits:
    plan = replace(captioner.plan, kv_dtype=torch.float32)
    return size_engine(captioner.checkpoint, plan, "cuda", batch, 64, share, **more)


def bytes_per_token(captioner: NativeCaptioner) -> int:
    config = captioner.checkpoint.config.decoder
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4


def test_the_cache_has_what_steps_and_graphs_were_seen_to_leave(
    card: FakeCard, llava: NativeCaptioner
) -> None:
    limits = sizes(llava)
    assert card.calls[:3] == [("tiles", 64), ("rows", 8192), ("rows", 64)]
    plan = limits.card
    assert plan is not None
    # Tower and language model at once; graphs in groups only where images are shared.
    assert plan.needs.steps == 64 * TILE + 8192 * ROW + 64 * ROW
    assert plan.needs.graphs == len(padded_sizes(64)) * GRAPH
    assert plan.free == card.total - 2 * GIB - LIBRARIES  # graphs and steps are let go, libraries stay
    assert plan.kv_bytes == int(0.9 * card.total) - 2 * GIB - LIBRARIES - plan.needs.total
    shared = sizes(llava, shares_images=True).card
    assert shared is not None
    assert shared.needs.graphs == 2 * plan.needs.graphs
    assert shared.kv_bytes == plan.kv_bytes - plan.needs.graphs
    # Nothing of it is what the model's shape says, which stands beside it in the log.
    assert plan.reckoned.steps != plan.needs.steps
    told = plan.describe(GIB)
    assert told == (
        "of 16.0 GiB the KV cache has 1.0 GiB, weights and others 2.2 GiB, steps 2.9 GiB (reckoned "
        f"{plan.reckoned.steps / GIB:.1f} GiB), graphs 0.0 GiB (reckoned {plan.reckoned.graphs / GIB:.1f} GiB), "
        f"images {plan.needs.images / GIB:.1f} GiB"
    )


def test_the_engine_says_how_the_card_is_shared_out(card: FakeCard, llava: NativeCaptioner) -> None:
    limits = replace(sizes(llava, 2), num_kv_tokens=4096, burst=1)
    opened = NativeCaptioner(llava.checkpoint, llava.plan, "tiny", "plain", limits)
    held = opened.engine.runner.cache.nbytes / GIB
    assert f"; of 16.0 GiB the KV cache has {held:.1f} GiB, weights" in opened.description


def test_a_share_of_the_card_decides_how_many_tokens_there_is_room_for(
    card: FakeCard, llava: NativeCaptioner
) -> None:
    token = bytes_per_token(llava)
    full = sizes(llava, 512, 1.0).card
    assert full is not None
    others = card.total - full.kv_bytes
    card.taken += full.kv_bytes - 3000 * token  # less is left than 512 sequences would like
    assert sizes(llava, 512, 1.0).num_kv_tokens == 3000
    card.total *= 2  # half of the card is for others
    assert sizes(llava, 512, 0.5).num_kv_tokens == 3000
    assert others > 2 * GIB
    card.taken += 2990 * token
    with pytest.raises(
        UsageError, match=r"the KV cache of one sequence .* lower --max-new-tokens or free memory"
    ):
        sizes(llava, 512, 0.5)
    with pytest.raises(
        UsageError,
        match=r"no GPU memory is left for the KV cache: of 32\.0 GiB --gpu-memory 0\.25 .*steps need 2\.9",
    ):
        sizes(llava, 512, 0.25)


def test_batches_that_find_no_memory_are_halved(card: FakeCard, llava: NativeCaptioner) -> None:
    card.taken = card.total - LIBRARIES - 1300 * MIB
    limits = sizes(llava, 8, 1.0)
    assert (limits.max_batch_tokens, limits.vision_batch) == (2048, 16)
    assert [call for call in card.calls if call[0] == "tiles"] == [
        ("tiles", 64),
        ("tiles", 32),
        ("tiles", 16),
    ]
    plan = limits.card
    assert plan is not None
    assert plan.needs.steps == 16 * TILE + 2048 * ROW + 8 * ROW


def test_a_small_card_gets_fewer_captions_at_once_unless_their_number_was_asked_for(
    card: FakeCard, llava: NativeCaptioner
) -> None:
    card.taken = card.total - LIBRARIES - 1200 * MIB
    limits = sizes(llava, None, 1.0)
    # 256 captions with the smaller steps that fit leave nothing for a cache; half of it all does.
    assert (limits.max_num_seqs, limits.max_batch_tokens, limits.vision_batch) == (128, 1024, 8)
    with pytest.raises(UsageError, match="no GPU memory is left for the KV cache"):
        sizes(llava, 256, 1.0)


def test_a_card_too_small_for_any_batch_is_one_line(
    card: FakeCard, llava: NativeCaptioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    card.taken = card.total - LIBRARIES - MIB
    found = (llava.checkpoint, replace(llava.plan, kv_dtype=torch.float32), "tiny", "cuda")
    monkeypatch.setattr("vila2.backends.native._find", lambda *more: found)
    with pytest.raises(UsageError) as refused:
        open_checkpoint("tiny", threads=1)
    assert "\n" not in str(refused.value)
    assert "of 16.0 GiB are free; lower --batch-size or --gpu-memory" in str(refused.value)
    assert card.calls[-1] == ("tiles", 1)


def test_figures_that_cannot_be_right_give_way_to_the_reckoned(
    card: FakeCard, llava: NativeCaptioner
) -> None:
    card.stolen = GIB
    plan = sizes(llava).card
    assert plan is not None
    assert plan.needs.graphs == plan.reckoned.graphs
    assert plan.needs.steps != plan.reckoned.steps


def test_images_in_tiles_are_measured_by_the_most_of_them(card: FakeCard, tmp_path: Path) -> None:
    path = write_nvila(tmp_path / "nvila")
    captioner = open_checkpoint(path, device="cpu", precision="float32", threads=1)
    processor = captioner.checkpoint.image_processor
    limits = sizes(captioner)
    doing, tiles = card.calls[0]
    assert doing == "tiles"
    assert processor.max_tiles <= tiles <= 64
    assert limits.card is not None
    hidden = captioner.checkpoint.config.decoder.hidden_size
    assert limits.card.needs.images == (64 + 64 + 64) * processor.max_tokens * hidden * 2
