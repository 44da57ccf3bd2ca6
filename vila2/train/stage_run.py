"""One stage: the loop.

A step is: micro-batches -> summed losses -> gradients of their mean -> the guard -> clip -> the optimiser. All that
decides the next step (weights, optimiser, random states, the place in the data) is in the stage's state, so a run
that was killed goes on bit for bit.
"""

import json
import math
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch

from vila2.data.files import atomic_write, make_folder
from vila2.errors import VilaError
from vila2.model.vlm import VisionLanguageModel
from vila2.recaption.interrupt import Interrupts
from vila2.train.batches import BatchStream, PackedBatch, Position
from vila2.train.checkpointing import checkpoint_blocks
from vila2.train.encode import ExampleEncoder
from vila2.train.flops import step_flops
from vila2.train.guard import Guard, diverged
from vila2.train.image_cache import ImageCache
from vila2.train.log import StageLog
from vila2.train.mixture import derived_seed
from vila2.train.optim import build_optimizer
from vila2.train.plot import plot_losses
from vila2.train.progress import Rates, StageSummary, StepFigures, TrainProgress
from vila2.train.recipe import DataSettings, Recipe
from vila2.train.run_folder import RunFolder
from vila2.train.sharding import LossOf, Processes, copy_whole, shard, whole_tensors
from vila2.train.sources import open_mixture
from vila2.train.stages import lr_scale, num_steps, param_groups, prepare_model, trainable
from vila2.train.start import Start
from vila2.train.state import (
    Joined,
    load_state,
    restore_rng,
    save_state,
    saved_step,
)

Steps = Generator[tuple[list[PackedBatch], Position], None, None]
_MAX_EMPTY_STEPS = 100  # in a row: the data have nothing to learn from


@dataclass(frozen=True, slots=True)
class Machine:
    """What a run computes with. `ceiling`: operations a second of all processes' matrix products, if measured."""

    precision: str
    threads: int
    ceiling: float | None


