"""What a loop came to, over seeds: means, intervals that join two errors, and who is compared with whom."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.augment.kits import evaluation, recipe
from vila2.augment.results import Figure, joined, markdown, read_results, specialists_markdown, table
from vila2.errors import OutputError, UsageError

HALF, MOST, ALL = [i % 2 == 0 for i in range(40)], [i % 4 != 0 for i in range(40)], [True] * 40


def line(run: Path, step: str, kind: str, **more: Any) -> dict[str, Any]:
    (run / step).mkdir(parents=True)
    base = {
        "step": step,
        "kind": kind,
        "key": "k",
        "finished": step,
        "seconds": 2.0,
        "cpu_hours": 0.5,
        "images": 10,
    }
    return {**base, "metrics": {}, "values": {}, "digest": "d", "device": "cpu", **more}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two seeds of one round: half right before, more after."""
    lines = []
    for seed, after in ((0, MOST), (1, ALL)):
        for model, right in (("round-0", HALF), ("round-1", after), ("control-steps", HALF), ("vila2", ALL)):
            for step in (f"seed-{seed}/{model}/evaluate", f"seed-{seed}/test/{model}"):
                lines.append(line(tmp_path, step, "evaluate"))
                evaluation(right).save(tmp_path / step / "evaluation.json")
        lines.append(line(tmp_path, f"seed-{seed}/round-1/gain", "gain", values={"best": 1}))
        figures = {"captions": 3, "words": 7.0 + seed}
        lines.append(line(tmp_path, f"seed-{seed}/round-1/gate", "gate", metrics=figures))
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    values = recipe(seeds=[0, 1]).model_dump(mode="json", by_alias=True)
    (tmp_path / "loop.json").write_text(json.dumps(values))
    return tmp_path


def test_a_mean_over_seeds_carries_both_errors() -> None:
    one = joined([(0.5, 0.4, 0.6)])
    assert one == Figure(0.5, 0.4, 0.6, [0.5])
    three = joined([(0.4, 0.3, 0.5), (0.5, 0.4, 0.6), (0.6, 0.5, 0.7)])
    of_seeds = 4.303 * 0.1 / 3**0.5
    assert three.value == pytest.approx(0.5)
    assert three.low is not None
    assert three.value - three.low == pytest.approx((of_seeds**2 + 0.1**2) ** 0.5)
    alike = joined([(0.5, 0.4, 0.6)] * 3)
    assert alike.high == pytest.approx(0.6)  # seeds that agree leave the error of the scenes
    bare = joined([(1.0, None, None), (3.0, None, None)])
    assert bare.low == pytest.approx(2 - 12.706)


def test_models_are_in_order_and_compared_with_their_like(run: Path) -> None:
    results = read_results(run)
    assert results.models == ["round-0", "round-1", "control-steps", "vila2"]
    assert list(results.metrics) == ["test", "dev"]
    figure = results.metrics["test"]["relation.accuracy"]["round-1"]
    assert figure.seeds == [0.75, 1.0]
    assert results.best == {"0": 1, "1": 1}
    pairs = {(pair.model, pair.other): pair.gains for pair in results.against["test"]}
    assert set(pairs) == {
        ("round-1", "round-0"), ("control-steps", "round-0"), ("best round", "control-steps"), ("vila2", "best round"),
        ("vila2", "control-steps"),
    }  # fmt: skip
    assert pairs["best round", "control-steps"]["relation.accuracy"].seeds == [0.25, 0.5]
    assert results.captions["round-1"] == {"captions": 3.0, "words": 7.5}
    assert results.cost["evaluate"]["steps"] == 16
    assert results.cost["evaluate"]["cpu_hours"] == 8.0


def test_the_table_shows_shares_in_per_cent(run: Path) -> None:
    rows = table(read_results(run), "test", ["relation.accuracy"])
    assert rows[0] == ["", "round-0", "round-1", "control-steps", "vila2"]
    assert rows[1][0] == "relation.accuracy"
    assert rows[1][1].startswith("50.0 (")


def test_a_run_under_way_says_how_many_seeds_are_measured(run: Path) -> None:
    assert read_results(run).say_seeds() == "2 seeds"
    values = recipe(seeds=[0, 1, 2]).model_dump(mode="json", by_alias=True)
    (run / "loop.json").write_text(json.dumps(values))
    results = read_results(run)
    assert (results.seeds, results.say_seeds()) == ([0, 1], "2 of 3 seeds")


def test_a_readme_gets_every_metric_and_sure_gains_in_bold(run: Path) -> None:
    results = read_results(run)
    lines = markdown(results, "test", main=["relation.accuracy", "not measured"])
    assert lines[:2] == ["|  | round-0 | round-1 | control-steps | vila2 |", "|---|---|---|---|---|"]
    named = [line.split("|")[1].strip(" `") for line in lines[2 : lines.index("")]]
    assert named == list(results.metrics["test"])
    row = next(line for line in lines if line.startswith("| `relation.accuracy` |"))
    assert row.split(" | ")[1].startswith("50.0 ± ")
    assert row.split(" | ")[2].startswith("87.5 ± ")
    gains = lines[lines.index("") + 1 :]
    assert gains[0] == "| gain of | `relation.accuracy` |"
    gain = next(line for line in gains if line.startswith("| vila2 over best round |"))
    assert "+12.5 ± " in gain
    assert "**" not in gain  # the seeds do not agree
    assert "| control-steps over round-0 | 0.0 ± 0.0 |" in gains
    assert {line.count("|") for line in gains} == {3}


def test_specialists_are_held_against_the_round_that_they_came_from(run: Path) -> None:
    step = "seed-0/specialist-ocr/evaluate"
    entry = line(run, step, "evaluate")
    evaluation(ALL).save(run / step / "evaluation.json")
    with (run / "ledger.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")
    results = read_results(run)
    lines = specialists_markdown(results, "dev", ["relation.accuracy"])
    assert lines[2].startswith("| specialist-ocr over best round | **+25.0 ± ")
    assert specialists_markdown(results, "test", ["relation.accuracy"]) == []


def test_steps_that_were_set_aside_do_not_count(run: Path) -> None:
    (run / "seed-1" / "test" / "vila2").rename(run / "gone")
    assert read_results(run).metrics["test"]["relation.accuracy"]["vila2"].seeds == [1.0]


def test_what_is_no_loop_is_said_so(tmp_path: Path, run: Path) -> None:
    with pytest.raises(OutputError, match="not the folder of a loop"):
        read_results(tmp_path / "none")
    (run / "ledger.jsonl").write_text("")
    with pytest.raises(UsageError, match="no evaluation yet"):
        read_results(run)
