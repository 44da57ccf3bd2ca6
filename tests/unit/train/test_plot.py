"""The loss plot and the log that it is drawn from."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vila2.errors import UsageError
from vila2.train import log as log_module
from vila2.train import plot
from vila2.train.log import StageLog, read_log
from vila2.train.plot import plot_losses


def lines(count: int) -> list[dict[str, float]]:
    return [{"step": step, "loss": 5 / step} for step in range(1, count + 1)]


def write(folder: Path, step: int, *more: dict[str, float]) -> None:
    log = StageLog(folder, step, tensorboard=False)
    for line in more:
        log.write(line)
    log.close()


def test_a_log_opened_at_a_step_forgets_what_came_after(tmp_path: Path) -> None:
    write(tmp_path, 0, *lines(6))
    write(tmp_path, 4, {"step": 5, "loss": 0.5})
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1, 2, 3, 4, 5]


def test_a_line_cut_short_is_none(tmp_path: Path) -> None:
    write(tmp_path, 0, *lines(3))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert len(read_log(tmp_path / "log.jsonl")) == 3
    write(tmp_path, 3, {"step": 4, "loss": 1.0})
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1, 2, 3, 4]


def test_losses_are_written_in_full(tmp_path: Path) -> None:
    loss = 0.1 + 0.2
    write(tmp_path, 0, {"step": 1, "loss": loss})
    assert read_log(tmp_path / "log.jsonl")[0]["loss"] == loss


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    log = StageLog(tmp_path, 0, tensorboard=True)
    for step in (1, 2):
        log.write({"step": step, "loss": 2.0 * step, "share": None})
    log.close()
    written = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in written.Scalars("loss")] == [(1, 2.0), (2, 4.0)]
    assert "share" not in written.Tags()["scalars"]


def test_without_tensorboard_the_hint_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match="pip install"):
        log_module._board(tmp_path, 0)


def test_the_picture_shows_the_losses(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    text = [json.dumps(line | ({"eval_loss": 2.0} if line["step"] == 20 else {})) for line in lines(50)]
    log.write_text("\n".join(text) + "\n")
    assert plot_losses(log, tmp_path / "loss.png", "a stage")
    pixels = np.asarray(Image.open(tmp_path / "loss.png").convert("RGB")).astype(int)
    blue = (pixels[..., 2] - pixels[..., 0] > 60).sum()
    orange = (pixels[..., 0] - pixels[..., 2] > 100).sum()
    assert blue > 300
    assert orange > 10


def test_without_matplotlib_there_is_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    assert not plot_losses(tmp_path / "log.jsonl", tmp_path / "loss.png", "a stage")
    assert not (tmp_path / "loss.png").exists()


def test_smoothing_keeps_a_constant_and_its_start() -> None:
    assert plot._smooth([(n, 3.0) for n in range(200)])[0] == (0, 3.0)
    assert plot._smooth([(n, 3.0) for n in range(200)])[-1][1] == pytest.approx(3.0)
