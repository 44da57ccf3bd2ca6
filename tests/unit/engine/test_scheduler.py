"""The block pool, the prefix cache and the scheduler against what they promise, on random workloads.

The simulated cache below writes each token's identity into its slot, as the runner writes keys and values, and
checks before every step that a sequence's blocks hold exactly its own history: any block shared, copied or
recycled wrongly shows as a wrong token.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vila2.engine.blocks import BlockCopy, BlockPool
from vila2.engine.scheduler import Chunk, Scheduler
from vila2.engine.sequence import EngineRequest, ImageSpan, Sequence, start_sequence
from vila2.types import SamplingParams

BLOCK = 4


def test_a_pool_gives_each_block_to_one_holder_at_a_time():
    pool = BlockPool(3, BLOCK)
    first = pool.allocate(2)
    pool.share(first[:1])
    pool.release(first)
    assert pool.num_free == 2  # the shared one is still held
    pool.release(first[:1])
    assert pool.num_free == 3
    with pytest.raises(ValueError, match="released more often"):
        pool.release(first[:1])
    with pytest.raises(ValueError, match="is free"):
        pool.share(first[:1])
    with pytest.raises(ValueError, match="4 blocks asked for, 3 free"):
        pool.allocate(4)


class SimulatedCache:
    """Slots that remember which token was written, and a scheduler driven to the end."""

    def __init__(self, num_blocks: int, max_num_seqs: int, max_batch_tokens: int) -> None:
        self.scheduler = Scheduler(BlockPool(num_blocks, BLOCK), max_num_seqs, max_batch_tokens)
        self.slots: dict[tuple[int, int], tuple] = {}
        self.num_computed = 0

    def copy(self, copies: list[BlockCopy]) -> None:
        for copy in copies:
            for offset in range(copy.num_tokens):
                self.slots[copy.target, offset] = self.slots[copy.source, offset]

    def step(self, num_drafted: int = 0) -> list[Chunk]:
        """One step, with drafts of up to `num_drafted` tokens; returns the chunks that want a token."""
        step = self.scheduler.schedule()
        self.copy(step.copies)
        preempted = self.scheduler.num_preemptions
        for i, chunk in enumerate(step.chunks):
            if chunk.wants_logits:
                draft = [future(chunk.sequence, ahead) for ahead in range(num_drafted)]
                step.chunks[i] = self.scheduler.with_draft(chunk, draft)
        assert self.scheduler.num_preemptions == preempted
        decoding = [chunk for chunk in step.chunks if chunk.sequence.is_decoding]
        assert sum(chunk.num_tokens for chunk in step.chunks) <= self.scheduler.max_batch_tokens
        assert all(chunk.num_tokens == 1 for chunk in decoding)
        assert len(self.scheduler.running) <= self.scheduler.max_num_seqs
        for chunk in step.chunks:
            self._write(chunk)
        for chunk in step.chunks:
            self._check(chunk)
        wanting = [chunk for chunk in step.chunks if chunk.wants_logits]
        self.copy(self.scheduler.advance(step))
        return wanting

    def _write(self, chunk: Chunk) -> None:
        sequence = chunk.sequence
        for position in range(sequence.num_computed, sequence.num_computed + chunk.num_tokens):
            slot = sequence.blocks[position // BLOCK], position % BLOCK
            self.slots[slot] = history(sequence, position)
            self.num_computed += 1
        for ahead, token in enumerate(chunk.draft):
            position = len(sequence.tokens) + ahead
            slot = sequence.blocks[position // BLOCK], position % BLOCK
            self.slots[slot] = token, position, image_of(sequence, position)

    def _check(self, chunk: Chunk) -> None:
        sequence = chunk.sequence
        for position in range(sequence.num_computed + chunk.num_tokens):
            slot = sequence.blocks[position // BLOCK], position % BLOCK
            assert self.slots[slot] == history(sequence, position)


def history(sequence: Sequence, position: int) -> tuple:
    """What a slot must hold: the token, its position, and the image that its prompt shows, if it shows one yet."""
    return sequence.tokens[position], position, image_of(sequence, position)


def image_of(sequence: Sequence, position: int) -> tuple | None:
    request = sequence.request
    seen_image = any(span.start <= position for span in request.spans)
    own = request.id if position >= request.header_length + 3 or request.image_key is None else None
    return (request.image_key, own) if seen_image else None


def future(sequence: Sequence, ahead: int) -> int:
    """The token that the sequence will have after `ahead` more."""
    return 50_000 + sequence.num_new_tokens + ahead


def request(id: int, header: int, tail: int, new: int, image_key: int | None, siblings: int) -> EngineRequest:
    tokens = (*range(100, 100 + header), -1, -1, -1, *range(1000 * (id + 1), 1000 * (id + 1) + tail))
    return EngineRequest(
        id,
        tokens,
        (ImageSpan(header, 3, 0),),
        sampling=SamplingParams(max_new_tokens=new),
        header_length=header,
        image_key=image_key,
        num_siblings=siblings,
    )


workloads = st.lists(
    st.tuples(st.integers(1, 12), st.integers(1, 14), st.integers(1, 4)), min_size=1, max_size=12
)  # (tail, new tokens, prompts on the image)


@settings(max_examples=150, deadline=None)
@given(
    workloads,
    st.integers(0, 9),
    st.integers(9, 30),
    st.integers(1, 6),
    st.integers(0, 20),
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5),
)
def test_every_sequence_finishes_with_its_own_history(
    jobs, header, num_blocks, max_seqs, extra_budget, drafts
):
    cache = SimulatedCache(num_blocks, max_seqs, max_seqs + extra_budget)
    expected = {}
    id = 0
    for key, (tail, new, siblings) in enumerate(jobs):
        for _ in range(siblings):
            built = request(id, header, tail, new, key, siblings)
            if cache.scheduler.fits(len(built.token_ids) + new):
                cache.scheduler.add(start_sequence(built))
                expected[id] = new
            id += 1
    done = {}
    for turn in range(20_000):
        if not cache.scheduler.num_unfinished:
            break
        drafted, right = drafts[turn % len(drafts)]
        for chunk in cache.step(drafted):
            sequence = chunk.sequence
            left = sequence.request.sampling.max_new_tokens - sequence.num_new_tokens
            accepted = min(right, len(chunk.draft), left - 1)
            sequence.tokens += [future(sequence, ahead) for ahead in range(accepted + 1)]
            sequence.num_computed += accepted
            if left == accepted + 1:
                done[sequence.request.id] = sequence.num_new_tokens
                cache.scheduler.finish(sequence)
    assert done == expected
    pool = cache.scheduler.pool
    cache.scheduler.prefixes.evict(pool.num_blocks)
    assert pool.num_free == pool.num_blocks


def test_a_header_is_computed_once_and_an_image_once_for_its_prompts():
    cache = SimulatedCache(64, max_num_seqs=8, max_batch_tokens=64)
    for id in range(6):  # two images with three prompts each
        cache.scheduler.add(start_sequence(request(id, 5, 2, 1, id // 3, 3)))
    finished = 0
    while cache.scheduler.num_unfinished:
        for sequence in [chunk.sequence for chunk in cache.step()]:
            sequence.tokens.append(7)
            cache.scheduler.finish(sequence)
            finished += 1
    assert finished == 6
    # 5 header tokens once, 3 image tokens an image, 2 tail tokens a prompt.
    assert cache.num_computed == 5 + 2 * 3 + 6 * 2
    assert cache.scheduler.prefixes.num_hits == 5


def test_out_of_blocks_preempts_the_newest_and_loses_nothing():
    cache = SimulatedCache(8, max_num_seqs=4, max_batch_tokens=32)
    for id in range(4):
        cache.scheduler.add(start_sequence(request(id, 0, 2, 20, None, 1)))
    order = []
    while cache.scheduler.num_unfinished:
        for sequence in [chunk.sequence for chunk in cache.step()]:
            sequence.tokens.append(7)
            if sequence.num_new_tokens == 20:
                cache.scheduler.finish(sequence)
                order.append(sequence.request.id)
    assert sorted(order) == [0, 1, 2, 3]
    assert order[0] == 0
    assert cache.scheduler.num_preemptions > 0


def test_impossible_limits_are_refused():
    with pytest.raises(ValueError, match="max_num_seqs"):
        Scheduler(BlockPool(1, 1), max_num_seqs=4, max_batch_tokens=2)
    with pytest.raises(ValueError, match="at least one block"):
        BlockPool(0, 16)
