"""The stand-in tensorrt_llm in this process, one installation after the other."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.checkpoints import write_nvila, write_vila15
from tests.trtllm_standin import runtime
from tests.trtllm_standin.generate import FLAVOURS, write_package


@pytest.fixture(scope="session")
def standins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Version -> the folder that its package lies in."""
    found = {}
    for name, flavour in FLAVOURS.items():
        found[name] = tmp_path_factory.mktemp("standin") / name
        write_package(found[name], flavour)
    return found


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    bf16 = torch.bfloat16  # what an engine holds, so that float32 sums over it are the reference
    return {
        "vila15": write_vila15(folder / "vila15", dtype=bf16),
        "nvila": write_nvila(folder / "nvila", dtype=bf16),
    }


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "vila2-fast"


@pytest.fixture(params=list(FLAVOURS))
def version(
    request: pytest.FixtureRequest, standins: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """A version of the stand-in, installed."""
    yield from install(request.param, standins, monkeypatch)


@pytest.fixture
def newest(standins: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    yield from install("1.3.0rc25", standins, monkeypatch)


def install(version: str, standins: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("TRTLLM_NO_USAGE_STATS", "TELEMETRY_DISABLED", "DO_NOT_TRACK"):
        monkeypatch.setenv(name, "")  # the adapter sets them; afterwards they are as before
    monkeypatch.syspath_prepend(standins[version])
    monkeypatch.setattr(runtime, "faults", None)
    monkeypatch.setattr(runtime, "log", [])
    _forget()
    yield version
    _forget()


def _forget() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorrt_llm"]:
        del sys.modules[name]
