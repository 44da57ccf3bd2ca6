"""Several specialists asked about one image: it is decoded once, and passes the tower once for all of them.

That is exact where their towers are the same, which holds for specialists that do not train it; whether it does is
checked by their weights. Those with one projector share its visual tokens too; one that trained its projector has the
tower's features go through that as well. The prefill is each specialist's own in any case.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
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
    from vila2.model.vision import VisionTower

_TOWER, _PROJECTOR = "vision_tower", "mm_projector"
_QUEUED = 64  # requests that wait for one specialist before no more are pulled
_KEPT = 512  # images whose visual tokens wait for a specialist; one that comes later encodes again


def open_panel(models: Mapping[str, str]) -> Callable[[RecaptionSettings], "Panel"]:
    """What opens the specialists of `models` (prompt -> checkpoint) for a recaption that asks these prompts."""

    def opened(settings: RecaptionSettings) -> Panel:
        texts: dict[str, str] = {}
        for prompt in choose_prompts(settings).prompts:
            texts |= {_plain(text, prompt.name): prompt.name for text in prompt.texts}
        projectors = _seeing_alike(dict.fromkeys(models.values()))
        members: dict[str, NativeCaptioner] = {}
        for path in projectors:
            members[path] = open_native(settings.model_copy(update={"model": path}))
        eyes = {id(members[path]): digest for path, digest in projectors.items()}
        return Panel({name: members[path] for name, path in models.items()}, texts, eyes)

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

    `members`: prompt -> captioner; `texts`: wording -> prompt; `eyes`: id of a captioner -> digest of its projector.
    """

    def __init__(
        self, members: Mapping[str, NativeCaptioner], texts: Mapping[str, str], eyes: Mapping[int, str]
    ) -> None:
        self.members, self.texts = dict(members), dict(texts)
        self.distinct = list({id(member): member for member in members.values()}.values())
        first = self.distinct[0]
        of_eyes: dict[str, list[NativeCaptioner]] = {}
        for member in self.distinct:  # what they have in common is kept in memory once
            alike = of_eyes.setdefault(eyes[id(member)], [])
            alike.append(member)
            member.checkpoint.model.vision = first.checkpoint.model.vision
            member.checkpoint.model.projector = alike[0].checkpoint.model.projector
            # One stream for all encodes: whoever reads visual tokens then waits for them, whoever had them made.
            member.engine.runner.vision = first.engine.runner.vision
        self.model_digest = digest_of({name: member.model_digest for name, member in members.items()})
        self.model_name = " + ".join(member.model_name for member in self.distinct)
        self.description = f"{len(self.distinct)} specialists, one encode an image; {first.description}"
        groups = list(of_eyes.values())
        self.encoder = _Encoder(
            _Tower(first.checkpoint.model.vision),
            [group[0].engine.runner.encode for group in groups],
            len(self.distinct),
        )
        for number, group in enumerate(groups):
            for member in group:
                member.engine.runner.encode = partial(self.encoder, number)  # type: ignore[method-assign]

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


class _Tower:
    """A tower whose passes can be played back: a second projector reads what it made for the first."""

    def __init__(self, tower: "VisionTower") -> None:
        self._made: list[Any] = []
        self._played: Iterator[Any] | None = None
        self._forward = tower.forward
        tower.forward = self._pass  # type: ignore[method-assign]

    def begin(self) -> None:
        """What is passed from now on is kept."""
        self._made.clear()
        self._played = None

    def again(self) -> None:
        """The next passes are those that were kept, in the same order."""
        self._played = iter(self._made)

    def end(self) -> None:
        self.begin()

    def _pass(self, tiles: Any) -> Any:
        if self._played is not None:
            return next(self._played)
        features = self._forward(tiles)
        self._made.append(features)
        return features


class _Encoder:
    """An encode whose results wait until every member has had them. `encodes`: one for each projector."""

    def __init__(
        self, tower: _Tower, encodes: list[Callable[[list["PreparedImage"]], list[Any]]], num_users: int
    ) -> None:
        self._tower, self._encodes, self._num_users = tower, encodes, num_users
        self._kept: OrderedDict[int, tuple[PreparedImage, list[Any], int]] = (
            OrderedDict()
        )  # the image keeps its id taken
        self.num_encoded = self.num_shared = 0

    def __call__(self, eyes: int, images: list["PreparedImage"]) -> list[Any]:
        """Visual tokens (num_tokens, hidden) of each image, by the projector number `eyes`."""
        known = {id(image) for image in images if id(image) in self._kept}
        new = list({id(image): image for image in images if id(image) not in known}.values())
        self.num_encoded += len(new)
        self.num_shared += len(known)
        for image, tokens in zip(new, self._of_all(new), strict=True):
            self._kept[id(image)] = (image, tokens, self._num_users)
        found = [self._kept[id(image)][1][eyes] for image in images]
        for place in dict.fromkeys(map(id, images)):
            image, kept, left = self._kept.pop(place)
            if left > 1:
                self._kept[place] = (image, kept, left - 1)
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return found

    def _of_all(self, images: list["PreparedImage"]) -> list[list[Any]]:
        """The visual tokens of each image by every projector, from one pass through the tower."""
        if not images:
            return []
        found = []
        self._tower.begin()
        for encode in self._encodes:
            found.append(encode(images))
            self._tower.again()
        self._tower.end()
        return [list(tokens) for tokens in zip(*found, strict=True)]


def _seeing_alike(paths: Iterable[str]) -> dict[str, str]:
    """Checkpoint -> digest of its projector. UsageError unless these checkpoints, in the layout that training writes,
    have one tower."""
    towers = {path: _digest(path, _TOWER) for path in paths}
    first = next(iter(towers))
    for path, tower in towers.items():
        if tower != towers[first]:
            raise UsageError(f"{path} sees with another tower than {first}: one encode cannot serve both")
    return {path: _digest(path, _PROJECTOR) for path in towers}


def _digest(checkpoint: str, part: str) -> str:
    """Of the weights of a part. UsageError if there are none."""
    files = sorted((Path(checkpoint) / part).glob("*.safetensors"))
    if not files:
        raise UsageError(
            f"{checkpoint} has no weights in {part}: specialists that are asked together need them there"
        )
    return digest_of([[file.name, digest_of_file(file)] for file in files])
