"""What a further prompt on the same image costs, through the Captioner seam.

    python bench/bench_shared_prefix.py .cache/llava-small

The same images with one prompt and with three prompts of equal length, in turns. Three prompts share one vision
encode and one image prefill, so two further prompts should cost only their own text prefill and decode.
"""

import argparse
from collections.abc import Iterator
from statistics import median
from time import perf_counter
from typing import Any

from common import append_row, facts, noise_images

from vila2.backends import Captioner, open_captioner
from vila2.config import RecaptionSettings
from vila2.types import CaptionRequest, SamplingParams

QUESTIONS = (
    "Describe the objects in the image and how they look.",
    "Describe the places of things in the image, in detail.",
    "Describe the people in the image and what they do.",
)
CHAT = "<|im_start|>user\n<image>\n{}<|im_end|>\n<|im_start|>assistant\n"
COUNTERS = ("images_encoded", "images_shared", "prompt_tokens", "computed_tokens", "prefix_hit_tokens")


def requests(
    captioner: Captioner, num_images: int, num_prompts: int, new_tokens: int
) -> Iterator[CaptionRequest]:
    sampling = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    for i, pixels in enumerate(noise_images(num_images)):
        prepared = captioner.prepare(pixels)
        for j in range(num_prompts):
            yield CaptionRequest(
                id=i * num_prompts + j,
                prompt=CHAT.format(QUESTIONS[j]),
                images=(prepared,),
                sampling=sampling,
                image_key=i,
                num_siblings=num_prompts,
            )


def timed(captioner: Captioner, num_images: int, num_prompts: int, new_tokens: int) -> dict[str, float]:
    before = captioner.stats()
    started = perf_counter()
    captions = list(captioner.caption(requests(captioner, num_images, num_prompts, new_tokens)))
    seconds = perf_counter() - started
    wrong = [c for c in captions if len(c.token_ids) != new_tokens]
    if wrong or len(captions) != num_images * num_prompts:
        raise RuntimeError(
            f"{len(wrong)} of {len(captions)} captions have not {new_tokens} tokens: {wrong[:1]}"
        )
    after = captioner.stats()
    return {"seconds": seconds, **{name: after[name] - before[name] for name in COUNTERS}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-row", action="store_true", help="print only; leave bench/results alone")
    args = parser.parse_args()

    settings = RecaptionSettings(
        source="noise",
        model=args.checkpoint,
        out="nowhere",
        device="cpu",
        precision=args.precision,
        template="raw",
        max_new_tokens=args.new_tokens,
    )
    captioner = open_captioner(settings)
    timed(captioner, 2, 1, args.new_tokens)
    runs: dict[int, list[dict[str, float]]] = {1: [], 3: []}
    for _ in range(args.rounds):
        for num_prompts, results in runs.items():
            results.append(timed(captioner, args.images, num_prompts, args.new_tokens))

    one, three = (median(run["seconds"] for run in results) for results in runs.values())
    further = (three - one) / 2 / one
    counters: dict[str, Any] = runs[3][-1]
    print(f"{args.images} images: one prompt {one:.2f} s, three prompts {three:.2f} s")
    print(f"a further prompt costs {further:.2f} of the first")
    print(", ".join(f"{name} {int(counters[name])}" for name in COUNTERS))
    if counters["images_encoded"] != args.images:
        raise SystemExit(f"{args.images} images were encoded {counters['images_encoded']:.0f} times")
    if not args.no_row:
        row = {
            **facts(),
            "model": captioner.model_name,
            "precision": args.precision,
            "images": args.images,
            "new_tokens": args.new_tokens,
            "rounds": args.rounds,
            "one_prompt_s": one,
            "three_prompts_s": three,
            "further_prompt": further,
            **{name: int(counters[name]) for name in COUNTERS},
        }
        append_row("shared_prefix", row)
    captioner.close()


if __name__ == "__main__":
    main()
