"""What `import tutelage as tt` gives: the same names to Python, to completion and to type checkers."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest
import torch

import tutelage as tt
from tutelage.config.run_config import RunConfig

STUB = ast.parse(Path(tt.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))


def test_python_and_type_checkers_see_the_same_names():
    imports = [node for node in STUB.body if isinstance(node, ast.ImportFrom)]
    typed = {alias.name: node.module for node in imports for alias in node.names}
    assert all(alias.asname == alias.name for node in imports for alias in node.names)
    assert typed.keys() == set(tt.__all__) - {"__version__"}
    for name, module in typed.items():
        found = vars(tt).get(name) or tt.__getattr__(name)
        expected = importlib.import_module(f"{module}.{name}" if name in tt._ROOMS else module)
        assert found is (expected if name in tt._ROOMS else vars(expected)[name])
        assert inspect.getdoc(found)
    assert [name for name in dir(tt) if not name.startswith("__")] == sorted({*tt.__all__} - {"__version__"})
    with pytest.raises(AttributeError, match="has no attribute 'Objectve'"):
        tt.__getattr__("Objectve")


def test_a_function_stays_one_when_its_module_is_imported():
    importlib.import_module("tutelage.run")
    assert [inspect.isfunction(tt.run) for _ in range(2)] == [True, True]


def test_strings_are_taken_for_paths():
    config = RunConfig(
        name="a", seed=1, tokens="4K", model={"shape": "nano-20k"}, data={"store": "stores/a"}, output="out"
    )
    assert (config.data.store, config.output) == (Path("stores/a"), Path("out"))


def test_every_device_that_torch_knows_has_a_size_of_chunks():
    with pytest.raises(RuntimeError) as refused:  # it lists them
        torch.device("none")
    devices = str(refused.value).partition("one of ")[2].partition(" device type")[0].split(", ")
    assert {"cpu", "cuda", "mps", "xpu", "hpu", "meta"} <= set(devices)
    for device in devices:
        for dense in (True, False):
            assert 8 <= tt.Objective().tokens_per_chunk(50_304, device, dense=dense) < 10_000
