"""A contact sheet: scenes side by side, each with a text below, to look at."""

import textwrap
from collections.abc import Sequence
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

_CELL = 168  # the least width of a column: text must fit below a small image
_LINE = 11
_LINES = 9
_GAP = 8
_LETTER = 5.2  # the width of a letter of the font, about


def sheet_png(images: Sequence[NDArray[np.uint8]], captions: Sequence[str], columns: int = 6) -> bytes:
    """A PNG of `images` (S, S, 3), all of one size, with the text of each below it."""
    side = images[0].shape[0]
    cell = max(side, _CELL)
    lines = [textwrap.wrap(caption, int(cell / _LETTER))[:_LINES] for caption in captions]
    height = side + max((len(part) for part in lines), default=0) * _LINE + 2 * _GAP
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (cell + _GAP) + _GAP, rows * height + _GAP), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=10)
    for number, (image, part) in enumerate(zip(images, lines, strict=True)):
        x, y = _GAP + number % columns * (cell + _GAP), _GAP + number // columns * height
        sheet.paste(Image.fromarray(image), (x, y))
        for row, line in enumerate(part):
            pen.text((x, y + side + 2 + row * _LINE), line, (0, 0, 0), font=font)
    file = BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()
