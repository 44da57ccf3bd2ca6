"""A base that the loop makes itself, and seeds that share a run folder."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import write_vila15
from tests.unit.augment.kits import SPECIALIST, STAGES, recipe
from vila2.augment.base import make_base
from vila2.augment.loop import Loop
from vila2.augment.plan import plan
from vila2.augment.probe import estimate
from vila2.augment.recipe import LoopRecipe
from vila2.augment.step import read_json
from vila2.data.lock import RunLock
from vila2.errors import OutputError, UsageError, VilaError
from vila2.model.checkpoint import inspect_checkpoint
from vila2.recaption.interrupt import Interrupts

COPY = (
    '{python} -c "import shutil, sys; shutil.copytree(sys.argv[1], sys.argv[2], dirs_exist_ok=True)" '
    "SOURCE {folder}/base"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vila15(tmp_path_factory.mktemp("made") / "vila15")


def with_base(out: Path, command: str, **changes: Any) -> LoopRecipe:
    return recipe(out=str(out), base={"command": command}, train={"stage": STAGES}, **changes)


def test_every_training_from_the_base_waits_for_it() -> None:
    steps = {step.name: step for step in plan(with_base(Path("run"), "make it", specialist=[SPECIALIST]))}
    assert list(steps)[:2] == ["source", "base"]
    trainings = [step for step in steps.values() if step.kind == "train"]
    assert len(trainings) > 5
    for step in trainings:
        if "specialist" in step.name:  # starts from a round
            assert "base" not in step.needs
        else:
            assert "base" in step.needs
            assert step.settings["base"] == "{run}/base/base"
    assert "minutes" not in steps["base"].settings  # what is only told is no part of the key


def test_a_base_is_made_by_one_command_and_named_by_its_content(tmp_path: Path, checkpoint: Path) -> None:
    run = tmp_path / "run"
    command = COPY.replace("SOURCE", str(checkpoint))
    summary = Loop(with_base(run, command), until="base").run()
    assert summary.done == ["base"]
    record = read_json(run / "base" / "step.json")
    assert record is not None
    assert record["digest"] == inspect_checkpoint(checkpoint).digest
    assert Loop(with_base(run, command), until="base").run().done == []
    with pytest.raises(UsageError, match="base was made otherwise"):
        Loop(with_base(run, f"{command} ''"), until="base").run()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("{python} -c pass", "left no checkpoint at"),
        ("{python} -c 'import sys; sys.exit(\"no room\")'", "ended with 1: no room"),
    ],
)
def test_a_command_that_makes_no_base_is_told(tmp_path: Path, command: str, said: str) -> None:
    with pytest.raises(VilaError, match=said):
        make_base({"command": command, "checkpoint": "base"}, tmp_path / "base", Interrupts())


def test_base_and_train_base_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="give one of them"):
        recipe(base={"command": "make it"})


def test_the_estimate_needs_a_base_of_the_same_shape(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="--until base"):
        estimate(
            with_base(tmp_path / "run", "make it", evaluate={"command": "none"}, rounds={"max": 0, "min": 0})
        )
    base = {"command": "false", "probe": COPY.replace("SOURCE", str(checkpoint)), "minutes": 7}
    stages = [stage | {"batch_examples": 2} for stage in STAGES]
    world = {"scenes": 4, "image_size": 70}
    of = recipe(
        out=str(tmp_path / "run"),
        base=base,
        source={"world": world},
        train={"stage": stages},
        rounds={"max": 0, "min": 0},
        evaluate={"command": "none"},
    )
    found = {step.step: step for step in estimate(of).steps}
    assert (found["base"].seconds, found["base"].basis) == (420.0, "recipe")
    assert found["seed-0/round-0/train"].seconds > 0
    assert not (tmp_path / "run").exists()


def test_seeds_side_by_side_share_what_comes_before_them(tmp_path: Path) -> None:
    of = recipe(out=str(tmp_path / "run"), seeds=[0, 1, 5])
    found: dict[int, list[str]] = {}

    def work(seed: int) -> None:
        found[seed] = Loop(of, until="round-0/captions", seed=seed).run().done

    threads = [threading.Thread(target=work, args=(seed,)) for seed in of.seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [0, 1, 5]
    assert sorted(name for done in found.values() for name in done) == [
        "seed-0/round-0/captions",
        "seed-1/round-0/captions",
        "seed-5/round-0/captions",
        "source",
    ]
    lines = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    assert sorted(line["step"] for line in lines) == sorted(n for done in found.values() for n in done)
    assert Loop(of, until="round-0/captions").run().done == []  # nothing is left for a run of all


def test_a_seed_and_a_run_of_all_do_not_meet(tmp_path: Path) -> None:
    of = recipe(out=str(tmp_path / "run"), seeds=[0, 1])
    with RunLock(tmp_path / "run"), pytest.raises(OutputError, match="at work"):
        Loop(of, until="source", seed=0).run()
    with pytest.raises(UsageError, match="the recipe's seeds are 0, 1"):
        Loop(of, seed=2)
    with pytest.raises(UsageError, match="all seeds share it: leave out --seed"):
        Loop(of, first="source", seed=1).run()
