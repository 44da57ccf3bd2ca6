"""Captions from any OpenAI-compatible server (vLLM, SGLang, a hosted API, ...), behind the Captioner seam.

An image travels as a data URL, made once in a decode thread; each prompt is a chat completion of its own, and the
prompts of an image go to the same server. What a server writes is text, so loops are looked for in its words; our own
(`vila2-fast serve`) is told what else decides a caption, and finds them in its tokens.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from functools import partial
from queue import Empty, SimpleQueue
from time import sleep
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vila2.backends.http_client import ChatClient, ChatReply, ChatSettings, RequestFailed, ServedModel
from vila2.backends.http_fleet import MAX_IN_FLIGHT
from vila2.backends.http_image import EncodedImage, ImageEncoder
from vila2.config import RecaptionSettings, nearest
from vila2.engine.repetition import find_loop_reference
from vila2.errors import UsageError
from vila2.types import (
    Caption,
    CaptionRequest,
    ErrorKind,
    FinishReason,
    RepetitionRule,
    SampleError,
    SamplingParams,
)

IMAGE_MARK = "<image>"
MIN_IN_LINE = (
    8  # requests beyond those that the servers take: enough to tell a server that fails from requests that do
)
IDLE_S = 0.01  # how long to wait for an answer before asking the source again
FULL_S = 0.1  # the same while nothing more may be sent: only an answer changes that
GATHER_S = 0.04  # while requests are in line: answers are taken together, for each wake-up costs a warm cache
_TOO_LONG = re.compile(r"context|too long|too many tokens|max_model_len|maximum.{0,20}length", re.IGNORECASE)
_FINISH = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH, "repetition": FinishReason.REPETITION}


@dataclass(frozen=True, slots=True)
class _Sent:
    request: CaptionRequest
    future: "Future[ChatReply]"
    length_name: str


class HttpCaptioner:
    """Captions through a ChatClient. One thread iterates `caption`; `prepare` may run in any."""

    def __init__(
        self,
        client: ChatClient,
        model_digest: str,
        encoder: ImageEncoder,
        *,
        apply_orientation: bool = True,
        to_ours: bool = False,
    ) -> None:
        settings = client.settings
        self.client, self.encoder = client, encoder
        self._apply_orientation, self._to_ours = apply_orientation, to_ours
        self.model_name, self.model_digest = settings.model, model_digest
        names = ", ".join(server.name for server in client.fleet.servers)
        self.description = f"by {names}, up to {settings.max_in_flight} requests at once"
        self._length_name = "max_tokens"
        self._has_tried = False
        self._under_way: dict[int, _Sent] = {}
        self._finished: SimpleQueue[int] = SimpleQueue()

    def prepare(self, image: NDArray[np.uint8]) -> EncodedImage:
        """One RGB image (height, width, 3) to a data URL."""
        return self.encoder.encode(image)

    def prepare_file(self, image: NDArray[np.uint8], file: bytes) -> EncodedImage:
        """The same from an image and the file that it was decoded from, which may travel instead."""
        return self.encoder.encode(image, file, apply_orientation=self._apply_orientation)

    def caption(self, requests: Iterable[CaptionRequest | None]) -> Iterator[Caption]:
        """See `Captioner.caption`. VilaError when the servers are gone, or refuse everything."""
        source = iter(requests)
        exhausted = False
        try:
            while not exhausted or self._under_way:
                while not exhausted and len(self._under_way) < self._room():
                    try:
                        request = next(source)
                    except StopIteration:
                        exhausted = True
                        break
                    if request is None:
                        break
                    error = self._send(request)
                    if error is not None:
                        yield _failed(request, error)
                is_full = exhausted or len(self._under_way) >= self._room()
                yield from self._collect(FULL_S if is_full else IDLE_S)
        finally:
            for sent in self._under_way.values():
                sent.future.cancel()
            self._under_way.clear()
            self._finished = SimpleQueue()

    def _room(self) -> int:
        """Half as many more as the servers take, so that each finds its next, of an image that it knows, in line.

        The first request goes alone: what is wrong with the settings shows once, and not many times.
        """
        if not self._has_tried:
            return 1
        room = self.client.fleet.room
        return room + max(MIN_IN_LINE, room // 2)

    def _send(self, request: CaptionRequest) -> SampleError | None:
        try:
            content = place_images(request.prompt, list(request.images))
        except ValueError as error:
            return SampleError(ErrorKind.BAD_PROMPT, str(error))
        if self._to_ours:  # which reads `<image>` itself
            content = place_images(request.prompt.replace(IMAGE_MARK, ""), list(request.images))
            content[-1]["text"] = request.prompt
        body = {
            "messages": [{"role": "user", "content": content}],
            **sampling_fields(request.sampling, request.rng_key, self._length_name),
            **(our_fields(request) if self._to_ours else {}),
        }
        future = self.client.submit(body, home=request.image_key)
        self._under_way[request.id] = _Sent(request, future, self._length_name)
        finished = self._finished
        future.add_done_callback(lambda _: finished.put(request.id))
        return None

    def _has_line(self) -> bool:
        """Do enough requests wait for a place that the servers find their next for a while, by how fast they are?"""
        fleet = self.client.fleet
        in_line, in_flight = len(self._under_way) - fleet.in_flight, fleet.in_flight
        return in_flight > 0 and in_line * fleet.latency_s >= 5 * GATHER_S * in_flight

    def _collect(self, wait_s: float) -> Iterator[Caption]:
        """The captions that are there, after a moment's wait for the first."""
        if self._has_line():
            sleep(GATHER_S)
        take: Callable[[], int] = partial(self._finished.get, timeout=wait_s)
        while True:
            try:
                number = take()
            except Empty:
                return
            take = self._finished.get_nowait
            self._has_tried = True
            caption = self._caption(self._under_way.pop(number))
            if caption is not None:
                yield caption

    def _caption(self, sent: "_Sent") -> Caption | None:
        """The answer as a caption; None if the request was sent once more in other words."""
        request = sent.request
        try:
            reply = sent.future.result()
        except RequestFailed as error:
            if error.refused and sent.length_name == "max_tokens" and "max_completion_tokens" in str(error):
                self._length_name = "max_completion_tokens"  # OpenAI's newer models take no other
                self._send(request)
                return None
            return _failed(request, _refusal(error))
        if reply.refused:
            return _failed(
                request, SampleError(ErrorKind.CONTENT_FILTER, reply.text[:200] or "a content filter")
            )
        return make_caption(request, reply, find_loops=not self._to_ours)

    def stats(self) -> dict[str, float]:
        """See `ChatClient.stats`."""
        return self.client.stats()

    def close(self) -> None:
        self.client.close()


