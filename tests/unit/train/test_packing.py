"""Packing: every token is one row, labels stay in their segment, positions go on from the prefix."""

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vila2.model.images import PreparedImage
from vila2.train.examples import EncodedExample, Row
from vila2.train.packing import NO_LABEL, PackedBatch, pack

VISUAL = 3


def image() -> PreparedImage:
    return PreparedImage(np.zeros((1, 4, 4, 3), np.uint8), "resize", None, VISUAL, 1, 4, 4)


tokens = st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=6)


def row(pairs: list[tuple[int, bool]]) -> Row:
    return Row(np.array([t for t, _ in pairs], np.int64), np.array([loss for _, loss in pairs], np.bool_))


@st.composite
def examples(draw: st.DrawFn) -> EncodedExample:
    num_images = draw(st.integers(0, 2))
    branches = draw(st.lists(tokens, min_size=1, max_size=4))
    header = [(token, False) for token in draw(st.lists(st.integers(0, 99), max_size=4))]
    for _ in range(num_images):
        header += [(-1, False)] * VISUAL
    if len(branches) > 1:
        branches = [[(branch[0][0], False), *branch[1:]] for branch in branches]
    prefix = row(header)
    return EncodedExample("k", tuple(image() for _ in range(num_images)), prefix, tuple(map(row, branches)))


def visible(batch: PackedBatch) -> np.ndarray:
    """(T, T): may row i see row j?"""
    total = batch.num_rows
    seen = np.zeros((total, total), dtype=bool)
    for start, end, prefix_start, prefix_end in batch.segments:
        for i in range(start, end):
            seen[i, start : i + 1] = True
            seen[i, prefix_start:prefix_end] = True
    return seen


@given(st.lists(examples(), max_size=5))
def test_every_sequence_is_there_once_as_if_it_stood_alone(items: list[EncodedExample]) -> None:
    items = [replace(item, key=str(number)) for number, item in enumerate(items)]
    batch = pack(items)
    seen = visible(batch)
    assert batch.num_rows == sum(item.num_rows for item in items)
    assert batch.keys == [item.key for item in items]
    # Segments cover every row once.
    covered = sorted(i for start, end, *_ in batch.segments for i in range(start, end))
    assert covered == list(range(batch.num_rows))
    labels_found = 0
    base = 0
    for item in items:
        shared = len(item.prefix)
        at = base + shared
        for branch in item.branches:
            last = at + len(branch) - 1
            rows = np.flatnonzero(seen[last])
            expected = [*range(base, base + shared), *range(at, at + len(branch))]
            assert rows.tolist() == expected
            ids = np.concatenate([item.prefix.token_ids, branch.token_ids])
            in_loss = np.concatenate([item.prefix.in_loss, branch.in_loss])
            assert batch.token_ids[rows].tolist() == ids.tolist()
            assert batch.positions[rows].tolist() == list(range(len(ids)))
            # A row sees all before it in its sequence, and no later one.
            for k, i in enumerate(rows.tolist()):
                assert np.flatnonzero(seen[i]).tolist() == expected[: k + 1]
            wanted = [ids[k + 1] if in_loss[k + 1] else NO_LABEL for k in range(len(ids) - 1)] + [NO_LABEL]
            own = batch.labels[rows[shared:]].tolist()
            assert own == wanted[shared:]
            labels_found += sum(label != NO_LABEL for label in own)
            if len(item.branches) == 1 and shared:
                assert batch.labels[rows[:shared]].tolist() == wanted[:shared]
                labels_found += sum(label != NO_LABEL for label in wanted[:shared])
            at += len(branch)
        base = at
    assert batch.num_labels == labels_found


@given(st.lists(examples(), max_size=5))
def test_visual_rows_are_those_of_the_images_in_order(items: list[EncodedExample]) -> None:
    batch = pack(items)
    assert len(batch.images) == sum(len(item.images) for item in items)
    assert all(a is b for a, b in zip(batch.images, [i for item in items for i in item.images], strict=True))
    assert len(batch.visual_rows) == sum(one.num_tokens for one in batch.images)
    assert (batch.token_ids[batch.visual_rows] == -1).all()
    assert (np.delete(batch.token_ids, batch.visual_rows) >= 0).all()
    assert (batch.labels[batch.labels != NO_LABEL] >= 0).all()


def test_a_single_branch_and_its_prefix_are_one_segment() -> None:
    prefix, branch = row([(7, False), (-1, False)]), row([(8, True), (9, True)])
    batch = pack([EncodedExample("k", (), prefix, (branch,))])
    assert batch.segments.tolist() == [[0, 4, 0, 0]]
    assert batch.labels.tolist() == [NO_LABEL, 8, 9, NO_LABEL]


def test_branches_see_the_prefix_and_not_each_other() -> None:
    prefix = row([(5, False), (-1, False)])
    first, second = row([(6, False), (7, True)]), row([(8, False), (9, True), (3, True)])
    batch = pack([EncodedExample("k", (), prefix, (first, second))])
    assert batch.segments.tolist() == [[0, 2, 0, 0], [2, 4, 0, 2], [4, 7, 0, 2]]
    assert batch.positions.tolist() == [0, 1, 2, 3, 2, 3, 4]
    assert batch.labels.tolist() == [NO_LABEL, NO_LABEL, 7, NO_LABEL, 9, 3, NO_LABEL]
    assert batch.num_labels == 3


def test_no_examples_make_a_batch_without_rows() -> None:
    batch = pack([])
    assert (batch.num_rows, batch.num_labels, batch.keys, batch.images) == (0, 0, [], [])
    assert batch.segments.shape == (0, 4)
    assert {a.dtype for a in (batch.token_ids, batch.labels, batch.positions, batch.segments)} == {
        np.dtype("int64")
    }
