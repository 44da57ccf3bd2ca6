"""One function per operation: `<name>_reference` defines it in plain torch, `<name>` picks the fastest equal path.

On the CPU without gradients that is `vila2._C`, on CUDA a Triton kernel where there is one, else the reference.
"""

from vila2.ops.native import Capabilities, capabilities

__all__ = ["Capabilities", "capabilities"]
