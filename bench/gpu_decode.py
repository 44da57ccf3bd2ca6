"""JPEGs decoded by the GPU: a figure for nvJPEG through torchvision, which stands in here for DALI's `mixed` decoder.

DALI is what the product uses (`--decoder dali`); a GPU machine without it still has torchvision's nvJPEG.
"""

import time
from collections.abc import Iterator

import torch
from common import photo_jpegs
from gpu_report import Report, Result
from torch.nn import functional


def measure(report: Report, *, dry: bool, deadline: float) -> Iterator[Result]:
    """Images a second decoded and resized to 384 px, and how far pixels are from the CPU path's."""
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except (ImportError, RuntimeError) as error:
        report.skip("nvJPEG", f"torchvision does not load here: {error}")
        return
    count = 4 if dry else 256
    files = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in photo_jpegs(count)]

    def decode(device: torch.device) -> list[torch.Tensor]:
        return decode_jpeg(files, mode=ImageReadMode.RGB, device=device)

    expected = decode(torch.device("cpu"))
    actual = decode(report.device)
    difference = max(
        float((one.cpu().float() - other.float()).abs().mean())
        for one, other in zip(actual, expected, strict=True)
    )

    def decode_and_resize() -> None:
        for image in decode(report.device):
            functional.interpolate(image[None].float(), size=(384, 384), mode="bicubic", antialias=True)
        if report.device.type == "cuda":
            torch.cuda.synchronize()

    decode_and_resize()
    start, rounds = time.perf_counter(), 0
    while not rounds or (not dry and time.perf_counter() - start < 5):
        decode_and_resize()
        rounds += 1
    rate = rounds * count / (time.perf_counter() - start)
    # nvJPEG interpolates chroma in its own way: grey levels, on average.
    yield Result(
        "nvJPEG by torchvision", "640 x 480 to 384", rate, "images/s", error=difference, tolerance=3.0
    )
