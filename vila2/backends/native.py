"""Our own engine behind the Captioner seam: a VILA or LLaVA checkpoint on this machine's CPU or GPU."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from vila2.backends.compute import (
    ON_CUDA,
    ComputePlan,
    available_cores,
    available_memory,
    pack_model,
    plan_compute,
    resolve_device_for,
    takes_torch_bf16,
)
from vila2.backends.engine_dir import (
    check_asked,
    check_engine,
    is_engine,
    layout_of,
    load_engine,
    misfit,
    read_engine,
)
from vila2.config import RecaptionSettings
from vila2.engine.engine import Engine, EngineLimits
from vila2.engine.gpu_memory import fitting_batch_tokens, is_out_of_memory, out_of_memory
from vila2.engine.measure import plan_card
from vila2.engine.sequence import EngineRequest, Finished, ImageSpan
from vila2.engine.speculation import MAX_DRAFT
from vila2.errors import UsageError
from vila2.model.checkpoint import LoadedCheckpoint, load_checkpoint
from vila2.model.images import PreparedImage
from vila2.model.prompt import build_prompt, check_template
from vila2.model.sample import Sample
from vila2.ops.threads import set_threads
from vila2.types import Caption, CaptionRequest, ErrorKind, FinishReason, SampleError

DEFAULT_PRECISION = "bf16"


class NativeCaptioner:
    """Captions with the native engine. One thread iterates `caption`; `prepare` may run in any."""

    def __init__(
        self,
        checkpoint: LoadedCheckpoint,
        plan: ComputePlan,
        model_name: str,
        template: str,
        limits: EngineLimits,
    ) -> None:
        self.model_digest = checkpoint.digest
        self.model_name = model_name
        self.plan = plan
        self.description = f"{plan.summary}, up to {limits.max_num_seqs} captions at once"
        self.checkpoint = checkpoint
        self.template = template
        self.engine = Engine(
            checkpoint.model,
            limits,
            checkpoint.tokenizer.eos_ids,
            checkpoint.tokenizer.decode,
            kv_dtype=plan.kv_dtype,
        )
        if limits.card is not None:
            self.description += f"; {limits.card.describe(self.engine.runner.cache.nbytes)}"
        if self.is_on_gpu:
            self._fit_steps()
        self._under_way: dict[int, CaptionRequest] = {}

    @property
    def is_on_gpu(self) -> bool:
        """Whether images may as well be decoded there."""
        return self.engine.runner.device.type == "cuda"

    def _fit_steps(self) -> None:
        """Make steps smaller if cache and graphs, now that they are there, have left less than was reckoned."""
        engine, limits = self.engine, self.engine.limits
        engine.runner.clear_memory()
        engine.scheduler.max_batch_tokens = fitting_batch_tokens(
            self.checkpoint.config,
            free=torch.cuda.mem_get_info()[0],
            max_batch_tokens=limits.max_batch_tokens,
            max_num_seqs=limits.max_num_seqs,
            vision_batch=limits.vision_batch,
            steps=None if limits.card is None else limits.card.needs.steps,
        )

    @property
    def square_side(self) -> int | None:
        """The side that `prepare` resizes every image to, if it does nothing else to it."""
        processor = self.checkpoint.image_processor
        return processor.image_size if processor.mode == "resize" else None

    @property
    def room(self) -> int:
        """How many requests the engine takes: one load ahead, so that images are encoded in batches."""
        return self.engine.limits.max_num_seqs + self.engine.limits.vision_batch

    def prepare(self, image: NDArray[np.uint8], num_images: int = 1) -> PreparedImage:
        """One RGB image (height, width, 3), one of the `num_images` of its request, to the model's tiles."""
        return self.checkpoint.image_processor.prepare(image, num_images)

    def caption(self, requests: Iterable[CaptionRequest | None]) -> Iterator[Caption]:
        """See `Captioner.caption`."""
        source = iter(requests)
        exhausted = False
        while not exhausted or self.engine.num_unfinished:
            while not exhausted and self.engine.num_unfinished < self.room:
                try:
                    request = next(source)
                except StopIteration:
                    exhausted = True
                    break
                if request is None:
                    break
                error = self.add(request)
                if error:
                    yield Caption(request.id, "", finish_reason=FinishReason.ERROR, error=error)
            if self.engine.num_unfinished:
                yield from self.step()
            elif not exhausted:
                time.sleep(0.001)  # nothing to do until the source has a request

    def add(self, request: CaptionRequest) -> SampleError | None:
        """Queue a request; why it cannot be, if so. In the thread that steps, and only while there is `room`."""
        images: list[PreparedImage] = list(request.images)
        try:
            prompt = build_prompt(
                self.template, request.prompt, images, self.checkpoint.tokenizer, self.checkpoint.config
            )
        except ValueError as error:
            return SampleError(ErrorKind.BAD_PROMPT, str(error))
        engine_request = EngineRequest(
            id=request.id,
            token_ids=tuple(prompt.token_ids),
            spans=tuple(_spans(prompt.image_spans, images)),
            images=tuple(images),
            sampling=request.sampling,
            header_length=prompt.header_length,
            image_key=request.image_key,
            num_siblings=request.num_siblings,
            rng_key=request.rng_key,
            draft=self._draft_tokens(request),
        )
        try:
            self.engine.add(engine_request)
        except ValueError as error:
            return SampleError(ErrorKind.PROMPT_TOO_LONG, str(error))
        self._under_way[request.id] = request
        return None

    def step(self) -> list[Caption]:
        """Advance everything by one step; what ended in it."""
        return [self._caption(finished) for finished in self.engine.step()]

    def abort(self, number: int) -> bool:
        """Drop a request; False if it is not under way."""
        self._under_way.pop(number, None)
        return self.engine.abort(number)

    def _draft_tokens(self, request: CaptionRequest) -> tuple[int, ...]:
        # A token is seldom longer than this; what lies far beyond the longest caption is of no use.
        text = request.draft.strip()[: 16 * request.sampling.max_new_tokens]
        if not text:
            return ()
        if not self.engine.kinds:
            self.engine.kinds = self.checkpoint.tokenizer.kinds()
        return tuple(self.checkpoint.tokenizer.encode(text))

    def _caption(self, finished: Finished) -> Caption:
        request = self._under_way.pop(finished.id)
        if finished.finish_reason is FinishReason.ERROR:
            error = SampleError(ErrorKind.ENGINE_ERROR, finished.error)
            return Caption(finished.id, "", finish_reason=FinishReason.ERROR, error=error)
        text = self.checkpoint.tokenizer.decode(finished.token_ids)
        ends = [at for stop in request.sampling.stop if (at := text.find(stop)) >= 0]
        if ends:
            text = text[: min(ends)]
        return Caption(
            finished.id, text.strip(), finished.token_ids, finished.finish_reason, finished.num_prompt_tokens
        )

    def stats(self) -> dict[str, float]:
        """The engine's counters; see `vila2.engine.engine.Counters`, and the scheduler's sharing."""
        scheduler = self.engine.scheduler
        return {
            **asdict(self.engine.counters),
            "prefix_hits": scheduler.prefixes.num_hits,
            "prefix_hit_tokens": scheduler.prefixes.num_hit_tokens,
            "preemptions": scheduler.num_preemptions,
            "queued": self.engine.num_waiting,
            "running": len(scheduler.running),
        }

    def close(self) -> None:
        self._under_way.clear()


