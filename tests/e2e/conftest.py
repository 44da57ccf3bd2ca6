"""Tiny random checkpoints, written once a session: their captions are gibberish, and exactly repeatable."""

from pathlib import Path

import pytest

from tests.checkpoints import write_llava, write_nvila, write_vila15


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        "vila15": write_vila15(folder / "vila15"),
        "nvila": write_nvila(folder / "nvila"),
        "llava": write_llava(folder / "llava"),
    }


@pytest.fixture(scope="session")
def vila15(checkpoints: dict[str, Path]) -> Path:
    return checkpoints["vila15"]
