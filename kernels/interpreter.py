"""Triton's interpreter, where there is no GPU: tests and dry runs call `mend_interpreter` before the first kernel.

The interpreter is chosen by TRITON_INTERPRET=1 in the environment when a kernel is defined. As of Triton 3.6 it cuts
bfloat16 off where a GPU rounds, loses a carry when it rounds to FP8, multiplies the bits of bfloat16 as integers, and
reads a loop's bounds by a cast that NumPy 2.4 refuses. Here torch converts instead.
"""

from typing import Any

import torch
import triton.language as tl
from triton.runtime import interpreter

_BITS = {8: torch.uint8, 16: torch.uint16, 32: torch.uint32, 64: torch.uint64}


def mend_interpreter() -> None:
    """Make the interpreter round as a GPU does, and take loops over computed bounds."""
    patch_tensor = interpreter._patch_lang_tensor
    if getattr(patch_tensor, "is_mended", False):
        return

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    patch_and_mend.is_mended = True  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = patch_and_mend
    interpreter._convert_float = _convert_float
    dot = interpreter.InterpreterBuilder.create_dot

    def dot_of_floats(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return dot(self, _widened(a), _widened(b), *others)

    interpreter.InterpreterBuilder.create_dot = dot_of_floats


def _torch_type(dtype: Any) -> torch.dtype:
    names = {"fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2, "bf16": torch.bfloat16}
    plain = {"fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
    return (names | plain)[dtype.name]


def _convert_float(values: Any, source: Any, target: Any, rounding: Any) -> Any:
    """The bits of `values`, floats of type `source`, rounded to `target` (to the nearest, ties to even)."""
    bits = torch.from_numpy(values.copy()).view(_BITS[source.primitive_bitwidth])
    converted = bits.view(_torch_type(source)).to(_torch_type(target))
    return converted.view(_BITS[target.primitive_bitwidth]).numpy()


def _widened(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    wide = _convert_float(handle.data, tl.bfloat16, tl.float32, None).view("float32")
    return interpreter.TensorHandle(wide, tl.float32)
