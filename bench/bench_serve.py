"""Captions a second through `vila2-fast serve` on this machine, against the same engine in process.

    python bench/bench_serve.py [--images 1200] [--rounds 5] [--no-row]

nano, on scenes of its world as JPEGs of 128 px, with the command's own settings: both sides read, decode, caption and
write parts. One process has the engine and one a server of the same batch size, which a third asks by --backend http.
All are loaded, then they take turns; figures are medians over the rounds. The bar is 90 % of the engine in process.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from common import ROOT, append_row, facts
from workers import Worker

SCRIPT = Path(__file__).parent / "serve_work.py"
IN_PROCESS, SERVED = "in process", "http to serve"


def write_scenes(folder: Path, count: int) -> None:
    command = [sys.executable, "-m", "vila2.cli", "world", "make", str(folder), "--scenes", str(count)]
    subprocess.run([*command, "--split", "heldout"], check=True, capture_output=True, cwd=ROOT)


class ServeProcess:
    """`vila2-fast serve` at a free port."""

    def __init__(self, model: str, batch: int) -> None:
        command = [sys.executable, "-m", "vila2.cli", "serve", "--model", model, "--port", "0"]
        self.process = subprocess.Popen(
            [*command, "--batch-size", str(batch)], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if " at http" not in line:
            raise RuntimeError(f"serve ended with {self.process.wait()}")
        print(line.strip(), flush=True)
        self.url = line.split(" at ")[1].split(": ")[0]

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def __enter__(self) -> "ServeProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--images", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=64, help="captions written at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-row", action="store_true", help="print only; leave bench/results alone")
    args = parser.parse_args()

    rates: dict[str, list[float]] = {IN_PROCESS: [], SERVED: []}
    cpu: dict[str, list[float]] = {IN_PROCESS: [], SERVED: []}
    captions: dict[str, list[str]] = {}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        write_scenes(Path(folder), args.images)
        common = (folder, "--model", args.model, "--batch", str(args.batch))
        server = stack.enter_context(ServeProcess(args.model, args.batch))
        sides = {
            IN_PROCESS: stack.enter_context(Worker(SCRIPT, *common)),
            SERVED: stack.enter_context(Worker(SCRIPT, *common, "--url", server.url)),
        }
        for number in range(1, args.rounds + 1):
            for name, worker in sides.items():
                before = server.cpu_s()
                answer = worker.ask(images=args.images)
                rates[name].append(answer["captions_per_s"])
                cpu[name].append(answer["cpu_s"] + server.cpu_s() - before)
                captions[name] = answer["captions"]
                print(
                    f"  round {number}  {name:14} {rates[name][-1]:7.1f} captions/s"
                    f"  {1000 * answer['cpu_s'] / args.images:6.2f} ms of CPU a caption here,"
                    f" {1000 * (server.cpu_s() - before) / args.images:6.2f} in the server",
                    flush=True,
                )
    same = sum(a == b for a, b in zip(captions[IN_PROCESS], captions[SERVED], strict=True))
    for name in sides:
        row: dict[str, Any] = {
            **facts(),
            "model": Path(args.model).name,
            "path": name,
            "batch": args.batch,
            "images": args.images,
            "rounds": args.rounds,
            "captions_per_s": median(rates[name]),
            "slowest": min(rates[name]),
            "of_in_process": median(rates[name]) / median(rates[IN_PROCESS]),
            "cpu_ms": 1000 * median(cpu[name]) / args.images,
            "same_captions": f"{same}/{args.images}",
        }
        print(f"{name:14} {row['captions_per_s']:7.1f} captions/s  {row['of_in_process']:.1%}", flush=True)
        if not args.no_row:
            append_row("serve", row)


if __name__ == "__main__":
    main()
