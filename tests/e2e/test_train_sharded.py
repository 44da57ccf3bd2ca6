"""Two processes of torchrun with FSDP2 (gloo, on the CPU) against one: the same losses, states and checkpoints.

Sums over two halves round differently from sums over a whole, so losses agree to 1e-5 and not bit for bit; one run
in two processes and its continuation after a stop do agree bit for bit.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.harness import Done, start, vila2_fast

TOLERANCE = 1e-5
# Scenes and text without images in one mixture: at some step a process has no image, or no example at all.
RECIPE = """
base = "{base}"
measure_ceiling = false
precision = "float32"
[[stage]]
name = "sft"
train = ["vision", "projector", "decoder"]
steps = 4
batch_examples = 3
max_tokens = 512
lr = 1e-3
optimizer = {{decoder = "muon"}}
weight_decay = 0.01
[[stage.data]]
kind = "world"
texts = "brief"
image_size = 70
[[stage.data]]
kind = "world"
texts = "instruction"
"""


def torchrun(*arguments: str | Path) -> None:
    """The real launcher: it imports torch in three processes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "VILA2_TRACEBACK": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "vila2.cli", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def two_processes(folder: Path, *arguments: str | Path) -> list[Done]:
    """What torchrun starts, without its imports."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        start(folder, *arguments, environment={"RANK": rank, "LOCAL_RANK": rank, **common})
        for rank in ("0", "1")
    ]
    return [process.wait() for process in started]


def losses(out: Path) -> list[tuple[float, float]]:
    lines = (out / "01-sft" / "log.jsonl").read_text().splitlines()
    return [(line["loss"], line["grad_norm"]) for line in map(json.loads, lines)]


def weights(out: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted((out / "01-sft" / "checkpoint").rglob("*.safetensors")):
        found |= load_file(file)
    return found


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, vila15: Path) -> Path:
    path = tmp_path_factory.mktemp("sharded") / "recipe.toml"
    path.write_text(RECIPE.format(base=vila15))
    return path


@pytest.fixture(scope="module")
def alone(recipe: Path) -> Path:
    out = recipe.parent / "alone"
    done = vila2_fast(recipe.parent, "train", recipe, "--out", out, "--threads", "1")
    assert done.code == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def halfway(recipe: Path) -> Path:
    """The run folder of two processes that stopped after two of four steps."""
    out = recipe.parent / "two"
    for done in two_processes(
        recipe.parent, "train", recipe, "--out", out, "--threads", "1", "--until", "sft:2"
    ):
        assert done.code == 0, done.stderr
    return out


@pytest.mark.slow
def test_two_processes_learn_what_one_does(alone: Path, halfway: Path, recipe: Path) -> None:
    state = halfway / "01-sft" / "state"
    assert len(list(state.glob("*.safetensors"))) == 2  # each its own shards
    out = recipe.parent / "two-to-the-end"
    shutil.copytree(halfway, out)
    torchrun("train", recipe, "--out", out, "--threads", "1")
    assert losses(out)[:2] == losses(halfway)
    torch.testing.assert_close(
        torch.tensor(losses(out)), torch.tensor(losses(alone)), rtol=TOLERANCE, atol=TOLERANCE
    )
    expected, found = weights(alone), weights(out)
    assert found.keys() == expected.keys()
    # A hidden matrix steps by its momentum's directions, also by those that are almost noise.
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_one_process_goes_on_where_two_stopped(alone: Path, halfway: Path, recipe: Path) -> None:
    out = recipe.parent / "one-after-two"
    shutil.copytree(halfway, out)
    done = vila2_fast(recipe.parent, "train", recipe, "--out", out, "--threads", "1")
    assert done.code == 0, done.stderr
    torch.testing.assert_close(
        torch.tensor(losses(out)), torch.tensor(losses(alone)), rtol=TOLERANCE, atol=TOLERANCE
    )


@pytest.mark.slow
def test_two_processes_train_the_adapters_of_one(recipe: Path, tmp_path: Path) -> None:
    sets = ("--set", "stage.sft.lora={rank=4}", "--set", "stage.sft.optimizer=adamw", "--threads", "1")
    for done in two_processes(tmp_path, "train", recipe, "--out", tmp_path / "two", *sets):
        assert done.code == 0, done.stderr
    done = vila2_fast(tmp_path, "train", recipe, "--out", tmp_path / "one", *sets)
    assert done.code == 0, done.stderr
    one, two = (torch.tensor(losses(tmp_path / name)) for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=TOLERANCE, atol=TOLERANCE)
    for name, tensor in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_processes_speak_with_one_voice(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first, second = two_processes(tmp_path, "train", recipe, "--out", out, "--threads", "1", "--dry-run")
    assert (first.code, second.code) == (0, 0), first.stderr + second.stderr
    assert "sft: 4 steps of 3 examples" in first.stdout
    assert second.stdout == ""
    assert not out.exists()
    refused = two_processes(tmp_path, "train", recipe, "--out", out, "--set", "stage.sft.stesp=4")
    for number, done in enumerate(refused):
        assert done.code == 2
        assert done.stderr.startswith(f"error: process {number} of 2: ")
        assert done.stderr.count("\n") == 1
