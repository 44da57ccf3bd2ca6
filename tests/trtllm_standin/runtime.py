"""What happens inside the stand-in's LLM: checks as strict as the real thing's, and the reference model's tokens.

The reference is transformers on the weights in the folder that LLM is given, in float32, one request after the other.
"""

import asyncio
import json
import os
import queue
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

Fault = Callable[[int], str]  # a request's number -> "" or what happens to it

# Set by tests, in the process that they run in; a process of its own reads VILA2_STANDIN_FAULT ("3:die").
faults: Fault | None = None
log: list[str] = []  # what the adapter did, for tests


class RequestError(RuntimeError):
    """tensorrt_llm's error of one request."""


def _fault_of(number: int) -> str:
    if faults is not None:
        return faults(number)
    at, _, what = os.environ.get("VILA2_STANDIN_FAULT", "").partition(":")
    return what if at and (at == "*" or int(at) == number) else ""


def _check_cuda_graph(config: Any) -> Any:
    if config.batch_sizes and config.max_batch_size not in (0, max(config.batch_sizes)):
        raise ValueError("CudaGraphConfig.max_batch_size must be the largest of batch_sizes")
    return config


class MultimodalParams:
    """Embeddings on their way to the worker: a handle, since tensors do not travel."""

    def __init__(self, multimodal_input: Any = None, multimodal_data: Any = None) -> None:
        self.multimodal_input, self.multimodal_data = multimodal_input, multimodal_data or {}
        self.is_handle = False

    def to_handle(self, element: str) -> None:
        assert element == "multimodal_data", element
        self.is_handle = True

    def has_content(self) -> bool:
        return bool(self.multimodal_data)


class VilaModel:
    """The key of the registry."""


class VilaInputProcessor:
    """As the real one, it would fill GPU memory with a vision tower: the adapter must keep it from being made."""

    def __init__(self, model_path: Any, config: Any, tokenizer: Any, trust_remote_code: bool = True) -> None:
        raise AssertionError("VilaInputProcessor loads its vision tower")

    @property
    def tokenizer(self) -> Any:
        raise AssertionError("what __init__ would have set is missing")


INPUT_PROCESSOR_REGISTRY = SimpleNamespace(
    _input_processors_cls_by_model_type={VilaModel: VilaInputProcessor}
)


class _TextProcessor:
    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, inputs: Any, sampling_params: Any) -> Any:
        raise AssertionError("the adapter hands over ids, no text")


