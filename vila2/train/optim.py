"""AdamW, and Muon for hidden matrices, over named parameters.

Muon follows `torch.optim.Muon` (Nesterov momentum, Newton-Schulz steps, the step scaled by sqrt(max(1, rows /
columns))) with four differences: four steps of the iteration with polynomials of their own do what five did, it runs
in float32 where the device has no fast bfloat16, matrices of one shape go through it together, and the blocks of a
fused matrix (q, k and v; gate and up) are made orthogonal each by itself. All state is float32; parameters in bfloat16
have float32 masters here. The same gradients give the same bits.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.adamw import adamw

from vila2.errors import UsageError
from vila2.model.vlm import VisionLanguageModel
from vila2.ops import capabilities

KINDS = ("adamw", "muon")
PRECISIONS = ("float32", "bf16")
ADAM_EPS = 1e-8
MUON_MOMENTUM = 0.95
# Of x, x^3, x^5, step by step: the polynomials that are closest to one on the singular values that the step before
# leaves, of 0.003 to 1 at first (as Polar Express makes them, arXiv:2505.16932), the last times 0.9. Four such steps
# bring those to 0.72 .. 1.08, where torch's five of (3.4445, -4.775, 2.0315) bring them to 0.68 .. 1.20: the mean, and
# so the size of a step, is the same.
NEWTON_SCHULZ = (
    (8.3837, -24.7659, 18.3571),
    (4.0434, -3.0114, 0.5695),
    (3.5056, -2.6267, 0.5257),
    (2.2411, -1.6509, 0.3931),
)
_GRAM_ASPECT = 1.5  # columns a row from which the iteration is cheaper on x @ x.T

# Matrices that look up or read out rather than mix: AdamW's in a group of Muon too.
_NOT_HIDDEN = ("embed_tokens", "lm_head", "patch_embedding", "position_embedding", "class_embedding")


@dataclass(frozen=True, slots=True)
class ParamGroup:
    """Parameters that share settings.

    In a group of Muon it takes the hidden matrices at `lr`; embeddings, the head, norms, biases, patch and position
    embeddings go to AdamW at `adamw_lr` (default: `lr`). Decay applies to tensors of two axes and more. `blocks`
    names fused matrices and the rows of their blocks (see `fused_rows`).
    """

    name: str
    named_parameters: Sequence[tuple[str, nn.Parameter]]
    lr: float
    weight_decay: float = 0.0
    optimizer: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    adamw_lr: float | None = None
    blocks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def fused_rows(model: VisionLanguageModel) -> dict[str, tuple[int, ...]]:
    """Parameter -> the rows of its blocks, for each matrix of a model that holds several side by side."""
    text, width = model.config.decoder, model.config.vision.width
    rows: dict[str, tuple[int, ...]] = {}
    for name, _ in model.named_parameters():
        if name.endswith("qkv.weight"):
            decoder = name.startswith("decoder.")
            rows[name] = (text.q_size, text.kv_size, text.kv_size) if decoder else (width,) * 3
        elif name.endswith("gate_up.weight"):
            rows[name] = (text.intermediate_size,) * 2
    return rows


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon may have it: a matrix inside the network."""
    return parameter.ndim == 2 and not any(part in _NOT_HIDDEN for part in name.split("."))