def _spans(
    image_spans: Iterable[tuple[int, int, int, int]], images: list[PreparedImage]
) -> Iterator[ImageSpan]:
    for start, length, image, chunk in image_spans:
        rows = images[image].num_tokens // images[image].num_placeholders
        yield ImageSpan(start, length, image, chunk * rows)


def open_native(settings: RecaptionSettings) -> NativeCaptioner:
    """The native backend with a run's settings. CheckpointError or UsageError when they cannot work."""
    return open_checkpoint(
        settings.model,
        device=settings.device,
        precision=settings.resolved_precision,
        template=settings.template,
        batch_size=settings.batch_size,
        threads=settings.threads,
        deterministic=settings.deterministic,
        max_new_tokens=settings.max_new_tokens,
        resize=settings.resize,
        gpu_memory=settings.gpu_memory,
        processes=settings.processes_on_cpu,
        shares_images=len(settings.prompt) > 1 or settings.prompt_file is not None,
    )


def open_checkpoint(
    path: str | Path,
    *,
    device: str = "auto",
    precision: str = "auto",
    template: str | None = None,
    batch_size: int | None = None,
    threads: int | None = None,
    deterministic: bool = False,
    max_new_tokens: int = 256,
    resize: str = "exact",
    gpu_memory: float = 0.9,
    processes: int = 1,
    shares_images: bool = False,
) -> NativeCaptioner:
    """Open a checkpoint, or an engine directory that was built from one (see vila2.backends.engine_dir).

    `precision` "auto" is the engine's own, or bf16. `batch_size` is the number of sequences decoded together
    (default: by the device and its memory); `max_new_tokens` is only the usual length, by which the cache is sized;
    `resize` is exact (Pillow's pixels) or fast (see `ImageProcessor.exact`); `gpu_memory` is the share of a card that
    may be used in all, `processes` how many like this one share the machine's memory; `shares_images` says
    that several requests will come for an image. UsageError, with the sizes, when a card is too small.
    """
    if template is not None:
        check_template(template)
    set_threads(threads or available_cores())
    try:
        checkpoint, plan, name, device = _find(path, device, precision, deterministic)
        processor = replace(checkpoint.image_processor, exact=resize == "exact")
        checkpoint = replace(checkpoint, image_processor=processor)
        limits = size_engine(
            checkpoint, plan, device, batch_size, max_new_tokens, gpu_memory, processes, shares_images
        )
        return NativeCaptioner(checkpoint, plan, name, template or checkpoint.config.template, limits)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        free, total = torch.cuda.mem_get_info()
        raise out_of_memory("the model, its cache and its graphs are made", free=free, total=total) from None


