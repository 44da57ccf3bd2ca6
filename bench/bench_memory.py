"""Memory over a long run: thousands of small images through the whole `vila2-fast recaption`.

    python bench/bench_memory.py [--images 10000]

Images are drawn into tar shards, a tiny checkpoint captions them, and the resident memory of the command is
sampled all along. After a warm-up the line through the samples must rise by less than MAX_GROWTH_MIB over the rest
of the run; otherwise the exit code is 1.
"""

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from common import append_row, facts
from make_tiny_llava import build
from PIL import Image

WARM_UP = 0.25  # of the run: caches, pools and the first parts fill
MAX_GROWTH_MIB = 48.0
SHARD = 1000


def write_shards(folder: Path, count: int) -> None:
    """WebDataset tars of small JPEGs of varied size, each with a .txt."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for first in range(0, count, SHARD):
        with tarfile.open(folder / f"{first // SHARD:05d}.tar", "w") as tar:
            for i in range(first, min(first + SHARD, count)):
                height, width = rng.integers(24, 96, 2)
                file = io.BytesIO()
                pixels = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((int(width), int(height))).save(file, "JPEG")
                for suffix, content in (("jpg", file.getvalue()), ("txt", f"picture {i}".encode())):
                    member = tarfile.TarInfo(f"{i:06d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def resident_mib(root: int) -> float:
    """Resident memory of a process and all its descendants, in MiB; 0 once it is gone."""
    children: dict[int, list[int]] = {}
    pages: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            pages[int(entry.name)] = int((entry / "statm").read_text().split()[1])
        except (OSError, IndexError):
            continue  # it ended meanwhile
        children.setdefault(parent, []).append(int(entry.name))
    total, pending = 0, [root]
    while pending:
        pid = pending.pop()
        total += pages.get(pid, 0)
        pending += children.get(pid, [])
    return total * 4096 / 2**20


def run_sampled(command: list[str], interval_s: float) -> tuple[list[tuple[float, float]], float]:
    """Run a command; (seconds, MiB) samples, and its seconds in all. SystemExit if it fails."""
    with tempfile.TemporaryFile("w+") as output:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        samples = []
        while process.poll() is None:
            samples.append((time.perf_counter() - started, resident_mib(process.pid)))
            time.sleep(interval_s)
        seconds = time.perf_counter() - started
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{output.read()[-2000:]}")
    return samples, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--no-row", action="store_true", help="print only; leave bench/results alone")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        build(work / "model")
        write_shards(work / "shards", args.images)
        command = [sys.executable, "-m", "vila2.cli", "recaption", str(work / "shards")]
        command += ["--model", str(work / "model"), "--out", str(work / "out"), "--device", "cpu"]
        command += ["--prompt-text", "Describe.", "--max-new-tokens", str(args.new_tokens), "--ignore-eos"]
        samples, seconds = run_sampled(command, interval_s=0.25)
        summary = json.loads((work / "out" / "summary.json").read_text(encoding="utf-8"))

    times, sizes = np.array(samples).T
    settled = times > WARM_UP * seconds
    slope = float(np.polyfit(times[settled], sizes[settled], 1)[0])  # MiB a second
    growth = slope * float(times[settled][-1] - times[settled][0])
    print(f"{summary['images']} images in {seconds:.0f} s, {len(sizes)} samples of the resident memory")
    print(f"after the warm-up {sizes[settled][:20].mean():.0f} MiB, at the end {sizes[-20:].mean():.0f} MiB")
    print(
        f"most {sizes.max():.0f} MiB, trend after the warm-up {growth:+.1f} MiB (allowed {MAX_GROWTH_MIB:.0f})"
    )
    if summary["images"] != args.images:
        raise SystemExit(f"{summary['images']} images in the summary, not {args.images}")
    if not args.no_row:
        row = {
            **facts(),
            "images": args.images,
            "new_tokens": args.new_tokens,
            "seconds": seconds,
            "settled_mib": float(sizes[settled][:20].mean()),
            "end_mib": float(sizes[-20:].mean()),
            "most_mib": float(sizes.max()),
            "trend_mib": growth,
        }
        append_row("memory", row)
    if growth > MAX_GROWTH_MIB:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
