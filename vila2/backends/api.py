"""`vila2.load`: captions from Python, for a script or a notebook."""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vila2.backends.native import NativeCaptioner, open_checkpoint
from vila2.data.decode import DecodeLimits, decode_image
from vila2.types import Caption, CaptionRequest, SamplingParams


class CaptionModel:
    """A loaded checkpoint. Not thread-safe: one call at a time."""

    def __init__(self, captioner: NativeCaptioner) -> None:
        self.captioner = captioner

    def caption(
        self,
        images: Sequence[Any],
        prompt: str = "Describe the image in detail.",
        *,
        max_new_tokens: int = 64,
        ignore_eos: bool = False,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        drafts: Sequence[str] = (),
    ) -> list[Caption]:
        """One caption an image, in order.

        An image is a PIL image, a uint8 array (height, width, 3), encoded bytes, or a path. `drafts`, one an image,
        are texts that the captions will resemble: the same captions come sooner. Raises ValueError for another
        number of them, `vila2.data.decode.DecodeError` for an image that cannot be decoded.
        """
        if drafts and len(drafts) != len(images):
            raise ValueError(f"{len(drafts)} drafts for {len(images)} images: give one an image, or none")
        sampling = SamplingParams(
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            max_new_tokens=max_new_tokens,
            ignore_eos=ignore_eos,
        )
        requests = (
            CaptionRequest(
                i,
                prompt,
                (self.captioner.prepare(_pixels(image)),),
                sampling,
                rng_key=(seed << 32) + i,
                draft=drafts[i] if drafts else "",
            )
            for i, image in enumerate(images)
        )
        captions = {caption.id: caption for caption in self.captioner.caption(requests)}
        return [captions[i] for i in range(len(images))]

    def stats(self) -> dict[str, float]:
        """The engine's counters since the model was loaded."""
        return self.captioner.stats()

    def close(self) -> None:
        self.captioner.close()

    def __enter__(self) -> "CaptionModel":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load(
    checkpoint: str | Path,
    device: str = "auto",
    precision: str = "auto",
    *,
    template: str | None = None,
    batch_size: int | None = None,
    threads: int | None = None,
    deterministic: bool = False,
) -> CaptionModel:
    """Load a VILA or LLaVA checkpoint, or an engine directory of `vila2-fast build`.

    CheckpointError or UsageError, in one line, when it cannot be used.
    """
    return CaptionModel(
        open_checkpoint(
            checkpoint,
            device=device,
            precision=precision,
            template=template,
            batch_size=batch_size,
            threads=threads,
            deterministic=deterministic,
        )
    )


def _pixels(image: Any) -> NDArray[np.uint8]:
    if isinstance(image, (str, Path)):
        image = Path(image).read_bytes()
    if isinstance(image, bytes):
        return decode_image(image, DecodeLimits()).pixels
    if hasattr(image, "convert"):  # a PIL image
        image = np.asarray(image.convert("RGB"))
    array = np.ascontiguousarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"an image array must be uint8 (height, width, 3), got {array.dtype} {array.shape}")
    return array
