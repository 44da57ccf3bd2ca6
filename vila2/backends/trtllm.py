"""Captions by TensorRT-LLM: our prompts, our batched vision stage, its language model.

A bounded window of requests is in flight through `generate_async`; an event loop in a thread of its own awaits them.
What comes back are token ids, which are ended, cut and decoded as the native engine does it: same tokens, same rows.
"""

import asyncio
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vila2.backends.loop_thread import LoopThread
from vila2.backends.trtllm_api import Api, load_api
from vila2.backends.trtllm_build import build, cache_variables, environment, this_gpu
from vila2.backends.trtllm_engine import EngineFolder, read_engine
from vila2.backends.trtllm_llm import make_inputs, make_sampling, open_llm
from vila2.backends.trtllm_vision import FeatureCache, VisionStage, read_config
from vila2.config import RecaptionSettings
from vila2.engine.repetition import advance_runs, new_runs
from vila2.errors import CheckpointError, UsageError, VilaError
from vila2.model.checkpoint import inspect_checkpoint
from vila2.model.images import PreparedImage
from vila2.model.prompt import VISUAL_TOKEN, PromptTokens, build_prompt, check_template, turn_end_ids
from vila2.model.tokenizer import Tokenizer, load_tokenizer
from vila2.types import Caption, CaptionRequest, ErrorKind, FinishReason, SampleError, SamplingParams

IDLE_S = 0.005  # how long to wait for an answer before asking the source again
SHUTDOWN_S = 60.0  # a dead worker may never answer
STALLED_AFTER = 8  # requests that time out in a row, none answered: the worker is dead
_TOO_LONG = ("max_seq_len", "max_num_tokens", "max_input_len", "length")


@dataclass(frozen=True, slots=True)
class _Answer:
    token_ids: tuple[int, ...] = ()
    finish_reason: str = ""
    error: SampleError | None = None


