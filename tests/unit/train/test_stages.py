"""Schedules, the number of steps, and what learns."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import write_vila15
from vila2.config import make_settings
from vila2.errors import UsageError
from vila2.model.checkpoint import load_checkpoint
from vila2.model.vlm import VisionLanguageModel
from vila2.train.recipe import StageSettings
from vila2.train.sources import open_mixture
from vila2.train.stages import lr_scale, num_steps, param_groups, part_of, prepare_model, trainable


def stage(**values: Any) -> StageSettings:
    given = {"name": "a", "train": "projector", "lr": 1e-3, "data": [{"kind": "world", "texts": "alt"}]}
    given |= {} if "epochs" in values else {"steps": 10}
    return make_settings(StageSettings, given | values)


@pytest.fixture
def model(tmp_path: Path) -> VisionLanguageModel:
    return load_checkpoint(write_vila15(tmp_path / "model"), dtype=torch.float32).model


def scales(steps: int, **values: Any) -> list[float]:
    settings = stage(steps=steps, **values)
    return [lr_scale(settings, step, steps) for step in range(steps)]


def test_cosine_rises_then_falls_to_its_end() -> None:
    found = scales(100, schedule="cosine", warmup=0.1, min_lr=0.1)
    assert found[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert found[10] == 1.0
    assert found[55] == pytest.approx(0.55)  # half-way between 1 and 0.1
    assert found[99] == pytest.approx(0.1, abs=1e-3)
    assert all(later <= earlier for earlier, later in pairwise(found[9:]))


def test_warmup_in_steps() -> None:
    assert scales(20, schedule="constant", warmup=4)[:6] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_falls_evenly() -> None:
    assert scales(4, schedule="linear", warmup=0) == [1.0, 0.75, 0.5, 0.25]


def test_wsd_stays_then_falls() -> None:
    found = scales(10, schedule="wsd", warmup=0, decay=0.5)
    assert found == pytest.approx([1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_epochs_are_of_all_sources_together() -> None:
    data = [
        {"kind": "world", "texts": "alt", "scenes": n, "split": s} for n, s in ((10, "dev"), (15, "pretrain"))
    ]
    settings = stage(epochs=2.0, batch_examples=8, data=data)
    assert num_steps(settings, open_mixture(settings.data)) == 7  # 50 examples


def test_epochs_of_endless_data_are_refused() -> None:
    settings = stage(epochs=1.0)
    with pytest.raises(UsageError, match="endless data"):
        num_steps(settings, open_mixture(settings.data))


def test_only_the_parts_of_the_stage_learn(model: VisionLanguageModel) -> None:
    prepare_model(model, stage(train=["projector", "decoder"]))
    assert {part_of(name) for name, _ in trainable(model)} == {"projector", "decoder"}
    prepare_model(model, stage(train=["vision"]))
    assert {part_of(name) for name, _ in trainable(model)} == {"vision"}


def test_groups_carry_the_settings_of_their_part(model: VisionLanguageModel) -> None:
    settings = stage(
        train=["projector", "decoder"],
        lr={"projector": 1e-3, "decoder": 1e-5},
        optimizer={"decoder": "muon"},
        weight_decay={"decoder": 0.1},
    )
    prepare_model(model, settings)
    projector, decoder = param_groups(model, settings)
    assert (projector.name, projector.lr, projector.optimizer, projector.weight_decay) == (
        "projector", 1e-3, "adamw", 0.0,
    )  # fmt: skip
    assert (decoder.name, decoder.lr, decoder.optimizer, decoder.weight_decay) == (
        "decoder", 1e-5, "muon", 0.1,
    )  # fmt: skip
    assert len(projector.named_parameters) + len(decoder.named_parameters) == len(list(trainable(model)))