def _find(
    path: str | Path, device: str, precision: str, deterministic: bool
) -> tuple[LoadedCheckpoint, ComputePlan, str, str]:
    """The model, how it computes, its name, and the device that it is on."""
    if is_engine(path):
        checkpoint, plan = _open_engine(path, device, precision, deterministic)
        name, device = read_engine(path).name, checkpoint.model.decoder.cos.device.type
    else:
        precision = DEFAULT_PRECISION if precision == "auto" else precision
        device = resolve_device_for(device, precision)
        plan = plan_compute(device, precision, deterministic, takes_torch_bf16())
        checkpoint = _load(path, plan, device, precision, deterministic)
        name = Path(path).resolve().name
    return checkpoint, plan, name, device


def _open_engine(
    path: str | Path, device: str, precision: str, deterministic: bool
) -> tuple[LoadedCheckpoint, ComputePlan]:
    record = read_engine(path)
    check_asked(path, record, precision, device)
    device = "cpu" if record.device == "cpu" else resolve_device_for(device, record.precision)
    plan = plan_compute(device, record.precision, deterministic, takes_torch_bf16())
    check_engine(path, record, layout_of(plan))
    if (cost := misfit(record)) is not None:
        plan = replace(plan, summary=f"{plan.summary}, {cost}")
    return load_engine(path, record, device), plan


def _load(
    path: str | Path, plan: ComputePlan, device: str, precision: str, deterministic: bool
) -> LoadedCheckpoint:
    """The checkpoint as the plan runs it. Rounding to 8 bits or 4 takes a while: it is done once, into a cache."""
    if precision in ("int8", *ON_CUDA):
        from vila2.backends.engine_build import cached_engine  # which captions with this module

        cached = cached_engine(path, precision)
        if cached is not None:
            return _open_engine(cached, device, precision, deterministic)[0]
    # What is rounded to few bits is rounded once, from float32.
    dtype = torch.float32 if precision in ON_CUDA else plan.model_dtype
    checkpoint = load_checkpoint(path, dtype=dtype, device=device)
    samples: tuple[Sample, ...] = ()
    if plan.packed_dtype is torch.int8:
        from vila2.backends.samples import own_samples

        samples = own_samples(checkpoint, checkpoint.config.template)
    pack_model(checkpoint.model, plan, samples=samples)
    return checkpoint


def size_engine(
    checkpoint: LoadedCheckpoint,
    plan: ComputePlan,
    device: str,
    batch_size: int | None,
    max_new_tokens: int,
    gpu_memory: float = 0.9,
    processes: int = 1,
    shares_images: bool = False,
) -> EngineLimits:
    """Batch sizes for the device, and a cache for the batch within a share of the free memory.

    On a card the largest batches are run and the graphs captured to see what they leave. UsageError when not even one
    sequence of the model's usual length fits.
    """
    config = checkpoint.config.decoder
    bytes_per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * plan.kv_dtype.itemsize
    # An image at its largest (dynamic tiles) and about 256 tokens of text beside the caption.
    usual = min(checkpoint.image_processor.max_tokens + 256 + max_new_tokens, config.max_positions)
    max_num_seqs = batch_size or (256 if device == "cuda" else 64)
    limits = EngineLimits(
        max_num_seqs=max_num_seqs,
        max_batch_tokens=max(8192 if device == "cuda" else 512, max_num_seqs),
        vision_batch=64 if device == "cuda" else 8,
        burst=8 if device == "cuda" else 1,
        group_prefixes=shares_images,
        # Where a row's bits depend on the rows beside it, a drafted token could tip a close choice.
        max_draft=MAX_DRAFT if plan.is_batch_invariant else 0,
    )
    budget = 0.4 * available_memory() / processes
    if device == "cuda":
        room = min(config.max_positions, (max_num_seqs + 1) * usual)
        limits = plan_card(
            checkpoint.model,
            limits,
            plan.kv_dtype,
            checkpoint.tokenizer.eos_ids,
            room=room,
            share=gpu_memory,
            sequence_bytes=0 if batch_size else usual * bytes_per_token,
        )
        assert limits.card is not None
        max_num_seqs, budget = limits.max_num_seqs, limits.card.kv_bytes
    most = int(budget // bytes_per_token)
    if most < usual:
        raise UsageError(
            f"the KV cache of one sequence ({usual} tokens) needs {usual * bytes_per_token / 2**20:.0f} MiB, "
            f"but {budget / 2**20:.0f} MiB may be used: lower --max-new-tokens or free memory"
        )
    num_kv_tokens = min(most, max_num_seqs * usual + usual)
    if batch_size is None:
        max_num_seqs = max(1, min(max_num_seqs, num_kv_tokens // usual))
    return replace(limits, max_num_seqs=max_num_seqs, num_kv_tokens=num_kv_tokens)
