"""The device ahead of the host: what is launched before what is read, and that no token changes by it."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.checkpoints import write_llava
from tests.unit.engine.engines import another_engine, engine_requests, photo, with_limits
from tests.unit.engine.test_cuda_graphs import SAMPLINGS, captions
from vila2.backends.native import NativeCaptioner
from vila2.engine.cuda_graphs import DecodeBursts
from vila2.engine.engine import Engine
from vila2.engine.overlap import Ahead, Flight
from vila2.engine.runner import ModelRunner
from vila2.errors import UsageError
from vila2.types import CaptionRequest, ErrorKind, FinishReason, RepetitionRule, SamplingParams


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("llava") / "tiny"
    write_llava(path)
    return path


class LateFlight(Flight):
    """A flight whose tokens are nonsense until somebody waits for it, as memory is that a device still writes."""

    def tokens(self) -> list[list[tuple[int, int]]]:
        self.log.append(("read", self.number))
        self.arrived.copy_(self.hidden)
        return super().tokens()


@pytest.fixture
def log(monkeypatch) -> list[tuple[str, int]]:
    """Launches and reads in order, each with the number of its flight."""
    events: list[tuple[str, int]] = []
    send = Ahead._send

    def late(self, sequences, new):
        flight = send(self, sequences, new)
        late = LateFlight(flight.sequences, flight.count, torch.full_like(flight.arrived, 10**9), None)
        late.hidden, late.log = flight.arrived, events
        late.number = sum(kind == "launch" for kind, _ in events)
        events.append(("launch", late.number))
        return late

    monkeypatch.setattr(Ahead, "_send", late)
    return events


def test_tokens_are_read_one_launch_late_and_are_the_same(llava, log):
    plain = captions(with_limits(llava, max_num_seqs=3), SAMPLINGS)
    assert not log
    ahead = with_limits(llava, max_num_seqs=3, burst=4)
    assert captions(ahead, SAMPLINGS) == plain
    for place, (kind, number) in enumerate(log):
        if kind == "read" and ("launch", number + 1) in log:
            assert log.index(("launch", number + 1)) < place  # the device had its next work already
    kinds = [kind for kind, _ in log]
    in_flight = [kinds[:end].count("launch") - kinds[:end].count("read") for end in range(len(kinds))]
    assert max(in_flight) == 2
    launches = sum(kind == "launch" for kind, _ in log)
    assert launches < ahead.engine.counters.steps  # bursts: the host waits less often than a step is made
    assert not ahead.engine.ahead.flights or not ahead.engine.num_unfinished


def test_a_launch_asks_the_device_for_nothing(llava, monkeypatch):
    """Every way in which Python reads a tensor's values would let the host wait for the device: a launch takes none."""
    forbidden = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu", "nonzero")
    launch, asked = Ahead.launch, []

    def watched(self, *arguments):
        with pytest.MonkeyPatch.context() as patch:
            for name in forbidden:
                patch.setattr(torch.Tensor, name, lambda *_, name=name: asked.append(name))
            return launch(self, *arguments)

    # The references read values as they please; the kernels that stand in for them on CUDA do not.
    for module in ("vila2.engine.overlap", "vila2.engine.cuda_graphs"):
        monkeypatch.setattr(f"{module}.sample", lambda logits, *_: logits.argmax(-1))
        monkeypatch.setattr(f"{module}.append_tokens", lambda tokens, *_: torch.zeros_like(tokens).int())
    monkeypatch.setattr(Ahead, "launch", watched)
    captions(with_limits(llava, max_num_seqs=3, burst=4), SAMPLINGS)
    assert asked == []


