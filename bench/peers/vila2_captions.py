"""Our side of bench/bench_recaption.py: a worker around `vila2.load` (bench/workers.py has the protocol)."""

import argparse
from typing import Any

from common import CHAT, noise_images
from workers import serve

import vila2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--precision", required=True)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int)
    args = parser.parse_args()
    model = vila2.load(
        args.checkpoint, device="cpu", precision=args.precision, template="raw", batch_size=args.batch_size
    )

    def caption(question: dict[str, Any]) -> dict[str, Any]:
        captions = model.caption(
            noise_images(question["images"], seed=question.get("seed", 0)),
            prompt=CHAT,
            max_new_tokens=args.new_tokens,
            ignore_eos=True,
        )
        return {
            "tokens": [list(caption.token_ids) for caption in captions],
            "prompt_tokens": captions[0].num_prompt_tokens,
        }

    caption({"images": 2})
    limits = model.captioner.engine.limits
    serve({"batch": limits.max_num_seqs, "plan": model.captioner.plan.summary}, caption)


if __name__ == "__main__":
    main()
