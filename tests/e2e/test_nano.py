"""The model that ships: there, small, described, and better than chance at what its card says."""

import json
import shutil
from pathlib import Path

import pytest

from tests.e2e.harness import vila2_fast
from vila2.evaluate import evaluate
from vila2.model.checkpoint import inspect_checkpoint
from vila2.model.shipped import SHIPPED, checkpoint_path

SCENES = Path(__file__).resolve().parents[2] / "examples" / "scenes"


def test_the_weights_that_ship_are_small_and_whole() -> None:
    folders = [checkpoint_path(name) for name in SHIPPED]
    size = sum(file.stat().st_size for folder in folders for file in folder.rglob("*.safetensors"))
    assert 0 < size <= 25e6
    for name in SHIPPED:
        info = inspect_checkpoint(name)
        assert 5e6 < info.num_parameters < 12e6
        assert set(info.dtypes) == {"BF16"}


def test_recaption_without_a_model_uses_nano_and_says_so(tmp_path: Path) -> None:
    source = tmp_path / "scenes"
    source.mkdir()
    for file in sorted(SCENES.glob("heldout-*"))[:4]:
        shutil.copy(file, source)
    done = vila2_fast(tmp_path, "recaption", source, "--out", tmp_path / "out", "--threads", "1")
    assert done.code == 0, done.stderr
    assert "nano" in done.stderr
    assert "photographs" in done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["captions"] == 2


@pytest.mark.parametrize("style", ["fluent", "second"])
def test_a_few_scenes_score_as_the_card_says(style: str) -> None:
    recorded = json.loads((checkpoint_path("nano") / "figures.json").read_text())[style]
    found = evaluate("nano", ["captions"], split="heldout", style=style, scenes=24, objects=(1, 4), threads=1)
    assert found.settings["objects"] == recorded["settings"]["objects"]
    f1 = recorded["metrics"]["objects.f1"]["value"]
    assert abs(found.metrics["objects.f1"].value - f1) < 0.15  # three standard errors of so few scenes