def place_images(prompt: str, images: list[EncodedImage]) -> list[dict[str, Any]]:
    """The content parts of a user turn: each image where its `<image>` stands, or first where there is none.

    ValueError if the prompt names another number of images.
    """
    pictures = [{"type": "image_url", "image_url": {"url": image.url}} for image in images]
    texts = [text.strip("\n") for text in prompt.split(IMAGE_MARK)]
    if len(texts) == 1:
        return [*pictures, {"type": "text", "text": prompt}]
    if len(texts) != len(images) + 1:
        raise ValueError(f"the prompt names {len(texts) - 1} images as {IMAGE_MARK}, but has {len(images)}")
    parts: list[dict[str, Any]] = [{"type": "text", "text": texts[0]}]
    for picture, text in zip(pictures, texts[1:], strict=True):
        parts += [picture, {"type": "text", "text": text}]
    return [part for part in parts if part.get("text") != ""]


def sampling_fields(
    sampling: SamplingParams, rng_key: int, length_name: str = "max_tokens"
) -> dict[str, Any]:
    """The request's fields of OpenAI's API; those that only vLLM, SGLang and ours know are sent only if asked for."""
    fields: dict[str, Any] = {length_name: sampling.max_new_tokens, "temperature": sampling.temperature}
    if sampling.temperature > 0:
        fields |= {"top_p": sampling.top_p, "seed": rng_key}
        if sampling.top_k:
            fields["top_k"] = sampling.top_k
    if sampling.stop:
        fields["stop"] = list(sampling.stop)
    if sampling.min_new_tokens:
        fields["min_tokens"] = sampling.min_new_tokens
    if sampling.ignore_eos:
        fields["ignore_eos"] = True
    return fields


def our_fields(request: CaptionRequest) -> dict[str, Any]:
    """What only our own server knows: the rule for loops, and how many requests will come with this image."""
    rule = request.sampling.repetition
    fields: dict[str, Any] = {"repetition": None if rule is None else asdict(rule)}
    return fields | {"siblings": request.num_siblings} if request.num_siblings > 1 else fields


