"""Matrix products with packed weights: for the CPU here, in few bits for either device in the modules beside.

A packed product is batch-invariant: row i of the output depends only on row i of the input, bit for bit, whatever
the number of rows or threads. That is what makes a caption independent of the batch it sat in.
"""

from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from vila2.ops.fp8 import Fp8Weight, fp8_linear
from vila2.ops.int4 import Int4Weight, int4_linear
from vila2.ops.native import native
from vila2.ops.quant import PackedBytes, byte_linear

if TYPE_CHECKING:
    from vila2._C import PackedWeights

Module = TypeVar("Module", bound=nn.Module)

_STORAGE = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`: x (..., in), weight (out, in), to (..., out)."""
    return functional.linear(x, weight, bias)


def pack(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> "PackedWeights":
    """A copy of `weight` (out, in) and `bias` (out,) for `linear`, stored as `dtype`: float32 or bfloat16."""
    if dtype not in _STORAGE:
        raise ValueError(f"weights can be packed as float32 or bfloat16, got {dtype}")
    weight = weight.detach().float().contiguous()
    return native.PackedWeights(
        weight, None if bias is None else bias.detach().float().contiguous(), _STORAGE[dtype]
    )


def packed_parts(weights: "PackedWeights") -> tuple[Tensor, Tensor | None]:
    """Copies of the packed panels, as bytes, and of the padded bias: what `packed_from` takes.

    Their layout is that of this machine's instruction set; `panel_layout` names it.
    """
    panels = torch.empty(weights.bytes, dtype=torch.uint8)
    bias = torch.empty(weights.padded_columns) if weights.has_bias else None
    weights.copy_to(panels, bias)
    return panels, bias


def packed_from(
    panels: Tensor, bias: Tensor | None, columns: int, depth: int, storage: str
) -> "PackedWeights":
    """Packed weights over the tensors of `packed_parts`, used where they lie (a mapped file, say).

    ValueError if their sizes are not those of `columns` and `depth` in this machine's layout.
    """
    if native is None:
        raise ValueError("packed weights need vila2._C, which is not built")
    return native.PackedWeights.over(panels, bias, columns, depth, storage)


def panel_layout(dtype: torch.dtype) -> str:
    """The name of the layout in which this machine packs weights stored as `dtype`."""
    layout = f"{_STORAGE[dtype]}-panels-{native.panel_width()}"
    return layout + ("x2" if dtype == torch.bfloat16 and rounds_rows() else "")


def rounds_rows() -> bool:
    """Whether products with weights stored as bfloat16 round the rows to bfloat16 too: where the CPU multiplies those.

    They do with `_C` on AVX512-BF16 alone; sums are float32 everywhere.
    """
    return native is not None and hasattr(native, "bf16_group") and native.bf16_group() == 2


def linear(x: Tensor, weights: "PackedWeights") -> Tensor:
    """`x @ weight.T + bias` with float32 sums, rounded to `x.dtype`: x (..., in) on the CPU to (..., out).

    Raises ValueError if a gradient is wanted: packed weights are for inference.
    """
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("packed weights give no gradient: call pack_linears on a model for inference only")
    if x.dtype != torch.float32:
        return linear(x.float(), weights).to(x.dtype)
    x = x.contiguous()
    y = (
        x.new_empty(x.shape[0], weights.columns)
        if x.dim() == 2
        else x.new_empty(*x.shape[:-1], weights.columns)
    )
    weights.multiply(x, y)
    return y


class Linear(nn.Linear):
    """`nn.Linear` that can be switched to packed weights (see `set_packed`); until then it is `nn.Linear`."""

    packed: "PackedWeights | PackedBytes | Fp8Weight | Int4Weight | None" = None

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is None:
            return functional.linear(x, self.weight, self.bias)
        if isinstance(self.packed, PackedBytes):
            return byte_linear(x, self.packed)
        if isinstance(self.packed, Fp8Weight):
            return fp8_linear(x, self.packed)
        if isinstance(self.packed, Int4Weight):
            return int4_linear(x, self.packed)
        return linear(x, self.packed)

    def set_packed(self, packed: "PackedWeights | PackedBytes | Fp8Weight | Int4Weight") -> None:
        """Multiply with `packed` from now on. `weight` and `bias` become None, which frees their memory unless
        something else (a tied embedding) holds it.
        """
        self.packed = packed
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)


def pack_linears(module: Module, dtype: torch.dtype) -> Module:
    """Turn each `Linear` inside `module` into its packed form for CPU inference, in place; returns `module`.

    Weights are stored as `dtype` (float32 or bfloat16), summed in float32. Without `_C` nothing is packed, and the
    weights are only rounded to `dtype`.
    """
    if dtype not in _STORAGE:
        raise ValueError(f"weights can be packed as float32 or bfloat16, got {dtype}")
    for child in module.modules():
        if not isinstance(child, Linear) or child.packed is not None:
            continue
        if native is None:
            child.weight.data = child.weight.data.to(dtype).float()
            child.bias = None if child.bias is None else nn.Parameter(child.bias.data.float())
        else:
            child.set_packed(pack(child.weight, child.bias, dtype))
    return module
