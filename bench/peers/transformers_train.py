"""The peer: transformers' Trainer on a LLaVA checkpoint, padded batches, AdamW, on the CPU.

A worker of bench/bench_train.py (bench/workers.py has the protocol); it imports nothing of vila2.
"""

import argparse
import tempfile
import time
from typing import Any

import numpy as np
import torch
from train_work import Conversation, conversations
from transformers import (
    AutoProcessor,
    LlavaForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging
from workers import serve


class Timed(Trainer):
    """Keeps each step's loss."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses.append(float(loss))
        return loss


class Clock(TrainerCallback):
    """Seconds from the first batch to the end of the last step."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = time.perf_counter() - self.start


def as_item(one: Conversation, num_visual: int, image_token: int, processor: Any) -> dict[str, Any]:
    visual = np.full(num_visual, image_token)
    ids = np.concatenate((one.header, visual, one.text))
    labels = np.concatenate(
        (np.full(len(one.header) + num_visual, -100), np.where(one.in_loss, one.text, -100))
    )
    pixels = processor.image_processor(images=one.pixels, return_tensors="pt")["pixel_values"][0]
    return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels), "pixel_values": pixels}


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Padded on the right to the longest, as transformers' own collators do it."""

    def padded(name: str, value: int) -> torch.Tensor:
        rows = [item[name] for item in items]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    lengths = torch.tensor([len(item["input_ids"]) for item in items])
    ids = padded("input_ids", 2)
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
        "labels": padded("labels", -100),
        "pixel_values": torch.stack([item["pixel_values"] for item in items]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--longest", type=int, required=True)
    args = parser.parse_args()

    logging.disable_progress_bar()
    processor = AutoProcessor.from_pretrained(args.checkpoint)
    model = LlavaForConditionalGeneration.from_pretrained(args.checkpoint, dtype=torch.float32)
    config, vision = model.config.text_config, model.config.vision_config
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    num_visual = (vision.image_size // vision.patch_size) ** 2
    cache: list[dict[str, Any]] = []

    def train(question: dict[str, Any]) -> dict[str, Any]:
        wanted = question["steps"] * args.batch
        if len(cache) < wanted:
            made = conversations(wanted, config.vocab_size, vision.image_size, args.longest)[len(cache) :]
            cache.extend(as_item(one, num_visual, model.config.image_token_id, processor) for one in made)
        model.load_state_dict(initial)
        clock = Clock()
        with tempfile.TemporaryDirectory() as folder:
            settings = TrainingArguments(
                output_dir=folder,
                use_cpu=True,
                per_device_train_batch_size=args.batch,
                num_train_epochs=1,
                learning_rate=question["lr"],
                lr_scheduler_type="constant",
                weight_decay=0.0,
                adam_beta2=0.95,
                max_grad_norm=1.0,
                train_sampling_strategy=question["order"],
                dataloader_pin_memory=False,
                remove_unused_columns=False,
                save_strategy="no",
                report_to="none",
                logging_steps=1000,
                disable_tqdm=True,
                seed=0,
            )
            trainer = Timed(
                model, settings, data_collator=collate, train_dataset=cache[:wanted], callbacks=[clock]
            )
            trainer.remove_callback(PrinterCallback)  # standard output is the protocol's
            trainer.losses = []
            trainer.train()
        return {"seconds": clock.seconds, "losses": trainer.losses}

    serve({"threads": torch.get_num_threads()}, train)


if __name__ == "__main__":
    main()
