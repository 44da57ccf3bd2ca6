"""Which tokens run next: continuous batching with chunked prefill over a paged cache.

Each step, in order of admission: every decoding sequence gets its next token, then prefills get chunks of what
is left of `max_batch_tokens`, then waiting sequences are admitted. When blocks run out, cached prefixes go
first and then the newest sequence is preempted: it gives up its blocks, keeps its tokens, and is computed again
later. A sequence that fits in the pool alone therefore always finishes (tested with hypothesis).
"""

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from vila2.engine.blocks import BlockCopy, BlockPool, PrefixCache
from vila2.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `num_tokens` tokens of a sequence, from `sequence.num_computed` on, and a draft of those after."""

    sequence: Sequence
    num_tokens: int
    draft: tuple[int, ...] = ()

    @property
    def num_rows(self) -> int:
        return self.num_tokens + len(self.draft)

    @property
    def num_logits(self) -> int:
        """How many of its last rows are followed by a token that somebody wants."""
        return 1 + len(self.draft) if self.wants_logits else 0

    @property
    def wants_logits(self) -> bool:
        """The chunk reaches the newest token, so a token can be sampled after it."""
        return self.sequence.num_computed + self.num_tokens == self.sequence.num_tokens


@dataclass(slots=True)
class Step:
    """What the runner does next. `copies` come first: they read blocks that `chunks` may overwrite."""

    chunks: list[Chunk] = field(default_factory=list)
    copies: list[BlockCopy] = field(default_factory=list)


class Scheduler:
    """Owns the waiting and the running sequences and all of their blocks."""

    def __init__(self, pool: BlockPool, max_num_seqs: int, max_batch_tokens: int) -> None:
        if not 1 <= max_num_seqs <= max_batch_tokens:
            raise ValueError(
                f"need 1 <= max_num_seqs ({max_num_seqs}) <= max_batch_tokens ({max_batch_tokens})"
            )
        self.pool = pool
        self.prefixes = PrefixCache(pool)
        self.max_num_seqs = max_num_seqs
        self.max_batch_tokens = max_batch_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    @property
    def num_unfinished(self) -> int:
        return len(self.waiting) + len(self.running)

    def fits(self, num_tokens: int) -> bool:
        """Whether a sequence of `num_tokens` tokens in all can run when it is alone."""
        return self.pool.blocks_for(num_tokens) <= self.pool.num_blocks

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self, is_ready: Callable[[Sequence], bool] = lambda sequence: True) -> Step:
        """The next step. A waiting sequence is admitted only if `is_ready` (its images are encoded)."""
        step = Step()
        num_decoding = sum(sequence.is_decoding and not sequence.is_closing for sequence in self.running)
        prefill_budget = self.max_batch_tokens - num_decoding
        position = 0
        while position < len(self.running):  # preemption takes sequences off the end while we walk
            sequence = self.running[position]
            remaining = sequence.num_tokens - sequence.num_computed
            count = 1 if sequence.is_decoding else min(remaining, prefill_budget)
            if count and not sequence.is_closing and self._grow(sequence, count):
                step.chunks.append(Chunk(sequence, count))
                prefill_budget -= 0 if sequence.is_decoding else count
            position += 1
        self._admit(step, prefill_budget, is_ready)
        return step

    def is_short(self) -> bool:
        """Whether the next step may have to preempt somebody: then no token may be pending when it is scheduled."""
        needed = 0
        for sequence in self.running:
            if not sequence.is_closing:
                count = min(sequence.num_tokens - sequence.num_computed, self.max_batch_tokens)
                blocks = self.pool.blocks_for(sequence.num_computed + count)
                needed += max(0, blocks - len(sequence.blocks))
        return needed > self.pool.num_free

    def _grow(self, sequence: Sequence, count: int) -> bool:
        """Give a running sequence blocks for `count` more tokens, at others' expense; False if it lost its own."""
        needed = self.pool.blocks_for(sequence.num_computed + count) - len(sequence.blocks)
        if needed <= 0:
            return True
        if self.pool.num_free < needed:
            self.prefixes.evict(needed)
        while self.pool.num_free < needed:
            victim = self.running[-1]
            self.preempt(victim)
            if victim is sequence:
                return False
        sequence.blocks += self.pool.allocate(needed)
        return True

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks; it waits, before all others, to be computed again."""
        self.running.remove(sequence)
        self._release(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        for key in sequence.produces:
            self.prefixes.abandon(key)
        sequence.produces.clear()
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.num_computed = 0
        sequence.slot = -1

    def _admit(self, step: Step, budget: int, is_ready: Callable[[Sequence], bool]) -> None:
        deferred: list[Sequence] = []
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            sequence = self.waiting.popleft()
            if not is_ready(sequence) or self._waits_for_prefix(sequence):
                deferred.append(sequence)
                continue
            if not self._start(sequence, step):
                deferred.append(sequence)
                break
            count = min(len(sequence.tokens) - sequence.num_computed, budget)
            needed = self.pool.blocks_for(sequence.num_computed + count) - len(sequence.blocks)
            sequence.blocks += self.pool.allocate(max(needed, 0))
            self.running.append(sequence)
            step.chunks.append(Chunk(sequence, count))
            budget -= count
        self.waiting.extendleft(reversed(deferred))

    def _waits_for_prefix(self, sequence: Sequence) -> bool:
        """Somebody is computing a start of this prompt right now: begin after it rather than beside it."""
        longest_ready = max(
            (p.num_tokens for p in sequence.prefixes if self.prefixes.is_ready(p.key)), default=0
        )
        return any(
            p.num_tokens > longest_ready and self.prefixes.is_promised(p.key) for p in sequence.prefixes
        )

    def _start(self, sequence: Sequence, step: Step) -> bool:
        """Begin after the longest ready prefix, if the whole sequence has room now."""
        ready = [p for p in sequence.prefixes if self.prefixes.is_ready(p.key)]
        # Room for the whole prompt and one token more, so that an admission does not at once preempt. Shared
        # blocks are counted too, which is on the safe side.
        needed = self.pool.blocks_for(len(sequence.tokens) + 1)
        needed = min(needed, self.pool.num_blocks)
        if self.pool.num_free < needed and not (
            ready and self._has_room_after(sequence, ready[-1].num_tokens)
        ):
            if self.running:
                return False
            self.prefixes.evict(needed)
            ready = [p for p in ready if self.prefixes.is_ready(p.key)]
        if ready:
            prefix = max(ready, key=lambda p: p.num_tokens)
            sequence.blocks, copies = self.prefixes.start_from(prefix.key)
            sequence.num_computed = prefix.num_tokens
            step.copies += copies
        for prefix in sequence.prefixes:
            if prefix.num_tokens > sequence.num_computed and not self.prefixes.is_ready(prefix.key):
                self.prefixes.promise(prefix.key, prefix.num_tokens, prefix.num_users)
                sequence.produces.append(prefix.key)
        return True

    def _has_room_after(self, sequence: Sequence, num_shared: int) -> bool:
        own = self.pool.blocks_for(len(sequence.tokens) + 1) - num_shared // self.pool.block_size
        return self.pool.num_free >= own

    def room_ahead(self, chunk: Chunk) -> int:
        """Tokens that a chunk may take beyond its own: what its blocks hold, and what nobody will miss."""
        sequence = chunk.sequence
        own = len(sequence.blocks) * self.pool.block_size - sequence.num_computed - chunk.num_tokens
        return own + self._num_spare() * self.pool.block_size

    def with_draft(self, chunk: Chunk, draft: Seq[int]) -> Chunk:
        """The chunk with as much of `draft` as there are blocks for now. Nobody is preempted for a draft."""
        sequence = chunk.sequence
        draft = tuple(draft[: self.room_ahead(chunk)])
        needed = self.pool.blocks_for(sequence.num_computed + chunk.num_tokens + len(draft))
        sequence.blocks += self.pool.allocate(max(needed - len(sequence.blocks), 0))
        return Chunk(sequence, chunk.num_tokens, draft)

    def _num_spare(self) -> int:
        return max(0, self.pool.num_free - len(self.running))  # each may need a block for its next token

    def advance(self, step: Step) -> list[BlockCopy]:
        """Record that `step` has run: tokens are computed, promised prefixes stored. Returns copies to make now."""
        copies: list[BlockCopy] = []
        for chunk in step.chunks:
            sequence = chunk.sequence
            sequence.num_computed += chunk.num_tokens
            for prefix in sequence.prefixes:
                if prefix.key in sequence.produces and sequence.num_computed >= prefix.num_tokens:
                    copies += self.prefixes.store(prefix.key, sequence.blocks)
                    sequence.produces.remove(prefix.key)
        return copies

    def finish(self, sequence: Sequence) -> None:
        """Take a running sequence out and free its blocks."""
        self.running.remove(sequence)
        self._release(sequence)
        sequence.is_done = True

    def drop(self, sequence: Sequence) -> None:
        """Take a sequence out, waiting or running, and free its blocks."""
        if sequence in self.running:
            self.finish(sequence)
        else:
            self.waiting.remove(sequence)  # it holds nothing: whoever waits has no blocks, or has lost them
