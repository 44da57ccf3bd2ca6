"""What the installed tensorrt_llm offers, found by looking at it and not at its version number.

Two generations: with the TensorRT engine path (to 1.3.0rc20) a checkpoint is compiled into engines; without it, the
PyTorch backend loads a checkpoint folder. Visual embeddings are handed over as `PreprocessedInputs` where there is
such a class, else through an input processor of ours.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, Literal

from vila2.config import nearest
from vila2.errors import UsageError

Generation = Literal["engine", "pytorch"]
# It reports its use to its maker unless one of these is set; a batch job shall not.
_NO_TELEMETRY = ("TRTLLM_NO_USAGE_STATS", "TELEMETRY_DISABLED", "DO_NOT_TRACK")
_TORCH_LLM, _ENGINE_LLM = "tensorrt_llm", "tensorrt_llm._tensorrt_engine"


@dataclass(frozen=True, slots=True)
class Api:
    """The classes and names of one installation. `accepted` are the keywords that its LLM takes."""

    generation: Generation
    versions: Mapping[str, str]
    llm: Any
    accepted: frozenset[str]
    preprocessed_inputs: Any  # None: hand embeddings over through the input processor
    multimodal_params: Any

    def config(self, name: str, **values: Any) -> Any:
        """An object of the class `name` (KvCacheConfig, BuildConfig, ...), or UsageError with what it accepts."""
        home = next(
            (
                module
                for module in ("tensorrt_llm.llmapi", "tensorrt_llm")
                if hasattr(import_module(module), name)
            ),
            None,
        )
        if home is None:
            raise UsageError(f"this tensorrt_llm ({self.versions['tensorrt_llm']}) has no {name}")
        return getattr(import_module(home), name)(**values)

    def keywords(self, wanted: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
        """What to call LLM with: ours as far as this version knows them, then the user's, which it must know."""
        check_options(options, self.accepted)
        known = {name: value for name, value in wanted.items() if name in self.accepted}
        return {**known, **options}


def silence_telemetry() -> None:
    """Before the package is imported, here and in the processes that it starts."""
    for name in _NO_TELEMETRY:
        os.environ[name] = "1"


def load_api() -> Api:
    """Import tensorrt_llm. UsageError where it is missing or cannot be loaded."""
    silence_telemetry()
    try:
        package = import_module("tensorrt_llm")
        api = import_module("tensorrt_llm.llmapi.llm")
        arguments = import_module("tensorrt_llm.llmapi.llm_args")
        multimodal = import_module("tensorrt_llm.inputs.multimodal")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "tensorrt_llm":
            raise UsageError(f"tensorrt_llm cannot be loaded: it lacks {error.name}") from None
        raise UsageError(
            "--backend trtllm needs the package tensorrt_llm, on a machine with an NVIDIA GPU: "
            "pip install tensorrt_llm, or use --backend native"
        ) from None
    except (ImportError, OSError, RuntimeError) as error:
        raise UsageError(f"tensorrt_llm cannot be loaded here: {_line(error)}") from None
    generation: Generation = "engine" if _has(_ENGINE_LLM) and hasattr(package, "BuildConfig") else "pytorch"
    home = import_module(_ENGINE_LLM if generation == "engine" else _TORCH_LLM)
    settings = arguments.TrtLlmArgs if generation == "engine" else arguments.TorchLlmArgs
    return Api(
        generation=generation,
        versions=_versions(package),
        llm=home.LLM,
        accepted=frozenset(settings.model_fields),
        preprocessed_inputs=getattr(api, "PreprocessedInputs", None),
        multimodal_params=multimodal.MultimodalParams,
    )


def parse_options(texts: Iterable[str]) -> dict[str, Any]:
    """`name=value` settings for LLM; a value is JSON, or else a plain word. UsageError."""
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise UsageError(f"engine option {text!r}: expected NAME=VALUE")
        try:
            options[name.strip()] = json.loads(value)
        except ValueError:
            options[name.strip()] = value
    return options


def check_options(options: Mapping[str, Any], accepted: frozenset[str]) -> None:
    """Refuse a setting that this version of LLM would refuse, and those that this backend decides. UsageError."""
    for name in options:
        if name not in accepted:
            raise UsageError(
                f"this tensorrt_llm has no setting {name!r}{nearest(name, sorted(accepted))}; "
                f"it accepts: {', '.join(sorted(accepted - _OURS))}"
            )
        if name in _OURS:
            raise UsageError(f"the setting {name!r} of tensorrt_llm is vila2-fast's own to choose")


# What the adapter's correctness hangs on, above all no block reuse: the placeholder ids of two images are the same.
_OURS = frozenset(
    {
        "model",
        "tokenizer",
        "skip_tokenizer_init",
        "kv_cache_config",
        "trust_remote_code",
        "telemetry_config",
        "backend",
    }
    | {"build_config", "quant_config", "calib_config", "enable_build_cache", "max_beam_width"}
)


def _has(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _versions(package: Any) -> dict[str, str]:
    import torch

    found = {"tensorrt_llm": str(getattr(package, "__version__", "unknown"))}
    try:
        found["tensorrt"] = version("tensorrt")
    except PackageNotFoundError:
        found["tensorrt"] = "none"
    return {**found, "torch": torch.__version__, "cuda": str(torch.version.cuda)}


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
