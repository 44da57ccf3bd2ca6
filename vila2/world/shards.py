"""A world as WebDataset tars: bytes that are the same wherever and however often they are made.

A sample is `KEY.jpg` (or png), `KEY.txt` (one text) and `KEY.json` (the whole truth, and the alt-text with its kind).
"""

import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from io import BytesIO
from typing import Any

from PIL import Image

from vila2.errors import UsageError
from vila2.world.scene import Scene
from vila2.world.settings import AltNoise, WorldSettings
from vila2.world.texts import CAPTION_PROMPTS, alt_text, caption_for, detailed_caption, layout
from vila2.world.world import World

FORMATS = ("jpg", "png")
TEXTS = ("alt", *CAPTION_PROMPTS, "layout")
_JPEG = {"quality": 92, "subsampling": 0}  # letters of ten pixels need their colours whole


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """What the tars of a folder hold; equal plans give equal bytes."""

    settings: WorldSettings
    split: str = "pretrain"
    scenes: int = 1000
    text: str = "alt"
    format: str = "jpg"
    shard_size: int = 1000

    def __post_init__(self) -> None:
        for value, allowed, name in ((self.text, TEXTS, "text"), (self.format, FORMATS, "format")):
            if value not in allowed:
                raise UsageError(f"no {name} {value!r}; there are {', '.join(allowed)}")
        if self.scenes < 1 or self.shard_size < 1:
            raise UsageError(f"{self.scenes} scenes in shards of {self.shard_size}: both must be at least 1")

    def shards(self) -> list[tuple[str, range]]:
        """The name of each tar, and its scenes."""
        starts = range(0, self.scenes, self.shard_size)
        return [
            (f"{self.split}-{number:05d}.tar", range(start, min(start + self.shard_size, self.scenes)))
            for number, start in enumerate(starts)
        ]

    def record(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        return asdict(self)


def shard_bytes(plan: ShardPlan, scenes: range, step: Callable[[], None] = lambda: None) -> bytes:
    """A tar of `scenes`; `step` is called after each."""
    world = World(plan.settings)
    file = BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for index in scenes:
            for extension, data in _sample(world, plan, world.scene(plan.split, index)):
                entry = tarfile.TarInfo(f"{plan.split}-{index:08d}.{extension}")
                entry.size = len(data)
                tar.addfile(entry, BytesIO(data))
            step()
    return file.getvalue()


def text_of(scene: Scene, kind: str, noise: AltNoise) -> str:
    """One of TEXTS."""
    if kind == "alt":
        return alt_text(scene, noise).text
    return layout(scene) if kind == "layout" else caption_for(scene, kind)


def _sample(world: World, plan: ShardPlan, scene: Scene) -> Iterator[tuple[str, bytes]]:
    alt = alt_text(scene, plan.settings.alt)
    truth = {**scene.truth(), "alt_text": alt.text, "alt_kind": alt.kind, "detailed": detailed_caption(scene)}
    yield plan.format, encoded(world, scene, plan.format)
    yield "txt", text_of(scene, plan.text, plan.settings.alt).encode()
    yield "json", json.dumps(truth, ensure_ascii=False).encode()


def encoded(world: World, scene: Scene, format: str) -> bytes:
    """The image of a scene as a file of `format`."""
    file = BytesIO()
    image = Image.fromarray(world.render(scene))
    if format == "png":
        image.save(file, "PNG")
    else:
        image.save(file, "JPEG", **_JPEG)
    return file.getvalue()
