"""Measure a checkpoint on the world, compare two, and drive or be judged by what others made.

`evaluate` and `compare` are the library; nothing here loads torch until a checkpoint is opened.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vila2.evaluate.comparison import Comparison, Difference, compare
    from vila2.evaluate.evaluation import Estimate, Evaluation, Record, load_evaluation
    from vila2.evaluate.run import evaluate

_HOME = {
    "evaluate": "run",
    "compare": "comparison",
    "load_evaluation": "evaluation",
    "Evaluation": "evaluation",
    "Estimate": "evaluation",
    "Record": "evaluation",
    "Comparison": "comparison",
    "Difference": "comparison",
}
__all__ = [
    "evaluate",
    "compare",
    "load_evaluation",
    "Evaluation",
    "Estimate",
    "Record",
    "Comparison",
    "Difference",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(f"vila2.evaluate.{_HOME[name]}"), name)
    raise AttributeError(f"module 'vila2.evaluate' has no attribute {name!r}")
