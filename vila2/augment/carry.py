"""The steps that run a model: training, recaptioning, evaluation; in this process or through a launcher."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vila2.augment.context import Context, Outcome, Stopped
from vila2.augment.launch import command_line, launch
from vila2.augment.recipe import Launcher
from vila2.augment.step import Step, digest_of, digest_of_stream, place, write_json
from vila2.config import RecaptionSettings, make_settings
from vila2.data.done import DoneSet
from vila2.data.files import atomic_write, make_folder, write_error
from vila2.data.verify import iter_rows
from vila2.errors import VilaError

EVALUATION = "evaluation.json"


def run_train(step: Step, context: Context) -> Outcome:
    """The stages of a training, to the checkpoint of the last."""
    from vila2.model.checkpoint import inspect_checkpoint
    from vila2.train.recipe import Recipe
    from vila2.train.trainer import Trainer

    folder = step.folder(context.run)
    values = place(step.free["recipe"], context.run)
    recipe = make_settings(Recipe, values, step.name)
    launcher = context.recipe.launch.train
    if launcher is not None:
        file = _write_yaml(folder / "train.yaml", values)
        launch(launcher, ["train", str(file)], step.name, folder, context.interrupts)
    else:
        trainer = Trainer(
            recipe,
            observe=lambda progress: context.observe(step.name, progress),
            interrupts=context.interrupts,
        )
        if trainer.run().interrupted:
            raise Stopped
    shutil.rmtree(folder / "cache", ignore_errors=True)  # images cut to size: of no use to a run that is done
    stages = [folder / f"{number:02d}-{stage.name}" for number, stage in enumerate(recipe.stage, 1)]
    summaries = [json.loads((stage / "summary.json").read_text(encoding="utf-8")) for stage in stages]
    digests = [inspect_checkpoint(stage / "checkpoint").digest for stage in stages]
    losses = {stage.name.partition("-")[2]: _last_loss(stage / "log.jsonl") for stage in stages}
    return Outcome(
        digest_of(digests),
        values={"checkpoint": digests[-1]},
        metrics={
            "loss": losses,
            **{name: sum(summary[name] for summary in summaries) for name in ("steps", "tokens", "images")},
        },
        images=sum(summary["images"] for summary in summaries),
        seconds=sum(summary["seconds"] for summary in summaries),
    )


def run_recaption(step: Step, context: Context) -> Outcome:
    """Captions of every image, or of the first `fraction` of them."""
    from vila2.augment.panel import open_panel
    from vila2.backends import open_captioner
    from vila2.recaption.output import open_samples
    from vila2.recaption.pipeline import run
    from vila2.recaption.prompts import choose_prompts
    from vila2.recaption.work import Plan

    settings = recaption_settings(step, context)
    launcher = context.recipe.launch.recaption
    if launcher is not None:
        _launch_recaption(launcher, settings, step, context)
    else:
        models = context.settings(step).get("models")
        summary = run(
            settings,
            observe=lambda progress: context.observe(step.name, progress),
            interrupts=context.interrupts,
            open_model=open_captioner if models is None else open_panel(models),
        )
        if summary.interrupted:
            raise Stopped
    out = Path(settings.out)
    left = Plan(
        open_samples(settings), settings, choose_prompts(settings).names, DoneSet.load(out)
    ).num_pending
    if left:
        raise VilaError(f"{step.name}: {left} images have no captions although the command has ended")
    return _recaptioned(out)


def recaption_settings(step: Step, context: Context) -> RecaptionSettings:
    """The settings of `vila2-fast recaption` that a step stands for."""
    from vila2.augment.source import num_samples

    values = context.settings(step)
    own = step.free["settings"]
    more: dict[str, Any] = {name: values[name] for name in ("prompt", "round")}
    more["seed"] = own.get("seed", values["seed"])
    if "deterministic" not in own:
        # So that a run that was cut ends the same; on a GPU it ends as good, not bit for bit.
        more["deterministic"] = not _on_gpu(context, "recaption")
    draft = place(step.free.get("draft", "off"), context.run)
    more["draft"] = draft if Path(draft).is_dir() else "off"
    if "temperature" in values:
        more["temperature"] = values["temperature"]
    total = num_samples(context)
    limit = min(-int(-values["fraction"] * total // 1), values.get("limit", total))
    if limit < total:
        more["limit"] = limit
    return context.recipe.recaption_settings(
        values["source"], values["model"], str(step.folder(context.run)), **more
    )


def _launch_recaption(launcher: Launcher, settings: RecaptionSettings, step: Step, context: Context) -> None:
    values = settings.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude_none=True)
    source = values.pop("source")
    folder = step.folder(context.run)
    file = _write_yaml(folder.with_name(f"{folder.name}.yaml"), values)
    arguments = ["recaption", source, "--recipe", str(file)]
    launch(launcher, arguments, step.name, folder.with_name(f"{folder.name}-logs"), context.interrupts)


def _recaptioned(out: Path) -> Outcome:
    """What the rows say, in one pass over them."""
    status: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    words = images = 0
    last: tuple[str, int] | None = None

    def pieces() -> Iterator[bytes]:
        nonlocal words, images, last
        for row in iter_rows(out):
            place = (row["shard"], row["index"])
            images += place != last
            last = place
            status[row["status"]] += 1
            if row["error_kind"]:
                errors[row["error_kind"]] += 1
            words += len(row["caption"].split())
            told = [*place, row["prompt"], row["status"], row["caption"]]
            yield json.dumps(told, ensure_ascii=False).encode()

    digest = digest_of_stream(pieces())
    captions = sum(status.values()) - status["error"]
    metrics = {
        "captions": captions,
        "words": words / max(1, captions),
        "status": dict(status),
        "errors": dict(errors),
        **_rates(out),
    }
    return Outcome(digest, metrics=metrics, images=images)


def _rates(out: Path) -> dict[str, Any]:
    """What the summaries of the last run say of speed and of drafts."""
    found = sorted(out.glob("summary*.json"))
    summaries = [json.loads(path.read_text(encoding="utf-8")) for path in found]
    if not summaries:
        return {}
    return {
        "captions_per_s": sum(summary["captions_per_s"] for summary in summaries),
        "rates": summaries[0]["rates"],
        "captioner": summaries[0]["captioner"],
    }


def run_evaluate(step: Step, context: Context) -> Outcome:
    """A checkpoint measured: `evaluation.json`."""
    from vila2.augment.measured import read_measured

    settings = context.settings(step)
    folder = step.folder(context.run)
    file = folder / EVALUATION
    make_folder(folder)
    if "command" in settings:
        _run_command(settings, step, context, file)
    else:
        _evaluate(settings, step, context, file)
    found = read_measured(file)
    figures = {name: [e.value, e.low, e.high] for name, e in found.metrics.items()}
    records = [[r.scene, r.task, r.question, r.reply, r.scores] for r in found.records]
    return Outcome(
        digest_of([found.settings, figures, records]),
        metrics={name: value[0] for name, value in figures.items()},
        images=len({record.scene for record in found.records}),
        seconds=found.seconds or None,
    )


def _evaluate(settings: dict[str, Any], step: Step, context: Context, file: Path) -> None:
    from vila2.evaluate import evaluate

    recipe = context.recipe
    checkpoint, tasks = settings.pop("checkpoint"), settings.pop("tasks")
    launcher = recipe.launch.evaluate
    if launcher is None:
        found = evaluate(
            checkpoint,
            tasks,
            device=recipe.device,
            threads=recipe.threads,
            observe=lambda done, total: context.observe(step.name, (done, total)),
            **settings,
        )
        found.save(file)
        return
    given = {
        **settings,
        "tasks": ",".join(tasks),
        "themes": ",".join(settings["themes"]) or None,
        "device": recipe.device,
        "threads": recipe.threads,
        "out": file,
    }
    arguments = ["evaluate", checkpoint]
    for name, value in given.items():
        if value is not None:
            arguments += [f"--{name.replace('_', '-')}", str(value)]
    launch(launcher, arguments, step.name, file.parent, context.interrupts)


def _run_command(settings: dict[str, Any], step: Step, context: Context, file: Path) -> None:
    """The user's own evaluation. A command that does not write {out} may leave lmms-eval's `*results.json`."""
    folder = file.parent
    fields = {"checkpoint": settings["checkpoint"], "out": str(file), "folder": str(folder)}
    words = command_line(settings["command"], (), fields)
    file.unlink(missing_ok=True)
    launch(Launcher(command="{arguments}"), words, step.name, folder, context.interrupts)
    found = sorted(folder.rglob("*results.json"), key=lambda path: path.stat().st_mtime)
    if not file.exists() and found:
        write_json(file, json.loads(found[-1].read_text(encoding="utf-8")))


def device_of(context: Context, step: Step) -> str:
    """Where a step's model ran: what the recipe says, or what there is."""
    with_model = step.kind in ("train", "recaption", "evaluate")
    return "cuda" if with_model and _on_gpu(context, step.kind) else "cpu"


def _on_gpu(context: Context, kind: str) -> bool:
    """A launcher's machine is taken to have a GPU, unless the recipe says otherwise; of this one it is known."""
    if context.recipe.device != "auto" or getattr(context.recipe.launch, kind) is not None:
        return context.recipe.device != "cpu"
    from vila2.backends.compute import resolve_device

    return resolve_device("auto") == "cuda"


def _last_loss(log: Path) -> float | None:
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return json.loads(lines[-1])["loss"] if lines else None


def _write_yaml(path: Path, values: dict[str, Any]) -> Path:
    """A recipe that a person can run by hand as well. OutputError if it cannot be written."""
    import yaml

    make_folder(path.parent)
    try:
        atomic_write(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode())
    except OSError as error:
        raise write_error(path, error) from error
    return path
