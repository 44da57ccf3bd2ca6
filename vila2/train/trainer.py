"""A recipe carried out: stage after stage, each from a checkpoint to a checkpoint.

What a stage does is in `stage_run`; this file decides which stages are left and where each starts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vila2.data.lock import RunLock
from vila2.errors import UsageError
from vila2.ops.threads import set_threads
from vila2.recaption.interrupt import Interrupts
from vila2.train.flops import measured_ceiling
from vila2.train.machine import chosen_precision, chosen_threads, dtype_of, keep_freed_memory
from vila2.train.progress import StageSummary, TrainProgress
from vila2.train.recipe import Recipe
from vila2.train.run_folder import RunFolder
from vila2.train.sharding import Processes, joined
from vila2.train.stage_run import Machine, StageRun
from vila2.train.start import Start, base_digests, load_base, load_trained

Observe = Callable[[TrainProgress], None]


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What this call did. `checkpoint` is that of the last stage that is done, if any."""

    out: str
    stages: list[StageSummary]
    already_done: int
    interrupted: bool
    checkpoint: str | None


class Trainer:
    """Runs a recipe, or goes on with it: the same recipe and folder again continue where the last run ended.

    `until` names a stage after which to stop, or `STAGE:STEP` in the middle of one.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        observe: Observe | None = None,
        interrupts: Interrupts | None = None,
        until: str | None = None,
    ) -> None:
        self.recipe = recipe
        self.observe = observe or (lambda progress: None)
        self.interrupts = interrupts or Interrupts()
        self.is_main = True  # known once the run has begun
        self.until_stage, self.until_step = _parse_until(until, recipe)

    def run(self) -> RunSummary:
        """Carry out all stages that are not done. Errors are those of `vila2.errors`."""
        with joined(self.recipe.device) as processes:
            self.is_main = processes.is_main
            out = Path(self.recipe.out)
            with RunLock(out, processes.rank, processes.world_size):
                return self._run(processes)

    def _run(self, processes: Processes) -> RunSummary:
        recipe, folder = self.recipe, RunFolder(self.recipe)
        machine = self._machine(processes)
        if processes.is_main:
            folder.remove_unfinished()
            decided = {"precision": machine.precision, "contents": base_digests(recipe)}
            folder.record({**recipe.deciding(), **decided})
        processes.barrier()
        last = len(recipe.stage) if self.until_stage is None else self.until_stage + 1
        done = sum(folder.is_done(index) for index in range(last))
        summaries: list[StageSummary] = []
        stopped = False
        for index in range(last):
            if folder.is_done(index):
                if processes.is_main:
                    folder.remove_state(index)
                continue
            run = StageRun(recipe, index, folder, self._start(index, folder, machine), machine, processes)
            until = self.until_step if index == self.until_stage else None
            summary = run.run(self.observe, self.interrupts, until)
            if summary is None:
                stopped = True
                break
            summaries.append(summary)
        complete = [index for index in range(len(recipe.stage)) if folder.is_done(index)]
        return RunSummary(
            out=recipe.out,
            stages=summaries,
            already_done=done,
            interrupted=stopped and self.interrupts.requested,
            checkpoint=str(folder.checkpoint(complete[-1])) if complete else None,
        )

    def _machine(self, processes: Processes) -> Machine:
        threads = chosen_threads(self.recipe.threads)
        set_threads(threads)
        keep_freed_memory()
        precision = chosen_precision(self.recipe.precision, processes.device)
        ceiling = None
        if self.recipe.measure_ceiling:
            seconds = 0.5
            kind = processes.device.type
            ceiling = measured_ceiling(dtype_of(precision), threads, kind, seconds) * processes.world_size
        return Machine(precision=precision, threads=threads, ceiling=ceiling)

    def _start(self, index: int, folder: RunFolder, machine: Machine) -> Start:
        """The model that a stage begins with; loaded anew, so that it is the same whether or not a run was cut."""
        dtype = dtype_of(machine.precision)
        if index == 0 or self.recipe.stage[index].from_ == "base":
            return load_base(self.recipe, dtype, self._device())
        return load_trained(folder.checkpoint(index - 1), dtype, self._device())

    def _device(self) -> str:
        import torch

        return "cuda" if self.recipe.device != "cpu" and torch.cuda.is_available() else "cpu"


def _parse_until(until: str | None, recipe: Recipe) -> tuple[int | None, int | None]:
    """`STAGE` or `STAGE:STEP` to the stage's index and the step."""
    if until is None:
        return None, None
    name, colon, step = until.partition(":")
    names = [stage.name for stage in recipe.stage]
    if name not in names:
        raise UsageError(f"--until {until!r}: there is no stage {name!r}; the recipe has {', '.join(names)}")
    if colon and not (step.isdigit() and int(step)):
        raise UsageError(f"--until {until!r}: expected STAGE or STAGE:STEP, like {names[0]}:100")
    return names.index(name), int(step) if colon else None