def make_caption(request: CaptionRequest, reply: ChatReply, *, find_loops: bool = True) -> Caption:
    """A reply as a caption: cut at the stop strings and before a loop, as the native engine does."""
    text, reason = reply.text, _FINISH.get(reply.finish_reason, FinishReason.STOP)
    ends = [at for stop in request.sampling.stop if (at := text.find(stop)) >= 0]
    text = text[: min(ends)] if ends else text
    rule = request.sampling.repetition if find_loops else None
    kept = text if rule is None or reason is FinishReason.REPETITION else cut_loop(text, rule)
    if kept != text:
        text, reason = kept, FinishReason.REPETITION
    return Caption(
        request.id,
        text.strip(),
        finish_reason=reason,
        num_prompt_tokens=reply.num_prompt_tokens,
        token_count=reply.num_tokens,
    )


def cut_loop(text: str, rule: RepetitionRule) -> str:
    """The text without its looping end, words taken for tokens; the text itself if it does not loop."""
    words = list(re.finditer(r"\S+", text))
    numbers: dict[str, int] = {}
    ids = [numbers.setdefault(word.group(), len(numbers)) for word in words]
    length = find_loop_reference(ids, rule)
    return text[: words[len(words) - length - 1].end()] if length else text


def _failed(request: CaptionRequest, error: SampleError) -> Caption:
    return Caption(request.id, "", finish_reason=FinishReason.ERROR, error=error)


def _refusal(error: RequestFailed) -> SampleError:
    kind = ErrorKind.REQUEST_REFUSED if error.refused else ErrorKind.SERVER_ERROR
    if error.refused and _TOO_LONG.search(str(error)):
        kind = ErrorKind.PROMPT_TOO_LONG
    return SampleError(kind, str(error))


def open_http(settings: RecaptionSettings) -> HttpCaptioner:
    """The http backend with a run's settings. UsageError or VilaError when no server can serve them."""
    chat = ChatSettings(
        urls=settings.base_url,
        model=settings.model,
        key_variable=settings.api_key_env,
        timeout_s=settings.request_timeout,
        patience_s=settings.patience,
        max_in_flight=settings.batch_size or MAX_IN_FLIGHT,
    )
    client = ChatClient(chat)
    try:
        named = "model" in settings.model_fields_set
        listed = client.models()
        model = choose_model(listed, settings.model if named else "")
        for server in client.fleet.servers:
            for entry in listed[server.name] or ():
                if entry.name == model.name and entry.parallel:
                    server.start_at(entry.parallel)
        client.settings = replace(chat, model=model.name)
        encoder = ImageEncoder(settings.send_format, settings.send_size)
        return HttpCaptioner(
            client,
            model.digest or _digest_of_name(model.name),
            encoder,
            apply_orientation=settings.orientation == "apply",
            to_ours=model.is_ours,
        )
    except BaseException:
        client.close()
        raise


def choose_model(listed: dict[str, list[ServedModel] | None], name: str) -> ServedModel:
    """The model to ask for: the one named, or the only one that is served. UsageError if that is none or several."""
    known = [(url, models) for url, models in listed.items() if models]
    if not name:
        served = {model.name for _, models in known for model in models}
        if len(served) != 1:
            what = f"choose one of: {', '.join(sorted(served))}" if served else "the server does not list any"
            raise UsageError(f"--backend http needs --model NAME; {what}")
        name = served.pop()
    digests: set[str] = set()
    is_ours = len(known) == len(listed)
    for url, models in known:
        found = [model for model in models if model.name == name]
        if not found:
            names = [model.name for model in models]
            hint = nearest(name, names) or f"; it serves: {', '.join(names[:8])}"
            raise UsageError(f"the server at {url} has no model {name!r}{hint}")
        digests |= {found[0].digest} - {""}
        is_ours = is_ours and found[0].is_ours
    if len(digests) > 1:
        raise UsageError(f"the servers do not serve the same {name!r}: their weights have other digests")
    return ServedModel(name, digests.pop() if digests else "", is_ours)


def _digest_of_name(name: str) -> str:
    """A server that does not say what it serves is known by its model's name alone."""
    return hashlib.blake2b(json.dumps(["http", name]).encode(), digest_size=16).hexdigest()
