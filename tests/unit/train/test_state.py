"""States on disk: whole at any moment, read back bit for bit, and the random states with them."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vila2.data import files
from vila2.errors import OutputError
from vila2.train.sharding import Processes
from vila2.train.state import (
    Joined,
    load_state,
    remove_unfinished,
    restore_rng,
    save_state,
    saved_step,
)

ALONE = Processes(0, 1, torch.device("cpu"))


def tensors(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "model/w": torch.randn(5, 3, generator=generator).to(torch.bfloat16),
        "optimizer/w/exp_avg": torch.randn(5, 3, generator=generator),
    }


def save(folder: Path, step: int, **values: Any) -> None:
    save_state(folder, step, tensors(step), values, ALONE)


def assert_holds(folder: Path, step: int) -> None:
    saved = load_state(folder)
    assert saved is not None
    assert saved.step == step
    with saved.tensors as found:
        for name, tensor in tensors(step).items():
            assert torch.equal(found[name], tensor)
            assert found[name].dtype == tensor.dtype


def test_round_trip(tmp_path: Path) -> None:
    assert load_state(tmp_path / "none") is None
    save(tmp_path / "state", 3, position={"step": 3}, recent=[0.1, 1e-30])
    assert_holds(tmp_path / "state", 3)
    saved = load_state(tmp_path / "state")
    assert saved is not None
    assert saved.values == {"position": {"step": 3}, "recent": [0.1, 1e-30]}


def test_a_new_state_takes_the_place_of_the_old(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert_holds(tmp_path, 3)
    assert len(list(tmp_path.glob("step-*"))) == 1


def test_a_failed_write_leaves_the_old_state_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error at every single file operation of a save, one after another."""
    for number in range(1, 100):
        folder = tmp_path / str(number)
        save(folder, 1)
        monkeypatch.setattr(files, "_fault", files._Fault(f"eio:{number}"))
        try:
            save(folder, 2)
        except OutputError:
            pass
        else:
            assert_holds(folder, 2)
            assert number > 5
            return
        finally:
            monkeypatch.setattr(files, "_fault", files._Fault(""))
        step = saved_step(folder)
        assert step in (1, 2)
        remove_unfinished(folder)
        assert_holds(folder, step)
        assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".safetensors"]


def test_random_states_go_on(tmp_path: Path) -> None:
    random.seed(1)
    np.random.seed(2)  # noqa: NPY002
    torch.manual_seed(3)
    save(tmp_path, 1)

    def draw() -> tuple[float, float, Tensor]:
        return random.random(), float(np.random.random()), torch.rand(3)  # noqa: NPY002

    first = draw()
    draw()
    saved = load_state(tmp_path)
    assert saved is not None
    restore_rng(tmp_path, saved, rank=0)
    again = draw()
    assert first[:2] == again[:2]
    assert torch.equal(first[2], again[2])
    restore_rng(tmp_path, saved, rank=5)  # a rank that did not exist keeps its own


def test_shards_of_several_processes_are_read_whole(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    whole = torch.arange(15.0).reshape(5, 3)
    save(tmp_path, 1)
    names = []
    for rank, rows in enumerate((slice(0, 2), slice(2, 4), slice(4, 5))):
        names.append(f"step-00000009-rank-{rank:05d}.safetensors")
        save_file({"model/w": whole[rows].clone()}, tmp_path / names[-1], metadata={"rng": "{}"})
    content = (tmp_path / "state.json").read_text()
    (tmp_path / "state.json").write_text(
        content.replace('"step-00000001-rank-00000.safetensors"', ", ".join(f'"{name}"' for name in names))
    )
    saved = load_state(tmp_path)
    assert saved is not None
    with saved.tensors as found:
        assert torch.equal(found["model/w"], whole)


@pytest.mark.parametrize("damage", ["cut", "gone", "json", "format"])
def test_damage_is_told_and_not_guessed_at(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 1)
    (weights,) = tmp_path.glob("*.safetensors")
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:100])
    elif damage == "gone":
        weights.unlink()
    else:
        (tmp_path / "state.json").write_text("{" if damage == "json" else '{"format": 99}')
    with pytest.raises(OutputError, match="remove"):
        load_state(tmp_path)


def test_numbers_and_tensors_joined(tmp_path: Path) -> None:
    save(tmp_path, 1)
    saved = load_state(tmp_path)
    assert saved is not None
    with saved.tensors as found:
        joined = Joined(found, "optimizer/", {"w/steps": 4})
        assert set(joined) == {"w/steps", "w/exp_avg"}
        assert len(joined) == 2
        assert joined["w/steps"] == 4
        assert torch.equal(joined["w/exp_avg"], tensors(1)["optimizer/w/exp_avg"])
