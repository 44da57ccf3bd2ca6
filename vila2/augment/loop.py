"""`Loop`: carries out the steps of a plan, skips what is complete, and writes down what each one took.

A step is claimed by `begun.json` and finished by `step.json`, both whole or not at all; the ledger is brought up to
date from the latter. So a run that is killed anywhere goes on where it was, and ends the same.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vila2.augment import base, boxes, carry, gates, source, texts
from vila2.augment.context import Begun, Context, Observe, Outcome, Stopped
from vila2.augment.ledger import Clock, Ledger, costs, now, versions
from vila2.augment.plan import Decided, ancestors, dependants, find_step, plan
from vila2.augment.recipe import LoopRecipe
from vila2.augment.step import BEGUN, FILE_NAME, Step, read_json, write_json
from vila2.data.files import DEAD_AFTER_S, remove_leftovers, write_error
from vila2.data.lock import RunLock, waiting_lock
from vila2.errors import UsageError
from vila2.recaption.interrupt import Interrupts
from vila2.train.recipe import differences

RECIPE = "loop.json"
SET_ASIDE = "replaced"
_WORK = {
    "source": source.run_source,
    "base": base.run_base,
    "boxes": boxes.run_boxes,
    "captions": texts.run_captions,
    "train": carry.run_train,
    "recaption": carry.run_recaption,
    "evaluate": carry.run_evaluate,
    "gate": gates.run_gate,
    "gain": gates.run_gain,
    "compare": gates.run_compare,
}
_TRAIN_GRACE_S = 1e6  # a training step is finished before it stops; captions can be dropped and written again


@dataclass(frozen=True, slots=True)
class LoopSummary:
    """What this call did: the steps that it carried out, how many were complete before, whether it was interrupted,
    and the step that comes next, if any."""

    out: str
    done: list[str]
    skipped: int
    interrupted: bool
    next_step: str | None


class State:
    """What lies in a run folder: the records of complete steps."""

    def __init__(self, run: Path, recipe: LoopRecipe) -> None:
        self.run, self.recipe = run, recipe
        self.records: dict[str, dict[str, Any]] = {}

    def steps(self) -> list[Step]:
        """The plan as far as it is known, with the records of the steps that are complete.

        UsageError if one was made with other settings, or from other inputs, than the recipe has now.
        """
        while True:
            steps = plan(self.recipe, self.decided())
            before = len(self.records)
            self._read(steps)
            if len(self.records) == before:
                return steps

    def decided(self) -> Decided:
        return {name: record["values"] for name, record in self.records.items() if record["kind"] == "gain"}

    def is_complete(self, step: Step) -> bool:
        return step.name in self.records

    def key(self, step: Step) -> str:
        return step.key({need: self.records[need]["digest"] for need in step.needs})

    def _read(self, steps: Sequence[Step]) -> None:
        """Read the records of steps that are complete, up to the first gain that is new: it changes the plan."""
        unknown: set[str] = set()  # seeds with a round to come: what follows it in the plan is not final
        for step in steps:
            seed = step.name.partition("/")[0]
            if step.name in self.records or seed in unknown:
                continue
            record = None
            if all(name in self.records for name in step.waits_for):
                record = read_json(step.folder(self.run) / FILE_NAME)
            if record is not None and step.is_judgement and record["key"] != self.key(step):
                record = None  # the recipe judges otherwise now: so it is judged again
            if record is not None:
                self.check(step, record)
                self.records[step.name] = record
            if step.kind == "gain":
                unknown.add(seed)

    def check(self, step: Step, record: Mapping[str, Any]) -> None:
        """UsageError unless `record` is of this very step."""
        if record["key"] == self.key(step):
            return
        lines = differences(record["settings"], step.settings)
        inputs = {need: self.records[need]["digest"] for need in step.needs}
        lines += [
            f"{name} has changed" for name, digest in inputs.items() if record["inputs"].get(name) != digest
        ]
        raise UsageError(
            f"{step.name} was made otherwise: {'; '.join(lines[:5]) or 'by another version'}; take back the change, "
            f"add --from {step.name} to do it and what follows again, or choose another --out"
        )


class Loop:
    """Runs a recipe, or goes on with it. `until` and `first` (--from) name steps, or folders of steps.

    With `seed` it carries out the steps of that seed alone, beside processes that do the same for other seeds; what
    they share is done by the first to come while the others wait.
    """

    def __init__(
        self,
        recipe: LoopRecipe,
        *,
        observe: Observe | None = None,
        interrupts: Interrupts | None = None,
        until: str | None = None,
        first: str | None = None,
        seed: int | None = None,
    ) -> None:
        if seed is not None and seed not in recipe.seeds:
            raise UsageError(f"--seed {seed}: the recipe's seeds are {', '.join(map(str, recipe.seeds))}")
        self.seed = seed
        self.recipe, self.run_folder = recipe, Path(recipe.out).absolute()
        self.observe = observe or (lambda step, progress: None)
        self.interrupts = interrupts or Interrupts()
        self.until, self.first = until, first

    def run(self) -> LoopSummary:
        """Carry out what is not complete. Errors are those of `vila2.errors`; GateFailed if a gate says no."""
        seeds = self.recipe.seeds
        share = (0, 1) if self.seed is None else (seeds.index(self.seed), len(seeds))
        with RunLock(self.run_folder, *share):
            return self._run()

    def _run(self) -> LoopSummary:
        run = self.run_folder
        self._tidy()
        if self.first is not None:
            self._set_aside(self.first)
        state = State(run, self.recipe)
        steps = state.steps()
        write_json(run / RECIPE, self.recipe.model_dump(mode="json", by_alias=True))
        ledger = Ledger(run)
        ledger.add(state.records.values())
        skipped, done = len(state.records), list[str]()
        wanted = self._wanted()
        while True:
            left = [step for step in steps if not state.is_complete(step)]
            step = next((step for step in left if wanted is None or step.name in wanted), None)
            if step is None:
                return LoopSummary(self.recipe.out, done, skipped, False, left[0].name if left else None)
            try:
                with self._alone(step):
                    steps = state.steps()  # another process may have done it while this one waited
                    if state.is_complete(step):
                        continue
                    record = self._carry_out(step, state)
            except Stopped:
                return LoopSummary(self.recipe.out, done, skipped, True, step.name)
            state.records[step.name] = record
            ledger.add([record])
            done.append(step.name)
            steps = state.steps()

    @contextmanager
    def _alone(self, step: Step) -> Iterator[None]:
        """Nobody else at work on a step that seeds share."""
        if self.seed is None or step.name.startswith(f"seed-{self.seed}/"):
            yield
            return
        with waiting_lock(self.run_folder / f"{step.name}.lock"):
            yield

    def _wanted(self) -> set[str] | None:
        """The steps that --until asks for, those of rounds that saturation may yet end included; None: all."""
        if self.until is None and self.seed is None:
            return None
        steps = plan(self.recipe)
        names = (
            [step.name for step in steps] if self.until is None else find_step(steps, self.until, "--until")
        )
        return ancestors(steps, [name for name in names if self._is_ours(name)])

    def _is_ours(self, name: str) -> bool:
        return self.seed is None or name.startswith(f"seed-{self.seed}/")

    def _carry_out(self, step: Step, state: State) -> dict[str, Any]:
        """One step from its claim to its record."""
        folder = step.folder(self.run_folder)
        key = state.key(step)
        begun = self._claim(step, state, key)
        clock = Clock(begun["seconds"], begun["cpu_seconds"])
        context = Context(
            self.run_folder,
            self.recipe,
            self.interrupts,
            self.observe,
            {name: record["values"] for name, record in state.records.items()},
        )
        self.observe(step.name, Begun(step.why))
        self.interrupts.grace_s = _TRAIN_GRACE_S if step.kind == "train" else 5.0
        try:
            outcome: Outcome = _WORK[step.kind](step, context)
        except BaseException:
            write_json(folder / BEGUN, {**begun, "seconds": clock.seconds, "cpu_seconds": clock.cpu_seconds})
            raise
        seconds = clock.seconds if outcome.seconds is None else max(clock.seconds, outcome.seconds)
        device = carry.device_of(context, step)
        record = {
            "step": step.name,
            "kind": step.kind,
            "key": key,
            "digest": outcome.digest,
            "inputs": {need: state.records[need]["digest"] for need in step.needs},
            "settings": step.settings,
            "versions": versions(),
            "started": begun["started"],
            "finished": now(),
            "seconds": round(seconds, 3),
            "device": device,
            **costs(self.recipe.cost, device, seconds, clock.cpu_seconds, outcome.images),
            "metrics": outcome.metrics,
            "values": outcome.values,
        }
        write_json(folder / FILE_NAME, record)
        return record

    def _claim(self, step: Step, state: State, key: str) -> dict[str, Any]:
        """`begun.json`: that of an earlier, unfinished try with the same settings, or a new one."""
        file = step.folder(self.run_folder) / BEGUN
        begun = read_json(file)
        if begun is not None and step.kind in ("train", "recaption"):
            state.check(step, begun)  # what is begun would be mixed with what is new
        if begun is None or begun["key"] != key:
            inputs = {need: state.records[need]["digest"] for need in step.needs}
            begun = {"key": key, "settings": step.settings, "inputs": inputs, "started": now()}
            begun |= {"seconds": 0.0, "cpu_seconds": 0.0}
            write_json(file, begun)
        return begun

    def _set_aside(self, text: str) -> None:
        """Move a step's folder, and those of all that follow from it, out of the way: nothing is deleted."""
        run = self.run_folder
        steps = plan(self.recipe, _recorded_gains(run, self.recipe))
        named = [name for name in find_step(steps, text, "--from") if self._is_ours(name)]
        if not named:
            raise UsageError(f"--from {text!r}: all seeds share it: leave out --seed")
        again = dependants(steps, named)
        places = [run / name for name in again if (run / name).exists()]
        if not places:
            return
        aside = run / SET_ASIDE / time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        number = 0
        while aside.exists():
            number += 1
            aside = aside.with_name(f"{aside.name.partition('_')[0]}_{number}")
        try:
            # The last first: should this be cut short, nothing is left that says it is complete without its inputs.
            for folder in reversed(places):
                target = aside / folder.relative_to(run)
                target.parent.mkdir(parents=True, exist_ok=True)
                folder.rename(target)
        except OSError as error:
            raise write_error(aside, error) from error

    def _tidy(self) -> None:
        """What a killed process left half-written. No other loop is at work there: the lock is held."""
        launch = self.recipe.launch
        launched = any((launch.train, launch.recaption, launch.evaluate))
        ours = self.run_folder if self.seed is None else self.run_folder / f"seed-{self.seed}"
        for folder in {file.parent for file in ours.rglob(".*.tmp")}:
            # A command that was launched may have outlived the loop that started it.
            remove_leftovers(folder, "*", DEAD_AFTER_S if launched else 0.0)


def _recorded_gains(run: Path, recipe: LoopRecipe) -> Decided:
    """What gains say that lie there, whatever they were made from."""
    found: dict[str, Mapping[str, Any]] = {}
    for step in plan(recipe):
        record = read_json(step.folder(run) / FILE_NAME) if step.kind == "gain" else None
        if record is not None:
            found[step.name] = record["values"]
    return found
