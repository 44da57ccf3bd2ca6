"""One tiny checkpoint, and one server around it for the tests that leave it as it was."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import write_llava
from tests.unit.serve.kits import SlowCaptioner, open_tiny, serving
from vila2.serve.server import Server


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def captioner(checkpoint: Path) -> SlowCaptioner:
    return open_tiny(checkpoint)


@pytest.fixture(scope="module")
def server(captioner: SlowCaptioner) -> Iterator[Server]:
    with serving(captioner) as running:
        yield running
