"""Calls into tensorrt_llm: its LLM opened or built, its sampling, and prompts with visual embeddings in both forms."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

from torch import Tensor

from vila2.backends.trtllm_api import Api
from vila2.backends.trtllm_engine import EngineSpec
from vila2.errors import VilaError
from vila2.types import SamplingParams

MEMORY_FRACTION = 0.85  # of the GPU's free memory, for its KV cache: our vision stage lives beside it
_QUANT = {"fp8": "FP8", "int4": "W4A16_AWQ"}
_IDS = "vila2_token_ids"


def open_llm(api: Api, folder: Path, spec: EngineSpec) -> Any:
    """tensorrt_llm's LLM on an engine folder. VilaError when it does not start."""
    limits = spec.limits
    wanted: dict[str, Any] = {
        "tokenizer": str(folder / "tokenizer"),
        "trust_remote_code": False,
        "dtype": "bfloat16",
        # Image placeholders are the same ids for every image: reused blocks would show one image as another.
        "kv_cache_config": api.config(
            "KvCacheConfig", enable_block_reuse=False, free_gpu_memory_fraction=MEMORY_FRACTION
        ),
        "max_batch_size": limits["max_batch_size"],
        "max_num_tokens": limits["max_num_tokens"],
        "max_seq_len": limits["max_seq_len"],
        "max_input_len": limits["max_input_len"],
        "enable_chunked_prefill": False,
    }
    if api.generation == "pytorch":
        wanted["model"] = str(folder / "model")
        wanted["cuda_graph_config"] = api.config(
            "CudaGraphConfig", max_batch_size=limits["max_batch_size"], enable_padding=True
        )
    else:
        wanted["model"] = str(folder / "llm")
    with _replaced_processor(api):
        llm = _call("start", api.llm, api.keywords(wanted, spec.options))
    if api.preprocessed_inputs is None and not hasattr(llm.input_processor, "attach_multimodal_embeddings"):
        llm.input_processor = _EngineProcessor(llm.input_processor)
    return llm


def build_llm(api: Api, source: Path, target: Path, spec: EngineSpec) -> None:
    """Compile the language model in `source` (a transformers folder) into the TensorRT engine `target`."""
    limits = spec.limits
    build_config = api.config(
        "BuildConfig",
        max_batch_size=limits["max_batch_size"],
        max_input_len=limits["max_input_len"],
        max_seq_len=limits["max_seq_len"],
        max_num_tokens=limits["max_num_tokens"],
        max_prompt_embedding_table_size=limits["max_multimodal_len"],
    )
    wanted: dict[str, Any] = {
        "model": str(source),
        "tokenizer": str(source),
        "trust_remote_code": False,
        "dtype": "bfloat16",
        "build_config": build_config,
        "kv_cache_config": api.config("KvCacheConfig", enable_block_reuse=False),
    }
    if spec.precision in _QUANT:
        algorithm = getattr(_quant_algorithms(), _QUANT[spec.precision])
        wanted["quant_config"] = api.config("QuantConfig", quant_algo=algorithm)
    llm = _call("build", api.llm, api.keywords(wanted, spec.options))
    try:
        llm.save(str(target))
    finally:
        llm.shutdown()


def run_once(api: Api, llm: Any) -> None:
    """A short answer to a prompt of text."""
    from tensorrt_llm import SamplingParams as Sampling

    output = llm.generate_async(
        {"prompt_token_ids": [1, 2, 3, 4]}, sampling_params=Sampling(max_tokens=4, top_k=1)
    )
    output.result(600)