def build_optimizer(groups: Sequence[ParamGroup], precision: str) -> "Optimizer":
    """An optimiser of `groups`, whose parameters are float32, or bfloat16 if `precision` is "bf16".

    Under "bf16" float32 parameters are their own masters: what a CPU without bfloat16 products computes with.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    return Optimizer(groups, precision)


class _Slot:
    """One parameter with its master and settings."""

    def __init__(self, name: str, parameter: nn.Parameter, group: ParamGroup) -> None:
        self.name, self.parameter, self.group = name, parameter, group
        self.master = parameter.data if parameter.dtype == torch.float32 else parameter.data.float()
        self.decay = group.weight_decay if parameter.ndim >= 2 else 0.0
        self.is_muon = group.optimizer == "muon" and is_hidden_matrix(name, parameter)
        self.lr = group.lr if self.is_muon or group.adamw_lr is None else group.adamw_lr
        self.blocks = group.blocks.get(name, (parameter.shape[0],)) if self.is_muon else ()
        if self.is_muon and sum(self.blocks) != parameter.shape[0]:
            raise ValueError(f"{name} has {parameter.shape[0]} rows, its blocks {self.blocks}")
        kinds = ("momentum",) if self.is_muon else ("exp_avg", "exp_avg_sq")
        self.state = {kind: torch.zeros_like(self.master) for kind in kinds}
        self.steps = 0

    @property
    def has_master(self) -> bool:
        return self.parameter.dtype != torch.float32


class Optimizer:
    """Steps over every parameter that has a gradient. Made by `build_optimizer`."""

    def __init__(self, groups: Sequence[ParamGroup], precision: str) -> None:
        self._slots: list[_Slot] = []
        seen: dict[int, str] = {}
        for group in groups:
            if group.optimizer not in KINDS:
                raise UsageError(
                    f"{group.name}: unknown optimizer {group.optimizer!r}; known: {', '.join(KINDS)}"
                )
            for name, parameter in group.named_parameters:
                if id(parameter) in seen:
                    raise ValueError(f"{name} and {seen[id(parameter)]} are one parameter")
                seen[id(parameter)] = name
                if parameter.dtype != torch.float32 and precision == "float32":
                    raise ValueError(f"{name} is {parameter.dtype}; precision float32 wants float32")
                self._slots.append(_Slot(name, parameter, group))
        if len({slot.name for slot in self._slots}) != len(self._slots):
            raise ValueError("two parameters have the same name")

    @property
    def num_parameters(self) -> int:
        return sum(slot.parameter.numel() for slot in self._slots)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for slot in self._slots:
            slot.parameter.grad = None

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float) -> float:
        """Scale the gradients so that the norm of them all is at most `max_norm`; returns what it was.

        Every rank gets the same number. A norm that is not finite scales nothing.
        """
        grads = [slot.parameter.grad for slot in self._slots if slot.parameter.grad is not None]
        if not grads:
            return 0.0
        total = nn.utils.get_total_norm(grads)
        norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
        if math.isfinite(norm) and norm > max_norm:
            torch._foreach_mul_(grads, max_norm / (norm + 1e-6))
        return norm

    @torch.no_grad()
    def step(self, lr_scale: float) -> None:
        """One step, every learning rate times `lr_scale`."""
        muon = [slot for slot in self._slots if slot.is_muon and slot.parameter.grad is not None]
        others = [slot for slot in self._slots if not slot.is_muon and slot.parameter.grad is not None]
        for slot in (*muon, *others):
            slot.steps += 1
        _muon_step(muon, lr_scale)
        _adamw_step(others, lr_scale)
        for slot in (*muon, *others):
            if slot.has_master:
                slot.parameter.data.copy_(slot.master)

    def state_dict(self) -> dict[str, Any]:
        """`<parameter>/<kind>` -> tensor, `<parameter>/steps` -> int. Tensors are the live ones, not copies."""
        state: dict[str, Any] = {}
        for slot in self._slots:
            state[f"{slot.name}/steps"] = slot.steps
            state |= {f"{slot.name}/{kind}": tensor for kind, tensor in slot.state.items()}
            if slot.has_master:
                state[f"{slot.name}/master"] = slot.master
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave. ValueError if the parameters, kinds or shapes are others.

        A plain tensor is cut to the shards of a parameter that is sharded.
        """
        expected = self.state_dict()
        if missing := expected.keys() ^ state.keys():
            raise ValueError(
                f"the optimiser's state does not fit its parameters: {_some(missing)} on one side only"
            )
        for slot in self._slots:
            slot.steps = int(state[f"{slot.name}/steps"])
            targets = slot.state | ({"master": slot.master} if slot.has_master else {})
            for kind, target in targets.items():
                value = state[f"{slot.name}/{kind}"]
                if value.shape != target.shape:
                    raise ValueError(
                        f"{slot.name}/{kind} has shape {tuple(value.shape)}, expected {tuple(target.shape)}"
                    )
                target.copy_(_like(value.to(target.dtype), target))


def _some(names: Iterable[str]) -> str:
    chosen = sorted(names)
    return ", ".join(chosen[:3]) + (f" and {len(chosen) - 3} more" if len(chosen) > 3 else "")


