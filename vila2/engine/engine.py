"""The engine: requests in, finished token lists out, one `step` at a time.

A step encodes images ahead of the language model when it runs short of them, lets the scheduler choose, runs
the model, samples, and ends what has ended. Stop strings need text, so the caller gives `decode`.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from vila2.engine.blocks import BlockPool
from vila2.engine.cuda_graphs import DecodeBursts
from vila2.engine.gpu_memory import CardPlan, is_out_of_memory
from vila2.engine.overlap import Ahead
from vila2.engine.repetition import advance_runs, new_runs
from vila2.engine.runner import ModelRunner
from vila2.engine.sampler import choose_tokens
from vila2.engine.scheduler import Chunk, Scheduler, Step
from vila2.engine.sequence import EngineRequest, Finished, Sequence, start_sequence
from vila2.engine.slots import Slots
from vila2.engine.speculation import MAX_DRAFT, Speculator, measure_step_cost
from vila2.model.vlm import VisionLanguageModel
from vila2.types import FinishReason

_Made = TypeVar("_Made")

_PROBE_CONTEXT = 256  # tokens: about an image and half a caption


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Sizes that decide speed and memory, never the captions."""

    max_num_seqs: int = 32
    max_batch_tokens: int = 512
    vision_batch: int = 8  # tiles encoded together
    num_kv_tokens: int = 32 * 1024
    block_size: int = 16
    max_kept_images: int = 64  # encoded images kept for siblings that have not come yet
    burst: int = 1  # steps of decoding between two looks of the host; more than 1 is for CUDA
    overlap: bool = True  # with bursts: launch the next one before the tokens of the last are read
    group_prefixes: bool = False  # with bursts: sequences that share an image read it together
    max_period: int = 64  # with bursts: the longest loop that the device looks for; the host does the rest
    max_draft: int = (
        MAX_DRAFT  # drafted tokens that a sequence may verify in a step; 0, and with bursts, none
    )
    card: CardPlan | None = None  # what the sizes rest on, where they were made for a card


@dataclass(slots=True)
class Counters:
    """What the engine has done: for the run summary and the benchmarks."""

    steps: int = 0
    prompt_tokens: int = 0  # of admitted requests, shared ones included
    computed_tokens: int = 0  # rows that really went through the language model
    new_tokens: int = 0
    sequence_steps: int = (
        0  # rows of plain decoding that the new tokens would have taken one by one, as they were
    )
    drafted_tokens: int = 0  # of drafts, verified
    accepted_tokens: int = 0  # of those, right
    images_encoded: int = 0
    images_shared: int = 0  # requests whose image was encoded for another one
    loops_cut: int = 0
    vision_s: float = 0.0
    language_s: float = 0.0
    sample_s: float = 0.0  # the head over the vocabulary, and the choice among it
    retreats: int = 0  # times that memory ran out and batches were made smaller
    probe_s: float = 0.0  # measuring what a step costs, once, when the first draft comes


@dataclass(slots=True)
class _Encoded:
    """The visual tokens of a request's images, kept while requests with their key are under way or expected."""

    embeddings: list[Tensor] | None = None
    num_live: int = 0
    num_seen: int = 0
    num_siblings: int = 1


