"""Rates over the last steps, and what a person or a program sees of a run."""

import json
from dataclasses import replace

import pytest

from vila2.cli import train_progress
from vila2.cli.train_progress import line_of, shown
from vila2.train.progress import Rates, StepFigures, TrainProgress

PROGRESS = TrainProgress(
    "sft", 2, 3, 40, 100, 1.23456, 2e-5, 0.5, None, 1234.5, 6.789, 2.5e9, 0.41, 12.0, 3725.0
)


def figures(seconds: float, tokens: int = 100, images: int = 2) -> StepFigures:
    return StepFigures(1, 1.0, 1e-3, 1.0, tokens, images, 1e6, seconds)


def test_rates_are_sums_over_the_last_steps() -> None:
    rates = Rates()
    assert rates.per_second() == (0.0, 0.0, 0.0, 0.0)
    rates.add(figures(1.0))
    rates.add(figures(3.0, tokens=300, images=0))
    assert rates.per_second() == (0.5, 100.0, 0.5, 5e5)
    for _ in range(50):  # the first two are forgotten
        rates.add(figures(0.5))
    assert rates.per_second() == (2.0, 200.0, 4.0, 2e6)


def test_one_line_holds_everything() -> None:
    assert line_of(PROGRESS) == (
        "sft (2/3) step 40/100, loss 1.2346, lr 2.00e-05, 1234 tokens/s, 6.79 images/s, "
        "2.5 GFLOP/s (41% of the ceiling), 1:02:05 left"
    )
    bare = line_of(replace(PROGRESS, loss=None, share=None, eval_loss=0.5))
    assert "no labels (held out 0.5000)" in bare
    assert "ceiling" not in bare


def test_lines_are_rare_but_for_what_matters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(train_progress.time, "monotonic", lambda: now[0])
    with shown(as_json=False) as show:
        for step in range(1, 101):
            show(replace(PROGRESS, step=step, eval_loss=0.5 if step == 7 else None))
        now[0] = 1e6
        show(PROGRESS)
    said = capsys.readouterr().err.splitlines()
    assert [line.split()[3] for line in said] == ["1/100,", "7/100,", "100/100,", "40/100,"]


def test_json_lines_have_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with shown(as_json=True) as show:
        show(PROGRESS)
    event = json.loads(capsys.readouterr().out)
    assert event.pop("event") == "progress"
    assert TrainProgress(**event) == PROGRESS


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with shown(as_json=False) as show:
        show(PROGRESS)
    said = capsys.readouterr().err
    assert "sft 2/3" in said
    assert "40/100" in said
