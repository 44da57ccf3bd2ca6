"""The base of a loop as a step of its own: a command of the recipe's that leaves a checkpoint in its folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vila2.augment.context import Context, Outcome
from vila2.augment.launch import command_line, launch
from vila2.augment.recipe import BASE, Launcher
from vila2.augment.step import Step
from vila2.errors import VilaError
from vila2.recaption.interrupt import Interrupts


def run_base(step: Step, context: Context) -> Outcome:
    """Run the command, which goes on from what lies in {folder}, and name the checkpoint by its content."""
    checkpoint = make_base(step.settings, step.folder(context.run), context.interrupts)
    from vila2.model.checkpoint import inspect_checkpoint

    digest = inspect_checkpoint(checkpoint).digest
    return Outcome(digest, values={"checkpoint": digest})


def make_base(settings: Mapping[str, Any], folder: Path, interrupts: Interrupts) -> Path:
    """The checkpoint that `settings["command"]` makes in `folder`. VilaError if there is none when it has ended."""
    words = command_line(settings["command"], (), {"folder": str(folder)})
    launch(Launcher(command="{arguments}"), words, BASE, folder, interrupts)
    checkpoint = folder / settings["checkpoint"]
    if not checkpoint.is_dir():
        raise VilaError(f"{BASE}: the command has ended, but left no checkpoint at {checkpoint}")
    return checkpoint
