"""The paged KV cache's bookkeeping: which blocks are free, which are shared, which prefixes are cached.

Nothing here touches a tensor. Invariant (tested with hypothesis): a block is free exactly when no sequence and
no prefix holds it, and only a block that one holder alone has may be written at positions past a shared prefix.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass


class BlockPool:
    """Reference-counted blocks of `block_size` tokens each."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"need at least one block of one token, got {num_blocks} of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._holders = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks `num_tokens` tokens fill."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks; the caller has checked `num_free`."""
        if count > len(self._free):
            raise ValueError(f"{count} blocks asked for, {len(self._free)} free")
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._holders[block] = 1
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """Add a holder to blocks that have at least one."""
        for block in blocks:
            if self._holders[block] < 1:
                raise ValueError(f"block {block} is free and cannot be shared")
            self._holders[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one holder of each block; those without any become free."""
        for block in blocks:
            if self._holders[block] < 1:
                raise ValueError(f"block {block} is released more often than it is held")
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free.append(block)


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Copy the first `num_tokens` slots of block `source` to block `target`, in every layer."""

    source: int
    target: int
    num_tokens: int


@dataclass(slots=True)
class Prefix:
    """A computed (or, while `blocks` is None, promised) start of prompts."""

    num_tokens: int
    num_users: int  # 0 = kept as long as there is room
    blocks: list[int] | None = None
    uses: int = 0


class PrefixCache:
    """Prompt starts whose keys and values are kept, so that later sequences begin after them.

    A prefix may end in the middle of a block. Its whole blocks are shared; the tail is copied, into the cache
    when the prefix is stored and out of it when a sequence starts, so that nobody writes into another's block.
    """

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self._prefixes: OrderedDict[Hashable, Prefix] = OrderedDict()
        self.num_hit_tokens = 0
        self.num_hits = 0

    def is_ready(self, key: Hashable) -> bool:
        prefix = self._prefixes.get(key)
        return prefix is not None and prefix.blocks is not None

    def is_promised(self, key: Hashable) -> bool:
        """True while some sequence is computing this prefix."""
        prefix = self._prefixes.get(key)
        return prefix is not None and prefix.blocks is None

    def promise(self, key: Hashable, num_tokens: int, num_users: int) -> None:
        """Announce that a sequence will compute this prefix; it counts as the first user."""
        self._prefixes[key] = Prefix(num_tokens, num_users, uses=1)

    def abandon(self, key: Hashable) -> None:
        """Take back a promise (its sequence was preempted or has failed)."""
        if self.is_promised(key):
            del self._prefixes[key]

    def store(self, key: Hashable, blocks: Sequence[int]) -> list[BlockCopy]:
        """Keep a promised prefix, computed in `blocks` by its sequence. Returns the copies to make at once.

        Without room for the copy of its tail the prefix is forgotten, which costs speed and nothing else.
        """
        prefix = self._prefixes[key]
        whole, tail = divmod(prefix.num_tokens, self.pool.block_size)
        if prefix.num_users == 1 or (tail and not self.pool.num_free):
            del self._prefixes[key]
            return []
        self.pool.share(blocks[:whole])
        prefix.blocks = list(blocks[:whole])
        if not tail:
            return []
        [target] = self.pool.allocate(1)
        prefix.blocks.append(target)
        return [BlockCopy(blocks[whole], target, tail)]

    def start_from(self, key: Hashable) -> tuple[list[int], list[BlockCopy]]:
        """Blocks for a new sequence that begins after this ready prefix, and the copies to make at once.

        Needs one free block when the prefix ends inside a block. A prefix whose last expected user this was is
        dropped.
        """
        prefix = self._prefixes[key]
        assert prefix.blocks is not None
        self._prefixes.move_to_end(key)
        whole, tail = divmod(prefix.num_tokens, self.pool.block_size)
        blocks = prefix.blocks[:whole]
        self.pool.share(blocks)
        copies = []
        if tail:
            [target] = self.pool.allocate(1)
            copies.append(BlockCopy(prefix.blocks[whole], target, tail))
            blocks = [*blocks, target]
        prefix.uses += 1
        self.num_hits += 1
        self.num_hit_tokens += prefix.num_tokens
        if prefix.num_users and prefix.uses >= prefix.num_users:
            self._drop(key)
        return blocks, copies

    def evict(self, num_free: int) -> None:
        """Drop stored prefixes, least recently used first, until `num_free` blocks are free or none is left."""
        for key in [key for key, prefix in self._prefixes.items() if prefix.blocks is not None]:
            if self.pool.num_free >= num_free:
                return
            self._drop(key)

    def _drop(self, key: Hashable) -> None:
        # The copies out of the dropped tail block run before anything is written: see Scheduler.schedule.
        blocks = self._prefixes.pop(key).blocks
        if blocks:
            self.pool.release(blocks)