def make_sampling(sampling: SamplingParams, rng_key: int, room: int, eos_ids: Sequence[int]) -> Any:
    """The same sampling in tensorrt_llm's terms. `room` is what the engine has left after the prompt.

    Its `max_tokens` is 32 unless set. Without top_k and top_p it is greedy, whatever the temperature: a top_p of 1
    makes it sample. We read the tokens ourselves, so nothing is detokenised there and stop texts stay in.
    """
    from tensorrt_llm import SamplingParams as Sampling

    fields: dict[str, Any] = {
        "max_tokens": min(sampling.max_new_tokens, room),
        "end_id": eos_ids[0],
        "pad_id": eos_ids[0],
        "ignore_eos": sampling.ignore_eos,
        "detokenize": False,
        "add_special_tokens": False,
    }
    if len(eos_ids) > 1 and not sampling.ignore_eos:
        fields["stop_token_ids"] = list(eos_ids[1:])
    if sampling.stop:
        fields |= {"stop": list(sampling.stop), "include_stop_str_in_output": True}
    if sampling.min_new_tokens:
        fields["min_tokens"] = sampling.min_new_tokens
    if sampling.temperature > 0:
        fields |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": rng_key}
        if sampling.top_k:
            fields["top_k"] = sampling.top_k
    else:
        fields["top_k"] = 1
    return Sampling(**fields)


def make_inputs(api: Api, token_ids: list[int], embeddings: Tensor | None) -> Any:
    """A prompt of ids, those of visual tokens beyond the vocabulary, with their embeddings (visual tokens, hidden)."""
    if embeddings is None:
        return {"prompt_token_ids": token_ids}
    if api.preprocessed_inputs is not None:
        params = api.multimodal_params(multimodal_data={"multimodal_embedding": embeddings})
        params.to_handle("multimodal_data")
        return api.preprocessed_inputs(prompt_token_ids=token_ids, multimodal_params=params)
    # The text is not read: our input processor takes the ids as they are.
    return {"prompt": "<image>", "multi_modal_embeddings": {"image": [embeddings], _IDS: token_ids}}


class _Attach:
    """What an input processor needs so that embeddings of ours pass through it untouched."""

    def attach_multimodal_embeddings(
        self, inputs: Any, multimodal_embedding: Any, sampling_params: Any
    ) -> tuple[list[int], dict[str, Any]]:
        data = {"multimodal_embedding": multimodal_embedding["image"][0]}
        return multimodal_embedding[_IDS], {"multimodal_data": data}


class _EngineProcessor(_Attach):
    """The text processor of a TensorRT engine, which knows nothing of images, and ours."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.tokenizer = inner.tokenizer

    def __call__(self, inputs: Any, sampling_params: Any) -> Any:
        return self.inner(inputs, sampling_params)


@contextmanager
def _replaced_processor(api: Api) -> Iterator[None]:
    """While LLM is made, let VILA's input processor be one that loads no vision tower: it would fill GPU memory."""
    if api.generation == "engine":
        yield  # an engine folder is no VILA checkpoint: the plain text processor is made for it
        return
    from tensorrt_llm._torch.models.modeling_vila import VilaInputProcessor, VilaModel
    from tensorrt_llm.inputs.registry import INPUT_PROCESSOR_REGISTRY

    class TokensOnly(_Attach, VilaInputProcessor):  # type: ignore[misc]
        tokenizer: Any = None  # attributes here, properties in newer versions of the class above
        config: Any = None

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            given = signature(VilaInputProcessor.__init__).bind(self, *args, **kwargs).arguments
            self.tokenizer = self._tokenizer = given["tokenizer"]
            self.config = self._config = given.get("config", given.get("model_config"))
            self.model_config, self._model_path = self.config, given.get("model_path")
            self._multimodal_hashing_supported = False

    table = INPUT_PROCESSOR_REGISTRY._input_processors_cls_by_model_type
    before = table[VilaModel]
    table[VilaModel] = TokensOnly
    try:
        yield
    finally:
        table[VilaModel] = before


def _quant_algorithms() -> Any:
    from tensorrt_llm.llmapi import QuantAlgo

    return QuantAlgo


def _call(what: str, function: Any, keywords: dict[str, Any]) -> Any:
    try:
        return function(**keywords)
    except Exception as error:  # of CUDA, MPI, TensorRT, pydantic, ...
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        raise VilaError(f"TensorRT-LLM did not {what}: {reason}") from error
