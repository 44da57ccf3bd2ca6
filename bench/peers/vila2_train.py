"""Our side of bench/bench_train.py: packed batches, `batch_loss`, our AdamW (bench/workers.py has the protocol)."""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from train_work import Conversation, batches, conversations
from workers import serve

from vila2.model.checkpoint import load_checkpoint
from vila2.model.images import ImageProcessor
from vila2.ops.threads import set_threads
from vila2.train.examples import VISUAL_TOKEN, EncodedExample, Row
from vila2.train.flops import PARTS, measured_ceiling, step_flops
from vila2.train.loss import batch_loss
from vila2.train.machine import keep_freed_memory
from vila2.train.optim import ParamGroup, build_optimizer, fused_rows
from vila2.train.packing import PackedBatch, pack


def as_example(one: Conversation, processor: ImageProcessor) -> EncodedExample:
    image = processor.prepare(one.pixels)
    prefix = np.concatenate((one.header, np.full(image.num_tokens, VISUAL_TOKEN)))
    return EncodedExample(
        "", (image,), Row(prefix, np.zeros(len(prefix), dtype=bool)), (Row(one.text, one.in_loss),)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--longest", type=int, required=True)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()

    set_threads(args.threads)
    keep_freed_memory()
    loaded = load_checkpoint(args.checkpoint, dtype=torch.float32)
    model, config = loaded.model.requires_grad_(True), loaded.config
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    cache: list[Conversation] = []

    def packed(steps: int) -> Iterator[PackedBatch]:
        wanted = steps * args.batch
        if len(cache) < wanted:
            cache[:] = conversations(
                wanted, config.decoder.vocab_size, config.vision.image_size, args.longest
            )
        for group in batches(cache[:wanted], args.batch):
            yield pack([as_example(one, loaded.image_processor) for one in group])

    def train(question: dict[str, Any]) -> dict[str, Any]:
        model.load_state_dict(initial)
        group = ParamGroup(
            "all",
            list(model.named_parameters()),
            question["lr"],
            optimizer=question.get("optimizer", "adamw"),
            blocks=fused_rows(model),
        )
        optimizer = build_optimizer([group], "float32")
        losses, flops, times = [], [], []
        begin = time.perf_counter()
        for batch in packed(question["steps"]):
            start = time.perf_counter()
            loss, count = batch_loss(model, batch, "cpu")
            (loss / count).backward()
            optimizer.clip_grad_norm(1.0)
            optimizer.step(1.0)
            optimizer.zero_grad()
            losses.append(float(loss.detach()) / count)
            times.append(time.perf_counter() - start)
            flops.append(step_flops(config, batch, PARTS))
        seconds = time.perf_counter() - begin  # packing included
        return {"seconds": seconds, "losses": losses, "times": times, "flops": flops}

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        if question["what"] == "train":
            return train(question)
        dtype = getattr(torch, question["dtype"])
        return {"rate": measured_ceiling(dtype, args.threads, seconds=question["seconds"])}

    serve({"threads": args.threads, "parameters": sum(p.numel() for p in model.parameters())}, answer)


if __name__ == "__main__":
    main()