class TrtllmCaptioner:
    """One engine folder, opened. One thread iterates `caption`; `prepare` may run in any."""

    def __init__(self, engine: EngineFolder, settings: RecaptionSettings, api: Api) -> None:
        self.engine, self.api = engine, api
        self.config = read_config(engine.config)
        self.model_name, self.model_digest = engine.name, engine.spec.digest
        self.timeout_s = settings.request_timeout
        self.template = check_template(settings.template) if settings.template else self.config.template
        self.image_processor = replace(self.config.image_processor(), exact=settings.resize == "exact")
        self.tokenizer = _open_tokenizer(engine.path / "tokenizer", self.config.token_newline)
        # Ids from here on are visual tokens. An engine counts them from its vocabulary; the PyTorch backend only
        # asks whether an id is beyond it, and may have cut its vocabulary to the tokenizer's.
        vocabulary = self.config.decoder.vocab_size
        self.first_visual_id = (
            vocabulary if engine.spec.generation == "engine" else max(vocabulary, len(self.tokenizer))
        )
        batch = engine.spec.limits["max_batch_size"]
        self.window = min(settings.batch_size or batch, batch)
        self.window += self.window // 2
        self.description = (
            f"tensorrt_llm {engine.spec.versions['tensorrt_llm']} ({engine.spec.generation}, {engine.spec.precision}), "
            f"up to {self.window} requests at once"
        )
        self.vision = VisionStage(engine.path, self.config, "cuda" if torch.cuda.is_available() else "cpu")
        self._environment = ExitStack()
        self._environment.enter_context(environment(cache_variables(engine.path)))
        try:
            self.llm = open_llm(api, engine.path, engine.spec)
        except BaseException:
            self._environment.close()
            raise
        engine.mark_used()
        self._loop = LoopThread("vila2-trtllm")
        self._features = FeatureCache(4 * self.vision.batch)
        self._under_way: dict[int, tuple[CaptionRequest, Future[_Answer], int]] = {}
        self._finished: SimpleQueue[int] = SimpleQueue()
        self._num_stalled = 0
        self._counts = {"requests": 0, "images_encoded": 0, "images_shared": 0, "new_tokens": 0, "aborted": 0}

    def prepare(self, image: NDArray[np.uint8]) -> PreparedImage:
        """One RGB image (height, width, 3) to the model's tiles."""
        return self.image_processor.prepare(image)

    def caption(self, requests: Iterable[CaptionRequest | None]) -> Iterator[Caption]:
        """See `Captioner.caption`. VilaError when the engine's worker is dead."""
        source = iter(requests)
        exhausted = False
        try:
            while not exhausted or self._under_way:
                taken: list[CaptionRequest] = []
                while not exhausted and len(taken) < min(
                    self.window - len(self._under_way), self.vision.batch
                ):
                    try:
                        request = next(source)
                    except StopIteration:
                        exhausted = True
                        break
                    if request is None:
                        break
                    taken.append(request)
                yield from self._submit(taken)
                yield from self._collect()
        finally:
            for _, future, _ in self._under_way.values():
                future.cancel()
            self._under_way.clear()
            self._finished = SimpleQueue()

    # ---- in ----

    def _submit(self, requests: Sequence[CaptionRequest]) -> Iterator[Caption]:
        """Send requests off; yields a caption for each that cannot be sent."""
        prompts: list[tuple[CaptionRequest, PromptTokens]] = []
        for request in requests:
            prompt = self._prompt(request)
            if isinstance(prompt, SampleError):
                yield _failed(request, prompt)
            else:
                prompts.append((request, prompt))
        for (request, prompt), tokens in zip(prompts, self._encode([r for r, _ in prompts]), strict=True):
            room = self.engine.spec.limits["max_seq_len"] - len(prompt.token_ids)
            ids, embeddings = self._fuse(prompt, tokens)
            sampling = make_sampling(request.sampling, request.rng_key, room, self.end_ids)
            future = self._loop.run(self._ask(ids, embeddings, sampling))
            self._under_way[request.id] = (request, future, len(ids))
            self._counts["requests"] += 1
            future.add_done_callback(lambda _, number=request.id, done=self._finished: done.put(number))  # type: ignore[misc]

    def _prompt(self, request: CaptionRequest) -> PromptTokens | SampleError:
        images = list(request.images)
        try:
            prompt = build_prompt(self.template, request.prompt, images, self.tokenizer, self.config)
        except ValueError as error:
            return SampleError(ErrorKind.BAD_PROMPT, str(error))
        limits, length = self.engine.spec.limits, len(prompt.token_ids)
        room = min(limits["max_input_len"], limits["max_seq_len"] - 1)
        if length > room:
            message = f"the prompt has {length} tokens; this engine has room for {room}"
            return SampleError(ErrorKind.PROMPT_TOO_LONG, message)
        return prompt

    def _encode(self, requests: Sequence[CaptionRequest]) -> list[list[Tensor]]:
        """The visual tokens of each request's images, all images that are new in one batch."""
        found: list[list[Tensor] | None] = []
        fresh: dict[Any, int] = {}  # key -> the request that has it encoded
        sharers: dict[int, int] = {}
        for number, request in enumerate(requests):
            first = fresh.get(request.image_key) if request.image_key is not None else None
            tokens = None if first is not None else self._features.get(request.image_key)
            self._counts["images_shared"] += first is not None or tokens is not None
            if first is not None:
                sharers[number] = first
            elif tokens is None and request.image_key is not None:
                fresh[request.image_key] = number
            found.append(tokens)
        wanted = [n for n, tokens in enumerate(found) if tokens is None and n not in sharers]
        images = [image for n in wanted for image in requests[n].images]
        encoded = iter(self.vision.encode(images)) if images else iter(())
        self._counts["images_encoded"] += len(images)
        for n in wanted:
            tokens = [next(encoded) for _ in requests[n].images]
            found[n] = tokens
            self._features.put(requests[n].image_key, tokens, requests[n].num_siblings)
        for n, first in sharers.items():
            found[n] = self._features.get(requests[n].image_key) or found[first]
        return [tokens if tokens is not None else [] for tokens in found]

    def _fuse(self, prompt: PromptTokens, tokens: list[Tensor]) -> tuple[list[int], Tensor | None]:
        """Ids in which visual tokens count up from beyond the vocabulary, and their embeddings in that order."""
        if not prompt.image_spans:
            return prompt.token_ids, None
        rows = [
            tokens[image][chunk * length : (chunk + 1) * length]
            for _, length, image, chunk in prompt.image_spans
        ]
        visual = iter(range(self.first_visual_id, self.first_visual_id + len(prompt.token_ids)))
        ids = [next(visual) if token == VISUAL_TOKEN else token for token in prompt.token_ids]
        return ids, torch.cat(rows)

    # ---- out ----

    async def _ask(self, ids: list[int], embeddings: Tensor | None, sampling: Any) -> _Answer:
        try:
            output = self.llm.generate_async(make_inputs(self.api, ids, embeddings), sampling_params=sampling)
        except ValueError as error:  # what it checks before a request is sent
            kind = (
                ErrorKind.PROMPT_TOO_LONG
                if any(w in str(error) for w in _TOO_LONG)
                else ErrorKind.ENGINE_ERROR
            )
            return _Answer(error=SampleError(kind, _line(error)))
        try:
            await asyncio.wait_for(output.aresult(), self.timeout_s)
        except asyncio.TimeoutError:
            output.abort()
            self._counts["aborted"] += 1
            return _Answer(finish_reason="stalled")
        except asyncio.CancelledError:
            output.abort()
            raise
        except Exception as error:
            if not _is_request_error(error):
                raise
            return _Answer(error=SampleError(ErrorKind.ENGINE_ERROR, _line(error)))
        if not output.outputs:
            return _Answer(error=SampleError(ErrorKind.ENGINE_ERROR, "TensorRT-LLM gave no output"))
        first = output.outputs[0]
        return _Answer(tuple(first.token_ids or ()), str(first.finish_reason))

    def _collect(self) -> Iterator[Caption]:
        """The captions that are there, after a moment's wait for the first."""
        take: Callable[[], int] = partial(self._finished.get, timeout=IDLE_S)
        while True:
            try:
                number = take()
            except Empty:
                return
            take = self._finished.get_nowait
            request, future, num_prompt_tokens = self._under_way.pop(number)
            try:
                answer = future.result()
            except VilaError:
                raise
            except Exception as error:
                raise VilaError(
                    f"TensorRT-LLM's worker failed: {_line(error)}; run the same command again to go on"
                ) from error
            yield self._caption(request, answer, num_prompt_tokens)

    def _caption(self, request: CaptionRequest, answer: _Answer, num_prompt_tokens: int) -> Caption:
        if answer.finish_reason == "stalled":
            self._num_stalled += 1
            if self._num_stalled >= STALLED_AFTER:
                raise VilaError(
                    f"TensorRT-LLM has answered none of {self._num_stalled} requests within {self.timeout_s:g} s each; "
                    "run the same command again to go on"
                )
            message = f"no answer within {self.timeout_s:g} s: aborted"
            return _failed(request, SampleError(ErrorKind.ENGINE_ERROR, message))
        self._num_stalled = 0
        if answer.error is not None:
            return _failed(request, answer.error)
        reason = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}.get(answer.finish_reason)
        if reason is None:  # timeout, cancelled, or something newer
            message = f"TensorRT-LLM ended the request: {answer.finish_reason}"
            return _failed(request, SampleError(ErrorKind.ENGINE_ERROR, message))
        sampling = request.sampling
        tokens, reason = end_tokens(
            answer.token_ids, sampling, self.tokenizer.eos_ids, self.tokenizer.decode, reason
        )
        self._counts["new_tokens"] += len(answer.token_ids)
        text = self.tokenizer.decode(tokens)
        ends = [at for stop in sampling.stop if (at := text.find(stop)) >= 0]
        text = text[: min(ends)] if ends else text
        return Caption(request.id, text.strip(), tokens, reason, num_prompt_tokens)

    @property
    def end_ids(self) -> list[int]:
        """The ids that end a caption, the tokenizer's own first."""
        own = self.tokenizer.inner.eos_token_id
        return sorted(self.tokenizer.eos_ids, key=lambda token: (token != own, token))

    def stats(self) -> dict[str, float]:
        """Counters since the engine was opened."""
        return {**self._counts, "in_flight": len(self._under_way)}

    def close(self) -> None:
        """Shut the worker down; one that is dead is not waited for."""
        self._loop.close()
        ending = threading.Thread(target=self.llm.shutdown, name="vila2-trtllm-shutdown", daemon=True)
        ending.start()
        ending.join(SHUTDOWN_S)
        self._environment.close()


