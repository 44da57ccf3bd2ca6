"""Which split a composition belongs to. It follows from the composition alone, so no two splits share one.

A composition is the names (with repeats) and the background. Some pairs of names (for a scene of one name: the name
and its background) are held out: `dev` and `heldout` have a set of pairs each, every scene of theirs shows at least
one of its own pairs, and no scene of another split shows any of them. The rest is shared between `pretrain` and
`instruct` by the whole composition.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations

from vila2.world.chance import stable_hash

HELD_PERCENT = 5  # of all pairs, for each of dev and heldout
INSTRUCT_PERCENT = 25  # of the compositions without a held pair


def pairs_of(names: Sequence[str], background: str) -> list[tuple[str, str]]:
    """The pairs that decide: of distinct names, or (name, background) if there is one name only."""
    distinct = sorted(set(names))
    return list(combinations(distinct, 2)) if len(distinct) > 1 else [(distinct[0], background)]


@lru_cache(maxsize=1 << 15)
def holder_of(pair: tuple[str, str]) -> str | None:
    """`dev` or `heldout` if the pair is theirs alone."""
    percent = stable_hash("held", *pair) % 100
    return "dev" if percent < HELD_PERCENT else "heldout" if percent < 2 * HELD_PERCENT else None


def split_of(names: Sequence[str], background: str) -> str | None:
    """The split that may show this, or None: pairs of both dev and heldout are never shown."""
    holders = {holder_of(pair) for pair in pairs_of(names, background)} - {None}
    if len(holders) == 1:
        return holders.pop()
    if holders:
        return None
    percent = stable_hash("composition", *sorted(names), background) % 100
    return "instruct" if percent < INSTRUCT_PERCENT else "pretrain"
