"""What a run has to do: which samples lack which prompts, and how one of them is loaded."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from vila2.backends import Captioner
from vila2.config import RecaptionSettings
from vila2.data.dali import BATCH_SIZE, DaliDecoder, choose_decoder
from vila2.data.decode import Decoded, DecodeError, DecodeLimits, decode_image, image_digest
from vila2.data.done import DoneSet
from vila2.data.source import Shard, ShardRange, Source, assign
from vila2.recaption.feed import Job, Loaded
from vila2.types import SampleError


@dataclass(frozen=True, slots=True)
class Cut:
    """What one of several processes on a machine works on: samples `first` to `stop` of the machine's share.

    The process has a rank of its own in its settings, for its lock and its parts; `rank` of `world_size` here is the
    machine's, which says whose share is cut.
    """

    first: int
    stop: int
    rank: int = 0
    world_size: int = 1
    num_pending: int = 0  # samples that lack a prompt, when the cut was made


class Plan:
    """The samples of a rank's share that lack a prompt, and the error rows that it does again."""

    def __init__(
        self,
        source: Source,
        settings: RecaptionSettings,
        prompts: Sequence[str],
        done: DoneSet,
        redo: Sequence[tuple[str, int, str]] = (),
        cut: Cut | None = None,
    ) -> None:
        self.prompts, self.done = tuple(prompts), done
        self._ranges = {part.shard.name: part for part in share_of(source, settings, cut)}
        self._redo: dict[str, dict[int, list[str]]] = defaultdict(dict)
        for shard, index, prompt in redo:
            self._redo[shard].setdefault(index, []).append(prompt)
        wanted = self._ranges.keys() | self._redo.keys()
        self._shards = [shard for shard in source.shards if shard.name in wanted]
        self.num_samples = sum(len(part) for part in self._ranges.values())
        self.num_pending = sum(len(indices) for _, indices in self.pending())
        self.num_done = done.num_rows - len(redo)

    def pending(self) -> Iterator[tuple[Shard, NDArray[np.int64]]]:
        """Shard by shard, the samples that must be read, ascending. Found anew each time: a list would be large."""
        for shard in self._shards:
            part = self._ranges.get(shard.name)
            indices = np.array(sorted(self._redo.get(shard.name, ())), np.int64)
            if part is not None:
                indices = np.union1d(
                    indices, self.done.pending(shard.name, part.start, part.stop, self.prompts)
                )
            if len(indices):
                yield shard, indices

    def jobs(self) -> Iterator[Job]:
        """Read what is to do, in the source's order. Finished samples are not read at all."""
        for shard, indices in self.pending():
            yield from self.read(shard, indices.tolist())

    def read(self, shard: Shard, indices: list[int]) -> Iterator[Job]:
        for sample in shard.read(indices):
            yield Job(sample, self._wanted(sample.shard, sample.index))

    def _wanted(self, shard: str, index: int) -> tuple[str, ...]:
        part = self._ranges.get(shard)
        wanted: set[str] = set(self._redo.get(shard, {}).get(index, ()))
        if part is not None and part.start <= index < part.stop:
            wanted.update(self.done.missing_prompts(shard, index, self.prompts))
        return tuple(prompt for prompt in self.prompts if prompt in wanted)


