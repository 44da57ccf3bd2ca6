"""Signs: a panel with a border and a word. Letters come from a sheet, so no font library takes part."""

from functools import lru_cache
from importlib.resources import files
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CELL = 64
BASELINE = 48
CAP = 40
FACES = 3
_GAP = 7  # between letters, in the sheet's pixels
_PAD = 22  # between the letters and the panel's edge
_BORDER = 6

# panel -> (its colour, the colour of its letters): each pair differs by a contrast ratio of at least 4.5
PANELS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "red": ((186, 20, 28), (255, 255, 255)),
    "blue": ((24, 66, 156), (255, 255, 255)),
    "green": ((12, 96, 52), (255, 255, 255)),
    "black": ((24, 24, 28), (255, 240, 120)),
    "white": ((252, 252, 252), (20, 20, 24)),
    "yellow": ((250, 206, 20), (20, 20, 24)),
}


@lru_cache(maxsize=1)
def _sheet() -> NDArray[np.uint8]:
    data = (files("vila2.world") / "assets" / "letters.png").read_bytes()
    return np.asarray(Image.open(BytesIO(data)).convert("L"))


@lru_cache(maxsize=4096)
def aspect(word: str, face: int) -> float:
    """Width over height of the panel."""
    height, width = _panel(word, face)[0].shape
    return width / height


def cap_share() -> float:
    """How high a letter is, as a share of the panel's height."""
    return CAP / (CAP + 2 * _PAD)


@lru_cache(maxsize=2048)
def panel(word: str, face: int, color: str, width: int, height: int) -> NDArray[np.uint8]:
    """The sign at `width` x `height` pixels: (height, width, 3)."""
    letters, border = _panel(word, face)
    size = (width, height)
    ink = np.asarray(Image.fromarray(letters).resize(size, Image.Resampling.BOX), np.float32)[..., None] / 255
    rim = np.asarray(Image.fromarray(border).resize(size, Image.Resampling.BOX), np.float32)[..., None] / 255
    ground, text = (np.array(tone, np.float32) for tone in PANELS[color])
    image = ground + (text - ground) * np.maximum(ink, rim)
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


@lru_cache(maxsize=512)
def _panel(word: str, face: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The letters and the border of the panel, in the sheet's pixels."""
    glyphs = [_glyph(letter, face) for letter in word]
    width = sum(glyph.shape[1] for glyph in glyphs) + _GAP * (len(glyphs) - 1)
    letters = np.zeros((CAP + 2 * _PAD, width + 2 * _PAD), np.uint8)
    x = _PAD
    top = _PAD - (BASELINE - CAP)
    for glyph in glyphs:
        rows = min(CELL, letters.shape[0] - top)
        letters[top : top + rows, x : x + glyph.shape[1]] |= glyph[:rows]
        x += glyph.shape[1] + _GAP
    border = np.full_like(letters, 255)
    border[_BORDER:-_BORDER, _BORDER:-_BORDER] = 0
    return letters, border


@lru_cache(maxsize=26 * FACES)
def _glyph(letter: str, face: int) -> NDArray[np.uint8]:
    column = ord(letter) - ord("A")
    cell = _sheet()[face * CELL : (face + 1) * CELL, column * CELL : (column + 1) * CELL]
    return cell[:, : int(np.flatnonzero(cell.any(0))[-1]) + 1]
