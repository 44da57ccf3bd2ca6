"""Where the kernels run: on a GPU if there is one, else in the interpreter, which is chosen before any is defined."""

import os
from importlib.util import find_spec

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    from vila2.kernels.interpreter import mend_interpreter

    mend_interpreter()


@pytest.fixture(scope="session")
def device() -> str:
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def near():
    """`near(dtype)`: tolerances of assert_close: a step of bfloat16, or what float32 sums lose."""

    def tolerances(dtype: torch.dtype, times: float = 1.0) -> dict[str, float]:
        tolerance = times * (2e-5 if dtype == torch.float32 else 1e-2)
        return {"rtol": tolerance, "atol": tolerance}

    return tolerances
