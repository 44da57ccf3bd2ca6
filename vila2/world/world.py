"""`World`: scenes by number, and their images. A scene follows from (settings, split, index) and nothing else."""

from functools import cached_property
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from vila2.errors import UsageError
from vila2.world import signs
from vila2.world.backgrounds import PATTERNS, SCENERY, TONES, VARIANTS, background
from vila2.world.chance import Chance
from vila2.world.lexicon import SIGN_WORDS, Lexicon, read_lexicon
from vila2.world.pictures import TURNS, Pictures, read_pictures
from vila2.world.scene import Background, Box, Object, Scene, Sign, area, intersection
from vila2.world.settings import LEAST_OF_A_THEME, SPLITS, WorldSettings
from vila2.world.splits import split_of

# The longer side of an object, in shares of the image side, by the number of objects.
_SIZES = {1: (0.32, 0.45), 2: (0.30, 0.43), 3: (0.27, 0.38), 4: (0.24, 0.34), 5: (0.22, 0.30)}
_WITH_SIGN = 0.88  # a sign takes room from the objects
_MARGIN = 0.01
_OVERLAP = 0.04  # of the smaller box
_LETTERS = (0.085, 0.12)  # the height of a sign's letters: 10 pixels or more at 120
_WIDEST_SIGN = 0.72
_TRIES = 24
_SCENERY = 0.2
_IN_THEME = 0.85
MAX_COPIES = 4
_SHRINK = 0.9