def test_without_overlap_each_launch_is_read_at_once(llava, log):
    plain = captions(with_limits(llava, max_num_seqs=3), SAMPLINGS)
    assert captions(with_limits(llava, max_num_seqs=3, burst=4, overlap=False), SAMPLINGS) == plain
    assert [kind for kind, _ in log] == ["launch", "read"] * (len(log) // 2)


def test_preempted_in_the_middle_of_a_loop(llava, log):
    """Little memory: sequences lose their cache and their place on the device, and still end where they should."""
    looping = SamplingParams(max_new_tokens=24, ignore_eos=True, repetition=RepetitionRule(6, 2, 3))
    samplings = [looping, SAMPLINGS[0], looping, SAMPLINGS[5], SAMPLINGS[3]]
    plain = captions(with_limits(llava, max_num_seqs=5, block_size=4), samplings)
    longest = max(len(tokens) for tokens, _ in plain.values())
    tight = with_limits(llava, max_num_seqs=5, block_size=4, burst=3)
    prompt = len(engine_requests(tight, [request(tight, 0, looping)])[0].token_ids)
    tight.engine = another_engine(
        tight, max_num_seqs=5, block_size=4, burst=3, num_kv_tokens=2 * prompt + longest // 2 + 12
    )
    assert captions(tight, samplings) == plain
    assert tight.engine.scheduler.num_preemptions > 0
    assert any(reason is FinishReason.REPETITION for _, reason in plain.values())


def test_a_rule_beyond_the_tables_is_the_hosts(llava):
    rule = RepetitionRule(30, 2, 3)
    samplings = [SamplingParams(max_new_tokens=40, ignore_eos=True, repetition=rule)] * 2 + [SAMPLINGS[5]]
    plain = captions(with_limits(llava, max_num_seqs=3), samplings)
    assert captions(with_limits(llava, max_num_seqs=3, burst=4, max_period=8), samplings) == plain


def test_one_that_is_dropped_in_flight_leaves_nothing(llava, log):
    captioner = with_limits(llava, max_num_seqs=2, burst=4)
    engine: Engine = captioner.engine
    plain = captions(with_limits(llava, max_num_seqs=2), [SAMPLINGS[0]] * 3)
    for number in range(3):
        assert captioner.add(request(captioner, number, SAMPLINGS[0])) is None
    done = [caption for _ in range(3) for caption in captioner.step()]
    assert engine.ahead.flights
    assert engine.abort(0)
    assert not engine.abort(0)
    while engine.num_unfinished:
        done += captioner.step()
    assert {caption.id: (caption.token_ids, caption.finish_reason) for caption in done} == {
        number: plain[number] for number in (1, 2)
    }
    held = sum(len(prefix.blocks) for prefix in engine.scheduler.prefixes._prefixes.values())
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks - held


def test_drafts_are_left_unused_with_bursts(llava):
    """What a drafted token costs has been measured without graphs only, so with them no draft is worth its cost."""
    captioner = with_limits(llava, max_num_seqs=2, burst=4)
    assert captioner.engine.limits.max_draft == 0
    asked = request(captioner, 0, SAMPLINGS[0], draft="a photo of a cat")
    assert captioner.add(asked) is None
    while captioner.engine.num_unfinished:
        captioner.step()
    assert captioner.engine.counters.drafted_tokens == 0
    assert captioner.engine.speculator.cost is None
    assert with_limits(llava).engine.limits.max_draft > 0


def test_a_step_that_finds_no_memory_is_done_again_in_smaller_ones(llava, monkeypatch):
    plain = captions(with_limits(llava, max_num_seqs=3), SAMPLINGS)
    captioner = with_limits(llava, max_num_seqs=3, burst=4, max_batch_tokens=64)
    run, most = ModelRunner.run, []

    def short(self, chunks, *more):
        rows = sum(chunk.num_rows for chunk in chunks)
        most.append(rows)
        if rows > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, chunks, *more)

    handled = []
    monkeypatch.setattr(ModelRunner, "clear_memory", lambda self: handled.append(sys.exc_info()[0]))
    monkeypatch.setattr(ModelRunner, "run", short)
    assert captions(captioner, SAMPLINGS) == plain
    # An error that is being handled keeps the tensors of the step that failed.
    assert handled == [None, None]
    assert captioner.engine.scheduler.max_batch_tokens == 16
    assert captioner.engine.counters.retreats == 2
    assert max(most[:2]) > 20 >= max(most[2:])


