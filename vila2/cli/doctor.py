"""`vila2-fast doctor`: what this machine has and what would be used for what. Imports nothing heavy."""

import json
import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import rich_click as click

from vila2 import __version__


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> None:
    """Say what this machine has (CPU, memory, GPU, libraries) and what would be used for what."""
    report = examine()
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    for section, lines in report.items():
        click.echo(section)
        for name, value in lines.items():
            click.echo(f"  {name:<22} {_show(value)}")


def examine() -> dict[str, dict[str, Any]]:
    """The whole report, as sections of name -> value."""
    extension, gpus = _extension(), _gpus()
    machine = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": _cores(),
        "memory GiB": _memory_gib(),
        "gpu": gpus or None,
    }
    libraries = {
        "python": platform.python_version(),
        "vila2-fast": __version__,
        "vila2._C": extension["isa"] and f"built, runs {extension['isa']}",
        "torch": _version("torch"),
        "torch cuda": _torch_cuda(),
        "transformers": _version("transformers"),
        "triton": _version("triton"),
        "dali": _version_of_any("nvidia-dali-cuda130", "nvidia-dali-cuda120", module="nvidia.dali"),
        "tensorrt_llm": _version_of_any("tensorrt-llm", module="tensorrt_llm"),
    }
    return {"machine": machine, "cpu features": extension["features"], "libraries": libraries, "used for": _uses(
        extension, bool(gpus and libraries["torch cuda"])
    )}  # fmt: skip


def _takes_torch(extension: dict[str, Any]) -> bool:
    """`vila2.backends.compute.takes_torch_bf16`, without importing torch."""
    features = extension["features"]
    own = extension["isa"] == "avx512_bf16"
    return bool(features.get("amx_bf16") or (features.get("avx512_bf16") and not own))


def _uses(extension: dict[str, Any], has_gpu: bool) -> dict[str, str]:
    """What a `recaption` here would run on. Says only what this version does."""
    if has_gpu:
        model = "bf16 through torch on the GPU"
    elif extension["isa"] is None:
        model = "torch on the CPU: vila2._C is not built (pip install . builds it)"
    elif _takes_torch(extension):
        model = "bf16 products of this CPU through torch; --deterministic: vila2._C"
    else:
        model = f"bf16 weights with float32 sums through vila2._C ({extension['isa']})"
    decode = (
        "simplejpeg for JPEG, Pillow for the rest" if find_spec("simplejpeg") else "Pillow (no simplejpeg)"
    )
    return {
        "device": "cuda" if has_gpu else "cpu",
        "image decode": decode,
        "model": model,
        "--backend trtllm": _tensorrt_llm(),
        "--backend http": "any OpenAI-compatible server"
        if find_spec("httpx") and find_spec("aiohttp")
        else "needs httpx and aiohttp (extra http)",
        "serve": "ready" if not (lacking := _lacking_for_serve()) else f"needs {lacking} (extra serve)",
    }


def _lacking_for_serve() -> str:
    names = ("starlette", "uvicorn", "prometheus_client")
    return ", ".join(name for name in names if find_spec(name) is None)


def _tensorrt_llm() -> str:
    """What of that backend was ever run: it cannot be told from here whether it fits the package that is installed."""
    state = (
        "tensorrt_llm is not installed" if not _has_module("tensorrt_llm") else "tensorrt_llm is installed"
    )
    return (
        f"{state}; written from its public source and tested against a stand-in of both its generations, "
        "never yet run against the real package: bench/trtllm_check.py does the whole round here"
    )


def _extension() -> dict[str, Any]:
    """The compiled part: the instruction set it chose, and what the CPU offers."""
    try:
        from vila2 import _C
    except ImportError:
        return {"isa": None, "features": {}}
    try:
        return {"isa": _C.isa(), "features": dict(_C.cpu_features())}
    except RuntimeError as error:  # VILA2_CPU_ISA names a set that is not there
        return {"isa": None, "features": {"error": str(error)}}


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _version_of_any(*distributions: str, module: str) -> str | None:
    """The version of the first distribution that is installed; "present" if only its module is."""
    found = next((number for name in distributions if (number := _version(name))), None)
    if found is None and _has_module(module):
        return "present"
    return found


def _has_module(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is not there
        return False


def _torch_cuda() -> str | None:
    """The CUDA version that torch was built for, read from its version file: importing torch takes seconds."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text()
    except OSError:
        return None
    match = re.search(r"^cuda(?::[^=]*)? = '([^']+)'", text, re.MULTILINE)
    return match[1] if match else None


def _gpus() -> list[str]:
    """The GPUs that the driver names; none without a driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,memory.total,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [" ".join(line.split()) for line in answer.splitlines() if line.strip()]


def _cpu_name() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1] if match else platform.processor() or "unknown"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _show(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return "; ".join(str(item) for item in value)
    return str(value)
