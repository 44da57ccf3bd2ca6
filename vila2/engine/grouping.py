"""Which decoding sequences begin with the same blocks, so that attention reads those once for all of them."""

from collections.abc import Sequence as Seq

import numpy as np
from numpy.typing import NDArray

from vila2.engine.sequence import Sequence

# Joining the parts of an attention costs about what reading so many of its keys does.
_LEAST_SAVED = 1 / 8

Groups = tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]


def group_by_prefix(sequences: Seq[Sequence], num_distinct: int, block_size: int) -> Groups | None:
    """`(lens, group_starts, members)` as `vila2.ops.attention.SharedPrefixes`; None where it would save too little.

    Those from `num_distinct` on repeat earlier ones and are grouped with them. A sequence is in the group of its
    longest prefix that another one has, too. Shapes depend on the number of sequences alone: as long as there may be
    groups there are starts, of which the last are empty.
    """
    count = len(sequences)
    groups: dict[tuple[int, int], list[int]] = {}
    left = list(range(num_distinct))
    for level in (1, 0):  # an image's prefix, then the header's
        found: dict[tuple[int, int], list[int]] = {}
        for row in left:
            sequence = sequences[row]
            if len(sequence.prefixes) > level:
                whole = sequence.prefixes[level].num_tokens // block_size
                if whole:
                    # Blocks are shared from the first on, so the last of them names them all.
                    found.setdefault((whole, sequence.blocks[whole - 1]), []).append(row)
        groups.update({key: rows for key, rows in found.items() if len(rows) > 1})
        grouped = {row for rows in groups.values() for row in rows}
        left = [row for row in left if row not in grouped]
    saved = sum(whole * block_size * (len(rows) - 1) for (whole, _), rows in groups.items())
    if saved < _LEAST_SAVED * sum(sequences[row].num_computed for row in range(num_distinct)):
        return None
    copies: dict[int, list[int]] = {}
    first_row = {id(sequence): row for row, sequence in reversed(list(enumerate(sequences[:num_distinct])))}
    for row in range(num_distinct, count):
        copies.setdefault(first_row[id(sequences[row])], []).append(row)
    lens = np.zeros(count, dtype=np.int32)
    starts = np.zeros(max_groups(count) + 1, dtype=np.int32)
    members: list[int] = []
    for number, ((whole, _), rows) in enumerate(groups.items()):
        members += [*rows, *(copy for row in rows for copy in copies.get(row, ()))]
        lens[members[starts[number] :]] = whole * block_size
        starts[number + 1 :] = len(members)
    return lens, starts, np.array([*members, *[0] * (count - len(members))], dtype=np.int32)


def max_groups(count: int) -> int:
    """The most groups that `count` sequences can make."""
    return max(1, count // 2)