def _like(value: Tensor, target: Tensor) -> Tensor:
    """A whole tensor as `target` is sharded; every rank has the whole, so nothing is sent."""
    if isinstance(target, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(
            value.to(target.device), target.device_mesh, target.placements, src_data_rank=None
        )
    return value


def _gradient(slot: _Slot) -> Tensor:
    grad = slot.parameter.grad
    assert grad is not None
    return grad if grad.dtype == torch.float32 else grad.float()


def _adamw_step(slots: list[_Slot], lr_scale: float) -> None:
    """As `torch.optim.AdamW`, for all tensors that share settings in one fused pass."""
    settings: dict[tuple[Any, ...], list[_Slot]] = {}
    for slot in slots:
        key = (slot.lr, slot.decay, slot.group.betas, isinstance(slot.master, DTensor), slot.master.device)
        settings.setdefault(key, []).append(slot)
    for (lr, decay, betas, sharded, _), members in settings.items():
        steps = [torch.tensor(float(slot.steps - 1), device=slot.master.device) for slot in members]
        adamw(
            [slot.master for slot in members],
            [_gradient(slot) for slot in members],
            [slot.state["exp_avg"] for slot in members],
            [slot.state["exp_avg_sq"] for slot in members],
            [],
            steps,
            foreach=sharded,
            fused=not sharded,
            amsgrad=False,
            beta1=betas[0],
            beta2=betas[1],
            lr=lr * lr_scale,
            weight_decay=decay,
            eps=ADAM_EPS,
            maximize=False,
        )


def _muon_step(slots: list[_Slot], lr_scale: float) -> None:
    blocks: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}  # shape -> (direction, where it goes)
    updates = []
    for slot in slots:
        grad, momentum = _gradient(slot), slot.state["momentum"]
        momentum.lerp_(grad, 1 - MUON_MOMENTUM)
        direction = grad.lerp(momentum, MUON_MOMENTUM)
        if isinstance(direction, DTensor):
            direction = direction.full_tensor()
        update = torch.empty_like(direction)
        updates.append(update)
        for part, to in zip(
            torch.split(direction, list(slot.blocks)), torch.split(update, list(slot.blocks)), strict=True
        ):
            blocks.setdefault((part.shape[0], part.shape[1]), []).append((part, to))
    for (rows, columns), parts in blocks.items():
        scale = math.sqrt(max(1.0, rows / columns))
        for matrix, (_, to) in zip(orthogonal(torch.stack([part for part, _ in parts])), parts, strict=True):
            torch.mul(matrix, scale, out=to)
    for slot, update in zip(slots, updates, strict=True):
        slot.master.mul_(1 - slot.lr * lr_scale * slot.decay)
        slot.master.add_(_like(update, slot.master), alpha=-slot.lr * lr_scale)


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices (n, rows, columns) with their singular values brought near one (`NEWTON_SCHULZ`), float32 in and out."""
    dtype = torch.bfloat16 if matrices.is_cuda or capabilities().fast_bf16 else torch.float32
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = (x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]).to(dtype)
    # The squares of bfloat16 lose the small singular values.
    if dtype == torch.float32 and x.shape[2] >= _GRAM_ASPECT * x.shape[1]:
        x = torch.bmm(_gram_iteration(torch.bmm(x, x.transpose(1, 2))), x)
    else:
        x = _iteration(x)
    x = x.float()
    return x.transpose(1, 2) if tall else x


def _iteration(x: Tensor) -> Tensor:
    """Wide matrices of norm one after `NEWTON_SCHULZ`."""
    for a, b, c in NEWTON_SCHULZ:
        gram = torch.bmm(x, x.transpose(1, 2))
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _gram_iteration(gram: Tensor) -> Tensor:
    """The square matrices by which `_iteration` multiplies its own, given x @ x.T: all of it in the smaller square."""
    whole = None
    for number, (a, b, c) in enumerate(NEWTON_SCHULZ, start=1):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        whole = factor if whole is None else torch.bmm(factor, whole)
        if number < len(NEWTON_SCHULZ):
            gram = torch.bmm(torch.bmm(factor, gram), factor)
    assert whole is not None
    return whole
