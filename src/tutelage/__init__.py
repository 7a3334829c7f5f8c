"""Pretrain language models with a teacher, and measure which teacher, how much of it, and whether it pays.

In Python: `import tutelage as tt`, then `tt.run("student.yaml")` and so on; docs/how-to/python.md shows what
there is. Importing the package costs nothing: each public name is loaded when it is first used. Type checkers
and editors read the same names in `__init__.pyi`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import version
from types import ModuleType

__version__ = version("tutelage")

_HOME = {
    "Batch": "tutelage.types",
    "DenseTargets": "tutelage.types",
    "LogitTargets": "tutelage.types",
    "LogitTransform": "tutelage.types",
    "LossSums": "tutelage.types",
    "MeanTargets": "tutelage.types",
    "Objective": "tutelage.config.objective_config",
    "ObjectiveHead": "tutelage.objective",
    "RichProgress": "tutelage.cli.bars",
    "RunConfig": "tutelage.config.run_config",
    "RunDirectory": "tutelage.run_directory",
    "Score": "tutelage.types",
    "SparseTargets": "tutelage.types",
    "Store": "tutelage.data.store",
    "Stopped": "tutelage.errors",
    "StoreConfig": "tutelage.config.data_config",
    "Study": "tutelage.api",
    "StudyConfig": "tutelage.config.study_config",
    "TokenLosses": "tutelage.types",
    "TopK": "tutelage.config.objective_config",
    "TopP": "tutelage.config.objective_config",
    "UserError": "tutelage.errors",
    "build_store": "tutelage.api",
    "load_scores": "tutelage.api",
    "open_study": "tutelage.api",
    "chunked_objective": "tutelage.objective",
    "find_run": "tutelage.run_directory",
    "open_store": "tutelage.api",
    "reference_objective": "tutelage.objective",
    "run": "tutelage.api",
    "run_study": "tutelage.api",
    "weight_and_bias": "tutelage.objective",
}
_ROOMS = ["objective"]
"""Packages inside this one that are reached as attributes: `tt.objective.make_gate`."""

__all__ = ["__version__", *_HOME, *_ROOMS]  # noqa: PLE0604 - strings, which ruff cannot see in a dict


def __getattr__(name: str) -> object:
    """Load a public name from its home (PEP 562), so that `import tutelage` imports no torch."""
    if name in _ROOMS:
        return import_module(f"tutelage.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'tutelage' has no attribute {name!r}")
    return vars(import_module(_HOME[name]))[name]


def __dir__() -> list[str]:
    """Names for completion: the public ones and Python's own of a module."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


class _Package(ModuleType):
    """Keeps `tutelage.run` the function, which importing the module of that name would overwrite."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
