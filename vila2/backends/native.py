"""Our own engine behind the Captioner seam: a VILA or LLaVA checkpoint on this machine's CPU or GPU."""

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from vila2.config import RecaptionSettings
from vila2.engine.engine import Engine, EngineLimits
from vila2.engine.sequence import EngineRequest, Finished, ImageSpan
from vila2.errors import UsageError
from vila2.model.checkpoint import LoadedCheckpoint, load_checkpoint
from vila2.model.images import PreparedImage
from vila2.model.quantize import quantize_model
from vila2.model.prompt import build_prompt, check_template
from vila2.ops.linear import pack_linears
from vila2.ops.native import capabilities
from vila2.ops.threads import set_threads
from vila2.types import Caption, CaptionRequest, ErrorKind, FinishReason, SampleError


@dataclass(frozen=True, slots=True)
class ComputePlan:
    """How a precision is carried out on a device: the model's type, the packed weights' (if any), the cache's."""

    model_dtype: torch.dtype
    packed_dtype: torch.dtype | None
    kv_dtype: torch.dtype
    summary: str


def plan_compute(device: str, precision: str, deterministic: bool, has_bf16_products: bool) -> ComputePlan:
    """Choose the arithmetic for `precision` (float32, bf16 or int8) on `device` (cpu or cuda).

    Packed products keep sums and activations in float32 and do not depend on the batch, so they serve every
    CPU without bf16 instructions, and `deterministic` runs on those that have them.
    """
    if precision not in ("float32", "bf16", "int8"):
        raise UsageError(f"precision {precision!r} is not one of: float32, bf16, int8")
    if precision == "int8":
        if device != "cpu":
            raise UsageError("--precision int8 runs on the CPU only so far: add --device cpu")
        summary = "int8 weights and activations, int32 sums"
        return ComputePlan(torch.float32, torch.int8, torch.bfloat16, summary)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if device == "cuda":
        if deterministic:
            raise UsageError("--deterministic runs on the CPU only so far: add --device cpu")
        return ComputePlan(dtype, None, dtype, f"{precision} through torch on the GPU")
    if precision == "bf16" and has_bf16_products and not deterministic:
        return ComputePlan(dtype, None, dtype, "bf16 products of this CPU")
    return ComputePlan(
        torch.float32, dtype, dtype, f"{precision} weights, float32 sums, vila2's own products"
    )


def resolve_device(device: str) -> str:
    """`auto` becomes cuda where there is a GPU; UsageError if cuda is asked for and there is none."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "--device cuda: torch sees no GPU here; use --device cpu, or see `vila2-fast doctor`"
        )
    return device


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
        self._under_way: dict[int, CaptionRequest] = {}

    def prepare(self, image: NDArray[np.uint8]) -> PreparedImage:
        """One RGB image (height, width, 3) to the model's tiles."""
        return self.checkpoint.image_processor.prepare(image)

    def caption(self, requests: Iterable[CaptionRequest | None]) -> Iterator[Caption]:
        """See `Captioner.caption`. Takes requests one engine load ahead, so that images are encoded in batches."""
        source = iter(requests)
        exhausted = False
        room = self.engine.limits.max_num_seqs + self.engine.limits.vision_batch
        while not exhausted or self.engine.num_unfinished:
            while not exhausted and self.engine.num_unfinished < room:
                try:
                    request = next(source)
                except StopIteration:
                    exhausted = True
                    break
                if request is None:
                    break
                error = self._add(request)
                if error:
                    yield Caption(request.id, "", finish_reason=FinishReason.ERROR, error=error)
            if self.engine.num_unfinished:
                for finished in self.engine.step():
                    yield self._caption(finished)
            elif not exhausted:
                time.sleep(0.001)  # nothing to do until the source has a request

    def _add(self, request: CaptionRequest) -> SampleError | None:
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
        )
        try:
            self.engine.add(engine_request)
        except ValueError as error:
            return SampleError(ErrorKind.PROMPT_TOO_LONG, str(error))
        self._under_way[request.id] = request
        return None

    def _caption(self, finished: Finished) -> Caption:
        request = self._under_way.pop(finished.id)
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
    )


def open_checkpoint(
    path: str | Path,
    *,
    device: str = "auto",
    precision: str = "bf16",
    template: str | None = None,
    batch_size: int | None = None,
    threads: int | None = None,
    deterministic: bool = False,
    max_new_tokens: int = 256,
    resize: str = "exact",
) -> NativeCaptioner:
    """Load a checkpoint and build an engine for it.

    `batch_size` is the number of sequences decoded together (default: by the device and its memory);
    `max_new_tokens` is only the usual length, by which the cache is sized; `resize` is exact (Pillow's pixels)
    or fast (see `ImageProcessor.exact`).
    """
    device = resolve_device(device)
    plan = plan_compute(device, precision, deterministic, capabilities().fast_bf16)
    if template is not None:
        check_template(template)
    set_threads(threads or available_cores())
    checkpoint = load_checkpoint(path, dtype=plan.model_dtype, device=device)
    processor = replace(checkpoint.image_processor, exact=resize == "exact")
    checkpoint = replace(checkpoint, image_processor=processor)
    if plan.packed_dtype is torch.int8:
        quantize_model(checkpoint.model, narrow=True)
    elif plan.packed_dtype is not None:
        pack_linears(checkpoint.model, plan.packed_dtype)
    limits = size_engine(checkpoint, plan, device, batch_size, max_new_tokens)
    name = Path(path).resolve().name
    return NativeCaptioner(checkpoint, plan, name, template or checkpoint.config.template, limits)


def size_engine(
    checkpoint: LoadedCheckpoint, plan: ComputePlan, device: str, batch_size: int | None, max_new_tokens: int
) -> EngineLimits:
    """Batch sizes for the device, and a cache for the batch within a share of the free memory.

    UsageError when not even one sequence of the model's usual length fits.
    """
    config = checkpoint.config.decoder
    bytes_per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * plan.kv_dtype.itemsize
    # An image at its largest (dynamic tiles) and about 256 tokens of text beside the caption.
    usual = min(checkpoint.image_processor.max_tokens + 256 + max_new_tokens, config.max_positions)
    budget = 0.8 * torch.cuda.mem_get_info()[0] if device == "cuda" else 0.4 * available_memory()
    most = int(budget // bytes_per_token)
    if most < usual:
        raise UsageError(
            f"the KV cache of one sequence ({usual} tokens) needs {usual * bytes_per_token / 2**20:.0f} MiB, "
            f"but {budget / 2**20:.0f} MiB may be used: lower --max-new-tokens or free memory"
        )
    max_num_seqs = batch_size or (256 if device == "cuda" else 64)
    num_kv_tokens = min(most, max_num_seqs * usual + usual)
    if batch_size is None:
        max_num_seqs = max(1, min(max_num_seqs, num_kv_tokens // usual))
    return EngineLimits(
        max_num_seqs=max_num_seqs,
        max_batch_tokens=max(8192 if device == "cuda" else 512, max_num_seqs),
        vision_batch=64 if device == "cuda" else 8,
        num_kv_tokens=num_kv_tokens,
    )


def available_cores() -> int:
    """The cores that this process may use (its affinity mask, as containers and Slurm set it)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int:
    """Bytes of memory that can be had without swapping, the container's limit included where it shows."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        if limit != "max":
            free = min(free, int(limit) - used)
    except (OSError, ValueError):
        pass  # not Linux, or no cgroup: the plain figure stands
    return free
