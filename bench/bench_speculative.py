"""Round-two recaptioning: writing captions with drafts against writing them plainly, in one run.

    python bench/bench_speculative.py .cache/llava-small --batch 1 --batch 4

A draft is the model's own greedy caption with a share of its words, drawn at random, replaced by words of other
captions: what a caption of the round before looks like where that share has changed. Captions are checked to be the
same, token by token. Images are crops of photographs. Each share is measured with what the product does, which is to
guess from the draft and from the phrases of the captions that the run has written so far (it begins with none), and
from the draft alone; `new words` says how much phrases can know here: the share of tokens that follow two tokens they
have not followed in an earlier caption of the run.
Decoding alone is the whole run less a run of one new token (encode and prefill), each plain and drafted in turns.
On a machine with other work, `--clock cpu --threads 1` counts this process's CPU-seconds.
"""

import argparse
import random
import re
import time
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from statistics import median

import numpy as np
from common import CHAT, append_row, facts, photo_jpegs
from PIL import Image

from vila2.backends.native import NativeCaptioner, open_checkpoint
from vila2.engine.phrases import Phrases
from vila2.engine.speculation import Speculator
from vila2.types import Caption, CaptionRequest, SamplingParams

COUNTERS = ("new_tokens", "sequence_steps", "drafted_tokens", "accepted_tokens")
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def requests(captioner: NativeCaptioner, count: int, new_tokens: int) -> list[CaptionRequest]:
    sampling = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    return [
        CaptionRequest(i, CHAT, (captioner.prepare(pixels),), sampling)
        for i, pixels in enumerate(np.asarray(Image.open(BytesIO(data))) for data in photo_jpegs(count))
    ]


def replaced(text: str, share: float, others: list[str], rng: random.Random) -> str:
    """`text` with a share of its words replaced by some of `others`."""
    parts = re.split(r"(\s+)", text)  # words at even places, the space between them at odd ones
    words = [place for place in range(0, len(parts), 2) if parts[place]]
    for place in rng.sample(words, round(share * len(words))):
        parts[place] = rng.choice(others)
    return "".join(parts)


def new_words(captions: list[Caption]) -> float:
    """The share of tokens that come after two tokens as in no earlier caption."""
    known: set[tuple[int, ...]] = set()
    num_new = num_all = 0
    for caption in captions:
        threes = list(zip(caption.token_ids, caption.token_ids[1:], caption.token_ids[2:], strict=False))
        num_all += len(threes)
        num_new += sum(three not in known for three in threes)
        known.update(threes)
    return num_new / max(1, num_all)


class Run:
    """Captions requests and takes the time, with what the counters say of it."""

    def __init__(self, captioner: NativeCaptioner, clock: str) -> None:
        self.captioner, self.clock = captioner, CLOCKS[clock]

    def __call__(
        self, asked: list[CaptionRequest], with_phrases: bool = True
    ) -> tuple[float, dict[int, tuple[int, ...]], dict[str, float], list[Caption]]:
        speculator = self.captioner.engine.speculator
        # Each run learns anew.
        self.captioner.engine.speculator = Speculator(
            speculator.cost, phrases=Phrases() if with_phrases else None
        )
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

        share_new = new_words(captions)
        print(f"  {share_new:.0%} of the tokens follow two tokens as in no earlier caption")
        one = [replace(request, sampling=replace(request.sampling, max_new_tokens=1)) for request in asked]
        first: list[float] = []
        plain: list[float] = []
        ways = [(share, with_phrases) for share in shares for with_phrases in (True, False)]
        fast: dict[tuple[float, bool], list[float]] = {way: [] for way in ways}
        counts: dict[tuple[float, bool], dict[str, float]] = {}
        for _ in range(args.rounds):
            first.append(run(one)[0])
            plain.append(run(asked)[0])
            for way in ways:
                seconds, tokens, counts[way], _ = run(drafted[way[0]], way[1])
                if tokens != truth:
                    raise SystemExit(f"batch {batch}, {way[0]:.0%} right: the captions differ")
                fast[way].append(seconds)
        prefill, plainly = median(first), median(plain)
        for way in ways:
            seconds, used = median(fast[way]), counts[way]
            row = {
                "right_words": way[0],
                "guesses": "draft and phrases" if way[1] else "draft",
                "plain_s": plainly,
                "drafted_s": seconds,
                "prefill_s": prefill,
                "times_whole": plainly / seconds,
                "times_decoding": (plainly - prefill) / max(seconds - prefill, 1e-9),
                "accepted": used["accepted_tokens"] / max(1, used["drafted_tokens"]),
                "drafted_per_token": used["drafted_tokens"] / used["new_tokens"],
                "tokens_per_step": used["new_tokens"] / used["sequence_steps"],
                "new_words": share_new,
            }
            print(
                f"  {way[0]:4.0%} right, from {row['guesses']}: {row['times_whole']:.2f} times the speed of plain, "
                f"decoding alone {row['times_decoding']:.2f}; {row['accepted']:.0%} of guesses right, "
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
