"""The folder of a run: `recipe.json`, and a folder a stage with its log, its state and at last its checkpoint."""

import json
import shutil
from pathlib import Path
from typing import Any

from vila2 import __version__
from vila2.data.files import (
    atomic_write,
    make_folder,
    remove_leftovers,
    sync_file,
    sync_folder,
    write_error,
)
from vila2.errors import OutputError, UsageError
from vila2.model.checkpoint import save_vila
from vila2.model.vlm import VisionLanguageModel
from vila2.train.recipe import Recipe, differences
from vila2.train.start import Start
from vila2.train.state import remove_unfinished, saved_step

RECIPE_FILE = "recipe.json"
_PARTIAL = ".checkpoint.partial"


class RunFolder:
    """Names what lies where, and says what is done. `cache` holds what may be thrown away; None: nothing is kept."""

    def __init__(self, recipe: Recipe, caches: bool = True) -> None:
        self.root, self.recipe = Path(recipe.out), recipe
        self.cache = self.root / "cache" if caches else None

    def stage(self, index: int) -> Path:
        return self.root / f"{index + 1:02d}-{self.recipe.stage[index].name}"

    def checkpoint(self, index: int) -> Path:
        return self.stage(index) / "checkpoint"

    def state(self, index: int) -> Path:
        return self.stage(index) / "state"

    def is_done(self, index: int) -> bool:
        return (self.checkpoint(index) / "config.json").is_file()

    def has_begun(self, index: int) -> bool:
        return self.is_done(index) or saved_step(self.state(index)) is not None

    def remove_unfinished(self) -> None:
        """Remove what a process that was killed while it wrote left behind. Call it when nobody else writes."""
        for index in range(len(self.recipe.stage)):
            stage = self.stage(index)
            for folder in (stage, stage / "adapter"):
                remove_leftovers(folder, "*")
            shutil.rmtree(stage / _PARTIAL, ignore_errors=True)
            remove_unfinished(self.state(index))
        remove_leftovers(self.root, "*")

    def record(self, deciding: dict[str, Any]) -> None:
        """Write recipe.json, or check that it says the same. UsageError names what differs.

        Stages that have not begun may be changed, added or taken away.
        """
        path = self.root / RECIPE_FILE
        deciding = json.loads(json.dumps(deciding))  # as it will be read again: a tuple is a list
        begun = [self.has_begun(index) for index in range(len(self.recipe.stage))]
        recorded = self._read(path)
        if recorded is not None and self._recorded_stages_begun(recorded):
            count = max((index + 1 for index, has in enumerate(begun) if has), default=0)
            stages = recorded["stage"], deciding["stage"]
            wanted = {**deciding, "stage": stages[1][:count]}
            was = {**recorded, "stage": stages[0][:count]}
            lines = differences(was, wanted)
            lines += [f"stage {name} has begun and is not in the recipe" for name in self._lost(recorded)]
            if lines:
                raise UsageError(
                    f"{self.root} was begun with another recipe: {'; '.join(lines[:5])}; "
                    "choose another --out, or take back the change"
                )
        make_folder(self.root)
        content = {"version": __version__, "recipe": self.recipe.to_json(), "deciding": deciding}
        try:
            atomic_write(path, (json.dumps(content, indent=2) + "\n").encode())
        except OSError as error:
            raise write_error(path, error) from error

    def _read(self, path: Path) -> dict[str, Any] | None:
        try:
            recorded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["deciding"]
            return recorded
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            raise OutputError(
                f"{path} is not a recipe that this command wrote: choose another --out"
            ) from None

    def _recorded_stages_begun(self, recorded: dict[str, Any]) -> list[str]:
        """The folders of recorded stages that hold a state or a checkpoint."""
        folders = [f"{index + 1:02d}-{stage['name']}" for index, stage in enumerate(recorded["stage"])]
        return [
            name
            for name in folders
            if (self.root / name / "checkpoint" / "config.json").is_file()
            or saved_step(self.root / name / "state") is not None
        ]

    def _lost(self, recorded: dict[str, Any]) -> list[str]:
        own = {self.stage(index).name for index in range(len(self.recipe.stage))}
        return [name for name in self._recorded_stages_begun(recorded) if name not in own]

    def write_checkpoint(self, index: int, model: VisionLanguageModel, start: Start) -> None:
        """The stage's checkpoint in the VILA layout, whole or not at all. OutputError if it cannot be written."""
        target = self.checkpoint(index)
        partial = target.with_name(_PARTIAL)
        try:
            shutil.rmtree(partial, ignore_errors=True)
            save_vila(partial, model, start.tokenizer_folder, start.config)
            for file in partial.rglob("*"):
                if file.is_file():
                    sync_file(file)
            partial.rename(target)
            sync_folder(target.parent)
        except OSError as error:
            raise write_error(target, error) from error

    def remove_state(self, index: int) -> None:
        """A stage that is done needs none."""
        shutil.rmtree(self.state(index), ignore_errors=True)
