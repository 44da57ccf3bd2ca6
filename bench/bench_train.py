"""Training on the CPU: against transformers' Trainer, against the machine's matrix product, and over an epoch's memory.

    python bench/bench_train.py [speed] [step] [memory] [--rounds N] [--no-row]

speed: conversations of mixed length about an image each, one model, one batch size, AdamW, float32. Each engine is
a process of its own; they take turns. The Trainer pads: once in the given order, where the losses of every step are
compared, and once with its length grouping. step: one optimiser step of the shapes of llava-small, its operations a
second beside those of torch's matrix product in float32 and bfloat16, measured in the same run. memory: many
steps of varied size; after a warm-up the line through the resident memory must stay level.
"""

import argparse
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import append_row, facts
from train_work import build
from workers import Worker

PEERS = Path(__file__).parent / "peers"
PARTS = ("speed", "step", "memory")
MAX_GROWTH_MIB = 48.0
LR = 3e-4


@dataclass
class Contender:
    """One engine and order of examples, its seconds by round and the losses of its steps."""

    engine: str
    worker: Worker
    question: dict[str, Any]
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def worker(engine: str, checkpoint: Path, batch: int, longest: int) -> Worker:
    arguments = (str(checkpoint), "--batch", str(batch), "--longest", str(longest))
    return Worker(PEERS / f"{engine}_train.py", *arguments)


def speed(args: argparse.Namespace, stack: ExitStack) -> None:
    for model, batch, steps in (("nano", 32, args.steps), ("llava-small", 4, max(1, args.steps // 6))):
        if model not in args.models:
            continue
        folder = checkpoint(model, stack)
        ours, peer = (worker(engine, folder, batch, 512) for engine in ("vila2", "transformers"))
        question = {"what": "train", "steps": steps, "lr": LR}
        everyone = [
            Contender("vila2", ours, question),
            Contender("transformers Trainer", peer, question | {"order": "sequential"}),
            Contender("transformers Trainer, by length", peer, question | {"order": "group_by_length"}),
        ]
        with ours, peer:
            for one in everyone:
                one.worker.ask(**(one.question | {"steps": 1}))
            for number in range(args.rounds):
                for one in everyone:
                    answer = one.worker.ask(**one.question)
                    one.seconds.append(answer["seconds"])
                    one.losses = answer["losses"]
                    rate = steps * batch / answer["seconds"]
                    print(f"  {model}, round {number + 1}: {one.engine:32} {rate:8.2f} samples/s", flush=True)
        report_speed(args, everyone, model, batch, steps)


def report_speed(
    args: argparse.Namespace, everyone: list[Contender], model: str, batch: int, steps: int
) -> None:
    ours = everyone[0]
    for one in everyone:
        gap: float | str = ""
        if one.question.get("order") != "group_by_length":
            gap = max(abs(a - b) for a, b in zip(ours.losses, one.losses, strict=True))
        row = {
            **facts(),
            "engine": one.engine,
            "model": model,
            "precision": "float32",
            "batch": batch,
            "steps": steps,
            "rounds": len(one.seconds),
            "samples_per_s": steps * batch / median(one.seconds),
            "slowest": steps * batch / max(one.seconds),
            "ours_times": median(one.seconds) / median(ours.seconds),
            "loss_gap": gap,
        }
        print(
            f"{model} {one.engine:32} {row['samples_per_s']:8.2f} samples/s; ours is {row['ours_times']:.2f} times; "
            f"losses differ by at most {gap}"
        )
        if not args.no_row:
            append_row("train", row)


def step(args: argparse.Namespace, stack: ExitStack) -> None:
    for model, batch in (("llava-small", 4), ("nano", 32)):
        if model not in args.models:
            continue
        with worker("vila2", checkpoint(model, stack), batch, 512) as ours:
            ceilings: dict[str, list[float]] = {"float32": [], "bfloat16": []}
            rates, seconds = [], []
            for _ in range(args.rounds):
                for dtype, found in ceilings.items():
                    found.append(ours.ask(what="ceiling", dtype=dtype, seconds=1.0)["rate"])
                answer = ours.ask(what="train", steps=3, lr=LR)
                # The first step of each turn takes the memory that the others reuse.
                seconds += answer["times"][1:]
                rates += [f / t for f, t in zip(answer["flops"][1:], answer["times"][1:], strict=True)]
        row = {
            **facts(),
            "model": model,
            "precision": "float32",
            "batch": batch,
            "steps": len(rates),
            "seconds": median(seconds),
            "gflops": median(rates) / 1e9,
            "float32_ceiling": max(ceilings["float32"]) / 1e9,
            "bf16_ceiling": max(ceilings["bfloat16"]) / 1e9,
            "of_float32": median(rates) / max(ceilings["float32"]),
            "of_bf16": median(rates) / max(ceilings["bfloat16"]),
        }
        print(
            f"{model}: {row['seconds']:.2f} s a step, {row['gflops']:.1f} GFLOP/s: {row['of_float32']:.0%} of "
            f"float32's {row['float32_ceiling']:.0f}, {row['of_bf16']:.0%} of bf16's {row['bf16_ceiling']:.0f}"
        )
        if not args.no_row:
            append_row("train_step", row)


def memory(args: argparse.Namespace, stack: ExitStack) -> None:
    batch, folder = 8, stack.enter_context(tempfile.TemporaryDirectory())
    with Worker(PEERS / "vila2_epoch.py", folder, "--batch", str(batch), "--longest", "768") as ours:
        answer = ours.ask(examples=args.memory_steps * batch)
    resident = np.array(answer["resident"])
    settled = np.arange(len(resident)) >= len(resident) // 4
    slope = float(np.polyfit(np.flatnonzero(settled), resident[settled], 1)[0])
    growth = slope * int(settled.sum())
    row = {
        **facts(),
        "model": "nano",
        "batch": batch,
        "steps": len(resident),
        "seconds": answer["seconds"],
        "samples_per_s": len(resident) * batch / answer["seconds"],
        "settled_mib": float(resident[settled][:20].mean()),
        "end_mib": float(resident[-20:].mean()),
        "most_mib": float(resident.max()),
        "trend_mib": growth,
    }
    print(
        f"{len(resident)} steps: {row['settled_mib']:.0f} MiB, then {row['end_mib']:.0f}; trend {growth:+.1f} MiB"
    )
    if not args.no_row:
        append_row("train_memory", row)
    if growth > MAX_GROWTH_MIB:
        raise SystemExit(f"the trend is above {MAX_GROWTH_MIB:.0f} MiB")


def checkpoint(name: str, stack: ExitStack) -> Path:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / name
    build(folder, name)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; by default all")
    parser.add_argument(
        "--models", nargs="+", default=["nano", "llava-small"], choices=["nano", "llava-small"]
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="of nano in a round; llava-small gets a sixth")
    parser.add_argument("--memory-steps", type=int, default=200)
    parser.add_argument("--no-row", action="store_true", help="print only; leave bench/results alone")
    args = parser.parse_args()
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        parser.error(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    for part in args.parts or PARTS:
        with ExitStack() as stack:
            {"speed": speed, "step": step, "memory": memory}[part](args, stack)


if __name__ == "__main__":
    main()