@dataclass(slots=True)
class Engine:
    """One model, one cache, one scheduler. Not thread-safe: one thread adds and steps."""

    model: VisionLanguageModel
    limits: EngineLimits
    eos_ids: frozenset[int]
    decode: Callable[[Seq[int]], str]
    kv_dtype: torch.dtype = torch.float32
    counters: Counters = field(default_factory=Counters)
    speculator: Speculator = field(default_factory=Speculator)
    kinds: bytes = b""  # of the vocabulary's tokens (see vila2.engine.draft)
    scheduler: Scheduler = field(init=False)
    runner: ModelRunner = field(init=False)
    ahead: Ahead | None = field(init=False, default=None)
    _encoded: OrderedDict[Hashable, _Encoded] = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        limits = self.limits
        num_blocks = max(1, limits.num_kv_tokens // limits.block_size)
        pool = BlockPool(num_blocks, limits.block_size)
        self.scheduler = Scheduler(pool, limits.max_num_seqs, limits.max_batch_tokens)
        self.runner = ModelRunner(self.model, num_blocks, limits.block_size, self.kv_dtype)
        if limits.burst > 1:
            # A step with drafts goes through the model without graphs, and what it costs there says nothing of bursts.
            self.limits = limits = replace(limits, max_draft=0)
            self.ahead = make_ahead(self.runner, limits, self.max_total_tokens(), self.eos_ids)

    @property
    def num_unfinished(self) -> int:
        return self.scheduler.num_unfinished

    @property
    def num_waiting(self) -> int:
        return len(self.scheduler.waiting)

    def max_total_tokens(self) -> int:
        """Prompt and new tokens that one request may have in all."""
        pool = self.scheduler.pool
        return min(self.model.config.decoder.max_positions, pool.num_blocks * pool.block_size)

    def add(self, request: EngineRequest) -> None:
        """Queue a request. ValueError if its prompt leaves no room for one new token."""
        if len(request.token_ids) >= self.max_total_tokens():
            raise ValueError(
                f"the prompt has {len(request.token_ids)} tokens; this engine has room for "
                f"{self.max_total_tokens() - 1} and one new one"
            )
        sequence = start_sequence(replace(request, draft=self._usable(request.draft)), self.kinds)
        if request.sampling.repetition:
            sequence.loop_runs = new_runs(request.sampling.repetition)
        if request.images:
            encoded = self._encoded.setdefault(_image_key(request), _Encoded())
            self.counters.images_shared += encoded.num_seen > 0
            encoded.num_live += 1
            encoded.num_seen += 1
            encoded.num_siblings = request.num_siblings
        self.counters.prompt_tokens += len(request.token_ids)
        self.scheduler.add(sequence)

    def abort(self, number: int) -> bool:
        """Let go of a request, wherever it stands; False if it is not under way. Its tokens are lost."""
        scheduler = self.scheduler
        for sequence in (*scheduler.running, *scheduler.waiting):
            if sequence.request.id == number:
                scheduler.drop(sequence)
                self._forget_image(sequence.request)
                return True
        return False

    def written(self) -> Iterator[tuple[int, list[int]]]:
        """The requests that have begun, each with its new tokens so far."""
        for sequence in self.scheduler.running:
            if sequence.num_new_tokens:
                yield sequence.request.id, sequence.output

    @torch.inference_mode()
    def step(self) -> list[Finished]:
        """Advance everything by one step; returns what ended in it."""
        if self.ahead is not None:
            return self._step_ahead(self.ahead)
        failed = self._encode_ahead()
        step = self.scheduler.schedule(self._is_encoded)
        if not step.chunks:
            return failed
        self._add_drafts(step)
        start = time.perf_counter()
        self.runner.copy(step.copies)
        embeddings = [self._embeddings(chunk.sequence) for chunk in step.chunks]
        hidden = self.runner.run(step.chunks, embeddings)
        wanting = [chunk for chunk in step.chunks if chunk.wants_logits]
        self.runner.copy(self.scheduler.advance(step))
        after_language = time.perf_counter()
        tokens = choose_tokens(self.model.decoder, hidden, wanting, self.eos_ids)
        finished = [
            end for chunk, new in zip(wanting, tokens, strict=True) if (end := self._extend(chunk, new))
        ]
        self.counters.sample_s += time.perf_counter() - after_language
        self.counters.language_s += after_language - start
        self.counters.steps += 1
        self.counters.computed_tokens += sum(chunk.num_rows for chunk in step.chunks)
        self.counters.sequence_steps += len(wanting)
        return failed + finished

    def _step_ahead(self, ahead: Ahead) -> list[Finished]:
        """Launch the next step or burst, then read the tokens of the one before. See vila2.engine.overlap."""
        finished = []
        if self.scheduler.is_short():
            finished = self._land(
                ahead, 0
            )  # who is preempted gives up its tokens' cache, so they must be known
        finished += self._encode_ahead()
        step = self.scheduler.schedule(self._is_encoded)
        start = time.perf_counter()
        if step.chunks:
            rows = sum(chunk.num_rows for chunk in step.chunks)
            embeddings = [self._embeddings(chunk.sequence) for chunk in step.chunks]
            count = _unless_full(lambda: ahead.launch(step, self.scheduler, embeddings))
            if count is None:
                finished += self._land(ahead, 0)  # who is preempted must have all of its tokens
                if not self._retreat(step):
                    raise self.runner.out_of_memory(f"computing {rows} tokens")
                return finished
            self.counters.steps += count
            self.counters.computed_tokens += count * rows
        finished += self._land(ahead, 1 if step.chunks and self.limits.overlap else 0)
        self.counters.language_s += time.perf_counter() - start
        return finished

    def _retreat(self, step: Step) -> bool:
        """Memory has run out in a step: its prefills begin again later, in smaller batches.

        Where there are none, or batches cannot be smaller, half of the sequences begin again later, and there are never
        as many again. False: one is left.
        """
        scheduler = self.scheduler
        least = scheduler.max_num_seqs + 1
        prefills = [
            chunk.sequence
            for chunk in step.chunks
            if not chunk.sequence.is_decoding and not chunk.sequence.is_done
        ]
        kept = len(scheduler.running)
        if prefills and scheduler.max_batch_tokens > least:
            scheduler.max_batch_tokens = max(scheduler.max_batch_tokens // 2, least)
        elif kept > 1:
            scheduler.max_num_seqs = kept = kept // 2
        elif kept == len(step.chunks):  # else some have ended meanwhile, and fewer are left without that
            return False
        victims = {id(sequence) for sequence in (*prefills, *scheduler.running[kept:])}
        for sequence in reversed([one for one in scheduler.running if id(one) in victims]):
            scheduler.preempt(sequence)
        self.counters.retreats += 1
        self.runner.clear_memory()
        return True

    def _land(self, ahead: Ahead, num_left: int) -> list[Finished]:
        """Read the tokens of all launches but the last `num_left`. Those after an end are thrown away."""
        finished = []
        while len(ahead.flights) > num_left:
            flight = ahead.flights.popleft()
            for sequence, tokens in zip(flight.sequences, flight.tokens(), strict=True):
                self.counters.sequence_steps += flight.count
                sequence.num_pending -= flight.count
                for token, repeated in tokens:
                    if sequence.is_done:
                        break
                    self.counters.new_tokens += 1
                    if end := self._append(
                        sequence, token, None if ahead.slots.leaves_loops(sequence) else repeated
                    ):
                        finished.append(end)
        return finished

    # Drafts

    def _usable(self, draft: tuple[int, ...]) -> tuple[int, ...]:
        """The draft up to its first token that is none of the model's."""
        size = self.model.config.decoder.vocab_size
        bad = next((place for place, token in enumerate(draft) if not 0 <= token < size), len(draft))
        return draft[:bad] if self.limits.max_draft else ()

    def _add_drafts(self, step: Step) -> None:
        """Give the chunks that end at a sequence's newest token as much of its draft to verify as pays."""
        chunks = step.chunks
        room = [self._draft_room(chunk) for chunk in chunks]
        if not any(room) or not self._knows_step_cost():
            return
        lengths = self.speculator.plan(chunks, room, self.limits.max_batch_tokens)
        for i, length in enumerate(lengths):
            draft = chunks[i].sequence.draft
            if length and draft is not None and draft.line is not None:
                chunks[i] = self.scheduler.with_draft(chunks[i], draft.line.tokens[:length])

    def _draft_room(self, chunk: Chunk) -> int:
        """The most drafted tokens that the chunk can take: one token more always follows them."""
        sequence = chunk.sequence
        if sequence.draft is None or not chunk.wants_logits:
            return 0
        left = min(
            sequence.request.sampling.max_new_tokens - sequence.num_new_tokens,
            self.max_total_tokens() - len(sequence.tokens),
        )
        return max(0, min(left - 1, self.limits.max_draft, self.scheduler.room_ahead(chunk)))

    def _knows_step_cost(self) -> bool:
        """Measure it now if it is not known and a block is free to do so; False if none is."""
        pool = self.scheduler.pool
        if self.speculator.cost is not None:
            return True
        if not pool.num_free:
            return False
        start = time.perf_counter()
        [block] = pool.allocate(1)
        context = min(_PROBE_CONTEXT, self.max_total_tokens())
        self.speculator.cost = measure_step_cost(
            lambda rows: self.runner.probe(rows, block, context),
            self.limits.max_batch_tokens,
            on_cpu=self.runner.device.type == "cpu",
        )
        pool.release([block])
        self.counters.probe_s += time.perf_counter() - start
        return True

    # Images

    def _is_encoded(self, sequence: Sequence) -> bool:
        request = sequence.request
        return not request.images or self._encoded[_image_key(request)].embeddings is not None

    def _embeddings(self, sequence: Sequence) -> list[Tensor]:
        request = sequence.request
        if not request.images:
            return []
        embeddings = self._encoded[_image_key(request)].embeddings
        assert embeddings is not None
        return embeddings

    def _encode_ahead(self) -> list[Finished]:
        """Encode a batch of images when fewer waiting sequences are ready than could start now.

        Returns the ends of requests whose images no batch is small enough for.
        """
        room = self.limits.max_num_seqs - len(self.scheduler.running)
        lacking: OrderedDict[Hashable, EngineRequest] = OrderedDict()
        num_ready = num_tiles = 0
        for sequence in self.scheduler.waiting:
            if self._is_encoded(sequence):
                num_ready += 1
                if num_ready >= max(room, 1):
                    return []
                continue
            request = sequence.request
            tiles = sum(len(image.tiles) for image in request.images)
            if lacking and num_tiles + tiles > self.limits.vision_batch:
                break
            if _image_key(request) not in lacking:
                lacking[_image_key(request)] = request
                num_tiles += tiles
        if not lacking:
            return []
        start = time.perf_counter()
        images = [image for request in lacking.values() for image in request.images]
        encoded = _unless_full(lambda: self.runner.encode(images))
        if encoded is None:
            self.counters.retreats += 1
            self.runner.clear_memory()
            if len(lacking) > 1:
                self.limits = replace(self.limits, vision_batch=max(1, num_tiles // 2))
                return []
            encoded = _unless_full(lambda: self.runner.encode(images))  # with all the memory that can be had
        if encoded is None:
            error = self.runner.out_of_memory(f"encoding an image of {num_tiles} tiles")
            if num_tiles == 1:
                raise error  # no image is smaller
            [key] = lacking
            return self._fail(key, str(error))
        rows = iter(encoded)
        for key, request in lacking.items():
            self._encoded[key].embeddings = [next(rows) for _ in request.images]
        self.counters.images_encoded += len(images)
        self.counters.vision_s += time.perf_counter() - start
        return []

    def _fail(self, key: Hashable, error: str) -> list[Finished]:
        """End the waiting requests for an image, which cannot be had."""
        ends = []
        for sequence in list(self.scheduler.waiting):
            request = sequence.request
            if request.images and _image_key(request) == key:
                self.scheduler.drop(sequence)
                self._forget_image(request)
                ends.append(Finished(request.id, (), FinishReason.ERROR, sequence.num_prompt_tokens, error))
        return ends

    def _forget_image(self, request: EngineRequest) -> None:
        """A request has ended: drop its images unless siblings use or will use them."""
        if not request.images:
            return
        key = _image_key(request)
        encoded = self._encoded[key]
        encoded.num_live -= 1
        if encoded.num_live:
            return
        if encoded.num_seen >= encoded.num_siblings:
            del self._encoded[key]
            return
        self._encoded.move_to_end(key)
        idle = [key for key, kept in self._encoded.items() if not kept.num_live]
        for key in idle[: max(0, len(idle) - self.limits.max_kept_images)]:
            del self._encoded[key]

    # Tokens

    def _extend(self, chunk: Chunk, tokens: list[int]) -> Finished | None:
        """Add the tokens that a chunk brought; returns the end of the sequence if one of them was it."""
        sequence = chunk.sequence
        finished = None
        num_added = 0
        while finished is None and num_added < len(tokens):
            finished = self._append(sequence, tokens[num_added])
            num_added += 1
        num_right = min(num_added, len(tokens) - 1)
        self.counters.new_tokens += num_added
        self.counters.drafted_tokens += len(chunk.draft)
        self.counters.accepted_tokens += num_right
        if finished is None:
            sequence.num_computed += num_right
            self.speculator.learn(sequence, len(chunk.draft), num_right, num_added)
        return finished

    def _append(self, sequence: Sequence, token: int, repeated: int | None = None) -> Finished | None:
        """Add a sampled token; the end of the sequence if this was it. `repeated`: by how far it loops, if known."""
        sampling = sequence.request.sampling
        if token in self.eos_ids and not sampling.ignore_eos:
            return self._finish(sequence, FinishReason.STOP, sequence.output)
        sequence.tokens.append(token)
        output = sequence.output
        if (
            sampling.stop
            and len(output) >= sampling.min_new_tokens
            and self._hits_stop(output, sampling.stop)
        ):
            return self._finish(sequence, FinishReason.STOP, output)
        if sampling.repetition and sequence.loop_runs is not None:
            if repeated is None:
                repeated = advance_runs(sequence.loop_runs, output, sampling.repetition)
            if repeated:
                self.counters.loops_cut += 1
                return self._finish(sequence, FinishReason.REPETITION, output[: len(output) - repeated])
        if len(output) >= sampling.max_new_tokens or len(sequence.tokens) >= self.max_total_tokens():
            return self._finish(sequence, FinishReason.LENGTH, output)
        return None

    def _hits_stop(self, output: list[int], stop: tuple[str, ...]) -> bool:
        # A token is at least a byte, so a stop string that ends with the newest token lies within this tail,
        # but for multi-byte characters that are still incomplete, for which the slack is.
        tail = max(len(text.encode()) for text in stop) + 8
        text = self.decode(output[-tail:])
        return any(end in text for end in stop)

    def _finish(self, sequence: Sequence, reason: FinishReason, output: list[int]) -> Finished:
        self.scheduler.finish(sequence)
        self._forget_image(sequence.request)
        return Finished(sequence.request.id, tuple(output), reason, sequence.num_prompt_tokens)


def make_ahead(runner: ModelRunner, limits: EngineLimits, room: int, eos_ids: frozenset[int]) -> Ahead:
    """What launches ahead of the host, its graphs captured; no sequence has more than `room` tokens."""
    slots = Slots(runner, limits.max_num_seqs, room + limits.max_period, limits.max_period)
    bursts = DecodeBursts(
        runner, slots, limits.max_num_seqs, room, eos_ids, limits.burst, limits.group_prefixes
    )
    bursts.warm_up()
    return Ahead(runner, bursts, slots, room)


def _unless_full(work: Callable[[], _Made]) -> _Made | None:
    """What `work` makes; None if the device's memory ended.

    The error ends here: as long as it is handled, its traceback holds the tensors that `work` had made, and no memory
    can be given back.
    """
    try:
        return work()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    return None


def _image_key(request: EngineRequest) -> Hashable:
    return ("request", request.id) if request.image_key is None else ("shared", request.image_key)