def end_tokens(
    token_ids: Sequence[int],
    sampling: SamplingParams,
    eos_ids: frozenset[int],
    decode: Callable[[Sequence[int]], str],
    reason: FinishReason,
) -> tuple[tuple[int, ...], FinishReason]:
    """Where the native engine would have ended: at an end token, a stop text or a loop, whichever comes first."""
    output: list[int] = []
    rule = sampling.repetition
    runs = None if rule is None else new_runs(rule)
    tail = max((len(text.encode()) for text in sampling.stop), default=0) + 8
    for token in token_ids:
        if token in eos_ids and not sampling.ignore_eos:
            return tuple(output), FinishReason.STOP
        output.append(token)
        if sampling.stop and len(output) >= sampling.min_new_tokens:
            text = decode(output[-tail:])
            if any(end in text for end in sampling.stop):
                return tuple(output), FinishReason.STOP
        if rule is not None and runs is not None:
            repeated = advance_runs(runs, output, rule)
            if repeated:
                return tuple(output[: len(output) - repeated]), FinishReason.REPETITION
    return tuple(output), reason


def open_trtllm(settings: RecaptionSettings) -> TrtllmCaptioner:
    """The trtllm backend with a run's settings: the engine given, or the model's, built into the cache on first use.

    UsageError without the package; CheckpointError for an engine of another checkpoint, version or GPU.
    """
    api = load_api()
    if settings.engine is not None:
        engine = read_engine(Path(settings.engine).expanduser())
        check_engine(engine, api)
        if settings.precision not in ("auto", engine.spec.precision):
            raise UsageError(
                f"{engine.path} was built for {engine.spec.precision}, not {settings.precision}: "
                "leave --precision out, or build another engine"
            )
        most = engine.spec.limits["max_new_tokens"]
        if settings.max_new_tokens > most:
            raise UsageError(
                f"{engine.path} has room for captions of {most} tokens, not {settings.max_new_tokens}: "
                "lower --max-new-tokens, or build another engine"
            )
    else:
        engine = build(
            settings.model,
            precision="bf16" if settings.precision == "auto" else settings.precision,
            max_batch=settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
            options=settings.engine_option,
        )
    return TrtllmCaptioner(engine, settings, api)


