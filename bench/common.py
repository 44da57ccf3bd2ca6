"""What the benchmarks share: the workload, facts about the machine, and rows of bench/results/*.csv.

A row is never edited by hand; `bench/tables.py` writes the tables of BENCHMARKS.md from them.
"""

import csv
import datetime as dt
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when transformers is imported

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

# 224 prompt tokens on llava-small, 196 of them visual.
QUESTION = (
    "Describe the image in detail, including objects, their attributes, positions and any visible text."
)
CHAT = f"<|im_start|>user\n<image>\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"


def noise_images(count: int, height: int = 480, width: int = 640, seed: int = 0) -> list[NDArray[np.uint8]]:
    """Uniform noise: what an image shows does not change the work of captioning it."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(count)]


def photo_jpegs(count: int, size: tuple[int, int] = (640, 480), quality: int = 88) -> list[bytes]:
    """JPEGs with the detail of photographs: crops of examples/images, scaled to `size` (width, height)."""
    from io import BytesIO

    from PIL import Image

    photos = [
        Image.open(ROOT / "examples" / "images" / name).convert("RGB")
        for name in ("astronaut.jpg", "cat.jpg", "coffee.webp", "rocket.jpg", "photographer.jpg")
    ]
    rng = np.random.default_rng(0)
    encoded = []
    for i in range(count):
        photo = photos[i % len(photos)]
        scale = rng.uniform(0.6, 1.0)
        w, h = int(photo.width * scale), int(photo.height * scale)
        left, top = int(rng.integers(0, photo.width - w + 1)), int(rng.integers(0, photo.height - h + 1))
        part = photo.crop((left, top, left + w, top + h)).resize(size, Image.Resampling.BICUBIC)
        file = BytesIO()
        part.save(file, "JPEG", quality=quality)
        encoded.append(file.getvalue())
    return encoded


def device_name(device: str = "cpu") -> str:
    """`AMD EPYC-Milan (2 cores)`, or the GPU's name."""
    if device != "cpu":
        import torch

        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = dict(
            line.split(":", 1) for line in cpuinfo.read_text().split("\n\n")[0].splitlines() if ":" in line
        )
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        name = fields.get("model name", name)
        if "cpu family" in fields:
            name += f" family {fields['cpu family']} model {fields['model']}"
    return f"{name} ({len(os.sched_getaffinity(0))} cores)"


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def commit() -> str:
    """The commit, with a `+` if files that git tracks have been changed since (results apart); "" without git."""

    def git(*arguments: str) -> str:
        if shutil.which("git") is None:
            return ""
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!bench/results", ":!*.md")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def isa() -> str:
    """The instruction set that vila2._C chose."""
    from vila2.ops import capabilities

    return str(capabilities().isa)


def facts(device: str = "cpu") -> dict[str, Any]:
    """The columns that every row begins with."""
    import torch

    return {
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
        "commit": commit(),
        "device": device_name(device),
        "isa": isa() if device == "cpu" else "",
        "threads": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "transformers": installed("transformers"),
    }


def append_row(table: str, row: dict[str, Any]) -> None:
    """Add a row to bench/results/TABLE.csv. ValueError if the table has other columns."""
    path = RESULTS / f"{table}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            columns = next(csv.reader(file))
        if columns != list(row):
            raise ValueError(f"{path} has the columns {columns}, the row has {list(row)}")
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow({key: _cell(value) for key, value in row.items()})


def _cell(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def read_rows(table: str) -> list[dict[str, str]]:
    path = RESULTS / f"{table}.csv"
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
