"""Make the picture sheets of this folder: run by hand when names.tsv changes, never at run time.

    npm pack @iconify-json/fluent-emoji @iconify-json/fluent-emoji-flat   (both MIT), unpack each, then
    pip install pillow resvg_py
    python make_pictures.py fluent-emoji/icons.json fluent.webp
    python make_pictures.py fluent-emoji-flat/icons.json flat.webp

A sheet holds one picture a name, in the order of names.tsv, COLUMNS in a row. Each is drawn at four times its size,
cut to what is drawn, scaled to SIDE pixels on its longer side and centred in a cell of SIDE x SIDE.
"""

import io
import json
import sys
from pathlib import Path
from typing import Any

import resvg_py  # type: ignore[import-not-found]
from PIL import Image

SIDE = 80
COLUMNS = 16
HERE = Path(__file__).parent


def main(icons_json: str, sheet_name: str) -> None:
    icons = json.loads(Path(icons_json).read_text(encoding="utf-8"))
    lines = (HERE / "names.tsv").read_text(encoding="utf-8").splitlines()
    names = [line.split("\t") for line in lines if not line.startswith("#")]
    sheet = Image.new("RGBA", (COLUMNS * SIDE, -(-len(names) // COLUMNS) * SIDE))
    for number, (_, icon, *_) in enumerate(names):
        picture = draw(icons, icon)
        x, y = number % COLUMNS * SIDE, number // COLUMNS * SIDE
        sheet.paste(picture, (x + (SIDE - picture.width) // 2, y + (SIDE - picture.height) // 2))
    sheet.save(HERE / sheet_name, "WEBP", quality=90, alpha_quality=95, method=6)


def draw(icons: dict[str, Any], icon: str) -> Image.Image:
    if icon not in icons["icons"]:
        icon = icons["aliases"][icon]["parent"]
    side = 4 * SIDE
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 32 32" width="{side}" height="{side}">{icons["icons"][icon]["body"]}</svg>'
    )
    whole = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")
    box = whole.getchannel("A").point(lambda a: 255 * (a > 24)).getbbox()
    cut = whole.crop(box)
    scale = SIDE / max(cut.size)
    return cut.resize(
        (max(1, round(cut.width * scale)), max(1, round(cut.height * scale))), Image.Resampling.BOX
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
