"""VILA² made fast: recaption image sets with a VILA or LLaVA checkpoint, retrain, repeat.

Importing this package imports no torch; `vila2.load` does, when it is called.
"""

import os
from pkgutil import extend_path
from typing import TYPE_CHECKING, Any

# torch's OpenMP workers would spin after each of its operations, on the cores that vila2._C's own threads need.
# Read once, when torch is first imported; what the user has set stands.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Run from the repository root, find _C and kernels where they were installed.
__path__ = extend_path(__path__, __name__)

__version__ = "0.1.0"
__all__ = ["load", "__version__"]

if TYPE_CHECKING:
    from vila2.backends.api import load


def __getattr__(name: str) -> Any:
    if name == "load":
        from vila2.backends.api import load

        return load
    raise AttributeError(f"module 'vila2' has no attribute {name!r}")
