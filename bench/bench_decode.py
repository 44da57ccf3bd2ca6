"""JPEG bytes to the model's input: images per CPU-second, ours against Pillow with the transformers processor.

    python bench/bench_decode.py

Photo-like 640x480 JPEGs to normalised patches or pixels at 384 px (SigLIP's size), one thread. CPU-seconds, not
seconds: it is what a machine with more cores divides by. Both paths give the same pixels, to the last bit.
"""

import argparse
import io
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from common import append_row, facts, photo_jpegs
from PIL import Image
from transformers import SiglipImageProcessor

from vila2.data.decode import DecodeLimits, decode_image
from vila2.model.images import ImageProcessor
from vila2.ops.patches import image_patches
from vila2.ops.threads import set_threads

PEER = "pillow + transformers"
SIDE, PATCH = 384, 14
HALF = (0.5, 0.5, 0.5)


def paths(jpegs: list[bytes]) -> dict[str, Callable[[int], object]]:
    """What each path does with image `i`; then the steps of ours alone, to say what limits it."""
    ours = ImageProcessor("resize", SIDE, tokens_per_tile=(SIDE // PATCH) ** 2)
    theirs = SiglipImageProcessor(size={"height": SIDE, "width": SIDE})
    limits = DecodeLimits()
    decoded = [decode_image(jpeg, limits).pixels for jpeg in jpegs]
    tiles = [torch.from_numpy(ours.prepare(pixels).tiles) for pixels in decoded]

    def with_vila2(i: int) -> None:
        prepared = ours.prepare(decode_image(jpegs[i], limits).pixels)
        image_patches(torch.from_numpy(prepared.tiles), PATCH, HALF, HALF, torch.float32)

    return {
        "vila2": with_vila2,
        PEER: lambda i: theirs(Image.open(io.BytesIO(jpegs[i])).convert("RGB"), return_tensors="pt"),
        "vila2, decoding alone": lambda i: decode_image(jpegs[i], limits),
        "vila2, resize alone": lambda i: ours.prepare(decoded[i]),
        "vila2, patches alone": lambda i: image_patches(tiles[i], PATCH, HALF, HALF, torch.float32),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-row", action="store_true", help="print only; leave bench/results alone")
    args = parser.parse_args()

    torch.set_num_threads(1)
    set_threads(1)
    every_path = paths(photo_jpegs(args.images))
    rates: dict[str, list[float]] = {name: [] for name in every_path}
    for _ in range(args.rounds):
        for name, path in every_path.items():
            started = time.process_time()
            for i in range(args.images):
                path(i)
            rates[name].append(args.images / (time.process_time() - started))

    base = median(rates[PEER])
    for name, values in rates.items():
        rate = median(values)
        print(f"{name:24} {rate:7.1f} images per CPU-second  {rate / base:5.2f} times")
        if not args.no_row:
            row: dict[str, Any] = {
                **facts(),
                "threads": 1,
                "path": name,
                "images": args.images,
                "rounds": args.rounds,
                "images_per_cpu_s": rate,
                "slowest": min(values),
                "ratio": rate / base,
            }
            append_row("decode", row)


if __name__ == "__main__":
    main()
