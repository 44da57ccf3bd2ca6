"""What every test meets: one thread, no network, repeatable hypothesis, and markers that skip by capability.

A marked test skips, with its reason, where the machine lacks what it needs. `VILA2_REQUIRE=gpu,triton` turns
those skips into failures, so that a run on a GPU machine cannot be green without having tested the GPU.
"""

import os
import shutil
import subprocess
from collections.abc import Callable
from importlib.util import find_spec

import pytest
from hypothesis import settings

# Read by torch and by the tokenizers when they are imported, which no test module has done yet.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def missing_gpu() -> str | None:
    """Why there is no CUDA device, or None. Torch is imported only where a driver answers."""
    probe = shutil.which("nvidia-smi")
    if probe is None or subprocess.run([probe, "-L"], capture_output=True, check=False).returncode != 0:
        return "no NVIDIA driver answers"
    import torch

    return None if torch.cuda.is_available() else "this torch sees no CUDA device"


def missing_triton() -> str | None:
    return None if find_spec("triton") else "triton is not installed"


def missing_dali() -> str | None:
    found = find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
    return None if found else "nvidia.dali is not installed (make dali)"


PROBES: dict[str, Callable[[], str | None]] = {
    "gpu": missing_gpu,
    "triton": missing_triton,
    "dali": missing_dali,
}


def required_markers() -> set[str]:
    names = {name.strip() for name in os.environ.get("VILA2_REQUIRE", "").split(",")} - {""}
    unknown = names - PROBES.keys()
    if unknown:
        raise pytest.UsageError(f"VILA2_REQUIRE names {sorted(unknown)}; known are {sorted(PROBES)}")
    return names


def pytest_configure(config: pytest.Config) -> None:
    required_markers()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    required = required_markers()
    for name, probe in PROBES.items():
        marked = [item for item in items if item.get_closest_marker(name)]
        reason = probe() if marked else None
        if reason is None or name in required:
            continue
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_setup(item: pytest.Item) -> None:
    for name in required_markers():
        if item.get_closest_marker(name):
            reason = PROBES[name]()
            if reason:
                pytest.fail(f"VILA2_REQUIRE asks for {name}, but {reason}", pytrace=False)
