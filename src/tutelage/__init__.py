"""Pretrain language models with a teacher, and measure which teacher, how much of it, and whether it pays.

Importing the package costs nothing; each public name is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version

__version__ = version("tutelage")

_HOME = {
    "Batch": "tutelage.types",
    "DenseTargets": "tutelage.types",
    "LossSums": "tutelage.types",
    "Objective": "tutelage.objective",
    "RunConfig": "tutelage.config.run_config",
    "Score": "tutelage.types",
    "StoreConfig": "tutelage.config.data_config",
    "StudyConfig": "tutelage.config.study_config",
    "UserError": "tutelage.errors",
    "build_store": "tutelage.data.build",
    "chunked_objective": "tutelage.objective",
    "open_store": "tutelage.data.store",
    "reference_objective": "tutelage.objective",
    "run": "tutelage.run",
}

__all__ = ["__version__", *_HOME]  # noqa: PLE0604 - strings, which ruff cannot see in a dict


def __getattr__(name: str) -> object:
    """Load a public name from its home (PEP 562), so that `import tutelage` imports no torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'tutelage' has no attribute {name!r}")
    return vars(import_module(_HOME[name]))[name]