def check_engine(engine: EngineFolder, api: Api) -> None:
    """Refuse an engine that was built for something else than what is here. CheckpointError says what to do."""
    spec = engine.spec
    differences = [
        f"{name} {spec.versions[name]}, here is {value}"
        for name, value in api.versions.items()
        if spec.versions.get(name, value) != value
    ]
    gpu = this_gpu()
    if (spec.gpu.get("name"), spec.gpu.get("capability")) != (gpu["name"], gpu["capability"]):
        differences.append(f"the GPU {spec.gpu.get('name')}, here is {gpu['name']}")
    if spec.generation != api.generation:
        differences.append(f"the {spec.generation} path, this tensorrt_llm has the {api.generation} path")
    again = f"build it again: vila2-fast build {engine.checkpoint} --backend trtllm --out {engine.path}"
    if differences:
        raise CheckpointError(f"{engine.path} was built with {'; '.join(differences)}; {again}")
    if Path(engine.checkpoint).is_dir():
        try:
            digest = inspect_checkpoint(engine.checkpoint).digest
        except (CheckpointError, OSError):
            return  # something else lies there now: the engine is whole without it
        if digest != spec.digest:
            raise CheckpointError(
                f"{engine.path} is stale: the checkpoint {engine.checkpoint} has changed since; {again}"
            )


def _open_tokenizer(folder: Path, token_newline: bool) -> Tokenizer:
    tokenizer = load_tokenizer(folder)
    if token_newline:
        tokenizer.add_image_token()
    tokenizer.add_eos_ids(turn_end_ids(tokenizer))
    return tokenizer


def _is_request_error(error: Exception) -> bool:
    """tensorrt_llm's own error of one request, known by its name: its place has moved between versions."""
    return any(kind.__name__ == "RequestError" for kind in type(error).__mro__)


def _failed(request: CaptionRequest, error: SampleError) -> Caption:
    return Caption(request.id, "", finish_reason=FinishReason.ERROR, error=error)


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
