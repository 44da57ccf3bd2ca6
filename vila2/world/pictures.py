"""The pictures of a style: cut from its sheet, turned and flipped as scenes ask, with their colours from the pixels."""

from functools import lru_cache
from importlib.resources import files
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vila2.world.lexicon import COLORS, read_lexicon
from vila2.world.settings import MAX_LIGHT, STYLES

SIDE = 80
COLUMNS = 16
TURNS = (-12, -6, 0, 6, 12)
_PREVAILS = 0.42  # the share of the drawn pixels that a colour needs
_CLEARLY = 1.5  # and how many times the share of the next
_DRAWN = 24  # alpha from which a pixel counts as drawn

# 1/2, 1/4: a scaled-down copy is read where it is large enough, so that resizing costs the same at any image size.
_HALVINGS = (1, 2)


class Pictures:
    """All pictures of one style. Thread-safe for reading once a picture was made; making it twice does no harm."""

    def __init__(self, style: str) -> None:
        data = (files("vila2.world") / "assets" / STYLES[style]).read_bytes()
        self._sheet = Image.open(BytesIO(data)).convert("RGBA")
        self._number = {name: number for number, name in enumerate(read_lexicon().names)}
        self._ready: dict[tuple[str, int, bool], list[Image.Image]] = {}
        self._colors: dict[str, str | None] = {}

    def picture(self, name: str, turn: int, flip: bool) -> list[Image.Image]:
        """The picture with premultiplied alpha, cut tightly, and its halvings."""
        key = (name, turn, flip)
        ready = self._ready.get(key)
        if ready is None:
            ready = self._ready[key] = self._make(name, turn, flip)
        return ready

    def aspect(self, name: str, turn: int, flip: bool) -> float:
        """Width over height of what is drawn."""
        whole = self.picture(name, turn, flip)[0]
        return whole.width / whole.height

    def color(self, name: str) -> str | None:
        """The colour that prevails in the picture, or None. It stays the same however a scene lights the picture."""
        if name not in self._colors:
            pixels = np.asarray(self._cell(name), np.uint8).reshape(-1, 4)
            drawn = pixels[pixels[:, 3] > 200, :3]
            lights = (1 - MAX_LIGHT, 1.0, 1 + MAX_LIGHT)
            seen = {prevailing_color(np.minimum(drawn * light, 255).astype(np.uint8)) for light in lights}
            self._colors[name] = seen.pop() if len(seen) == 1 else None
        return self._colors[name]

    def sized(self, name: str, turn: int, flip: bool, width: int, height: int) -> NDArray[np.uint8]:
        """The picture at `width` x `height` pixels: (height, width, 4), alpha premultiplied."""
        levels = self.picture(name, turn, flip)
        best = levels[0]
        for level in levels[1:]:
            if level.width >= width and level.height >= height:
                best = level
        return np.asarray(best.resize((width, height), Image.Resampling.BILINEAR))

    def _cell(self, name: str) -> Image.Image:
        y, x = divmod(self._number[name], COLUMNS)
        return self._sheet.crop((x * SIDE, y * SIDE, (x + 1) * SIDE, (y + 1) * SIDE))

    def _make(self, name: str, turn: int, flip: bool) -> list[Image.Image]:
        image = self._cell(name)
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image = image.convert("RGBa")  # premultiplied: no dark rims from what lies under transparent pixels
        if turn:
            image = image.rotate(turn, Image.Resampling.BICUBIC, expand=True)
        drawn = np.asarray(image)[..., 3] > _DRAWN
        rows, columns = np.flatnonzero(drawn.any(1)), np.flatnonzero(drawn.any(0))
        image = image.crop((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))
        levels = [image]
        for halvings in _HALVINGS:
            size = (max(image.width >> halvings, 1), max(image.height >> halvings, 1))
            levels.append(image.resize(size, Image.Resampling.BOX))
        return levels


def prevailing_color(pixels: NDArray[np.uint8]) -> str | None:
    """The named colour of most of `pixels` (n, 3), if it clearly prevails."""
    if not len(pixels):
        return None
    shares = np.bincount(color_numbers(pixels), minlength=len(COLORS)) / len(pixels)
    order = np.argsort(shares)
    first, second = shares[order[-1]], shares[order[-2]]
    return COLORS[int(order[-1])] if first >= _PREVAILS and first >= _CLEARLY * second else None


def color_numbers(pixels: NDArray[np.uint8]) -> NDArray[np.int64]:
    """For each of `pixels` (n, 3), which of COLORS a person would call it."""
    rgb = pixels.astype(np.float64) / 255
    high, low = rgb.max(1), rgb.min(1)
    chroma = high - low
    safe = np.where(chroma > 0, chroma, 1)
    r, g, b = rgb.T
    hue = (
        np.where(high == r, (g - b) / safe % 6, np.where(high == g, (b - r) / safe + 2, (r - g) / safe + 4))
        * 60
    )
    vivid = chroma / np.maximum(high, 1e-6)
    warm = (hue < 45) | (hue >= 345)
    rules: list[tuple[str, NDArray[np.bool_]]] = [  # the first that fits
        ("black", (high < 0.24) | ((high < 0.36) & (vivid < 0.5) & ~warm)),
        ("white", (vivid < 0.17) & (high > 0.82)),
        ("gray", (vivid < 0.14) | ((vivid < 0.25) & (hue > 190) & (hue < 300))),
        ("brown", warm & (high < 0.42)),
        ("brown", warm & (high < 0.72) & (vivid < 0.72)),
        ("brown", (hue >= 18) & (hue < 45) & (high < 0.66)),
        ("brown", (hue >= 10) & (hue < 45) & (high < 0.86) & (vivid < 0.52)),
        ("pink", ((hue < 10) | (hue >= 300)) & (vivid < 0.56) & (high > 0.72)),
        ("pink", (hue >= 292) & (hue < 341) & (high > 0.6)),
        ("red", (hue < 14) | (hue >= 335)),
        ("orange", hue < 41),
        ("yellow", hue < 66),
        ("green", hue < 168),
        ("blue", hue < 246),
        ("purple", hue < 335),
    ]
    names = np.select([fits for _, fits in rules], [np.int64(COLORS.index(name)) for name, _ in rules])
    return names.astype(np.int64)


@lru_cache(maxsize=len(STYLES))
def read_pictures(style: str) -> Pictures:
    return Pictures(style)
