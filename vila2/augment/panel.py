"""Several specialists asked about one image: it is decoded, encoded and projected once for all of them.

That is exact where their towers and projectors are the same, which holds for specialists that train the decoder alone.
Where a specialist trains its own tower or projector, its visual tokens are its own and so is its encode. The prefill
is each specialist's own in any case.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vila2.augment.step import digest_of, digest_of_file
from vila2.backends.native import NativeCaptioner, open_native
from vila2.config import RecaptionSettings
from vila2.errors import UsageError
from vila2.recaption.prompts import choose_prompts, parse_text
from vila2.types import Caption, CaptionRequest

if TYPE_CHECKING:
    from numpy import uint8
    from numpy.typing import NDArray

    from vila2.model.images import PreparedImage

_PARTS = ("vision_tower", "mm_projector")
_QUEUED = 64  # requests that wait for one specialist before no more are pulled
_KEPT = 512  # images whose visual tokens wait for a specialist; one that comes later encodes again


def open_panel(models: Mapping[str, str]) -> Callable[[RecaptionSettings], "Panel"]:
    """What opens the specialists of `models` (prompt -> checkpoint) for a recaption that asks these prompts."""

    def opened(settings: RecaptionSettings) -> Panel:
        texts: dict[str, str] = {}
        for prompt in choose_prompts(settings).prompts:
            texts |= {_plain(text, prompt.name): prompt.name for text in prompt.texts}
        _check_towers(dict.fromkeys(models.values()))
        members: dict[str, NativeCaptioner] = {}
        for path in dict.fromkeys(models.values()):
            members[path] = open_native(settings.model_copy(update={"model": path}))
        return Panel({name: members[path] for name, path in models.items()}, texts)

    return opened


def _plain(text: str, prompt: str) -> str:
    """A wording as a request has it."""
    parsed = parse_text(text, prompt)
    if parsed.fields:
        raise UsageError(
            f"prompt {prompt!r}: specialists that are asked together need wordings without fields"
        )
    return parsed.fill({})


class Panel:
    """A captioner made of others that see alike. Requests go to the one that knows their prompt, by its wording.

    `members`: prompt -> captioner; `texts`: wording -> prompt.
    """

    def __init__(self, members: Mapping[str, NativeCaptioner], texts: Mapping[str, str]) -> None:
        self.members, self.texts = dict(members), dict(texts)
        self.distinct = list({id(member): member for member in members.values()}.values())
        first = self.distinct[0]
        for other in self.distinct[1:]:  # what they have in common is kept in memory once
            other.checkpoint.model.vision = first.checkpoint.model.vision
            other.checkpoint.model.projector = first.checkpoint.model.projector
        self.model_digest = digest_of({name: member.model_digest for name, member in members.items()})
        self.model_name = " + ".join(member.model_name for member in self.distinct)
        self.description = f"{len(self.distinct)} specialists, one encode an image; {first.description}"
        self.encoder = _Encoder(first.engine.runner.encode, len(self.distinct))
        for member in self.distinct:
            member.engine.runner.encode = self.encoder  # type: ignore[method-assign]

    def prepare(self, image: "NDArray[uint8]") -> "PreparedImage":
        return self.distinct[0].prepare(image)

    def caption(self, requests: Iterable[CaptionRequest | None]) -> Iterator[Caption]:
        """See `Captioner.caption`. The specialists take turns; each runs until a caption of its own is finished."""
        source = iter(requests)
        lanes = [_Lane(member) for member in self.distinct]
        of_member = {id(lane.member): lane for lane in lanes}
        exhausted = False
        try:
            while True:
                while not exhausted and all(len(lane.queue) < _QUEUED for lane in lanes):
                    try:
                        request = next(source)
                    except StopIteration:
                        exhausted = True
                        break
                    if request is None:
                        break
                    of_member[id(self._member(request))].add(request, self._num_prompts(request))
                busy = [lane for lane in lanes if lane.pending]
                for lane in busy:
                    yield lane.next()
                if not busy:
                    if exhausted:
                        return
                    time.sleep(0.001)  # nothing to do until the source has a request
        finally:
            for lane in lanes:
                lane.close()

    def _member(self, request: CaptionRequest) -> NativeCaptioner:
        return self.members[self.texts[request.prompt]]

    def _num_prompts(self, request: CaptionRequest) -> int:
        """How many of an image's prompts go to the same member."""
        member = self._member(request)
        return min(request.num_siblings, sum(other is member for other in self.members.values()))

    def stats(self) -> dict[str, float]:
        """Sums over the members; images are counted as they were encoded."""
        totals: dict[str, float] = {}
        for member in self.distinct:
            for name, value in member.stats().items():
                totals[name] = totals.get(name, 0.0) + value
        return totals | {"images_encoded": self.encoder.num_encoded, "images_shared": self.encoder.num_shared}

    def close(self) -> None:
        for member in self.distinct:
            member.close()


class _Lane:
    """One member at work on the requests of its own."""

    def __init__(self, member: NativeCaptioner) -> None:
        self.member = member
        self.queue: deque[CaptionRequest] = deque()
        self.pending = 0
        self._captions = member.caption(self._requests())

    def add(self, request: CaptionRequest, num_siblings: int) -> None:
        self.queue.append(replace(request, num_siblings=num_siblings))
        self.pending += 1

    def next(self) -> Caption:
        """The next finished caption; only while one is pending."""
        caption = next(self._captions)
        self.pending -= 1
        return caption

    def close(self) -> None:
        close: Any = getattr(self._captions, "close", None)
        if close is not None:
            close()

    def _requests(self) -> Iterator[CaptionRequest | None]:
        while True:
            yield self.queue.popleft() if self.queue else None


class _Encoder:
    """An encode whose results wait until every member has had them."""

    def __init__(self, encode: Callable[[list["PreparedImage"]], list[Any]], num_users: int) -> None:
        self._encode, self._num_users = encode, num_users
        self._kept: OrderedDict[int, tuple[PreparedImage, Any, int]] = (
            OrderedDict()
        )  # the image keeps its id taken
        self.num_encoded = self.num_shared = 0

    def __call__(self, images: list["PreparedImage"]) -> list[Any]:
        """Visual tokens (num_tokens, hidden) of each image."""
        known = {id(image) for image in images if id(image) in self._kept}
        new = list({id(image): image for image in images if id(image) not in known}.values())
        self.num_encoded += len(new)
        self.num_shared += len(known)
        found = dict(zip(map(id, new), self._encode(new) if new else [], strict=True))
        for image in new:
            self._kept[id(image)] = (image, found[id(image)], self._num_users)
        tokens = [self._kept[id(image)][1] for image in images]
        for place in dict.fromkeys(map(id, images)):
            image, kept, left = self._kept.pop(place)
            if left > 1:
                self._kept[place] = (image, kept, left - 1)
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return tokens


def _check_towers(paths: Iterable[str]) -> None:
    """UsageError unless these checkpoints, in the layout that training writes, have one tower and one projector."""
    found: dict[str, str] = {}
    for path in paths:
        files = sorted(file for part in _PARTS for file in (Path(path) / part).glob("*.safetensors"))
        found[path] = digest_of([[file.name, digest_of_file(file)] for file in files])
        if not files or found[path] != next(iter(found.values())):
            raise UsageError(
                f"{path} sees with another tower or projector than {next(iter(found))}: one encode cannot serve both"
            )
