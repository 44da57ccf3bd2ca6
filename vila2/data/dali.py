"""JPEGs decoded in batches by NVIDIA DALI: by the GPU's nvJPEG ("mixed"), or by the CPU, which tests the same code.

What comes out is what `decode_image` gives, within a few grey levels: DALI resamples in its own way (measured: at
most 3 levels after resizing on the CPU). Everything that is no plain JPEG, and every JPEG that DALI cannot decode, is
left to `decode_image`: its pixels and its typed errors are the product's. One bad image fails DALI's whole batch, so
the sample that its error names is taken out and the rest runs again.

One verdict differs: a JPEG of the right length whose bits were flipped may decode here, into damaged pixels, where
`decode_image` calls it corrupt. Only decoding it once more on the CPU would tell, at the cost of all that DALI gains:
who must know takes `--decoder cpu`.
"""

import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from importlib.util import find_spec
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vila2.data.decode import Decoded, DecodeError, DecodeLimits, decode_image
from vila2.errors import UsageError

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

Decode = Callable[[bytes], Decoded]
_Entry = tuple[bytes, "Future[Decoded | None]"]

_SAMPLE = re.compile(r"sample #(\d+)")
BATCH_SIZE = 64
_GATHER_S = 0.002  # how long a batch waits for more images once it has one


def has_dali() -> bool:
    """Whether DALI is installed; it is not imported for that."""
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


def choose_decoder(wanted: str, *, on_gpu: bool) -> str:
    """`auto` is dali where the model runs on a GPU and DALI is installed, else cpu. UsageError if dali cannot be."""
    if wanted == "auto":
        return "dali" if on_gpu and has_dali() else "cpu"
    if wanted == "dali" and not has_dali():
        raise UsageError(
            "--decoder dali: DALI is not installed here; install vila2-fast[gpu], or use --decoder cpu"
        )
    return wanted


class DaliDecoder:
    """`decode` from many threads; one thread gathers their images into batches of up to `batch_size` and runs DALI.

    With `side` pixels come out resized to side x side (bicubic, antialiased), on the device that decodes; `width` and
    `height` of a `Decoded` are the image's own all the same. `device` is "mixed" (a GPU) or "cpu". A batch holds at
    most one image of each thread that waits. Flipped bits inside a JPEG may pass as pixels (see the module).
    """

    def __init__(
        self,
        *,
        device: str = "mixed",
        side: int | None = None,
        batch_size: int = BATCH_SIZE,
        num_threads: int = 2,
        limits: DecodeLimits | None = None,
        apply_orientation: bool = True,
    ) -> None:
        if device not in ("mixed", "cpu"):
            raise ValueError(f"device must be mixed or cpu, got {device!r}")
        self.limits = limits or DecodeLimits()
        self.apply_orientation, self.side = apply_orientation, side
        self._batch_size = batch_size
        self._pipeline = _pipeline(device, side, batch_size, num_threads, apply_orientation)
        self._waiting: SimpleQueue[_Entry | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="vila2-dali", daemon=True)
        self._thread.start()

    def decode(self, data: bytes) -> Decoded:
        """One image; waits for the batch that takes it. Raises DecodeError and nothing else."""
        if self._is_plain_jpeg(data):
            future: Future[Decoded | None] = Future()
            self._waiting.put((data, future))
            decoded = future.result()
            if decoded is not None:
                return decoded
        return decode_image(data, self.limits, apply_orientation=self.apply_orientation)

    def decode_batch(self, images: Sequence[bytes]) -> list[Decoded | None]:
        """Plain JPEGs, at most `batch_size`; None for each that DALI cannot decode. From one thread at a time."""
        results: list[Decoded | None] = [None] * len(images)
        left = list(range(len(images)))
        while left:
            bad = self._try([images[place] for place in left], left, results)
            if bad is None:
                break
            del left[bad]
        return results

    def _try(self, images: list[bytes], places: list[int], results: list[Decoded | None]) -> int | None:
        """Decode into `results`; returns which of the images is bad, None if all went well or none is named."""
        try:
            pixels, sizes = self._run(images)
        except RuntimeError as error:
            self._pipeline.reset()
            found = _SAMPLE.search(str(error))
            # Where no sample is to blame by name, the CPU shall judge all that are left.
            return int(found[1]) if found is not None and int(found[1]) < len(images) else None
        for place, image, (height, width) in zip(places, pixels, sizes, strict=True):
            results[place] = Decoded(image, width, height)
        return None

    def close(self) -> None:
        """Stop the thread once what waits is decoded."""
        self._waiting.put(None)
        self._thread.join(timeout=10)

    def _is_plain_jpeg(self, data: bytes) -> bool:
        """Three or one channels, within the limits; what breaks one is told by `decode_image`."""
        if simplejpeg is None or not data.startswith(b"\xff\xd8\xff"):
            return False
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
            self.limits.check(width, height)
        except (ValueError, DecodeError):
            return False
        return colorspace in ("YCbCr", "Gray")

    def _run(self, images: list[bytes]) -> tuple[list[NDArray[np.uint8]], list[tuple[int, int]]]:
        pixels, shapes = self._pipeline.run(jpegs=[np.frombuffer(data, dtype=np.uint8) for data in images])
        if hasattr(pixels, "as_cpu"):
            pixels = pixels.as_cpu()
        # DALI uses its buffers again in the next run.
        copies = [np.array(pixels.at(place)) for place in range(len(images))]
        return copies, [(int(shape[0]), int(shape[1])) for shape in map(shapes.at, range(len(images)))]

    def _serve(self) -> None:
        is_open = True
        while is_open:
            batch = self._gather()
            is_open = batch[-1] is not None
            taken = [entry for entry in batch if entry is not None]
            try:
                decoded = self.decode_batch([data for data, _ in taken])
            except Exception as error:
                for _, future in taken:
                    future.set_exception(error)
                continue
            for (_, future), result in zip(taken, decoded, strict=True):
                future.set_result(result)

    def _gather(self) -> list[_Entry | None]:
        """What waits, up to a batch, and what comes within a moment of it; ends with None when closed."""
        batch = [self._waiting.get()]
        with suppress(Empty):
            while len(batch) < self._batch_size and batch[-1] is not None:
                batch.append(self._waiting.get(timeout=_GATHER_S))
        return batch


def _pipeline(
    device: str, side: int | None, batch_size: int, num_threads: int, apply_orientation: bool
) -> Any:
    """Encoded bytes in, uint8 (height, width, 3) and the image's own shape out."""
    from nvidia.dali import Pipeline, fn, types

    pipeline = Pipeline(
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=0 if device == "mixed" else None,
        prefetch_queue_depth=1,  # a batch in, its pixels out: nothing is read ahead here
    )
    with pipeline:
        jpegs = fn.external_source(name="jpegs", dtype=types.UINT8, ndim=1)
        pixels = fn.decoders.image(
            jpegs,
            device=device,
            output_type=types.RGB,
            adjust_orientation=apply_orientation,
            jpeg_fancy_upsampling=True,  # as libjpeg interpolates colour, so that pixels stay near the CPU path's
        )
        if side is not None:
            pixels = fn.resize(pixels, size=(side, side), interp_type=types.INTERP_CUBIC, antialias=True)
        shapes = fn.peek_image_shape(jpegs, adjust_orientation=apply_orientation)
        pipeline.set_outputs(pixels, shapes)
    pipeline.build()
    return pipeline
