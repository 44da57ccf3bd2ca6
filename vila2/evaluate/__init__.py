"""Measure a checkpoint on the world, compare two, and drive or be judged by what others made.

`evaluate` and `compare` are the library; nothing here loads torch until a checkpoint is opened.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vila2.evaluate.evaluation import Comparison, Estimate, Evaluation, Record, load_evaluation
    from vila2.evaluate.run import compare, evaluate

__all__ = ["evaluate", "compare", "load_evaluation", "Evaluation", "Comparison", "Estimate", "Record"]

_HOME = {"evaluate": "run", "compare": "run"}


def __getattr__(name: str) -> Any:
    if name in __all__:
        from importlib import import_module

        return getattr(import_module(f"vila2.evaluate.{_HOME.get(name, 'evaluation')}"), name)
    raise AttributeError(f"module 'vila2.evaluate' has no attribute {name!r}")