class StageRun:
    """One stage of a recipe in memory, begun or continued."""

    def __init__(
        self,
        recipe: Recipe,
        index: int,
        folder: RunFolder,
        start: Start,
        machine: Machine,
        processes: Processes,
    ) -> None:
        self.recipe, self.index, self.folder = recipe, index, folder
        self.start, self.machine, self.processes = start, machine, processes
        self.stage = stage = recipe.stage[index]
        torch.manual_seed(derived_seed(recipe.seed, stage.name, "adapters") % 2**63)  # the same everywhere
        self.model = start.model
        prepare_model(self.model, stage)
        torch.manual_seed(derived_seed(recipe.seed, stage.name, processes.rank) % 2**63)
        if stage.checkpoint_activations:
            checkpoint_blocks(self.model)
        self.loss = LossOf(self.model, processes.device, sharded=processes.world_size > 1)
        if processes.world_size > 1:
            shard(self.loss, processes)
        self.optimizer = build_optimizer(param_groups(self.model, stage), machine.precision)
        self.stream, self.steps = self._stream(stage.data, prefetch=2)
        self.held_out: list[PackedBatch] | None = None
        self.guard = Guard(recipe.guard)
        self.position = Position()
        self.totals = {"tokens": 0, "images": 0}
        self.seconds = 0.0
        self.empty_steps = 0

    def run(
        self, observe: Callable[[TrainProgress], None], interrupts: Interrupts, until: int | None = None
    ) -> StageSummary | None:
        """Train to the end and write the checkpoint; None if it stopped before, with its state saved."""
        if self.processes.is_main:
            make_folder(self.folder.stage(self.index))
        self.processes.barrier()
        self._resume()
        log = None
        if self.processes.is_main:
            log = StageLog(self.folder.stage(self.index), self.position.step, self.recipe.tensorboard)
        try:
            with interrupts.orderly():
                finished = self._loop(log, observe, interrupts, until)
        finally:
            if log is not None:
                log.close()
        return self._finish() if finished else None

    def probe(self, steps: int) -> float:
        """Seconds a step, of the quickest of `steps` after one that warms up. The model is changed, no file is."""
        seconds = []
        with closing(cast(Steps, self.stream.steps())) as stream:
            for _ in range(steps + 1):
                begun = time.perf_counter()
                batches, self.position = next(stream)
                seconds.append(self._step(batches, begun).seconds)
        return min(seconds[1:])

    def state_bytes(self) -> int:
        """What a saved state takes on disk, about."""
        return sum(tensor.nbytes for tensor in self._state_tensors().values())

    def _loop(
        self,
        log: StageLog | None,
        observe: Callable[[TrainProgress], None],
        interrupts: Interrupts,
        until: int | None,
    ) -> bool:
        rates = Rates()
        saved_at = time.monotonic()
        last = min(self.steps, until or self.steps)
        with closing(cast(Steps, self.stream.steps(self.position))) as steps:
            while self.position.step < last:
                begun = time.perf_counter()
                batches, position = next(steps)
                minutes = (time.monotonic() - saved_at) / 60
                # The main process's clock decides for all; any process may be asked to stop.
                due, stop = self.processes.sum(
                    [
                        float(self.processes.is_main and minutes >= self.stage.save_minutes),
                        interrupts.requested,
                    ]
                )
                figures = self._step(batches, begun)
                self.position = position
                rates.add(figures)
                self._tell(figures, rates, log, observe)
                every = self.stage.save_every
                if due or stop or (every and position.step % every == 0 and position.step < self.steps):
                    self._save()
                    saved_at = time.monotonic()
                if stop:
                    return False
        if last < self.steps:
            self._save()
        return last == self.steps

    def _step(self, batches: list[PackedBatch], begun: float) -> StepFigures:
        """One optimiser step. DivergedError before any weight has changed."""
        step = self.position.step
        labels, tokens, images, flops = self.processes.sum(self._counts(batches))
        self.optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64, device=self.processes.device)
        for batch in batches:
            if not (batch.num_labels or self.loss.sharded):
                continue
            loss = self.loss(batch)
            if loss.requires_grad:
                # FSDP averages gradients over the processes; the mean is over the labels of all.
                (loss * (self.processes.world_size / max(1.0, labels))).backward()
            total += loss.detach()
        for _, parameter in trainable(self.model):
            if parameter.grad is None:  # a step without images, say: momentum goes on all the same
                parameter.grad = torch.zeros_like(parameter)
        (summed,) = self.processes.sum([float(total)])
        norm, mean = 0.0, None
        if labels:
            mean = summed / labels
            norm = self._checked(mean, batches)
            self.optimizer.step(lr_scale(self.stage, step, self.steps))
        self._count_empty(bool(labels))
        seconds = time.perf_counter() - begun
        self.seconds += seconds
        self.totals["tokens"] += int(tokens)
        self.totals["images"] += int(images)
        rate = max(self.stage.lr.of(part) for part in self.stage.train)
        return StepFigures(
            step=step + 1,
            loss=mean,
            lr=rate * lr_scale(self.stage, step, self.steps),
            grad_norm=norm,
            tokens=int(tokens),
            images=int(images),
            flops=flops,
            seconds=seconds,
        )

    def _counts(self, batches: list[PackedBatch]) -> list[float]:
        """Labels, tokens, images and operations of this process's share of a step."""
        adapted = self.stage.lora.parts if self.stage.lora else ()
        # Gradients flow through a part with adapters, but not to its weights.
        learnt = [part for part in self.stage.train if part not in adapted] or ["projector"]
        return [
            sum(batch.num_labels for batch in batches),
            sum(len(batch.token_ids) for batch in batches),
            sum(len(batch.images) for batch in batches),
            step_flops(self.start.config, batches, learnt),
        ]

    def _checked(self, loss: float, batches: list[PackedBatch]) -> float:
        """Clip the gradients; returns their norm. DivergedError names the step and its batch's keys."""
        norm = self.optimizer.clip_grad_norm(self.stage.clip or math.inf)
        reason = self.guard.check(loss, norm)
        if reason is None:
            return norm
        own = [key for batch in batches for key in batch.keys]
        keys = [key for part in self.processes.gather(own) for key in part]
        kept = saved_step(self.folder.state(self.index))
        raise diverged(f"stage {self.stage.name}", self.position.step + 1, reason, keys, kept)

    def _count_empty(self, has_labels: bool) -> None:
        self.empty_steps = 0 if has_labels else self.empty_steps + 1
        if self.empty_steps >= _MAX_EMPTY_STEPS:
            met = ", ".join(f"{count} {name}" for name, count in sorted(self.stream.statistics.items()))
            raise VilaError(
                f"stage {self.stage.name}: {self.empty_steps} steps in a row had nothing to learn ({met}): "
                "look at the data of the recipe"
            )

    def _tell(
        self,
        figures: StepFigures,
        rates: Rates,
        log: StageLog | None,
        observe: Callable[[TrainProgress], None],
    ) -> None:
        """Log the step where it is due, and show it."""
        stage, step = self.stage, figures.step
        eval_loss = None
        if stage.eval and (step % stage.eval_every == 0 or step == self.steps):
            eval_loss = self._held_out_loss()
        if log is None:
            return
        steps_per_s, tokens_per_s, images_per_s, flops_per_s = rates.per_second()
        share = None if self.machine.ceiling is None else flops_per_s / self.machine.ceiling
        progress = TrainProgress(
            stage=stage.name,
            stage_number=self.index + 1,
            num_stages=len(self.recipe.stage),
            step=step,
            steps=self.steps,
            loss=figures.loss,
            lr=figures.lr,
            grad_norm=figures.grad_norm,
            eval_loss=eval_loss,
            tokens_per_s=tokens_per_s,
            images_per_s=images_per_s,
            flops_per_s=flops_per_s,
            share=share,
            seconds=self.seconds,
            eta_s=(self.steps - step) / steps_per_s if steps_per_s else 0.0,
        )
        if step % stage.log_every == 0 or step == self.steps or eval_loss is not None:
            log.write(_log_line(progress))
        observe(progress)

    @torch.no_grad()
    def _held_out_loss(self) -> float | None:
        """The mean loss a label over the first `eval_examples` of the recipe's eval data."""
        if self.held_out is None:
            stream, _ = self._stream(self.stage.eval, prefetch=0)
            count = math.ceil(self.stage.eval_examples / self.stage.batch_examples)
            steps = stream.steps()
            self.held_out = [batch for _ in range(count) for batch in next(steps)[0]]
        self.model.eval()
        summed = sum(
            float(self.loss(batch)) for batch in self.held_out if batch.num_labels or self.loss.sharded
        )
        self.model.train()
        total, labels = self.processes.sum([summed, sum(batch.num_labels for batch in self.held_out)])
        return total / labels if labels else None

    def _stream(self, data: tuple[DataSettings, ...], prefetch: int) -> tuple[BatchStream, int]:
        """The batches of these data, and how many steps of them the stage takes."""
        stage, config = self.stage, self.start.config
        mixture = open_mixture(data, derived_seed(self.recipe.seed, stage.name, "data"), self.folder.cache)
        processor, cache = config.image_processor(), None
        most = int(self.recipe.image_cache_gb * 2**30)
        if self.folder.cache is not None and most and any(source.kind != "world" for source in data):
            cache = ImageCache(self.folder.cache / "images", processor, most)
        encoder = ExampleEncoder(
            self.start.tokenizer,
            config,
            processor,
            stage.template,
            max_tokens=stage.max_example_tokens or stage.max_tokens,
            cache=cache,
        )
        stream = BatchStream(
            mixture,
            encoder,
            batch_examples=stage.batch_examples,
            max_tokens=stage.max_tokens,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
            prefetch=prefetch,
            workers=self.recipe.image_workers,
        )
        return stream, num_steps(stage, mixture)

    def _save(self) -> None:
        numbers = self.optimizer.state_dict().items()
        values = {
            "position": self.position.to_json(),
            "optimizer": {k: v for k, v in numbers if not isinstance(v, torch.Tensor)},
            "recent_losses": list(self.guard.recent),
            "totals": self.totals,
            "seconds": self.seconds,
        }
        tensors = self._state_tensors()
        save_state(self.folder.state(self.index), self.position.step, tensors, values, self.processes)

    def _state_tensors(self) -> dict[str, torch.Tensor]:
        tensors = {f"model/{name}": parameter.data for name, parameter in trainable(self.model)}
        optimizer = self.optimizer.state_dict().items()
        return tensors | {f"optimizer/{k}": v for k, v in optimizer if isinstance(v, torch.Tensor)}

    def _resume(self) -> None:
        """Take over the saved state, if there is one."""
        folder = self.folder.state(self.index)
        saved = load_state(folder)
        if saved is None:
            return
        values = saved.values
        with saved.tensors as tensors:
            for name, parameter in trainable(self.model):
                copy_whole(parameter.data, tensors[f"model/{name}"])
            self.optimizer.load_state_dict(Joined(tensors, "optimizer/", values["optimizer"]))
        self.position = Position.from_json(values["position"])
        self.guard = Guard(self.recipe.guard, values["recent_losses"])
        self.totals, self.seconds = values["totals"], values["seconds"]
        restore_rng(folder, saved, self.processes.rank)

    def _finish(self) -> StageSummary:
        """Write the checkpoint, with the loss plot, the adapters and a summary beside it."""
        state = whole_tensors(self.model)
        folder = self.folder.stage(self.index)
        summary = StageSummary(
            name=self.stage.name,
            steps=self.steps,
            seconds=self.seconds,
            checkpoint=str(self.folder.checkpoint(self.index)),
            **self.totals,
        )
        if self.processes.is_main:
            if self.stage.lora is not None:
                from vila2.train.lora import merged, save_adapter

                save_adapter(folder / "adapter", state, self.stage.lora)
                state = merged(state, self.stage.lora)
            plot_losses(folder / "log.jsonl", folder / "loss.png", f"{self.recipe.out}: {self.stage.name}")
            atomic_write(folder / "summary.json", json.dumps(asdict(summary), indent=2).encode())
            with torch.device("meta"):
                plain = VisionLanguageModel.from_config(self.start.config)
            plain.load_state_dict(state, assign=True)
            self.folder.write_checkpoint(self.index, plain, self.start)
            self.folder.remove_state(self.index)
        self.processes.barrier()
        return summary


def _log_line(progress: TrainProgress) -> dict[str, Any]:
    """A line of log.jsonl. The loss is written in full: two runs are compared by it."""
    line: dict[str, Any] = {
        "step": progress.step,
        "loss": progress.loss,
        "lr": progress.lr,
        "grad_norm": progress.grad_norm,
    }
    if progress.eval_loss is not None:
        line["eval_loss"] = progress.eval_loss
    line |= {
        "tokens_per_s": round(progress.tokens_per_s, 2),
        "images_per_s": round(progress.images_per_s, 3),
        "flops_per_s": round(progress.flops_per_s),
        "share": None if progress.share is None else round(progress.share, 5),
        "seconds": round(progress.seconds, 3),
    }
    return line
