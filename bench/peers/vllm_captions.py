"""The peer vLLM: LLaVA captions with its offline engine on the CPU, continuous batching.

A worker of bench/bench_peers.py (bench/workers.py has the protocol); it runs in an environment of its own.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from common import CHAT, ROOT, noise_images

os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB: more than 64 sequences of 320 tokens take
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
# What it compiles at its first start.
os.environ["VLLM_CACHE_ROOT"] = str(ROOT / ".cache" / "peers" / "vllm-cache")
os.environ["HF_HUB_OFFLINE"] = "1"
# By itself it leaves one core free and binds to the others; here it gets every core, as the others do.
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))

from PIL import Image
from vllm import LLM, SamplingParams
from workers import own_output, serve

# Where there is no AVX-512, what it compiles takes longer to make than the benchmark to run.
EAGER = "avx512f" not in Path("/proc/cpuinfo").read_text(encoding="utf-8").split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--precision", choices=["float32", "bf16"], required=True)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()

    # No caches: each image is captioned once, as in a data set.
    engine = LLM(
        args.checkpoint,
        dtype="bfloat16" if args.precision == "bf16" else "float32",
        max_model_len=1024,
        max_num_seqs=args.batch,
        max_num_batched_tokens=2048,
        limit_mm_per_prompt={"image": 1},
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
        enforce_eager=EAGER,
    )
    sampling = SamplingParams(max_tokens=args.new_tokens, ignore_eos=True, temperature=0)

    def generate(question: dict[str, Any]) -> dict[str, Any]:
        prompts = [
            {"prompt": CHAT, "multi_modal_data": {"image": Image.fromarray(image)}}
            for image in noise_images(question["images"], seed=question["seed"])
        ]
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        return {
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "prompt_tokens": len(outputs[0].prompt_token_ids),
        }

    generate({"images": 2, "seed": 1000})
    serve({"batch": args.batch}, generate)


if __name__ == "__main__":  # vLLM starts processes that import this file
    own_output()
    main()
