"""The peer OpenVINO GenAI: LLaVA captions with int8 weights, in continuous batches or one image at a time.

A worker of bench/bench_peers.py (bench/workers.py has the protocol); it runs in an environment of its own, where
`optimum-cli export openvino --task image-text-to-text --weight-format int8` made its model.
"""

import argparse
from typing import Any

import openvino
import openvino_genai as genai
from common import CHAT, noise_images
from workers import own_output, serve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32, help="1: the plain pipeline, an image at a time")
    args = parser.parse_args()

    config = genai.GenerationConfig(
        max_new_tokens=args.new_tokens, min_new_tokens=args.new_tokens, ignore_eos=True, do_sample=False
    )
    config.apply_chat_template = False
    if args.batch == 1:
        single = genai.VLMPipeline(args.model, "CPU")
    else:
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = 2  # GB
        scheduler.max_num_seqs = args.batch
        scheduler.max_num_batched_tokens = 2048
        scheduler.enable_prefix_caching = False
        batched = genai.ContinuousBatchingPipeline(args.model, scheduler, "CPU")

    def generate(question: dict[str, Any]) -> dict[str, Any]:
        pictures = [
            openvino.Tensor(image) for image in noise_images(question["images"], seed=question["seed"])
        ]
        if args.batch == 1:
            results = [single.generate(CHAT, images=[p], generation_config=config) for p in pictures]
        else:
            count = len(pictures)
            results = batched.generate(
                [CHAT] * count, images=[[p] for p in pictures], generation_config=[config] * count
            )
        # It gives texts, not tokens, and counts these: of each image alone, or of all in a batch together.
        counted = results if args.batch == 1 else results[:1]
        return {
            "generated": sum(result.perf_metrics.get_num_generated_tokens() for result in counted),
            "prompt_tokens": results[0].perf_metrics.get_num_input_tokens(),
        }

    generate({"images": 2, "seed": 1000})
    serve({"batch": args.batch}, generate)


if __name__ == "__main__":
    own_output()
    main()
