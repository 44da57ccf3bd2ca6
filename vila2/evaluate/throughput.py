"""How many images a second are captioned here: by the engine alone, and from image files to rows on disk.

Every caption has the same length (end-of-sequence does not end it), is greedy and never asked for again: so every run
does the same work, whatever the images show. Engine and pipeline take turns; figures are medians over the rounds.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vila2.backends import open_captioner
from vila2.backends.compute import available_cores
from vila2.config import RecaptionSettings
from vila2.errors import VilaError
from vila2.recaption.pipeline import run
from vila2.train.flops import caption_flops, product_ceiling
from vila2.types import Caption, CaptionRequest, SamplingParams
from vila2.world import World, WorldSettings, texts
from vila2.world.shards import ShardPlan, shard_bytes

if TYPE_CHECKING:
    from vila2.backends import Captioner

PROMPT = texts.CAPTION_PROMPTS["detailed"][0]
_SPLIT = "pretrain"
_BATCH = 32  # of a model that is another program's
Observe = Callable[[str], None]  # a line about what was measured


@dataclass(slots=True)
class Case:
    """One batch size and caption length. Rates are images a second, a figure for each round."""

    batch_size: int  # captions written at once
    new_tokens: int
    images: int
    prompt_tokens: int = 0  # visual ones included
    flops: float = 0.0  # that an image needs; 0 where the model is another program's
    engine: list[float] = field(default_factory=list)
    pipeline: list[float] = field(default_factory=list)

    def to_json(self, ceiling: float) -> dict[str, Any]:
        """Its row: medians, and the share of `ceiling` (operations a second; 0: unknown) that the engine reaches."""
        engine = median(self.engine)
        return {
            "batch_size": self.batch_size,
            "new_tokens": self.new_tokens,
            "prompt_tokens": self.prompt_tokens,
            "images": self.images,
            "rounds": len(self.engine),
            "engine_images_per_s": engine,
            "engine_slowest": min(self.engine),
            "engine_tokens_per_s": engine * self.new_tokens,
            "pipeline_images_per_s": median(self.pipeline) if self.pipeline else None,
            "flops_an_image": self.flops or None,
            "of_ceiling": engine * self.flops / ceiling if ceiling and self.flops else None,
        }


COLUMNS = tuple(Case(1, 1, 1, engine=[1.0]).to_json(0.0))  # of a row


@dataclass(frozen=True, slots=True)
class Throughput:
    """What was measured. `ceiling`: operations a second of this machine's matrix product in the model's type."""

    model: str
    compute: str
    ceiling: float
    rows: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def throughput(
    settings: RecaptionSettings,
    *,
    batch_sizes: Sequence[int] = (),
    new_tokens: Sequence[int] = (64,),
    images: int | None = None,
    image_size: int = 512,
    rounds: int = 3,
    with_pipeline: bool = True,
    observe: Observe = lambda line: None,
) -> Throughput:
    """Measure the model that `settings` name; their source and output are left alone.

    No `batch_sizes`: the engine's own choice. `images` a round: by itself, twice the batch and at least 16. Scenes of
    the world are drawn `image_size` pixels square and, for the pipeline, written as JPEGs into tars; without
    `with_pipeline` only the engine is measured. VilaError when the model cannot be opened or a caption fails.
    """
    rows: list[dict[str, Any]] = []
    model = compute = ""
    ceiling = 0.0
    with TemporaryDirectory(prefix="vila2-throughput-") as folder:
        for batch_size in batch_sizes or (None,):
            for length in new_tokens:
                chosen = _fixed(settings, batch_size, length)
                captioner = open_captioner(chosen)
                try:
                    model, compute = captioner.model_name, captioner.description
                    case = _case(captioner, chosen, images)
                    pictures = _drawn(captioner, min(case.images, 64), image_size)
                    _caption_all(captioner, pictures[:2], 2, chosen)  # what is made at first use is made
                    case.prompt_tokens = _caption_all(captioner, pictures, 1, chosen)[0].num_prompt_tokens
                    case.flops = _flops(captioner, pictures[0], case)
                    if not ceiling:
                        ceiling = _ceiling(captioner, chosen)
                        observe(f"{model}: {compute}")
                    for _ in range(rounds):
                        case.engine.append(case.images / _timed(captioner, pictures, case.images, chosen))
                finally:
                    captioner.close()
                if with_pipeline:
                    source = _written(Path(folder), case.images, image_size)
                    for number in range(rounds):
                        case.pipeline.append(
                            _piped(chosen, source, Path(folder) / f"{len(rows)}-{number}", case.images)
                        )
                rows.append(case.to_json(ceiling))
                observe(describe(rows[-1]))
    return Throughput(model, compute, ceiling, rows)


def describe(row: dict[str, Any]) -> str:
    """A row in a line."""
    text = (
        f"batch {row['batch_size']:4}  {row['prompt_tokens']} + {row['new_tokens']} tokens  "
        f"engine {row['engine_images_per_s']:9.3f} images/s"
    )
    if row["of_ceiling"] is not None:
        text += f" ({row['of_ceiling']:.0%} of the ceiling)"
    if row["pipeline_images_per_s"] is not None:
        text += f"  files to rows {row['pipeline_images_per_s']:9.3f} images/s"
    return text


def _fixed(settings: RecaptionSettings, batch_size: int | None, new_tokens: int) -> RecaptionSettings:
    """The settings under which every caption is as long as the next."""
    changed = {
        "batch_size": batch_size or settings.batch_size,
        "max_new_tokens": new_tokens,
        "ignore_eos": True,
        "temperature": 0.0,
        "retry": (),
        "repetition": None,
        "draft": "off",
        "prompt": (),
        "prompt_text": settings.prompt_text or PROMPT,
        "limit": None,
    }
    return settings.model_copy(update=changed)


def _case(captioner: "Captioner", settings: RecaptionSettings, images: int | None) -> Case:
    engine = getattr(captioner, "engine", None)
    batch = settings.batch_size or (_BATCH if engine is None else engine.limits.max_num_seqs)
    return Case(batch, settings.max_new_tokens, images or max(2 * batch, 16))


def _drawn(captioner: "Captioner", count: int, side: int) -> list[Any]:
    """Prepared images: the engine alone is measured from here."""
    world = World(WorldSettings(image_size=side))
    rendered: Iterator[NDArray[np.uint8]] = (world.render(world.scene(_SPLIT, i)) for i in range(count))
    return [captioner.prepare(image) for image in rendered]


def _caption_all(
    captioner: "Captioner", pictures: list[Any], count: int, settings: RecaptionSettings
) -> list[Caption]:
    sampling = SamplingParams(max_new_tokens=settings.max_new_tokens, ignore_eos=True)
    requests = (
        CaptionRequest(i, str(settings.prompt_text), (pictures[i % len(pictures)],), sampling)
        for i in range(count)
    )
    captions = list(captioner.caption(requests))
    for caption in captions:
        if caption.error is not None:
            raise VilaError(f"a drawn image cannot be captioned: {caption.error.message}")
    return captions


def _timed(captioner: "Captioner", pictures: list[Any], count: int, settings: RecaptionSettings) -> float:
    start = time.perf_counter()
    _caption_all(captioner, pictures, count, settings)
    return time.perf_counter() - start


def _piped(settings: RecaptionSettings, source: Path, out: Path, images: int) -> float:
    """Images a second from files to committed rows; opening the model does not count."""
    summary = run(settings.model_copy(update={"source": str(source), "out": str(out)}))
    if summary.errors_in_output:
        raise VilaError(f"{summary.errors_in_output} of {images} drawn images could not be captioned: {out}")
    return summary.images / summary.seconds


def _written(folder: Path, count: int, side: int) -> Path:
    """A folder with a tar of `count` scenes."""
    target = folder / f"scenes-{count}"
    if not target.exists():
        plan = ShardPlan(WorldSettings(image_size=side), _SPLIT, count, shard_size=count)
        ((name, scenes),) = plan.shards()
        target.mkdir()
        (target / name).write_bytes(shard_bytes(plan, scenes))
    return target


def _flops(captioner: "Captioner", picture: Any, case: Case) -> float:
    checkpoint = getattr(captioner, "checkpoint", None)
    if checkpoint is None:
        return 0.0
    return caption_flops(
        checkpoint.config,
        tiles=len(picture.tiles),
        visual=picture.num_tokens,
        prompt=case.prompt_tokens,
        new=case.new_tokens,
    )


def _ceiling(captioner: "Captioner", settings: RecaptionSettings) -> float:
    """Of the type that the model multiplies in; 0 where the model is another program's, or its types are several."""
    plan = getattr(captioner, "plan", None)
    if plan is None or plan.low_bits:
        return 0.0
    device = "cuda" if getattr(captioner, "is_on_gpu", False) else "cpu"
    return product_ceiling(
        plan.packed_dtype or plan.model_dtype, settings.threads or available_cores(), device
    )
