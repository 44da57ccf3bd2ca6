"""Round-two recaptioning: writing captions with drafts against writing them plainly, in one run.

    python bench/bench_speculative.py .cache/llava-small --batch 1 --batch 4

A draft is the model's own greedy caption with a share of its words replaced by words of other captions: what a caption
of the round before looks like where that share has changed. Captions are checked to be the same, token by token.
Decoding alone is the whole run less a run of one new token (encode and prefill), each plain and drafted in turns.
On a machine with other work, `--clock cpu --threads 1` counts this process's CPU-seconds.
"""

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

from common import CHAT, append_row, facts, noise_images

from vila2.backends.native import NativeCaptioner, open_checkpoint
from vila2.engine.speculation import Speculator
from vila2.types import Caption, CaptionRequest, SamplingParams

COUNTERS = ("new_tokens", "sequence_steps", "drafted_tokens", "accepted_tokens")
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def requests(captioner: NativeCaptioner, count: int, new_tokens: int) -> list[CaptionRequest]:
    sampling = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    return [
        CaptionRequest(i, CHAT, (captioner.prepare(pixels),), sampling)
        for i, pixels in enumerate(noise_images(count))
    ]


def replaced(text: str, share: float, others: list[str], rng: random.Random) -> str:
    """`text` with a share of its words replaced by some of `others`."""
    words = text.split()
    for place in rng.sample(range(len(words)), round(share * len(words))):
        words[place] = rng.choice(others)
    return " ".join(words)


class Run:
    """Captions requests and takes the time, with what the counters say of it."""

    def __init__(self, captioner: NativeCaptioner, clock: str) -> None:
        self.captioner, self.clock = captioner, CLOCKS[clock]

    def __call__(
        self, asked: list[CaptionRequest]
    ) -> tuple[float, dict[int, tuple[int, ...]], dict[str, float], list[Caption]]:
        speculator = self.captioner.engine.speculator
        self.captioner.engine.speculator = Speculator(speculator.cost)  # each run learns its acceptance anew
        before = self.captioner.stats()
        start = self.clock()
        captions = sorted(self.captioner.caption(asked), key=lambda caption: caption.id)
        seconds = self.clock() - start
        after = self.captioner.stats()
        tokens = {caption.id: caption.token_ids for caption in captions}
        return seconds, tokens, {name: after[name] - before[name] for name in COUNTERS}, captions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--images", type=int, default=8, help="rounded up to whole batches")
    parser.add_argument("--batch", type=int, action="append", help="captions at once; repeatable [1 2 4]")
    parser.add_argument("--right", type=float, action="append", help="share of right words [1 0.9 0.8 0.6 0]")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--note", default="", help="what else there is to say of the run, for its rows")
    parser.add_argument("--no-row", action="store_true", help="print only; leave bench/results alone")
    args = parser.parse_args()

    shares = args.right or [1.0, 0.9, 0.8, 0.6, 0.0]
    for batch in args.batch or [1, 2, 4]:
        captioner = open_checkpoint(
            args.checkpoint,
            device="cpu",
            precision=args.precision,
            template="raw",
            batch_size=batch,
            threads=args.threads,
            max_new_tokens=args.new_tokens,
        )
        run = Run(captioner, args.clock)
        count = -(-args.images // batch) * batch
        asked = requests(captioner, count, args.new_tokens)
        _, truth, _, captions = run(asked)  # warm, and what drafts are made of
        others = sorted({word for caption in captions for word in caption.text.split()})
        rng = random.Random(0)
        drafted = {
            share: [
                replace(request, draft=replaced(caption.text, 1 - share, others, rng))
                for request, caption in zip(asked, captions, strict=True)
            ]
            for share in shares
        }
        run([replace(drafted[shares[0]][0], id=count)])  # measures the cost of a step
        cost = captioner.engine.speculator.cost
        assert cost is not None
        steps = "  ".join(
            f"{rows}: {seconds / cost.seconds[0]:.2f}"
            for rows, seconds in zip(cost.rows, cost.seconds, strict=True)
        )
        print(
            f"batch {batch}: a step of one row takes {1e3 * cost.seconds[0]:.1f} ms; rows: times as long:  {steps}"
        )

        one = [replace(request, sampling=replace(request.sampling, max_new_tokens=1)) for request in asked]
        first: list[float] = []
        plain: list[float] = []
        fast: dict[float, list[float]] = {share: [] for share in shares}
        counts: dict[float, dict[str, float]] = {}
        for _ in range(args.rounds):
            first.append(run(one)[0])
            plain.append(run(asked)[0])
            for share in shares:
                seconds, tokens, counts[share], _ = run(drafted[share])
                if tokens != truth:
                    raise SystemExit(f"batch {batch}, {share:.0%} right: the captions differ")
                fast[share].append(seconds)
        prefill, plainly = median(first), median(plain)
        for share in shares:
            seconds, used = median(fast[share]), counts[share]
            row = {
                "right_words": share,
                "plain_s": plainly,
                "drafted_s": seconds,
                "prefill_s": prefill,
                "times_whole": plainly / seconds,
                "times_decoding": (plainly - prefill) / max(seconds - prefill, 1e-9),
                "accepted": used["accepted_tokens"] / max(1, used["drafted_tokens"]),
                "drafted_per_token": used["drafted_tokens"] / used["new_tokens"],
                "tokens_per_step": used["new_tokens"] / used["sequence_steps"],
            }
            print(
                f"  {share:4.0%} right: {row['times_whole']:.2f} times the speed of plain, "
                f"decoding alone {row['times_decoding']:.2f}; {row['accepted']:.0%} of drafted tokens right, "
                f"{row['tokens_per_step']:.2f} tokens a step"
            )
            if not args.no_row:
                settings = {
                    "model": captioner.model_name,
                    "precision": args.precision,
                    "batch": batch,
                    "images": count,
                    "new_tokens": args.new_tokens,
                    "rounds": args.rounds,
                    "clock": args.clock,
                }
                base = {**facts(), "threads": args.threads or facts()["threads"]}
                append_row("speculative", {**base, **settings, **row, "note": args.note})
        captioner.close()


if __name__ == "__main__":
    main()
