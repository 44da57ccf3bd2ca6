"""fp8 and int4: calibrated on whole prompts by ModelOpt (a stand-in here), or asked of the engine builder."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.trtllm_standin import runtime
from vila2.backends import open_captioner
from vila2.backends.trtllm_build import build
from vila2.backends.trtllm_quantize import QUANT_FILE, Calibration, scenes
from vila2.config import RecaptionSettings
from vila2.errors import CheckpointError, UsageError
from vila2.types import CaptionRequest, SamplingParams

IMAGES = [np.random.default_rng(n).integers(0, 255, (50, 40, 3), dtype=np.uint8) for n in range(3)]
CALIBRATION = Calibration("three images", IMAGES)


class ModelOpt:
    """What the adapter calls of it, and what it was called with."""

    def __init__(self) -> None:
        self.recipes: list[str] = []
        self.shapes: list[tuple[int, ...]] = []
        self.writes_config = True

    def quantize(self, model: Any, config: str, forward_loop: Any) -> Any:
        self.recipes.append(config)
        forward = model.forward

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.shapes.append(tuple(kwargs["inputs_embeds"].shape))
            return forward(*args, **kwargs)

        model.forward = counted
        forward_loop(model)
        model.forward = forward
        return model

    def export_hf_checkpoint(self, model: Any, export_dir: str) -> None:
        folder = Path(export_dir)
        assert not list(folder.glob("*.safetensors")), "the old weights are still there"
        model.save_pretrained(folder)
        if self.writes_config:
            (folder / QUANT_FILE).write_text(json.dumps({"quantization": {"quant_algo": self.recipes[-1]}}))


@pytest.fixture
def modelopt(monkeypatch: pytest.MonkeyPatch) -> ModelOpt:
    fake = ModelOpt()
    names = ("modelopt", "modelopt.torch", "modelopt.torch.quantization", "modelopt.torch.export")
    modules = {name: ModuleType(name) for name in names}
    modules["modelopt"].torch = modules["modelopt.torch"]  # type: ignore[attr-defined]
    modules["modelopt.torch"].quantization = modules[names[2]]  # type: ignore[attr-defined]
    for name in ("FP8_DEFAULT_CFG", "INT4_AWQ_CFG"):
        setattr(modules[names[2]], name, name)
    modules[names[2]].quantize = fake.quantize  # type: ignore[attr-defined]
    modules[names[3]].export_hf_checkpoint = fake.export_hf_checkpoint  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return fake


@pytest.mark.parametrize(("precision", "recipe"), [("fp8", "FP8_DEFAULT_CFG"), ("int4", "INT4_AWQ_CFG")])
def test_a_quantised_checkpoint(
    newest: str, modelopt: ModelOpt, models: dict[str, Path], precision: str, recipe: str
) -> None:
    engine = build(models["vila15"], precision=precision, max_batch=2, calibration=CALIBRATION)
    assert modelopt.recipes == [recipe]
    assert len(modelopt.shapes) == 3
    assert {shape[0] for shape in modelopt.shapes} == {1}
    assert min(shape[1] for shape in modelopt.shapes) > 9  # visual tokens and text
    for folder in ("model", "model/llm"):
        assert (
            json.loads((engine.path / folder / QUANT_FILE).read_text())["quantization"]["quant_algo"]
            == recipe
        )
    settings = RecaptionSettings(source="s", out="o", backend="trtllm", engine=str(engine.path))
    assert settings.deciding()["precision"] == precision
    captioner = open_captioner(settings)
    request = CaptionRequest(0, "x", (captioner.prepare(IMAGES[0]),), SamplingParams(max_new_tokens=4))
    [caption] = list(captioner.caption([request]))
    captioner.close()
    assert caption.error is None
    other = Calibration("others", IMAGES[:1])
    assert build(models["vila15"], precision=precision, max_batch=2, calibration=other).path != engine.path


def test_the_engine_builder_is_told_the_algorithm(
    standins: dict[str, Path], cache: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.unit.backends.conftest import install

    for _ in install("1.2.1", standins, monkeypatch):
        build(models["vila15"], precision="fp8", max_batch=2)
        build(models["vila15"], precision="int4", max_batch=2)
        build(models["vila15"], max_batch=2)
        assert [line for line in runtime.log if line.startswith("save")] == [
            "save FP8", "save W4A16_AWQ", "save none",
        ]  # fmt: skip


def test_what_quantisation_needs(
    newest: str, models: dict[str, Path], cache: Path, modelopt: ModelOpt
) -> None:
    modelopt.writes_config = False
    with pytest.raises(CheckpointError, match=r"ModelOpt wrote no hf_quant_config.json"):
        build(models["vila15"], precision="fp8", max_batch=2, calibration=CALIBRATION)
    with pytest.raises(UsageError, match="precision 'int8' is not one of: bf16, fp8, int4"):
        build(models["vila15"], precision="int8")
    assert not list((cache / "engines").iterdir())


def test_without_modelopt(newest: str, models: dict[str, Path], cache: Path) -> None:
    with pytest.raises(UsageError, match="--precision fp8 needs NVIDIA's ModelOpt"):
        build(models["vila15"], precision="fp8", max_batch=2, calibration=CALIBRATION)
    assert not list((cache / "engines").iterdir())


def test_scenes_are_the_same_everywhere() -> None:
    assert scenes(2).digest == scenes(2).digest != scenes(1).digest
