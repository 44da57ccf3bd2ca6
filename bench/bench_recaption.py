"""Captions a second against transformers' `generate`, on the same model, images, prompt and number of new tokens.

    python bench/bench_recaption.py .cache/llava-small

640x480 images, 224 prompt tokens, 64 new tokens, greedy, end-of-sequence ignored, on the CPU. Each engine and
precision is a process of its own; they run in turns. Round one measures every batch size of the peer, the later
rounds its fastest in each precision; figures are medians over the rounds. `ratio` compares with the peer's fastest
of all, whatever its precision. `same_tokens` says on how many images greedy tokens equal the peer's in float32.
"""

import argparse
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from common import append_row, facts
from workers import Worker

PRECISIONS = ["float32", "bf16", "int8"]
PEERS = Path(__file__).parent / "peers"


@dataclass
class Contender:
    """One engine in one precision at one batch size, and its seconds by round."""

    engine: str
    precision: str
    batch: int
    worker: Worker
    seconds: list[float] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)

    def run(self, images: int, new_tokens: int) -> None:
        answer = self.worker.ask(images=images, batch=self.batch)
        self.tokens = answer["tokens"]
        lengths = {len(tokens) for tokens in self.tokens}
        if lengths != {new_tokens} or len(self.tokens) != images:
            raise RuntimeError(f"{self.engine} made {lengths} tokens an image, not {new_tokens}")
        self.seconds.append(answer["seconds"])
        print(
            f"  {self.engine:12} {self.precision:8} batch {self.batch:3}  {images / self.seconds[-1]:7.3f} images/s"
            f"  ({answer['prompt_tokens']} prompt tokens)",
            flush=True,
        )


def contenders(args: argparse.Namespace, stack: ExitStack) -> list[Contender]:
    found = []
    for precision in args.precisions:
        common = (args.checkpoint, "--precision", precision, "--new-tokens", str(args.new_tokens))
        ours = stack.enter_context(Worker(PEERS / "vila2_captions.py", *common))
        print(f"vila2 {precision}: {ours.ready['plan']}, batch {ours.ready['batch']}", flush=True)
        found.append(Contender("vila2", precision, ours.ready["batch"], ours))
        if precision == "int8":
            continue  # transformers has none
        peer = stack.enter_context(Worker(PEERS / "transformers_generate.py", *common))
        found += [Contender("transformers", precision, batch, peer) for batch in args.batches]
    return found


def fastest(group: list[Contender]) -> Contender:
    return min(group, key=lambda one: median(one.seconds))


def row(
    one: Contender, args: argparse.Namespace, best: Contender, reference: Contender | None
) -> dict[str, Any]:
    same = ""
    if reference is not None:
        pairs = zip(one.tokens, reference.tokens, strict=True)
        same = f"{sum(a == b for a, b in pairs)}/{args.images}"
    return {
        **facts(),
        "engine": one.engine,
        "model": Path(args.checkpoint).resolve().name,
        "precision": one.precision,
        "batch": one.batch,
        "images": args.images,
        "new_tokens": args.new_tokens,
        "rounds": len(one.seconds),
        "images_per_s": args.images / median(one.seconds),
        "slowest": args.images / max(one.seconds),
        "ratio": median(best.seconds) / median(one.seconds),
        "same_tokens": same,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--precisions", nargs="+", default=["float32", "bf16"], choices=PRECISIONS)
    parser.add_argument("--no-row", action="store_true", help="print only; leave bench/results alone")
    args = parser.parse_args()

    with ExitStack() as stack:
        everyone = contenders(args, stack)
        print("round 1", flush=True)
        for one in everyone:
            one.run(args.images, args.new_tokens)
        finalists = [one for one in everyone if one.engine == "vila2"]
        for precision in args.precisions:
            group = [one for one in everyone if (one.engine, one.precision) == ("transformers", precision)]
            finalists += [fastest(group)] if group else []
        for number in range(2, args.rounds + 1):
            print(f"round {number}", flush=True)
            for one in finalists:
                one.run(args.images, args.new_tokens)

    peers = [one for one in finalists if one.engine == "transformers"]
    best = fastest(peers)
    reference = next((one for one in peers if one.precision == "float32"), None)
    print()
    for one in everyone:
        values = row(one, args, best, reference)
        print(
            f"{one.engine:12} {one.precision:8} batch {one.batch:3}  {values['images_per_s']:7.3f} images/s"
            f"  {values['ratio']:5.2f} times the peer's best  same tokens {values['same_tokens']}"
        )
        if not args.no_row:
            append_row("recaption", values)


if __name__ == "__main__":
    main()
