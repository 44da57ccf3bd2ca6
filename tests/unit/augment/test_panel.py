"""Specialists asked together: the captions that each writes alone, from one encode an image."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.checkpoints import write_vila15
from vila2.augment.panel import open_panel
from vila2.config import RecaptionSettings
from vila2.data.verify import iter_rows
from vila2.errors import UsageError
from vila2.recaption.pipeline import run

NUM_IMAGES = 5


def change(checkpoint: Path, part: str, seed: int) -> Path:
    """Draw the weights of a part anew."""
    torch.manual_seed(seed)
    for file in (checkpoint / part).glob("*.safetensors"):
        weights = {name: tensor + 0.2 * torch.randn_like(tensor) for name, tensor in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
    return checkpoint


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("specialists")
    made = {
        "ocr": write_vila15(folder / "ocr"),
        "spatial": change(write_vila15(folder / "spatial"), "llm", 3),
    }
    return {name: str(path) for name, path in made.items()} | {"brief": str(made["ocr"])}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("images") / "a.tar"
    random = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for number in range(NUM_IMAGES):
            file = io.BytesIO()
            Image.fromarray(random.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(file, "PNG")
            entry = tarfile.TarInfo(f"k{number}.png")
            entry.size = len(file.getvalue())
            tar.addfile(entry, io.BytesIO(file.getvalue()))
    return str(path)


def settings(images: str, model: str, out: Path, *prompts: str) -> RecaptionSettings:
    return RecaptionSettings(
        source=images, model=model, out=str(out), prompt=prompts, max_new_tokens=6, deterministic=True,
        precision="float32", retry=(), threads=1,
    )  # fmt: skip


def captions(out: Path) -> dict[tuple[str, str], str]:
    return {(row["key"], row["prompt"]): row["caption"] for row in iter_rows(out)}


def test_together_they_write_what_each_writes_alone(
    tmp_path: Path, images: str, models: dict[str, str]
) -> None:
    together = settings(images, models["ocr"], tmp_path / "all", *models)
    summary = run(together, open_model=open_panel(models))
    alone: dict[tuple[str, str], str] = {}
    for prompt, model in models.items():
        run(settings(images, model, tmp_path / prompt, prompt))
        alone |= captions(tmp_path / prompt)
    assert captions(tmp_path / "all") == alone
    assert len(alone) == 3 * NUM_IMAGES
    assert len({alone["k0", "ocr"], alone["k0", "spatial"], alone["k0", "brief"]}) > 1
    assert summary.captioner["images_encoded"] == NUM_IMAGES
    assert summary.captioner["images_shared"] == NUM_IMAGES  # the second model's


def test_a_run_that_was_cut_asks_for_the_rest(tmp_path: Path, images: str, models: dict[str, str]) -> None:
    whole = settings(images, models["ocr"], tmp_path / "all", *models)
    run(whole.model_copy(update={"limit": 2}), open_model=open_panel(models))
    assert len(captions(tmp_path / "all")) == 6
    run(whole, open_model=open_panel(models))
    assert len(captions(tmp_path / "all")) == 3 * NUM_IMAGES


def test_a_projector_of_its_own_shares_the_tower(
    tmp_path: Path, images: str, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It writes what it writes alone, and no image passes the tower twice."""
    from vila2.model.vision import VisionTower

    other = str(change(change(write_vila15(tmp_path / "other"), "llm", 5), "mm_projector", 1))
    mixed = models | {"grounding": other}
    tiles: list[int] = []
    forward = VisionTower.forward

    def counted(tower: VisionTower, batch: torch.Tensor) -> torch.Tensor:
        tiles.append(len(batch))
        return forward(tower, batch)

    monkeypatch.setattr(VisionTower, "forward", counted)
    together = settings(images, models["ocr"], tmp_path / "all", *mixed)
    summary = run(together, open_model=open_panel(mixed))
    assert sum(tiles) == NUM_IMAGES
    assert summary.captioner["images_encoded"] == NUM_IMAGES
    assert summary.captioner["images_shared"] == 2 * NUM_IMAGES
    tiles.clear()
    for prompt in ("grounding", "ocr"):
        run(settings(images, mixed[prompt], tmp_path / prompt, prompt))
        alone = captions(tmp_path / prompt)
        assert alone == {key: text for key, text in captions(tmp_path / "all").items() if key[1] == prompt}
    assert sum(tiles) == 2 * NUM_IMAGES  # asked one by one, each has an encode of its own


def test_another_tower_is_refused(tmp_path: Path, images: str, models: dict[str, str]) -> None:
    other = str(change(write_vila15(tmp_path / "other"), "vision_tower", 1))
    mixed = models | {"spatial": other}
    with pytest.raises(UsageError, match="sees with another tower than"):
        run(settings(images, models["ocr"], tmp_path / "out", *mixed), open_model=open_panel(mixed))


def test_encodes_wait_on_one_stream(models: dict[str, str], images: str, tmp_path: Path) -> None:
    """On a GPU whoever reads visual tokens waits for the stream that made them, which is any member's."""
    opened = open_panel(models)(settings(images, models["ocr"], tmp_path / "out", *models))
    assert len({id(member.engine.runner.vision) for member in opened.distinct}) == 1
    assert len(opened.distinct) == 2
    opened.close()


def test_a_wording_with_fields_is_refused(tmp_path: Path, images: str, models: dict[str, str]) -> None:
    file = tmp_path / "prompts.toml"
    file.write_text('[ocr]\ntexts = ["Is it {original}?"]\n')
    asked = settings(images, models["ocr"], tmp_path / "out", *models).model_copy(
        update={"prompt_file": str(file)}
    )
    with pytest.raises(UsageError, match="wordings without fields"):
        run(asked, open_model=open_panel(models))
