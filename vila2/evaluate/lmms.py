"""lmms-eval drives our engine: `python -m lmms_eval --model vila2_fast --model_args checkpoint=CKPT --tasks mme`.

Installing the package announces `manifest` to lmms-eval (0.7 and later) under its entry point `lmms_eval.models`.
Requests about one picture share its encode and its prefill. Only `generate_until` is there: the engine gives no
likelihoods, and tasks of several rounds or about videos are refused by name.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from lmms_eval.api.model import lmms
from numpy.typing import NDArray

from vila2.backends.native import NativeCaptioner, open_checkpoint
from vila2.errors import UsageError, VilaError
from vila2.types import CaptionRequest, SamplingParams

NAME = "vila2_fast"
MAX_NEW_TOKENS = 1024  # what lmms-eval's own models take where a task does not say
MAX_RUN = 64  # requests that wait until it is known how many share a picture


def manifest() -> Any:
    """What lmms-eval asks an entry point for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=NAME, simple_class_path=f"{__name__}.Vila2Fast")


class Vila2Fast(lmms):  # type: ignore[misc]  # lmms-eval has no types
    """A VILA or LLaVA checkpoint behind lmms-eval's interface.

    `--model_args` takes checkpoint (or pretrained), precision, template, threads, max_num_seqs and deterministic.
    lmms-eval's own batch_size is not needed: the engine batches by what fits; its device is used if it is not cuda:N.
    """

    is_simple = True

    def __init__(
        self,
        checkpoint: str | None = None,
        pretrained: str | None = None,
        device: str | None = None,
        precision: str = "bf16",
        template: str | None = None,
        threads: int | str | None = None,
        max_num_seqs: int | str | None = None,
        deterministic: bool | str = False,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UsageError(
                f"{NAME} is one process, which batches by itself: start lmms-eval without a launcher"
            )
        path = checkpoint or pretrained
        if path is None or unknown:
            what = f"no argument {next(iter(unknown))!r}" if unknown else "no checkpoint"
            raise UsageError(f"--model_args of {NAME}: {what}; give checkpoint=PATH, precision=bf16, ...")
        self.captioner: NativeCaptioner = open_checkpoint(
            path,
            device="auto" if device is None else str(device).partition(":")[0],
            precision=precision,
            template=template,
            batch_size=None if max_num_seqs is None else int(max_num_seqs),
            threads=None if threads is None else int(threads),
            deterministic=str(deterministic).lower() in ("true", "1"),
        )
        self.batch_size = batch_size

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """One answer a request, in order. VilaError if a request cannot be answered at all."""
        answers: dict[int, str] = {}
        for caption in self.captioner.caption(self._requests(requests)):
            if caption.error is not None:
                raise VilaError(f"{requests[caption.id].args[4]}: {caption.error.message}")
            answers[caption.id] = caption.text
            context, settings = requests[caption.id].args[:2]
            self.cache_hook.add_partial("generate_until", (context, settings), caption.text)
        return [answers[i] for i in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            f"{NAME} writes answers and gives no likelihoods: choose a generate_until task"
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError(f"{NAME} answers single turns: choose a generate_until task")

    def _requests(self, requests: Sequence[Any]) -> Iterator[CaptionRequest]:
        for number, (images, members) in enumerate(self._runs(requests)):
            for i in members:
                context, settings = requests[i].args[:2]
                yield CaptionRequest(
                    id=i,
                    prompt=context,
                    images=images,
                    sampling=sampling_of(settings),
                    image_key=number if images else None,
                    num_siblings=len(members),
                    rng_key=i,
                )

    def _runs(self, requests: Sequence[Any]) -> Iterator[tuple[tuple[Any, ...], list[int]]]:
        """Prepared images, and which requests show just these: by document, and over neighbours that look the same,
        because many benchmarks ask of a picture in several documents, one after the other."""
        documents: dict[tuple[Any, ...], list[int]] = {}
        for i, request in enumerate(requests):
            documents.setdefault(request.args[2:], []).append(i)  # what shows it, document, task, split
        seen: bytes | None = None
        images: tuple[Any, ...] = ()
        members: list[int] = []
        for (to_visual, document, task, split), of_document in documents.items():
            pictures = _pictures(to_visual, self.task_dict[task][split][document], task)
            digest = _digest(pictures)
            if members and (digest != seen or len(members) >= MAX_RUN):
                yield images, members
                members = []
            if not members:
                prepare = self.captioner.checkpoint.image_processor.prepare
                seen, images = digest, tuple(prepare(picture, len(pictures)) for picture in pictures)
            members = members + of_document
        if members:
            yield images, members


def _pictures(to_visual: Any, document: Any, task: str) -> list[NDArray[np.uint8]]:
    """The RGB images (height, width, 3) that a task shows of a document."""
    found = (to_visual(document) if to_visual is not None else None) or []
    found = list(found) if isinstance(found, (list, tuple)) else [found]
    if not all(hasattr(image, "convert") for image in found):
        raise UsageError(f"{task} shows something that is no image: {NAME} sees images only")
    return [np.asarray(image.convert("RGB")) for image in found]


def _digest(pictures: Iterable[NDArray[np.uint8]]) -> bytes:
    digest = hashlib.blake2b()
    for picture in pictures:
        digest.update(f"{picture.shape}".encode())
        digest.update(picture.tobytes())
    return digest.digest()


def sampling_of(settings: Mapping[str, Any]) -> SamplingParams:
    """A task's generation_kwargs as ours. UsageError for a beam search, which the engine has not."""
    if int(settings.get("num_beams") or 1) > 1:
        raise UsageError(f"{NAME} has no beam search: give --gen_kwargs num_beams=1")
    temperature = float(settings.get("temperature") or 0.0)
    if settings.get("do_sample") is False:
        temperature = 0.0
    until = settings.get("until") or ()
    return SamplingParams(
        temperature=temperature,
        top_p=float(settings.get("top_p") or 1.0) if temperature else 1.0,
        top_k=int(settings.get("top_k") or 0) if temperature else 0,
        max_new_tokens=int(settings.get("max_new_tokens") or MAX_NEW_TOKENS),
        stop=(until,) if isinstance(until, str) else tuple(text for text in until if text),
    )
