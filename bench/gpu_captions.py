"""Captions end to end with random weights: the engine against transformers' `generate`, and against the roofline.

Images go through SigLIP-so400m at 384 px (27 x 27 patches, 196 visual tokens after down-sampling), 40 text tokens in,
128 new ones out, greedy, ends of sequence ignored: the work of VILA1.5-3B and -8B. What weights hold changes no time.
The rival gets the same tower and projector in plain torch and its own best batch: batches grow until one is slower,
does not fit, or would outlast the rival's share of the time, and the row says which of these it was.
"""

import gc
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from gpu_report import Report, Result
from torch import Tensor, nn

TEXT_TOKENS, NEW_TOKENS = 40, 128


@dataclass(frozen=True)
class Size:
    """A model's decoder, how many captions are timed, and the batches that the rival tries."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    captions: int
    batch: int
    rival_batches: tuple[int, ...] = ()


SIZES = (
    Size("3B", 2560, 6912, 32, 20, 20, 32000, 768, 256, (32, 64, 128, 256)),
    Size("8B", 4096, 14336, 32, 32, 8, 128256, 512, 256, (32, 64, 128, 256)),
)
DRY = Size("tiny", 64, 96, 2, 4, 2, 200, 3, 2, (2,))


def measure(report: Report, *, dry: bool, deadline: float) -> Iterator[Result]:
    """Captions a second of each size, the rival's, and the share of the roofline."""
    yield from run_ahead(report.device)
    for size in (DRY,) if dry else SIZES:
        if time.monotonic() > deadline:
            report.skip(size.name, "no time was left")
            return
        model = build(size, report.device, dry=dry)
        visual, new = model.config.tokens_per_tile, 4 if dry else NEW_TOKENS
        with no_card() if dry else nullcontext():
            planned = planned_bytes(model, size, new)
            rate = ours(model, size, new)
            peak = torch.cuda.max_memory_reserved()
        yield Result(
            f"memory {size.name}", "weights, cache, graphs and steps", peak / 2**30, "GiB",
            planned / max(peak, 1), "the peak was planned", 1.0,
        )  # fmt: skip
        floor = roofline_seconds(report, model, size, visual + TEXT_TOKENS, new)
        gc.collect()
        yield Result(
            f"captions {size.name}", f"{visual}+{TEXT_TOKENS} in, {new} out", rate, "captions/s",
            rate * floor, "roofline", 0.5,
        )  # fmt: skip
        if time.monotonic() < deadline:
            waiting = ours(model, size, new, overlap=False)
            yield Result(
                f"captions {size.name}, host waits",
                "no overlap",
                waiting,
                "captions/s",
                rate / waiting,
                "overlap",
            )
        if time.monotonic() > deadline:
            report.skip(f"transformers {size.name}", "no time was left")
            return
        # The models after this one want their time too.
        left = deadline - time.monotonic()
        until = time.monotonic() + (left if size is SIZES[-1] else left / 3)
        theirs, batch, ended = rival(model, size, new, until)
        yield Result(
            f"transformers {size.name}",
            f"generate, batch {batch}{ended}",
            theirs,
            "captions/s",
            rate / theirs,
            "ours",
            6.0,
        )
        del model
        gc.collect()
        if not dry:
            torch.cuda.empty_cache()


