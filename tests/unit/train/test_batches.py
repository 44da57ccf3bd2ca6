"""The stream: the same batches from any position, a partition among ranks, nothing lost to bad data or to timing."""

import json
import threading
import time
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.train.kits import kit, picture
from vila2.train.batches import BatchStream, PackedBatch, Position, share_out
from vila2.train.examples import Document, LazyImage, SkippedDocument
from vila2.train.mixture import Mixture


class Made:
    """Documents of many lengths; every seventh has a corrupt image, every eleventh cannot be read at all."""

    def __init__(
        self, name: str = "made", length: int | None = None, bad: bool = True, pause: float = 0.0
    ) -> None:
        self.name, self.length, self.bad, self.pause = name, length, bad, pause

    def document(self, index: int) -> Document:
        if self.pause:
            time.sleep(self.pause * (index % 3))
        if self.bad and index % 11 == 10:
            raise SkippedDocument("missing_file", "gone")
        turns = tuple(
            ((f"What is {index} {k}?", "dog " * (1 + (index * 7 + k) % 13)),) for k in range(1 + index % 4)
        )
        bad = self.bad and index % 7 == 6
        image = LazyImage(lambda: b"broken" if bad else picture(index % 256))
        images = () if index % 5 == 4 else (image,)
        return Document(f"{self.name}/{index}", "conversation", images, conversations=turns)


def stream(source: Made | None = None, **options) -> BatchStream:
    mixture = Mixture([source or Made(), Made("few", 9, bad=False)], [3, 1], seed=1)
    settings = {"batch_examples": 12, "max_tokens": 400, "prefetch": 0} | options
    return BatchStream(mixture, kit("nvila").encoder(), **settings)


def take(
    of: BatchStream, count: int, start: Position | None = None
) -> list[tuple[list[PackedBatch], Position]]:
    steps = of.steps(start)
    try:
        return list(islice(steps, count))
    finally:
        steps.close()


def content(batch: PackedBatch) -> tuple:
    arrays = (batch.token_ids, batch.labels, batch.positions, batch.segments, batch.visual_rows)
    tiles = b"".join(image.tiles.tobytes() for image in batch.images)
    return (*(array.tobytes() for array in arrays), tiles, tuple(batch.keys), batch.num_labels)


def contents(steps: list[tuple[list[PackedBatch], Position]]) -> list:
    return [([content(batch) for batch in batches], position) for batches, position in steps]


@pytest.fixture(scope="module")
def eight() -> list:
    return take(stream(), 8)


@pytest.mark.parametrize("options", [{"prefetch": 1}, {"prefetch": 3}, {"prefetch": 2, "workers": 3}])
def test_threads_change_nothing(eight: list, options: dict) -> None:
    assert contents(take(stream(Made(pause=0.002), **options), 8)) == contents(eight)


@pytest.mark.parametrize("at", range(8))
def test_a_stream_goes_on_from_any_position(eight: list, at: int) -> None:
    position = Position() if at == 0 else eight[at - 1][1]
    stored = Position.from_json(json.loads(json.dumps(position.to_json())))
    assert stored == position
    assert contents(take(stream(prefetch=2), 8 - at, stored)) == contents(eight)[at:]


def test_positions_count_steps_examples_and_documents(eight: list) -> None:
    for number, (_, position) in enumerate(eight, start=1):
        assert (position.step, position.examples) == (number, 12 * number)
        assert sum(position.consumed.values()) == 12 * number
        assert set(position.consumed) == {"made", "few"}


def test_another_step_size_goes_on_where_the_examples_ended(eight: list) -> None:
    (batches, position), *_ = take(stream(batch_examples=24), 1, eight[1][1])
    later = [key for step, _ in eight[2:4] for batch in step for key in batch.keys]
    assert sorted(key for batch in batches for key in batch.keys) == sorted(later)
    assert (position.step, position.examples) == (3, 48)


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_share_a_step_without_overlap(eight: list, world_size: int) -> None:
    ranks = [take(stream(rank=rank, world_size=world_size), 8) for rank in range(world_size)]
    for number, (alone, position) in enumerate(eight):
        shares = [rank[number][0] for rank in ranks]
        assert {rank[number][1] == position for rank in ranks} == {True}
        assert len({len(share) for share in shares}) == 1  # as many micro-batches for each
        keys = Counter(key for share in shares for batch in share for key in batch.keys)
        assert keys == Counter(key for batch in alone for key in batch.keys)
        assert sum(batch.num_labels for share in shares for batch in share) == sum(
            b.num_labels for b in alone
        )
        assert sum(batch.num_rows for share in shares for batch in share) == sum(b.num_rows for b in alone)


def test_bad_documents_are_counted_and_the_others_stay(eight: list) -> None:
    of = stream()
    found = take(of, 8)
    keys = [key for batches, _ in found for batch in batches for key in batch.keys]
    numbers = [(of.mixture.sources[s].name, i) for s, i in map(of.mixture.place, range(96))]
    gone = [i for name, i in numbers if name == "made" and i % 11 == 10]
    broken = [i for name, i in numbers if name == "made" and i % 7 == 6 and i % 5 != 4 and i % 11 != 10]
    assert of.statistics["skipped_missing_file"] == len(gone) > 0
    assert of.statistics["skipped_not_an_image"] == len(broken) > 0
    good = [f"{name}/{i}" for name, i in numbers if name == "few" or (i not in gone and i not in broken)]
    assert sorted(keys) == sorted(good)
    assert of.statistics["documents"] == 96 - len(gone)
    assert of.statistics["rows"] == sum(batch.num_rows for batches, _ in found for batch in batches)
    assert of.statistics["labels"] == sum(batch.num_labels for batches, _ in found for batch in batches)
    assert of.statistics["images"] == sum(len(batch.images) for batches, _ in found for batch in batches)


