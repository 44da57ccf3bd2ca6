"""Bursts in which sequences read a shared image together: the engine's groups in the kernels, against none."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoints import write_llava
from tests.unit.engine.engines import photo, with_limits
from vila2.engine.grouping import group_by_prefix, max_groups
from vila2.engine.sequence import EngineRequest, PrefixKey, Sequence
from vila2.types import CaptionRequest, SamplingParams


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("llava") / "tiny"
    write_llava(path)
    return path


@pytest.mark.triton
def test_groups_change_no_token(llava, monkeypatch):
    """Two questions on each of two images, one on a third; batches of 5 and 3 rows, the latter padded to 4."""
    from vila2.engine import runner
    from vila2.kernels.attention_decode import paged_decode_triton

    plain, groups = runner.paged_attention, []

    def attend(q, k_cache, v_cache, tables, starts, contexts, scale, longest, shared):
        if longest != 1:
            return plain(q, k_cache, v_cache, tables, starts, contexts, scale)
        groups.append(0 if shared is None else int((shared[1][1:] > shared[1][:-1]).sum()))
        return paged_decode_triton(q, k_cache, v_cache, tables, contexts, scale, shared, spans=1)

    monkeypatch.setattr(runner, "paged_attention", attend)
    found = {}
    for grouped in (False, True):
        captioner = with_limits(llava, max_num_seqs=5, block_size=4, burst=2, group_prefixes=grouped)
        requests = [
            CaptionRequest(
                number, f"What {number}?", (captioner.prepare(photo(number // 2)),),
                SamplingParams(max_new_tokens=4 + number % 2, ignore_eos=True),
                image_key=number // 2, num_siblings=2 if number < 4 else 1,
            )
            for number in range(5)
        ]  # fmt: skip
        found[grouped] = {caption.id: caption.token_ids for caption in captioner.caption(requests)}
        assert (max(groups) == 2) is grouped
    assert found[True] == found[False]


def sequence(header: int, image: int, blocks: list[int], computed: int) -> Sequence:
    """A sequence whose header and image prefix have so many tokens (0: no such prefix)."""
    prefixes = [PrefixKey("header", header, 0)] if header else []
    prefixes += [PrefixKey("image", image, 2)] if image else []
    return Sequence(EngineRequest(0, (1,)), [1], tuple(prefixes), num_computed=computed, blocks=blocks)


def test_who_is_grouped_with_whom():
    first = [sequence(5, 13, [0, 1, 2, 30 + row], 15) for row in range(3)]
    second = [sequence(5, 13, [0, 7, 8, 40 + row], 14) for row in range(2)]
    alone = [sequence(5, 13, [0, 11, 12, 13], 14), sequence(5, 0, [0, 21, 22], 11), sequence(0, 0, [23], 3)]
    rows = [first[0], alone[2], second[0], first[1], alone[0], second[1], first[2], alone[1]]
    padded = [*rows, first[1], alone[2]]
    groups = group_by_prefix(padded, len(rows), block_size=4)
    assert groups is not None
    lens, starts, members = groups
    assert lens.tolist() == [12, 0, 12, 12, 4, 12, 12, 4, 12, 0]
    assert len(starts) == max_groups(len(padded)) + 1
    assert len(members) == len(padded)
    found = {frozenset(members[a:b].tolist()) for a, b in pairwise(starts) if a < b}
    assert found == {frozenset({0, 3, 6, 8}), frozenset({2, 5}), frozenset({4, 7})}
    assert np.all(np.diff(starts) >= 0)


def test_what_saves_little_is_left_alone():
    few = [sequence(4, 0, [0, 1 + row, 9], 60) for row in range(4)]
    assert group_by_prefix(few, 4, block_size=4) is None
    assert group_by_prefix([sequence(0, 0, [1], 2)], 1, block_size=4) is None
