"""Bursts of decoding: the same tokens as step by step, whatever ends in the middle of one. Without a GPU no graphs."""

from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.checkpoints import write_llava
from tests.unit.engine.engines import engine_requests, photo, with_limits
from vila2.backends.native import NativeCaptioner
from vila2.engine.cuda_graphs import padded_sizes
from vila2.ops.attention import rope_store
from vila2.types import CaptionRequest, RepetitionRule, SamplingParams


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("llava") / "tiny"
    write_llava(path)
    return path


def captions(captioner: NativeCaptioner, samplings: list[SamplingParams]) -> dict[int, tuple]:
    requests = [
        CaptionRequest(i, "What is this?", (captioner.prepare(photo(i)),), sampling, rng_key=i)
        for i, sampling in enumerate(samplings)
    ]
    done = captioner.caption(requests)
    return {caption.id: (caption.token_ids, caption.finish_reason) for caption in done}


SAMPLINGS = [
    SamplingParams(max_new_tokens=13, ignore_eos=True),
    SamplingParams(max_new_tokens=20),
    SamplingParams(max_new_tokens=1),
    SamplingParams(temperature=0.9, top_p=0.8, top_k=30, max_new_tokens=17, min_new_tokens=6),
    SamplingParams(temperature=1.5, max_new_tokens=9),
    SamplingParams(max_new_tokens=40, ignore_eos=True, repetition=RepetitionRule(8, 2, 4)),
    SamplingParams(max_new_tokens=15, stop=("e", "a"), min_new_tokens=3),
]


@pytest.mark.parametrize("burst", [2, 5])
@pytest.mark.parametrize("max_num_seqs", [1, 3, 7])
def test_bursts_change_no_token(llava, burst, max_num_seqs):
    plain = captions(with_limits(llava, max_num_seqs=max_num_seqs), SAMPLINGS)
    bursting = with_limits(llava, max_num_seqs=max_num_seqs, burst=burst)
    assert captions(bursting, SAMPLINGS) == plain
    pool = bursting.engine.scheduler.pool
    held = sum(len(prefix.blocks) for prefix in bursting.engine.scheduler.prefixes._prefixes.values())
    assert pool.num_free == pool.num_blocks - held  # what a burst took ahead is given back


def test_a_full_pool_bursts_by_single_steps(llava):
    longest = max(
        len(request.token_ids)
        for request in engine_requests(
            with_limits(llava, max_num_seqs=2),
            [CaptionRequest(0, "What is this?", (with_limits(llava).prepare(photo(0)),), SAMPLINGS[0])],
        )
    )
    tokens = 4 * (-(-(longest + 14) // 4)) + 8
    sizes = {"max_num_seqs": 3, "block_size": 4, "num_kv_tokens": tokens}
    samplings = [SAMPLINGS[0]] * 3
    assert captions(with_limits(llava, **sizes, burst=6), samplings) == captions(
        with_limits(llava, **sizes), samplings
    )


class FakeStream:
    def wait_stream(self, other: "FakeStream") -> None:
        assert isinstance(other, FakeStream)


def as_on_cuda(monkeypatch, memory: int) -> list[tuple[str, object]]:
    """torch.cuda's names as `_capture` calls them; in a capture there is memory for `memory` steps."""
    told: list[tuple[str, object]] = []

    @contextmanager
    def graph(made, pool):
        told.append(("capture", pool))
        try:
            if len([what for what, _ in told if what == "capture"]) > memory:
                raise torch.OutOfMemoryError("CUDA out of memory")
            yield
        except torch.OutOfMemoryError:
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904 - as torch does

    fakes = {
        "Stream": FakeStream,
        "current_stream": FakeStream,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": lambda: SimpleNamespace(
            replay=lambda: told.append(("replay", None)), pool=lambda: "pool"
        ),
        "graph": graph,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return told


def test_every_size_is_captured_into_the_memory_of_the_largest(llava, monkeypatch):
    engine = with_limits(llava, max_num_seqs=5, burst=3, group_prefixes=True).engine
    bursts = engine.ahead.bursts
    sizes = []
    monkeypatch.setattr(type(bursts), "_advance", lambda self, size, grouped: sizes.append((size, grouped)))
    told = as_on_cuda(monkeypatch, memory=100)
    engine.runner.device = SimpleNamespace(type="cuda")
    bursts.warm_up()
    assert sorted(bursts._graphs) == [(size, grouped) for size in (1, 2, 4, 5) for grouped in (False, True)]
    assert sizes[::2] == [(size, grouped) for size in (5, 4, 2, 1) for grouped in (False, True)]
    assert sizes[::2] == sizes[1::2]  # each runs once before it is captured
    assert [pool for _, pool in told] == [None] + 7 * ["pool"]


def test_a_capture_that_memory_ends_says_so(llava, monkeypatch):
    engine = with_limits(llava, max_num_seqs=2, burst=3).engine
    as_on_cuda(monkeypatch, memory=1)
    monkeypatch.setattr(type(engine.ahead.bursts), "_advance", lambda *more: None)
    engine.runner.device = SimpleNamespace(type="cuda")
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        engine.ahead.bursts.warm_up()


def test_rows_that_pad_a_batch_write_nothing(llava, monkeypatch):
    stored = []

    def store(q, k, v, positions, slots, *more):
        stored.append(slots.tolist())
        return rope_store(q, k, v, positions, slots, *more)

    captioner = with_limits(llava, max_num_seqs=7, burst=3)
    monkeypatch.setattr("vila2.engine.runner.rope_store", store)
    monkeypatch.setattr("vila2.engine.cuda_graphs.padded_sizes", lambda most: [most])
    captions(captioner, SAMPLINGS[:3])
    padded = [slots for slots in stored if -1 in slots]
    assert padded
    for slots in padded:
        live = [slot for slot in slots if slot >= 0]
        assert len(slots) == 7
        assert 1 <= len(live) <= 3
        assert len(set(live)) == len(live)  # nobody writes where another does


def test_padded_sizes():
    assert padded_sizes(1) == [1]
    assert padded_sizes(5) == [1, 2, 4, 5]
    for most in (1, 7, 32, 100, 256, 300):
        sizes = padded_sizes(most)
        assert sizes[-1] == most
        for count in range(1, most + 1):
            size = next(size for size in sizes if size >= count)
            assert size - count < max(8, count / 2)