def test_statistics_are_of_the_steps_taken_whatever_was_made_ahead() -> None:
    ahead, none = stream(prefetch=4), stream()
    take(none, 2)
    steps = ahead.steps()
    next(steps), next(steps)
    time.sleep(0.3)
    assert ahead.statistics == none.statistics
    steps.close()


def test_micro_batches_keep_to_their_size_and_are_evenly_filled() -> None:
    for batches, _ in take(stream(Made(bad=False)), 8):
        sizes = [batch.num_rows for batch in batches]
        assert max(sizes) <= 400
        # No example has more than 200 rows, so the emptiest lies at most that far below the fullest.
        assert max(sizes) - min(sizes) <= 200


def test_a_document_with_more_rows_than_a_micro_batch_is_divided() -> None:
    class Large(Made):
        def document(self, index: int) -> Document:
            turns = tuple(((f"What {k}?", "dog " * 10),) for k in range(40))
            return Document(f"large/{index}", "conversation", (picture(),), conversations=turns)

    of = BatchStream(
        Mixture([Large("large")], [1]), kit("nvila").encoder(), batch_examples=2, max_tokens=300, prefetch=0
    )
    ((batches, _),) = take(of, 1)
    assert max(batch.num_rows for batch in batches) <= 300
    whole = kit("nvila").encoder().encode(Large("large").document(0))
    learnt = sum(int(branch.in_loss.sum()) for branch in whole.branches)
    assert sum(batch.num_labels for batch in batches) == 2 * learnt
    assert of.statistics["documents"] == 2


def test_a_single_text_longer_than_a_micro_batch_comes_alone() -> None:
    class Long(Made):
        def document(self, index: int) -> Document:
            return Document(f"long/{index}", "text", text="dog " * (200 if index == 0 else 5))

    of = BatchStream(
        Mixture([Long("long")], [1]), kit("nvila").encoder(), batch_examples=8, max_tokens=100, prefetch=0
    )
    ((batches, _),) = take(of, 1)
    assert [batch.keys for batch in batches if batch.num_rows > 100] == [["long/0"]]


def test_fewer_examples_than_ranks_leave_batches_without_rows() -> None:
    sizes = []
    for rank in range(3):
        ((batches, _),) = take(stream(batch_examples=2, rank=rank, world_size=3), 1)
        sizes.append([batch.num_rows for batch in batches])
    assert len({len(size) for size in sizes}) == 1
    assert 0 in [row for size in sizes for row in size]


def test_an_error_in_the_thread_reaches_the_reader_in_its_place() -> None:
    class Failing(Made):
        def document(self, index: int) -> Document:
            if index == 30:
                raise RuntimeError("a fault of the program")
            return super().document(index)

    steps = stream(Failing(), prefetch=3).steps()
    got = [next(steps), next(steps)]
    assert [position.step for _, position in got] == [1, 2]
    with pytest.raises(RuntimeError, match="a fault of the program"):
        list(steps)


def test_closing_the_stream_ends_its_threads() -> None:
    before = threading.active_count()
    steps = stream(prefetch=2, workers=2).steps()
    next(steps)
    assert threading.active_count() > before
    steps.close()
    assert threading.active_count() == before


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.floats(0, 50)), max_size=30),
    st.integers(1, 4),
    st.integers(20, 120),
)
def test_shares_are_a_partition_within_bounds(
    items: list[tuple[int, float]], world_size: int, max_rows: int
) -> None:
    sizes = [rows for rows, _ in items]
    costs = [rows + extra for rows, extra in items]
    shares = share_out(sizes, costs, world_size, max_rows)
    assert len(shares) == world_size
    assert len({len(share) for share in shares}) == 1
    placed = [i for share in shares for micro in share for i in micro]
    assert sorted(placed) == list(range(len(items)))
    for share in shares:
        for micro in share:
            assert micro == sorted(micro)
            assert sum(sizes[i] for i in micro) <= max([max_rows, *sizes])
        totals = [sum(costs[i] for i in micro) for micro in share]
        assert totals == sorted(totals, reverse=True)


def test_shares_balance_costs_and_not_only_rows() -> None:
    sizes, costs = [10] * 8, [10.0, 10, 10, 10, 40, 40, 40, 40]
    one, other = share_out(sizes, costs, 2, 1000)
    assert sum(costs[i] for i in one[0]) == sum(costs[i] for i in other[0]) == 100


@pytest.mark.parametrize("options", [{"rank": 2, "world_size": 2}, {"batch_examples": 0}, {"max_tokens": 0}])
def test_settings_that_make_no_sense_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=r"rank must lie|a step needs"):
        stream(**options)


def test_labels_are_tokens_of_the_answers(eight: list) -> None:
    of = kit("nvila")
    for batches, _ in eight:
        for batch in batches:
            text = of.tokenizer.decode(batch.labels[batch.labels >= 0].tolist())
            assert not text.replace("dog", "").strip()
            assert np.isin(batch.labels[batch.labels >= 0], batch.token_ids).all()
