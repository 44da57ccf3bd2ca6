"""Training from the command line: to the end, through kills at any moment, and what a user meets."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.e2e.harness import Done, Process, start, vila2_fast, wait_for
from vila2.model.checkpoint import load_checkpoint

RECIPE = """
measure_ceiling = false
precision = "float32"
seed = 5
[[stage]]
name = "align"
train = "projector"
steps = 3
batch_examples = 2
lr = 1e-3
[[stage.data]]
kind = "world"
texts = "alt"
image_size = 70

[[stage]]
name = "sft"
train = ["vision", "projector", "decoder"]
steps = 6
batch_examples = 2
lr = {vision = 1e-4, projector = 1e-3, decoder = 1e-3}
optimizer = {decoder = "muon"}
schedule = "wsd"
save_every = 2
[[stage.data]]
kind = "world"
texts = "brief"
image_size = 70
weight = 2
[[stage.data]]
kind = "world"
texts = "instruction"
"""


class Run:
    """The recipe in a run folder of its own."""

    def __init__(self, tmp: Path, base: Path, text: str = RECIPE) -> None:
        self.tmp, self.out = tmp, tmp / "run"
        self.recipe = tmp / "recipe.toml"
        self.recipe.write_text(f'base = "{base}"\n{text}')

    def arguments(self, *more: str) -> list[str]:
        return ["train", str(self.recipe), "--out", str(self.out), "--threads", "1", *more]

    def train(self, *more: str, fault: str = "") -> Done:
        return vila2_fast(self.tmp, *self.arguments(*more), fault=fault)

    def start(self, *more: str) -> Process:
        return start(self.tmp, *self.arguments(*more))

    def log(self, stage: str = "02-sft") -> list[dict[str, Any]]:
        path = self.out / stage / "log.jsonl"
        *lines, _ = path.read_text().split("\n") if path.exists() else [""]
        return [json.loads(line) for line in lines]

    def learnt(self) -> tuple[list[Any], dict[str, torch.Tensor]]:
        """Every loss, and every weight at the end."""
        losses = [
            (line["step"], line["loss"], line["grad_norm"])
            for stage in ("01-align", "02-sft")
            for line in self.log(stage)
        ]
        weights = {}
        for file in sorted((self.out / "02-sft" / "checkpoint").rglob("*.safetensors")):
            weights |= load_file(file)
        return losses, weights


def assert_same(one: Run, other: Run) -> None:
    (losses, weights), (expected_losses, expected) = one.learnt(), other.learnt()
    assert losses == expected_losses
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, vila15: Path) -> Run:
    run = Run(tmp_path_factory.mktemp("reference"), vila15)
    done = run.train()
    assert done.code == 0, done.stderr
    return run


@pytest.fixture
def run(tmp_path: Path, vila15: Path) -> Run:
    return Run(tmp_path, vila15)


def test_stages_train_their_parts_alone(reference: Run, vila15: Path) -> None:
    assert [line["step"] for line in reference.log()] == [1, 2, 3, 4, 5, 6]
    base, aligned, tuned = (
        load_checkpoint(path, dtype=torch.float32).model
        for path in (vila15, *(reference.out / stage / "checkpoint" for stage in ("01-align", "02-sft")))
    )

    def changed(before: torch.nn.Module, after: torch.nn.Module) -> set[str]:
        old = before.state_dict()
        return {
            name.partition(".")[0]
            for name, tensor in after.state_dict().items()
            if not torch.equal(old[name], tensor)
        }

    assert changed(base, aligned) == {"projector"}
    assert changed(aligned, tuned) == {"vision", "projector", "decoder"}


def test_the_run_folder_holds_what_it_promises(reference: Run) -> None:
    stage = reference.out / "02-sft"
    assert {path.name for path in stage.iterdir()} >= {"log.jsonl", "loss.png", "checkpoint", "summary.json"}
    assert not (stage / "state").exists()  # a stage that is done needs none
    line = reference.log()[0]
    rates = {"tokens_per_s", "images_per_s", "flops_per_s", "share", "seconds"}
    assert line.keys() >= {"step", "loss", "lr", "grad_norm"} | rates
    recorded = json.loads((reference.out / "recipe.json").read_text())
    assert recorded["recipe"]["stage"][1]["optimizer"]["decoder"] == "muon"
    summary = json.loads((stage / "summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["images"] > 0


def test_the_checkpoint_captions(reference: Run, tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    (tmp_path / "images").mkdir()
    Image.fromarray(np.full((40, 50, 3), 90, dtype=np.uint8)).save(tmp_path / "images" / "a.png")
    checkpoint = reference.out / "02-sft" / "checkpoint"
    done = vila2_fast(
        tmp_path, "recaption", tmp_path / "images", "--model", checkpoint, "--out", tmp_path / "out",
        "--max-new-tokens", "4", "--threads", "1",
    )  # fmt: skip
    assert done.code == 0, done.stderr


def test_the_same_recipe_gives_the_same_bits(run: Run, reference: Run) -> None:
    assert run.train().code == 0
    assert_same(run, reference)


# The file operations of a run: recipe.json, logs, three states of the second stage, summaries, checkpoints.
@pytest.mark.parametrize("number", [3, 22, 25, 28, 31, 36, 42, 44])
def test_killed_at_a_file_operation_and_resumed(run: Run, reference: Run, number: int) -> None:
    assert run.train(fault=f"kill:{number}").code == -signal.SIGKILL
    done = run.train()
    assert done.code == 0, done.stderr
    assert_same(run, reference)
    assert not list(run.out.rglob("*.tmp"))


@pytest.mark.parametrize("lines", [1, 3, 5])
def test_killed_in_the_middle_of_a_step_and_resumed(run: Run, reference: Run, lines: int) -> None:
    process = run.start()
    wait_for(lambda: len(run.log()) >= lines)
    process.send(signal.SIGKILL)
    process.wait()
    done = run.train()
    assert done.code == 0, done.stderr
    assert_same(run, reference)


def test_interrupted_it_saves_and_goes_on(run: Run, reference: Run) -> None:
    process = run.start("--set", "stage.sft.save_every=1000")
    wait_for(lambda: len(run.log()) >= 2)
    process.send(signal.SIGINT)
    done = process.wait()
    assert done.code in (0, 130)  # 0: it was through before the signal came
    if done.code == 130:
        assert "run the same command again" in done.stderr
        assert json.loads((run.out / "02-sft" / "state" / "state.json").read_text())["step"] >= 2
        assert run.train().code == 0
    assert_same(run, reference)


def test_until_stops_where_it_is_told(run: Run, reference: Run) -> None:
    assert run.train("--until", "align").code == 0
    assert not (run.out / "02-sft").exists()
    assert run.train("--until", "sft:3").code == 0
    assert len(run.log()) == 3
    done = run.train("--json")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[-1]["event"] == "summary"
    assert events[-1]["already_done"] == 1
    assert events[0]["event"] == "progress"
    assert events[0]["step"] == 4
    assert_same(run, reference)


def test_another_recipe_is_refused_by_its_keys(run: Run) -> None:
    assert run.train("--until", "sft:2").code == 0
    done = run.train("--set", "stage.sft.lr.decoder=5e-4", "--set", "seed=6")
    assert done.code == 2
    assert "seed was 5, is 6" in done.stderr
    assert "stage.sft.lr.decoder was 0.001, is 0.0005" in done.stderr


def test_a_stage_that_has_not_begun_may_change(run: Run) -> None:
    assert run.train("--until", "align").code == 0
    done = run.train("--set", "stage.sft.lr.decoder=5e-4", "--set", "stage.sft.steps=1")
    assert done.code == 0, done.stderr


def test_one_process_a_folder(run: Run) -> None:
    process = run.start("--set", "stage.align.steps=100000")
    wait_for(lambda: len(run.log("01-align")) >= 1)
    done = run.train()
    process.send(signal.SIGKILL)
    process.wait()
    assert done.code == 1
    assert "already at work" in done.stderr


def test_divergence_stops_with_step_and_keys(run: Run) -> None:
    done = run.train(
        "--set", "stage.align.lr=1e30", "--set", "stage.align.warmup=0", "--set", "stage.align.save_every=1"
    )
    assert done.code == 1
    assert "diverged at step 2" in done.stderr
    assert "0-world/pretrain/" in done.stderr
    assert "the state of step 1 is kept" in done.stderr
    assert (run.out / "01-align" / "state" / "state.json").is_file()


def test_dry_run_tells_and_writes_nothing(run: Run) -> None:
    done = run.train("--dry-run")
    assert done.code == 0, done.stderr
    assert "align: 3 steps of 2 examples; trains projector" in done.stdout
    assert "sft: 6 steps" in done.stdout
    assert "MiB on disk" in done.stdout
    assert not run.out.exists()


def test_held_out_loss_is_logged_and_changes_nothing(run: Run, reference: Run) -> None:
    data = 'stage.sft.eval=[{kind="world", texts="brief", image_size=70, split="dev"}]'
    more = ("--set", data, "--set", "stage.sft.eval_every=2", "--set", "stage.sft.eval_examples=4")
    assert run.train(*more).code == 0
    held_out = [line["eval_loss"] for line in run.log() if "eval_loss" in line]
    assert len(held_out) == 3
    assert all(loss > 0 for loss in held_out)
    assert_same(run, reference)


def test_activation_checkpointing_changes_nothing(run: Run, reference: Run) -> None:
    assert run.train("--set", "stage.sft.checkpoint_activations=true").code == 0
    assert_same(run, reference)


def test_small_micro_batches_sum_to_the_same_step(run: Run, reference: Run) -> None:
    sets = ("--set", "stage.sft.max_tokens=64", "--set", "stage.sft.max_example_tokens=1024")
    assert run.train(*sets).code == 0
    (losses, _), (expected, _) = run.learnt(), reference.learnt()
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_a_stage_may_begin_at_the_base(run: Run, vila15: Path) -> None:
    assert run.train("--set", "stage.sft.from=base", "--set", 'stage.sft.train=["decoder"]').code == 0
    base, tuned = (
        load_checkpoint(path, dtype=torch.float32).model.projector.state_dict()
        for path in (vila15, run.out / "02-sft" / "checkpoint")
    )
    assert all(torch.equal(tuned[name], tensor) for name, tensor in base.items())  # align's are left behind


def test_bfloat16_resumes_bit_for_bit_and_tells_tensorboard_each_step_once(
    run: Run, vila15: Path, tmp_path: Path
) -> None:
    sets = ("--set", "precision=bf16", "--set", "tensorboard=true")
    assert run.train(*sets).code == 0
    (tmp_path / "again").mkdir()
    again = Run(tmp_path / "again", vila15)
    process = again.start(*sets)
    wait_for(lambda: len(again.log()) >= 3)
    process.send(signal.SIGKILL)
    process.wait()
    assert again.train(*sets).code == 0
    assert_same(again, run)
    board = EventAccumulator(str(again.out / "02-sft" / "tensorboard")).Reload()
    told = [(event.step, event.value) for event in board.Scalars("loss")]
    assert told == [(line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in again.log()]


def test_adapters_resume_and_merge(run: Run, vila15: Path, tmp_path: Path) -> None:
    sets = ("--set", "stage.sft.lora={rank=4, dropout=0.1}", "--set", 'stage.sft.optimizer="adamw"')
    assert run.train(*sets).code == 0
    (tmp_path / "again").mkdir()
    again = Run(tmp_path / "again", vila15)
    assert again.train(*sets, "--until", "sft:3").code == 0
    assert again.train(*sets).code == 0
    assert_same(again, run)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (run.out / "02-sft" / "adapter" / name).is_file()
    aligned = load_file(run.out / "01-align" / "checkpoint" / "llm" / "model.safetensors")
    tuned = load_file(run.out / "02-sft" / "checkpoint" / "llm" / "model.safetensors")
    changed = {name for name in tuned if not torch.equal(tuned[name], aligned[name])}
    assert changed == {name for name in tuned if "_proj." in name}


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (("stage.sft.trian=decoder",), "did you mean 'train'"),
        (("stage.align.data.0.texts=altt",), "did you mean 'alt'"),
        (("base=/nowhere",), "/nowhere does not exist"),
    ],
)
def test_mistakes_are_one_line(run: Run, sets: tuple[str, ...], said: str) -> None:
    done = run.train(*(part for text in sets for part in ("--set", text)))
    assert done.code in (1, 2)
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
