"""What a recipe would take: every stage is set up as in a run and takes a few steps, in memory only."""

from dataclasses import dataclass

from vila2.ops.threads import set_threads
from vila2.train.machine import chosen_precision, chosen_threads, dtype_of
from vila2.train.recipe import PARTS, Recipe
from vila2.train.run_folder import RunFolder
from vila2.train.sharding import joined
from vila2.train.stage_run import Machine, StageRun
from vila2.train.stages import part_of, trainable
from vila2.train.start import load_base

_PROBED_STEPS = 2  # after one that warms up


@dataclass(frozen=True, slots=True)
class StageEstimate:
    """One stage. `trainable` counts parameters by part."""

    name: str
    steps: int
    batch_examples: int
    trainable: dict[str, int]
    step_s: float
    seconds: float


@dataclass(frozen=True, slots=True)
class RunEstimate:
    """All stages. `disk_bytes`: every checkpoint, and the largest state beside its replacement."""

    parameters: int
    precision: str
    threads: int
    stages: list[StageEstimate]
    probed_steps: int
    seconds: float
    disk_bytes: int


def estimate(recipe: Recipe) -> RunEstimate:
    """Probe every stage on this process's device. Nothing is written."""
    folder = RunFolder(recipe, caches=False)
    threads = chosen_threads(recipe.threads)
    set_threads(threads)
    with joined(recipe.device) as processes:
        precision = chosen_precision(recipe.precision, processes.device)
        machine = Machine(precision=precision, threads=threads, ceiling=None)
        stages, state_bytes, parameters, weight_bytes = [], 0, 0, 0
        for index, stage in enumerate(recipe.stage):
            start = load_base(recipe, dtype_of(precision), processes.device)
            parameters = sum(parameter.numel() for parameter in start.model.parameters())
            weight_bytes = sum(parameter.nbytes for parameter in start.model.parameters())
            run = StageRun(recipe, index, folder, start, machine, processes)
            counts = dict.fromkeys(PARTS, 0)
            for name, parameter in trainable(start.model):
                counts[part_of(name)] += parameter.numel()
            step_s = run.probe(_PROBED_STEPS)
            state_bytes = max(state_bytes, run.state_bytes())
            stages.append(
                StageEstimate(
                    name=stage.name,
                    steps=run.steps,
                    batch_examples=stage.batch_examples,
                    trainable={str(part): count for part, count in counts.items()},
                    step_s=step_s,
                    seconds=step_s * run.steps,
                )
            )
    return RunEstimate(
        parameters=parameters,
        precision=precision,
        threads=threads,
        stages=stages,
        probed_steps=_PROBED_STEPS,
        seconds=sum(stage.seconds for stage in stages),
        disk_bytes=len(stages) * weight_bytes + 2 * state_bytes,
    )