class Runtime:
    """One LLM object, with a worker thread."""

    def __init__(
        self, llm: Any, generation: str, arguments: dict[str, Any], keywords: dict[str, Any]
    ) -> None:
        from tensorrt_llm.llmapi import llm_args

        kind = llm_args.TrtLlmArgs if generation == "engine" else llm_args.TorchLlmArgs
        for name in keywords:
            if name not in kind.model_fields:
                raise ValueError(f"LLM got invalid argument: {name}")
        self.generation, self.args = generation, kind(**{**arguments, **keywords})
        assert any(os.environ.get(n) for n in ("TRTLLM_NO_USAGE_STATS", "TELEMETRY_DISABLED")), (
            "it phones home"
        )
        assert self.args.kv_cache_config.enable_block_reuse is False, "images would be taken for one another"
        assert self.args.trust_remote_code is False
        if _fault_of(-1) == "start":
            raise RuntimeError("CUDA error: out of memory")
        folder = Path(self.args.model)
        self.built = None
        if generation == "engine" and self.args.build_config is not None:
            self._build(folder)
        else:
            self._open(folder, llm)
        self._queue: queue.Queue[Any] = queue.Queue()
        self._dead: Exception | None = None
        self._is_over = False
        self._number = 0
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        log.append(f"{'build' if self.built else 'open'} {generation}")

    def _build(self, folder: Path) -> None:
        limits = self.args.build_config
        assert (folder / "config.json").is_file()
        config = json.loads((folder / "config.json").read_text())
        assert config["architectures"][0] in ("LlamaForCausalLM", "Qwen2ForCausalLM")
        assert limits.max_prompt_embedding_table_size >= limits.max_batch_size, "no room for visual tokens"
        assert limits.max_input_len <= limits.max_seq_len
        self.built, self.limits = folder, limits.model_dump()

    def _open(self, folder: Path, llm: Any) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(self.args.tokenizer), trust_remote_code=False)
        if self.generation == "engine":
            self.limits = json.loads((folder / "limits.json").read_text())
            language_model = folder
            llm.input_processor = _TextProcessor(tokenizer)
        else:
            config = json.loads((folder / "config.json").read_text())
            assert config["architectures"] == ["LlavaLlamaModel"]
            assert config["model_type"] == "llava_llama"
            assert config["model_dtype"] in ("torch.bfloat16", "torch.float16")
            assert "resume_path" in config
            for part in ("llm", "vision_tower", "mm_projector"):
                assert Path(config[f"{part}_cfg"]["_name_or_path"]).name == part
                assert (folder / part / "config.json").is_file()
            self.limits = {}
            language_model = folder / "llm"
            maker = INPUT_PROCESSOR_REGISTRY._input_processors_cls_by_model_type[VilaModel]
            llm.input_processor = maker(
                str(folder), SimpleNamespace(**config), tokenizer, trust_remote_code=False
            )
            Path(os.environ["TLLM_AUTOTUNER_CACHE_PATH"]).parent.mkdir(parents=True, exist_ok=True)
            Path(os.environ["TLLM_AUTOTUNER_CACHE_PATH"]).write_text("{}")
        self.llm = llm
        self.model = AutoModelForCausalLM.from_pretrained(language_model, torch_dtype=torch.float32).eval()
        self.vocab_size = self.model.get_input_embeddings().num_embeddings

    # ---- the API's methods ----

    def save(self, arguments: dict[str, Any]) -> None:
        assert self.built is not None, "The engine is not built yet."
        target = Path(arguments["engine_dir"])
        shutil.copytree(self.built, target, dirs_exist_ok=True)
        (target / "rank0.engine").write_bytes(b"engine")
        (target / "limits.json").write_text(json.dumps(self.limits, default=str))
        log.append(f"save {self.args.quant_config.quant_algo.value if self.args.quant_config else 'none'}")

    def generate_async(self, arguments: dict[str, Any]) -> Any:
        from tensorrt_llm.llmapi.result import RequestOutput

        if self._dead is not None:
            raise self._dead
        if self._is_over:
            raise RuntimeError("LLM is shutting down")
        sampling = arguments["sampling_params"]
        ids, embeddings = self._preprocess(arguments["inputs"], sampling)
        most = self.args.max_seq_len or self.limits.get("max_seq_len")
        if len(ids) + sampling.max_tokens > most:
            raise ValueError(
                f"The sum of prompt length ({len(ids)}) and max_tokens exceeds max_seq_len ({most})"
            )
        assert len(ids) <= self.args.max_num_tokens
        self._check_visual(ids, embeddings)
        call = _Call(self._number)
        self._number += 1
        output = RequestOutput(call)
        output.request_id, output.prompt, output.context_logits = call.number, None, None
        output.prompt_token_ids = ids
        self._queue.put((call, output, ids, embeddings, sampling))
        return output

    def shutdown(self, arguments: dict[str, Any]) -> None:
        self._is_over = True
        self._queue.put(None)
        log.append("shutdown")

    def _preprocess(self, inputs: Any, sampling: Any) -> tuple[list[int], Any]:
        if not isinstance(inputs, dict):
            from tensorrt_llm.llmapi.llm import PreprocessedInputs

            assert isinstance(inputs, PreprocessedInputs)
            params = inputs.multimodal_params
            assert params.is_handle, "tensors do not travel to the worker without a handle"
            log.append("preprocessed")
            return inputs.prompt_token_ids, params.multimodal_data["multimodal_embedding"]
        assert set(inputs) <= {
            "prompt",
            "prompt_token_ids",
            "multi_modal_data",
            "multi_modal_embeddings",
            "query",
        }
        if "multi_modal_embeddings" not in inputs:
            return inputs["prompt_token_ids"], None
        assert "prompt" in inputs, "older versions turn ids back into text"
        given = inputs["multi_modal_embeddings"]
        ids, extra = self.llm.input_processor.attach_multimodal_embeddings(inputs, given, sampling)
        log.append("attached")
        return ids, extra["multimodal_data"]["multimodal_embedding"]

    def _check_visual(self, ids: list[int], embeddings: Any) -> None:
        assert all(isinstance(token, int) and token >= 0 for token in ids)
        visual = [token for token in ids if token >= self.vocab_size]
        if embeddings is None:
            assert not visual
            return
        assert embeddings.shape == (len(visual), self.model.config.hidden_size)
        assert visual == list(range(visual[0], visual[0] + len(visual)))
        if self.generation == "engine":  # a row of the prompt table each, counted from the vocabulary
            assert visual[0] == self.vocab_size
            assert (
                len(visual) * self.limits["max_batch_size"] <= self.limits["max_prompt_embedding_table_size"]
            )

    # ---- the worker ----

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            call, output, ids, embeddings, sampling = item
            fault = _fault_of(call.number)
            if fault == "hang":
                continue
            if fault == "die":
                self._dead = RuntimeError("MPI worker exited with signal 9")
                call.future.set_exception(self._dead)
                continue
            if self._dead is not None:
                call.future.set_exception(self._dead)
                continue
            if fault == "request_error":
                call.future.set_exception(RequestError("the request failed: bad logits"))
                continue
            try:
                tokens, reason = self._generate(ids, embeddings, sampling)
            except Exception as error:
                call.future.set_exception(error)
                continue
            self._finish(call, output, tokens, fault if fault in ("cancelled", "timeout") else reason, fault)

    def _finish(self, call: "_Call", output: Any, tokens: list[int], reason: str, fault: str) -> None:
        from tensorrt_llm.llmapi.result import CompletionOutput

        output.outputs = (
            []
            if fault == "empty"
            else [CompletionOutput(index=0, text="", token_ids=tokens, finish_reason=reason)]
        )
        output.finished = True
        if not call.future.done():
            call.future.set_result(output)

    @torch.inference_mode()
    def _generate(self, ids: list[int], embeddings: Any, sampling: Any) -> tuple[list[int], str]:
        tokens = torch.tensor(ids)
        embedded = self.model.get_input_embeddings()(tokens.clamp(max=self.vocab_size - 1))
        if embeddings is not None:
            embedded[tokens >= self.vocab_size] = embeddings.float()
        greedy = sampling.top_k in (None, 1) and sampling.top_p in (None, 0.0)
        chance = torch.Generator().manual_seed((sampling.seed or 0) % 2**63)
        stops = set(sampling.stop_token_ids or ()) | ({sampling.end_id} if not sampling.ignore_eos else set())
        output: list[int] = []
        out = self.model(inputs_embeds=embedded[None], use_cache=True)
        while len(output) < sampling.max_tokens:
            logits = out.logits[0, -1].clone()
            if len(output) < (sampling.min_tokens or 0):
                logits[list(stops)] = float("-inf")
            if greedy:
                token = int(logits.argmax())
            else:
                token = int(
                    torch.multinomial(
                        (logits / (sampling.temperature or 1.0)).softmax(-1), 1, generator=chance
                    )
                )
            output.append(token)
            if token in stops:
                return output, "stop"
            out = self.model(
                input_ids=torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True
            )
        return output, "length"


class _Call:
    """The future behind a RequestOutput."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.future: Future[Any] = Future()
        self._aborted = False

    def result(self, output: Any, timeout: float | None) -> Any:
        return self.future.result(timeout)

    async def aresult(self, output: Any) -> Any:
        return await asyncio.wrap_future(self.future)

    def abort(self, output: Any) -> None:
        self._aborted = True
        log.append(f"abort {self.number}")

    def aborted(self, output: Any) -> bool:
        return self._aborted
