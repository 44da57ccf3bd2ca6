"""Images with every caption that they had, and what in them is so: what a page shows of a loop's texts."""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from vila2.augment.results import Results
from vila2.augment.source import NAME as SOURCE
from vila2.augment.source import index_folder
from vila2.augment.texts import FILE_NAME as CAPTIONS
from vila2.augment.texts import read_captions
from vila2.data.decode import DecodeError, decode_image
from vila2.data.shards import open_source
from vila2.data.verify import iter_rows
from vila2.errors import VilaError

THUMBNAIL = 160  # pixels of the longer side
_QUALITY = 80


@dataclass(frozen=True, slots=True)
class Told:
    """One text about an image. `right` and `wrong`: the things it mentions that are there, and that are not; None
    where the truth is not known."""

    by: str
    text: str
    status: str = "ok"
    right: list[str] | None = None
    wrong: list[str] | None = None


@dataclass(frozen=True, slots=True)
class Shown:
    """An image, as a data URI, and its texts in the order in which they were written."""

    key: str
    image: str
    truth: str = ""
    texts: list[Told] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def gallery(run: Path, results: Results, count: int) -> list[Shown]:
    """`count` images spread over the source, with the texts of the first seed. Empty when the images are gone."""
    seed = run / f"seed-{results.seeds[0]}"
    originals = seed / "round-0" / "captions"
    if not count or not (originals / CAPTIONS).is_file():
        return []
    every = list(read_captions(originals))
    chosen = every[:: max(1, len(every) // count)][:count]
    places = {(record["shard"], record["index"]): record for record in chosen}
    texts: dict[tuple[str, int], list[Told]] = {
        place: [Told("original", record["text"])] for place, record in places.items()
    }
    for by, folder in _outputs(seed, results.models):
        for row in iter_rows(folder):
            place = (row["shard"], row["index"])
            if place in texts:
                prompt = "" if by.startswith("round-") else f": {row['prompt']}"
                texts[place].append(Told(by + prompt, row["caption"], row["status"]))
    images = _images(run, results.recipe["source"], places)
    truths = _truths(run, results.recipe["source"])
    return [
        _shown(record["key"], images.get(place, ""), texts[place], truths) for place, record in places.items()
    ]


def _outputs(seed: Path, models: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Who captioned, and where: rounds by number, then specialists."""
    rounds = [seed / model for model in models if model.startswith("round-")]
    for folder in [*rounds, *sorted(seed.glob("specialist*"))]:
        if (folder / "recaption" / "parts").is_dir():
            yield folder.name, folder / "recaption"


def _images(
    run: Path, source: Mapping[str, Any], places: Mapping[tuple[str, int], Any]
) -> dict[tuple[str, int], str]:
    path = str(source["path"]) if source["path"] is not None else str(run / SOURCE)
    try:
        opened = open_source(path, index_dir=index_folder(run))
    except VilaError:
        return {}  # the texts stand without their images
    found: dict[tuple[str, int], str] = {}
    for shard in opened.shards:
        indices = sorted(index for name, index in places if name == shard.name and index < len(shard))
        for sample in shard.read(indices) if indices else ():
            if sample.image is not None:
                found[sample.shard, sample.index] = _data_uri(sample.image)
    return found


def _data_uri(data: bytes) -> str:
    """A small JPEG made anew from the pixels: nothing of the file itself reaches the page."""
    try:
        image = Image.fromarray(decode_image(data).pixels)
    except DecodeError:
        return ""
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _truths(run: Path, source: Mapping[str, Any]) -> Mapping[str, Any]:
    if source["world"] is None:
        return {}
    from vila2.evaluate.truths import read_truths

    return read_truths(run / SOURCE)


def _shown(key: str, image: str, texts: Sequence[Told], truths: Mapping[str, Any]) -> Shown:
    scene = truths.get(key)
    if scene is None:
        return Shown(key, image, "", list(texts))
    from vila2.evaluate.statements import mentions
    from vila2.world import read_lexicon

    find = read_lexicon().find
    there = scene.counts()
    judged = []
    for told in texts:
        said = dict.fromkeys(mentions(told.text, find))
        right, wrong = [n for n in said if n in there], [n for n in said if n not in there]
        judged.append(Told(told.by, told.text, told.status, right, wrong))
    things = [name if number == 1 else f"{name} x{number}" for name, number in there.items()]
    sign = [f'sign "{scene.sign.word}"'] if scene.sign is not None else []
    return Shown(key, image, ", ".join([*things, *sign, scene.background]), judged)