def build(size: Size, device: torch.device, *, dry: bool) -> Any:
    """A VILA of this size with random bfloat16 weights on the device."""
    from vila2.model.decoder import DecoderConfig
    from vila2.model.projector import ProjectorConfig
    from vila2.model.vision import VisionConfig
    from vila2.model.vlm import ModelConfig, VisionLanguageModel

    vision = VisionConfig(
        "siglip", 384, 14, 1152, 4304, 27, 16, "gelu_pytorch_tanh", 1e-6, select_feature="cls_patch"
    )
    if dry:
        vision = replace(vision, image_size=28, width=32, inner_width=48, num_layers=3, num_heads=2)
    config = ModelConfig(
        vision,
        ProjectorConfig("mlp_downsample", vision.width, size.hidden, column_major=True),
        DecoderConfig(
            size.vocab,
            size.hidden,
            size.inner,
            size.layers,
            size.heads,
            size.kv_heads,
            size.hidden // size.heads,
            4096,
        ),
        "resize",
        vision.image_size,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = VisionLanguageModel.from_config(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def run_ahead(device: torch.device) -> Iterator[Result]:
    """Whether graphs, groups and the overlap write the tokens that one step after the other writes on the CPU.

    And how often the host waited for the device meanwhile, as torch sees it: reading a launch's tokens waits for an
    event, which does not count.
    """
    from vila2.engine.engine import EngineLimits

    torch.manual_seed(0)
    model = build(DRY, torch.device("cpu"), dry=True).float()
    expected, _ = _mixed_tokens(model, EngineLimits(max_num_seqs=6))
    ahead = EngineLimits(max_num_seqs=6, burst=3, group_prefixes=True)
    found, waits = _mixed_tokens(model.to(device), ahead)
    total = sum(map(len, expected.values()))
    wrong = sum(tokens != found[number] for number, tokens in expected.items())
    yield Result(
        "engine ahead of the host", "tokens as on the CPU", total, "tokens",
        error=wrong / len(expected), tolerance=0.0,
    )  # fmt: skip
    yield Result(
        "waits of the host",
        "but for tokens of the launch before",
        waits,
        "waits",
        float(not waits),
        "none",
        1.0,
    )


def _mixed_tokens(model: Any, limits: Any) -> tuple[dict[int, tuple[int, ...]], int]:
    """The tokens of requests of every kind: two on an image or one, greedy and sampled, ending in each way.

    And how often the host waited for the device.
    """
    from vila2.engine.engine import Engine
    from vila2.engine.sequence import EngineRequest, ImageSpan
    from vila2.types import RepetitionRule, SamplingParams

    rng = np.random.default_rng(0)
    processor, visual = model.config.image_processor(), model.config.tokens_per_tile
    side, vocab = model.config.image_size, model.config.decoder.vocab_size
    header = tuple(int(token) for token in rng.integers(8, vocab, 20))
    samplings = (
        SamplingParams(max_new_tokens=13),
        SamplingParams(max_new_tokens=20, temperature=0.9, top_p=0.9, top_k=50, min_new_tokens=5),
        SamplingParams(max_new_tokens=24, ignore_eos=True, repetition=RepetitionRule(6, 2, 3)),
    )
    engine = Engine(model, limits, frozenset(range(8)), lambda tokens: "", torch.float32)
    for number in range(12):
        image = processor.prepare(
            np.random.default_rng(number // 2).integers(0, 256, (side, side, 3), dtype=np.uint8)
        )
        text = tuple(int(token) for token in rng.integers(8, vocab, 3 + number))
        prompt = (*header, *([-1] * visual), *text)
        engine.add(
            EngineRequest(
                number,
                prompt,
                (ImageSpan(len(header), visual, 0),),
                (image,),
                samplings[number % 3],
                len(header),
                number // 2,
                2,
                rng_key=number,
            )
        )
    done = []
    with warnings.catch_warnings(record=True) as caught, watched(model.decoder.cos.is_cuda):
        warnings.simplefilter("always")
        while engine.num_unfinished:
            done += engine.step()
    return {end.id: end.token_ids for end in done}, count_waits(caught)


def count_waits(caught: list[warnings.WarningMessage]) -> int:
    """How many warnings are of a call that waited; torch also warns once that it may overlook some."""
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


@contextmanager
def watched(on_gpu: bool) -> Iterator[None]:
    """Let torch warn of each call that waits for the device."""
    if not on_gpu:
        yield
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def limits_of(model: Any, size: Size, new_tokens: int) -> Any:
    """The engine's sizes for these captions."""
    from vila2.engine.engine import EngineLimits

    on_gpu = model.decoder.cos.is_cuda
    usual = model.config.tokens_per_tile + TEXT_TOKENS + new_tokens + 16
    return EngineLimits(
        max_num_seqs=size.batch,
        max_batch_tokens=8192 if on_gpu else 512,
        vision_batch=64 if on_gpu else 4,
        num_kv_tokens=(size.batch + 8) * usual,
        burst=8 if on_gpu else 2,
    )


def planned_bytes(model: Any, size: Size, new_tokens: int) -> int:
    """What weights, cache, graphs and steps would take by what is measured as at the start of a run."""
    from vila2.engine.measure import measure_needs

    limits, config = limits_of(model, size, new_tokens), model.config.decoder
    room = min(config.max_positions, limits.num_kv_tokens)
    needs = measure_needs(model, limits, torch.bfloat16, frozenset(), room)
    cache = limits.num_kv_tokens * 4 * config.num_layers * config.kv_size
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    return int(before + cache + needs.total)


@contextmanager
def no_card() -> Iterator[None]:
    """What torch says of a card's memory, where there is none: nothing."""
    with patch.multiple(
        torch.cuda,
        mem_get_info=lambda: (0, 0),
        memory_reserved=lambda: 0,
        max_memory_reserved=lambda: 0,
        reset_peak_memory_stats=lambda: None,
        empty_cache=lambda: None,
        synchronize=lambda: None,
    ):
        yield


def ours(model: Any, size: Size, new_tokens: int, *, overlap: bool = True) -> float:
    """Captions a second of the engine over `size.captions` images, after a warm-up of one batch."""
    from vila2.engine.engine import Engine

    on_gpu = model.decoder.cos.is_cuda
    limits = replace(limits_of(model, size, new_tokens), overlap=overlap)
    engine = Engine(model, limits, frozenset(), lambda tokens: "", torch.bfloat16)
    _caption(engine, model, min(size.captions, size.batch), new_tokens, first=10**6)
    _wait(on_gpu)
    start = time.perf_counter()
    _caption(engine, model, size.captions, new_tokens, first=0)
    _wait(on_gpu)
    return size.captions / (time.perf_counter() - start)


def _caption(engine: Any, model: Any, count: int, new_tokens: int, first: int) -> None:
    from vila2.engine.sequence import EngineRequest, ImageSpan
    from vila2.types import SamplingParams

    processor = model.config.image_processor()
    rng = np.random.default_rng(first)
    side, visual = model.config.image_size, model.config.tokens_per_tile
    images = [
        processor.prepare(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        for _ in range(min(count, 16))
    ]
    text = [int(token) for token in rng.integers(0, model.config.decoder.vocab_size, TEXT_TOKENS)]
    header = TEXT_TOKENS // 3
    prompt = (*text[:header], *([-1] * visual), *text[header:])
    sampling = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    for index in range(count):
        span = ImageSpan(header, visual, 0)
        engine.add(
            EngineRequest(first + index, prompt, (span,), (images[index % len(images)],), sampling, header)
        )
    done = 0
    while engine.num_unfinished:
        done += len(engine.step())
    assert done == count, (done, count)


def rival(model: Any, size: Size, new_tokens: int, until: float) -> tuple[float, int, str]:
    """The best captions a second of transformers' `generate`, by `best_batch`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    decoder = model.config.decoder
    device = model.decoder.cos.device
    # Our decoder's memory goes first: the rival's weights are as many.
    model.decoder.to("meta")
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    config = LlamaConfig(
        vocab_size=decoder.vocab_size,
        hidden_size=decoder.hidden_size,
        intermediate_size=decoder.intermediate_size,
        num_hidden_layers=decoder.num_layers,
        num_attention_heads=decoder.num_heads,
        num_key_value_heads=decoder.num_kv_heads,
        max_position_embeddings=4096,
        attn_implementation="sdpa",
        pad_token_id=0,
        eos_token_id=None,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            language = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    tower = PlainTower(model)

    def seconds(batch: int) -> float:
        _generate(language, tower, model, batch, min(new_tokens, 4))
        _wait(device.type == "cuda")
        start = time.perf_counter()
        _generate(language, tower, model, batch, new_tokens)
        _wait(device.type == "cuda")
        return time.perf_counter() - start

    return best_batch(size.rival_batches, seconds, until)


def best_batch(
    batches: tuple[int, ...], seconds: Callable[[int], float], until: float
) -> tuple[float, int, str]:
    """The most items a second over growing batches, at which one, and why no larger one was tried (or nothing).

    `seconds` of a batch may raise OutOfMemoryError, but for the first. No batch is begun that at twice the time of the
    one before would end after `until`, by the monotonic clock.
    """
    rate, best, took = 0.0, 0, 0.0
    for batch in batches:
        if best and time.monotonic() + 2 * took > until:
            return rate, best, f", no time for {batch}"
        begun = time.monotonic()
        try:
            rate_now = batch / seconds(batch)
        except torch.OutOfMemoryError:
            if not best:
                raise
            return rate, best, f", {batch} does not fit"
        took = time.monotonic() - begun
        if rate_now < rate:
            return rate, best, f", {batch} slower"
        rate, best = rate_now, batch
    return rate, best, ""


class PlainTower(nn.Module):
    """The same tower and projector with no kernel of ours: what a user of transformers runs."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vision, self.projector = model.vision, model.projector

    def forward(self, tiles: Tensor) -> Tensor:
        """Tiles (N, size, size, 3) uint8 to visual tokens."""
        # Every op asks this one function; without Triton each takes its reference.
        with patch("vila2.ops.triton.has_triton", lambda: False):
            return self.projector(self.vision(tiles))


@torch.inference_mode()
def _generate(language: Any, tower: PlainTower, model: Any, batch: int, new_tokens: int) -> None:
    side = model.config.image_size
    device = language.device
    tiles = torch.randint(0, 256, (batch, side, side, 3), dtype=torch.uint8, device=device)
    text = torch.randint(0, model.config.decoder.vocab_size, (batch, TEXT_TOKENS), device=device)
    embeddings = torch.cat((tower(tiles), language.get_input_embeddings()(text)), dim=1)
    mask = torch.ones(embeddings.shape[:2], dtype=torch.int64, device=device)
    language.generate(
        inputs_embeds=embeddings,
        attention_mask=mask,
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
    )


def roofline_seconds(report: Report, model: Any, size: Size, prompt: int, new_tokens: int) -> float:
    """The least seconds a caption by the ceilings measured here: products at their peak, and in decoding the larger
    of the products and of the bytes of weights and cache, for batches of `size.batch`."""
    vision = sum(part.numel() for layer in model.vision.layers for part in layer.parameters())
    patches = model.config.vision.num_positions
    config = model.config.decoder
    weights = sum(part.numel() for layer in model.decoder.layers for part in layer.parameters())
    head = config.vocab_size * config.hidden_size
    width = model.config.vision.width
    vision_flops = 2.0 * vision * patches + 4.0 * patches**2 * width * len(model.vision.layers)
    prefill_flops = 2.0 * weights * prompt + 2.0 * prompt**2 * config.q_size * config.num_layers
    per_token = 4 * config.num_layers * config.kv_size  # bytes of keys and values
    cache_bytes = per_token * (prompt + new_tokens / 2)
    step_flops = 2.0 * (weights + head) + 4.0 * (prompt + new_tokens / 2) * config.q_size * config.num_layers
    step_bytes = 2.0 * (weights + head) / size.batch + cache_bytes
    step = max(step_flops / report.ceiling("bf16"), step_bytes / report.ceiling("copy"))
    return (vision_flops + prefill_flops) / report.ceiling("bf16") + new_tokens * step


def _wait(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()