def test_a_burst_that_finds_no_memory_is_done_again_with_fewer_sequences(llava, monkeypatch):
    plain = captions(with_limits(llava, max_num_seqs=5), SAMPLINGS)
    captioner = with_limits(llava, max_num_seqs=5, burst=4)
    launch, most = DecodeBursts.launch, []

    def short(self, sequences, count):
        most.append(len(sequences))
        if len(sequences) > 2:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return launch(self, sequences, count)

    monkeypatch.setattr(DecodeBursts, "launch", short)
    assert captions(captioner, SAMPLINGS) == plain
    assert captioner.engine.scheduler.max_num_seqs in (1, 2)
    assert captioner.engine.counters.retreats == sum(count > 2 for count in most) > 0


def test_another_error_of_a_step_is_not_taken_for_memory(llava, monkeypatch):
    def broken(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    captioner = with_limits(llava, max_num_seqs=3, burst=4)
    monkeypatch.setattr(ModelRunner, "run", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        captions(captioner, SAMPLINGS)


@pytest.mark.parametrize("burst", [1, 4])
def test_an_image_that_does_not_fit_alone_is_an_error_row(llava, monkeypatch, burst):
    captioner = with_limits(llava, max_num_seqs=3, burst=burst)
    requests = [request(captioner, number, SAMPLINGS[0]) for number in range(4)]
    [image] = requests[1].images
    huge = replace(image, tiles=np.concatenate((image.tiles, image.tiles)))
    requests[1] = replace(requests[1], images=(huge,))
    encode = ModelRunner.encode

    def short(self, images):
        if any(len(image.tiles) > 1 for image in images):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(self, images)

    monkeypatch.setattr(ModelRunner, "encode", short)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**29, 2**34))
    done = {caption.id: caption for caption in captioner.caption(requests)}
    assert [number for number, caption in sorted(done.items()) if caption.error] == [1]
    assert done[1].error.kind is ErrorKind.ENGINE_ERROR
    assert (
        "out of GPU memory while encoding an image of 2 tiles: 0.5 GiB of 16.0 GiB" in done[1].error.message
    )
    assert done[0].token_ids
    assert not captioner.engine._encoded


def test_images_that_find_no_memory_are_encoded_fewer_at_a_time(llava, monkeypatch):
    plain = captions(with_limits(llava, max_num_seqs=3), SAMPLINGS)
    captioner = with_limits(llava, max_num_seqs=3, vision_batch=4)
    encode = ModelRunner.encode

    def short(self, images):
        if len(images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(self, images)

    monkeypatch.setattr(ModelRunner, "encode", short)
    assert captions(captioner, SAMPLINGS) == plain
    assert captioner.engine.counters.retreats == 2


@pytest.mark.parametrize(
    ("method", "doing"), [("run", "computing .* tokens"), ("encode", "encoding an image of 1 tiles")]
)
def test_what_cannot_be_made_smaller_is_one_line_with_sizes(llava, monkeypatch, method, doing):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    captioner = with_limits(llava, max_num_seqs=3, burst=4)
    monkeypatch.setattr(ModelRunner, method, full)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**29, 2**34))
    with pytest.raises(
        UsageError, match=rf"out of GPU memory while {doing}: 0.5 GiB of 16.0 GiB are free; lower --ba"
    ):
        captions(captioner, SAMPLINGS)


def request(
    captioner: NativeCaptioner, number: int, sampling: SamplingParams, draft: str = ""
) -> CaptionRequest:
    image = captioner.prepare(photo(number))
    return CaptionRequest(number, "What is this?", (image,), sampling, rng_key=number, draft=draft)
