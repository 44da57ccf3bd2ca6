"""A model whose products are packed, in one file that is used where it lies.

The file is a safetensors file, so any tool can list it. Every tensor begins at a multiple of 64 bytes, and readers map
the file: a second process shares the pages of the first, and loading costs no copy. How the tensors of a product
belong together stands in the header's `products`.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vila2.errors import CheckpointError
from vila2.model.fp8_blocks import with_fp8_blocks
from vila2.model.quantized import ready
from vila2.model.vlm import ModelConfig, VisionLanguageModel
from vila2.ops.fp8 import Fp8Weight
from vila2.ops.int4 import GROUP, Int4Weight
from vila2.ops.linear import Linear, packed_from, packed_parts
from vila2.ops.quant import PackedBytes, load_packed_bytes

_ALIGNMENT = 64
_LOW_BIT_PARTS = {"fp8": ("values", "scales"), "int4": ("values", "scales", "zeros")}
_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.float8_e4m3fn: "F8_E4M3",
}


def save_packed(model: VisionLanguageModel, file: BinaryIO) -> None:
    """Write the weights of `model`, packed products and all else, to an empty binary file."""
    products: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    for name, module in model.named_modules():
        if isinstance(module, Linear) and module.weight is None:
            products[name], parts = _split(module)
            tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    # Those that fill whole lines come first, so that all but the tail of the file is aligned without holes, which
    # the format does not allow.
    order = sorted(tensors, key=lambda name: (_num_bytes(tensors[name]) % _ALIGNMENT != 0, name))
    entries: dict[str, Any] = {"__metadata__": {"products": json.dumps(products, sort_keys=True)}}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + _num_bytes(tensor)
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-(len(header) + 8) % _ALIGNMENT)
    file.write(len(header).to_bytes(8, "little") + header)
    for name in order:
        flat = tensors[name].detach().cpu().contiguous().view(-1)
        file.write(flat.view(torch.uint8).numpy().data)


def load_packed(config: ModelConfig, path: Path, device: str = "cpu") -> VisionLanguageModel:
    """The model in a file of `save_packed`, its weights mapped or, for CUDA, copied there.

    CheckpointError if the file is not that of `config`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            products = json.loads((file.metadata() or {})["products"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        return _assemble(config, products, tensors, device)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path} is not a whole weight file of this engine ({reason}): build it again"
        ) from None


def _assemble(
    config: ModelConfig, products: Mapping[str, Mapping[str, Any]], tensors: dict[str, Tensor], device: str
) -> VisionLanguageModel:
    with torch.device("meta"):
        model = VisionLanguageModel.from_config(config)
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear) and name in products:
            _join(module, products[name], tensors, name, device)
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        tensor = tensors.pop(name)
        if tensor.shape != parameter.shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, the model needs {tuple(parameter.shape)}")
        parameter.data = tensor.to(device)
    if tensors:
        raise ValueError(f"{min(tensors)} belongs to no part of the model")
    model.requires_grad_(False)
    return with_fp8_blocks(ready(model.eval()))


def _split(module: Linear) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a packed product is, and its tensors."""
    packed = module.packed
    assert packed is not None
    facts: dict[str, Any] = {"columns": packed.columns, "depth": packed.depth}
    if isinstance(packed, PackedBytes):
        facts |= {"kind": "bytes", "is_narrow": packed.is_narrow, "is_gated": packed.is_gated}
        facts["turn"] = packed.turn
        parts = {"panels": packed.panels, "scales": packed.scales, "sums": packed.sums, "bias": packed.bias}
    elif isinstance(packed, Fp8Weight):
        facts["kind"] = "fp8"
        parts = {"values": packed.values, "scales": packed.scales, "bias": packed.bias}
    elif isinstance(packed, Int4Weight):
        facts["kind"] = "int4"
        parts = {"values": packed.values, "scales": packed.scales, "zeros": packed.zeros, "bias": packed.bias}
    else:
        panels, bias = packed_parts(packed)
        facts["kind"] = packed.storage
        parts = {"panels": panels, "bias": bias}
    return facts, {name: tensor for name, tensor in parts.items() if tensor is not None}


def _join(
    module: Linear, facts: Mapping[str, Any], tensors: dict[str, Tensor], name: str, device: str
) -> None:
    columns, depth = facts["columns"], facts["depth"]
    if (columns, depth) != (module.out_features, module.in_features):
        raise ValueError(
            f"{name} is {columns} x {depth}, the model needs {module.out_features} x {module.in_features}"
        )
    bias = tensors.pop(f"{name}.bias", None)
    if (bias is None) != (module.bias is None):
        raise ValueError(f"{name} has {'no' if bias is None else 'a'} bias, against the model")
    if facts["kind"] in ("fp8", "int4"):
        parts = {part: tensors.pop(f"{name}.{part}") for part in _LOW_BIT_PARTS[facts["kind"]]}
        module.set_packed(_low_bits(parts, bias, columns, depth, name).to(device))
        return
    panels = tensors.pop(f"{name}.panels")
    if facts["kind"] == "bytes":
        module.set_packed(
            load_packed_bytes(
                panels,
                tensors.pop(f"{name}.scales"),
                tensors.pop(f"{name}.sums"),
                bias,
                columns,
                depth,
                is_narrow=bool(facts["is_narrow"]),
                is_gated=bool(facts["is_gated"]),
                turn=int(facts["turn"]),
            )
        )
    else:
        module.set_packed(packed_from(panels, bias, columns, depth, str(facts["kind"])))


def _low_bits(
    parts: Mapping[str, Tensor], bias: Tensor | None, columns: int, depth: int, name: str
) -> Fp8Weight | Int4Weight:
    """A product in FP8 or 4 bits. ValueError if its tensors are not those of `columns` and `depth`."""
    groups = -(-depth // GROUP)
    wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "values": ((columns, depth), torch.float8_e4m3fn),
        "scales": ((columns,), torch.float32),
    }
    if "zeros" in parts:
        beside = (groups, columns)
        wanted = {"values": ((*beside, GROUP // 2), torch.uint8), "scales": (beside, torch.bfloat16)}
        wanted["zeros"] = (beside, torch.uint8)
    if bias is not None:
        parts = {**parts, "bias": bias}
        wanted["bias"] = ((columns,), torch.bfloat16)
    for part, (shape, dtype) in wanted.items():
        if parts[part].shape != shape or parts[part].dtype != dtype:
            found = f"{tuple(parts[part].shape)} {parts[part].dtype}"
            raise ValueError(f"{name}.{part} is {found}, the model needs {shape} {dtype}")
    if "zeros" in parts:
        return Int4Weight(parts["values"], parts["scales"], parts["zeros"], bias, depth)
    return Fp8Weight(parts["values"], parts["scales"], bias)


def _num_bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * tensor.element_size()