def share_of(source: Source, settings: RecaptionSettings, cut: Cut | None = None) -> list[ShardRange]:
    """The samples of this rank, or of a cut of it.

    `limit` counts over all ranks: each takes its part from the start of its share.
    """
    rank, world = (settings.rank, settings.world_size) if cut is None else (cut.rank, cut.world_size)
    ranges = assign(source, rank, world)
    if settings.limit is not None:
        ranges = _clip(ranges, 0, settings.limit * (rank + 1) // world - settings.limit * rank // world)
    return ranges if cut is None else _clip(ranges, cut.first, cut.stop)


def cut_share(
    source: Source, settings: RecaptionSettings, prompts: Sequence[str], done: DoneSet, count: int
) -> list[Cut]:
    """This rank's share in `count` cuts without overlap, with as many samples to do in each as in any other."""
    ranges = share_of(source, settings)
    todo = [len(done.pending(part.shard.name, part.start, part.stop, prompts)) for part in ranges]
    shares = [sum(todo) * number // count for number in range(count + 1)]
    starts = shares[1:-1]
    places: list[int] = []
    offset = seen = 0
    for part, num_pending in zip(ranges, todo, strict=True):
        inside = [start - seen for start in starts if seen <= start < seen + num_pending]
        if inside:
            indices = done.pending(part.shard.name, part.start, part.stop, prompts)
            places += [offset + int(indices[number]) - part.start for number in inside]
        offset += len(part)
        seen += num_pending
    places += [offset] * (count - 1 - len(places))  # nothing is left to do for these
    bounds = [0, *places, offset]
    return [
        Cut(first, stop, settings.rank, settings.world_size, end - start)
        for (first, stop), (start, end) in zip(pairwise(bounds), pairwise(shares), strict=True)
    ]


def _clip(ranges: Sequence[ShardRange], first: int, stop: int) -> list[ShardRange]:
    """The samples `first` to `stop` of `ranges`, counted through all of them."""
    clipped: list[ShardRange] = []
    offset = 0
    for part in ranges:
        start, end = max(first - offset, 0), min(stop - offset, len(part))
        if start < end:
            clipped.append(ShardRange(part.shard, part.start + start, part.start + end))
        offset += len(part)
    return clipped


def make_loader(captioner: Captioner, settings: RecaptionSettings) -> Callable[[Job], Loaded]:
    """What a decode thread does with a job: bytes to pixels to what the captioner wants. Bad bytes are an error row."""
    limits = DecodeLimits(
        max_pixels=settings.max_pixels,
        min_side=settings.min_side,
        max_aspect=settings.max_aspect,
    )

    decode = open_decoder(captioner, settings, limits)
    prepare_file = getattr(captioner, "prepare_file", None)  # of those that may send the file itself

    def load(job: Job) -> Loaded:
        sample, light = job.sample, _without_bytes(job)
        digest = "" if sample.image is None else image_digest(sample.image)
        if sample.error is not None:
            return Loaded(light, error=sample.error, image_digest=digest)
        assert sample.image is not None  # a sample has an image or an error
        try:
            image = decode(sample.image)
        except DecodeError as error:
            return Loaded(light, error=SampleError(error.kind, str(error)), image_digest=digest)
        prepared = (
            prepare_file(image.pixels, sample.image) if prepare_file else captioner.prepare(image.pixels)
        )
        size = getattr(prepared, "nbytes", image.pixels.nbytes)
        return Loaded(light, prepared, None, image.width, image.height, digest, size)

    return load


def open_decoder(
    captioner: Captioner, settings: RecaptionSettings, limits: DecodeLimits
) -> Callable[[bytes], Decoded]:
    """What turns bytes into pixels, by `--decoder`. With `--resize fast` DALI resizes too, where that is all."""
    upright = settings.orientation == "apply"
    on_gpu = bool(getattr(captioner, "is_on_gpu", False))
    if choose_decoder(settings.decoder, on_gpu=on_gpu) == "cpu":
        return partial(decode_image, limits=limits, apply_orientation=upright)
    side = getattr(captioner, "square_side", None) if settings.resize == "fast" else None
    device = "mixed" if on_gpu else "cpu"
    return DaliDecoder(device=device, side=side, limits=limits, apply_orientation=upright).decode


def decode_workers(settings: RecaptionSettings, captioner: Captioner) -> int:
    """Threads that decode: as many as the settings say, else by what decodes.

    `--threads` says what a run may take of the machine, so beside a model on the CPU they go by it.
    """
    if settings.decode_workers is not None:
        return settings.decode_workers
    on_gpu = bool(getattr(captioner, "is_on_gpu", False))
    if settings.threads is not None and not on_gpu:
        return max(1, min(16, settings.threads // 2))
    return default_decode_workers(choose_decoder(settings.decoder, on_gpu=on_gpu))


def default_decode_workers(decoder: str) -> int:
    """Threads that decode: they run beside the model, which uses every core, and seldom need more than a few.

    Where DALI decodes they only wait for it: enough of them for the batch that it decodes and for the next one.
    """
    if decoder == "dali":
        return 2 * BATCH_SIZE
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(2, min(16, cores // 2))


def _without_bytes(job: Job) -> Job:
    """The job without the encoded image, so that a sample in flight does not hold its file in memory."""
    return replace(job, sample=replace(job.sample, image=None))
