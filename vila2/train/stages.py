"""What a stage of a recipe means for a model: which parameters learn, in which groups, and how fast at each step."""

import math
from collections.abc import Iterator

from torch import nn

from vila2.errors import UsageError
from vila2.model.vlm import VisionLanguageModel
from vila2.train.mixture import Mixture
from vila2.train.optim import ParamGroup, fused_rows
from vila2.train.recipe import PARTS, Part, StageSettings


def part_of(name: str) -> Part:
    """The part that a parameter of the model belongs to, by its name."""
    found = name.partition(".")[0]
    assert found in PARTS, name
    return found


def prepare_model(model: VisionLanguageModel, stage: StageSettings) -> None:
    """Let the parts of the stage learn and freeze the rest; where it asks for adapters, add them."""
    whole = set(stage.train) - set(stage.lora.parts if stage.lora else ())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in whole)
    if stage.lora is not None:
        from vila2.train.lora import add_adapters

        add_adapters(model, stage.lora)
    model.train()


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that learn, each once."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def param_groups(model: VisionLanguageModel, stage: StageSettings) -> list[ParamGroup]:
    """One group a part that learns."""
    blocks = fused_rows(model)
    groups = []
    for part in PARTS:
        members = [(name, parameter) for name, parameter in trainable(model) if part_of(name) == part]
        if members:
            groups.append(
                ParamGroup(
                    name=part,
                    named_parameters=members,
                    lr=stage.lr.of(part),
                    weight_decay=stage.weight_decay.of(part),
                    optimizer=stage.optimizer.of(part),
                    betas=stage.betas,
                    adamw_lr=stage.adamw_lr,
                    blocks=blocks,
                )
            )
    return groups


def num_steps(stage: StageSettings, mixture: Mixture) -> int:
    """How many optimiser steps the stage takes."""
    if stage.steps is not None:
        return stage.steps
    assert stage.epochs is not None
    examples = mixture.num_examples
    if examples is None:
        raise UsageError(
            f"stage {stage.name}: epochs of endless data: give steps, or scenes to every source that has no end"
        )
    return max(1, math.ceil(stage.epochs * examples / stage.batch_examples))


def lr_scale(stage: StageSettings, step: int, steps: int) -> float:
    """What the learning rates are multiplied by at `step`, which counts from 0."""
    warmup = stage.warmup if stage.warmup >= 1 else math.ceil(stage.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    if stage.schedule == "constant":
        return 1.0
    first, falls = (warmup, "cosine") if stage.schedule == "cosine" else (warmup, "linear")
    if stage.schedule == "wsd":
        first = max(warmup, steps - math.ceil(stage.decay * steps))
    if step < first:
        return 1.0
    done = min(1.0, (step - first) / max(1, steps - first))
    left = 0.5 * (1 + math.cos(math.pi * done)) if falls == "cosine" else 1 - done
    return stage.min_lr + (1 - stage.min_lr) * left
