"""The peer: LLaVA captions with transformers' `generate`, in padded batches, greedy, end-of-sequence ignored.

A worker of bench/bench_recaption.py (bench/workers.py has the protocol); it imports nothing of vila2.
"""

import argparse
from typing import Any

import torch
from common import CHAT, noise_images
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration
from transformers.utils import logging
from workers import serve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--precision", choices=["float32", "bf16"], required=True)
    parser.add_argument("--new-tokens", type=int, default=64)
    args = parser.parse_args()

    logging.disable_progress_bar()
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    processor = AutoProcessor.from_pretrained(args.checkpoint)
    processor.tokenizer.padding_side = "left"
    if processor.tokenizer.pad_token_id is None:
        processor.tokenizer.pad_token_id = processor.tokenizer.eos_token_id
    model = LlavaForConditionalGeneration.from_pretrained(args.checkpoint, dtype=dtype).eval()
    model.generation_config.eos_token_id = None

    def generate(question: dict[str, Any]) -> dict[str, Any]:
        images, tokens = noise_images(question["images"], seed=question.get("seed", 0)), []
        for start in range(0, len(images), question["batch"]):
            part = [Image.fromarray(image) for image in images[start : start + question["batch"]]]
            inputs = processor(images=part, text=[CHAT] * len(part), return_tensors="pt")
            inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
            length = inputs["input_ids"].shape[1]
            with torch.inference_mode():
                out = model.generate(
                    **inputs,
                    max_new_tokens=args.new_tokens,
                    min_new_tokens=args.new_tokens,
                    do_sample=False,
                )
            tokens += out[:, length:].tolist()
        return {"tokens": tokens, "prompt_tokens": length}

    generate({"images": 2, "batch": 2})
    serve({"threads": torch.get_num_threads()}, generate)


if __name__ == "__main__":
    main()
