"""Make letters.png: A to Z in three faces, by hand, so that signs look the same whatever FreeType is installed.

    pip install pillow; python make_letters.py DejaVuSans-Bold.ttf DejaVuSerif-Bold.ttf DejaVuSansMono-Bold.ttf

One row a face, one cell of CELL x CELL a letter; the baseline is at BASELINE, and a letter starts at the cell's left.
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

CELL = 64
BASELINE = 48
CAP = 40  # the height of an H, in pixels


def main(*faces: str) -> None:
    sheet = Image.new("L", (26 * CELL, len(faces) * CELL))
    pen = ImageDraw.Draw(sheet)
    for row, face in enumerate(faces):
        size = next(n for n in range(20, 99) if height(ImageFont.truetype(face, n)) >= CAP)
        font = ImageFont.truetype(face, size)
        for column in range(26):
            letter = chr(ord("A") + column)
            left = font.getbbox(letter, anchor="ls")[0]
            pen.text((column * CELL - left, row * CELL + BASELINE), letter, 255, font=font, anchor="ls")
    sheet.save(Path(__file__).parent / "letters.png", optimize=True)


def height(font: ImageFont.FreeTypeFont) -> float:
    return -font.getbbox("H", anchor="ls")[1]


if __name__ == "__main__":
    main(*sys.argv[1:])
