"""The images of a loop: scenes drawn into tars, or a source that is there; and their original captions."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vila2.augment.context import Context, Outcome
from vila2.augment.step import Step, digest_of, read_json, write_json
from vila2.data.files import atomic_write, make_folder, remove_leftovers, write_error
from vila2.data.shards import open_source
from vila2.data.source import Source
from vila2.errors import UsageError, VilaError

NAME = "source"
PLAN = "world.json"


def run_source(step: Step, context: Context) -> Outcome:
    """Draw what is not drawn yet, and count what there is."""
    settings = context.settings(step)
    world = settings.get("world")
    if world is not None:
        path = step.folder(context.run)
        _draw(path, world, step, context)
    else:
        path = Path(settings["path"])
    source = open_source(str(path), index_dir=index_folder(context.run))
    shards = {shard.name: len(shard) for shard in source.shards}
    total = sum(shards.values())
    return Outcome(
        digest_of([world or source.root, shards]),
        values={"samples": total},
        metrics={"samples": total, "shards": len(shards)},
        images=total,
    )


def index_folder(run: Path) -> Path:
    """Where the places of samples are kept, so that large tars are scanned once."""
    return run / "index"


def num_samples(context: Context) -> int:
    """How many images there are, by the step that counted them."""
    return int(context.outcomes[NAME]["samples"])


def shard_plan(world: dict[str, Any]) -> Any:
    """What the tars of a world hold. UsageError for settings that no world has."""
    from vila2.world import AltNoise, WorldSettings
    from vila2.world.shards import ShardPlan

    options = dict(world["options"])
    noise = options.pop("alt", {})
    values: dict[str, Any]
    try:
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
        settings = WorldSettings(
            image_size=world["image_size"],
            seed=world["seed"],
            style=world["style"],
            alt=AltNoise(**noise),
            **values,
        )
    except TypeError as error:
        raise UsageError(f"source.world.options: {error}") from None
    return ShardPlan(
        settings,
        split=world["split"],
        scenes=world["scenes"],
        format=world["format"],
        shard_size=world["shard_size"],
    )


def _draw(folder: Path, world: dict[str, Any], step: Step, context: Context) -> None:
    from vila2.world.shards import shard_bytes

    plan = shard_plan(world)
    make_folder(folder)
    recorded = read_json(folder / PLAN)
    if recorded is not None and recorded != json.loads(json.dumps(plan.record())):
        raise VilaError(f"{folder} holds a world of other settings (see {PLAN} there): choose another --out")
    write_json(folder / PLAN, plan.record())
    done = 0
    for name, scenes in plan.shards():
        if not (folder / name).exists():
            data = shard_bytes(plan, scenes)
            try:
                remove_leftovers(folder, name)
                atomic_write(folder / name, data)
            except OSError as error:
                raise write_error(folder / name, error) from error
        done += len(scenes)
        context.observe(step.name, (done, plan.scenes))


def original_records(source: Source) -> Iterator[dict[str, Any]]:
    """{shard, index, key, text} of every sample that has an image and a text, by shard name and index.

    A source is read from end to end for this, images included: tars hold both in one stream.
    """
    for shard in sorted(source.shards, key=lambda shard: shard.name):
        for sample in shard.read():
            if sample.error is None and sample.image is not None:
                yield {
                    "shard": sample.shard,
                    "index": sample.index,
                    "key": sample.key,
                    "text": sample.original.strip(),
                }