class World:
    """All scenes of one setting. Holds caches but no state: any order of calls gives the same answers."""

    def __init__(self, settings: WorldSettings | None = None) -> None:
        self.settings = settings or WorldSettings()

    @cached_property
    def lexicon(self) -> Lexicon:
        return read_lexicon(self.settings.themes)

    @cached_property
    def pictures(self) -> Pictures:
        return read_pictures(self.settings.style)

    def scene(self, split: str, index: int) -> Scene:
        """Scene number `index` (0 or more, without end) of a split."""
        if split not in SPLITS:
            raise UsageError(f"no split {split!r}; there are {', '.join(SPLITS)}")
        if index < 0:
            raise UsageError(f"scenes are numbered from 0, got {index}")
        settings = self.settings
        chance = Chance("scene", settings.seed, split, index)
        names, backdrop = self._composition(chance, split)
        sign_word = chance.pick(SIGN_WORDS[: settings.sign_words]) if chance.below(settings.sign) else None
        sign = None
        while True:  # each round shrinks everything a little, so it ends
            for scale in (1.0, _SHRINK, _SHRINK**2, _SHRINK**3, _SHRINK**4):
                sign = self._place_sign(chance, sign_word, backdrop) if sign_word else None
                objects = self._place_objects(chance, names, sign, scale)
                if objects is not None:
                    return Scene(
                        settings.seed, split, index, settings.style, objects, sign, backdrop, settings.themes
                    )

    def render(self, scene: Scene) -> NDArray[np.uint8]:
        """The image of a scene: uint8 (image_size, image_size, 3)."""
        size = self.settings.image_size
        pictures = self.pictures if scene.style == self.settings.style else read_pictures(scene.style)
        backdrop = scene.backdrop
        image = background(backdrop.pattern, backdrop.color, backdrop.variant, backdrop.shift, size)
        for thing in scene.objects:
            x0, y0, x1, y1 = _pixels(thing.box, size)
            source = pictures.sized(thing.name, thing.turn, thing.flip, x1 - x0, y1 - y0)
            _composite(image[y0:y1, x0:x1], source, thing.light)
        if scene.sign is not None:
            x0, y0, x1, y1 = _pixels(scene.sign.box, size)
            sign = scene.sign
            image[y0:y1, x0:x1] = signs.panel(sign.word, sign.face, sign.color, x1 - x0, y1 - y0)
        return image

    def _composition(self, chance: Chance, split: str) -> tuple[list[str], Background]:
        """Names and background that belong to `split`. What the rates govern is drawn once, before any is refused."""
        settings = self.settings
        count = chance.weighted(range(1, len(settings.object_counts) + 1), self._cumulative_counts)
        copies = 1
        if count > 1 and chance.below(settings.repeat):
            copies = 2 + chance.integer(min(count, MAX_COPIES) - 1)
        theme = chance.weighted(*self._weighted_themes) if chance.below(settings.theme) else ""
        pattern = "scenery" if chance.below(_SCENERY) else chance.pick(PATTERNS)
        while True:
            names = self._names(chance, count - copies + 1, theme)
            color = chance.pick(tuple(SCENERY if pattern == "scenery" else TONES))
            if any(self.pictures.color(name) == color for name in names):
                continue  # a red thing on red would be there but not seen
            backdrop = Background(pattern, color, chance.integer(VARIANTS), round(chance.random(), 3))
            all_names = names + names[:1] * (copies - 1)
            if split_of(all_names, backdrop.phrase) == split:
                return all_names, backdrop

    def _names(self, chance: Chance, count: int, theme: str) -> list[str]:
        """`count` different names, most of them of `theme`."""
        names: list[str] = []
        while len(names) < count:
            table = self._weighted_names[theme if chance.below(_IN_THEME) else ""]
            name = chance.weighted(*table)
            if name not in names:
                names.append(name)
        return names

    def _place_sign(self, chance: Chance, word: str, backdrop: Background) -> Sign:
        face = chance.integer(signs.FACES)
        colors = [color for color in signs.PANELS if color != backdrop.color]
        height = chance.uniform(*_LETTERS) / signs.cap_share()
        width = height * signs.aspect(word, face)
        if width > _WIDEST_SIGN:
            height, width = height * _WIDEST_SIGN / width, _WIDEST_SIGN
        x = chance.uniform(_MARGIN, 1 - _MARGIN - width)
        y = chance.uniform(_MARGIN, 1 - _MARGIN - height)
        if chance.below(0.7):  # signs tend to hang at an edge, which leaves room
            y = _MARGIN + y * 0.12 if y + height / 2 < 0.5 else 1 - _MARGIN - height - (1 - y - height) * 0.12
        return Sign(word, _rounded((x, y, x + width, y + height)), chance.pick(colors), face)

    def _place_objects(
        self, chance: Chance, names: list[str], sign: Sign | None, scale: float
    ) -> tuple[Object, ...] | None:
        low, high = _SIZES[len(names)]
        if sign:
            low, high = low * _WITH_SIGN, high * _WITH_SIGN
        placed: list[Object] = []
        for name in chance.shuffled(names):
            turn = chance.pick(TURNS) if chance.below(self.settings.turn) else 0
            flip = chance.below(self.settings.flip)
            aspect = self.pictures.aspect(name, turn, flip)
            light = round(1 + chance.uniform(-self.settings.light, self.settings.light), 3)
            for _ in range(_TRIES):
                side = chance.uniform(low, high) * scale
                width, height = (side, side / aspect) if aspect > 1 else (side * aspect, side)
                x = chance.uniform(_MARGIN, 1 - _MARGIN - width)
                y = chance.uniform(_MARGIN, 1 - _MARGIN - height)
                box = _rounded((x, y, x + width, y + height))
                if _free(box, placed, sign):
                    placed.append(Object(name, box, self.pictures.color(name), turn, flip, light))
                    break
            else:
                return None
        return tuple(placed)

    @cached_property
    def _cumulative_counts(self) -> list[float]:
        return list(accumulate(self.settings.object_counts))

    @cached_property
    def _weighted_names(self) -> dict[str, tuple[tuple[str, ...], list[float]]]:
        """Theme -> (names, running sums of their popularity); "" has all names."""
        popularity = self.popularity
        tables = {**self.lexicon.themes, "": self.lexicon.names}
        return {key: (names, list(accumulate(popularity[n] for n in names))) for key, names in tables.items()}

    @cached_property
    def _weighted_themes(self) -> tuple[tuple[str, ...], list[float]]:
        """A theme comes as often as it has names, so that names of small themes are not everywhere."""
        themes = {
            theme: names for theme, names in self.lexicon.themes.items() if len(names) >= LEAST_OF_A_THEME
        }
        return tuple(themes), list(accumulate(len(names) for names in themes.values()))

    @cached_property
    def popularity(self) -> dict[str, float]:
        """How often a name is drawn, against the others: from 2 down to 1 along each theme."""
        return {
            name: 2 - rank / max(len(names) - 1, 1)
            for names in self.lexicon.themes.values()
            for rank, name in enumerate(names)
        }


def _free(box: Box, placed: list[Object], sign: Sign | None) -> bool:
    if sign is not None and intersection(box, sign.box) > 0:
        return False
    return all(intersection(box, other.box) <= _OVERLAP * min(area(box), area(other.box)) for other in placed)


def _rounded(box: Box) -> Box:
    """Whole ten-thousandths: exact in JSON, and the same in every text."""
    x0, y0, x1, y1 = box
    return round(x0, 4), round(y0, 4), round(x1, 4), round(y1, 4)


def _pixels(box: Box, size: int) -> tuple[int, int, int, int]:
    """The pixels that a box covers, at least one."""
    x0, y0 = min(round(box[0] * size), size - 1), min(round(box[1] * size), size - 1)
    return x0, y0, min(max(round(box[2] * size), x0 + 1), size), min(max(round(box[3] * size), y0 + 1), size)


def _composite(below: NDArray[np.uint8], source: NDArray[np.uint8], light: float) -> None:
    """Lay `source` (h, w, 4; premultiplied) over `below` (h, w, 3), in place."""
    wide = source.astype(np.uint16)
    color = wide[..., :3]
    if light != 1:
        color = np.minimum(color * np.uint16(round(light * 128)) >> 7, wide[..., 3:])
    rest = below * (255 - wide[..., 3:])
    below[...] = color + (rest + 127) // 255
