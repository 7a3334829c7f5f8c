"""The house rules that a machine can check. Each rule is a function, tried on a planted offence first."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest
from house import (
    Module,
    circles,
    file_names_used_twice,
    functions,
    import_graph,
    imported_names,
    length,
    read_package,
    types_used_twice,
)

import tutelage

SOURCE = Path(tutelage.__file__).parent
README = Path(__file__).parents[2] / "README.md"
MODULES = read_package(SOURCE)
MAX_FILE_LINES = 400
MIN_FILE_LINES = 60
MAX_FUNCTION_LINES = 60
MIN_EXPLANATION = 12

SHORT_FILES = {
    "__main__.py": "`python -m tutelage`, which torchrun needs",
    "cli/main.py": "assembles the command, and does nothing else",
    "loading.py": "what every process that needs torch begins with",
    "study/engines/forked.py": "one import, under a name that multiprocessing can be told",
    "errors.py": "the exceptions, which everything imports",
}
"""Files under MIN_FILE_LINES, each with its reason. The `__init__` of a directory may be short."""

_BASE = {"types", "errors", "files", "config"}
_ROOMS = {"data", "models", "objective", "teachers"}
ALLOWED: dict[str, set[str]] = {
    "__init__": set(),
    "errors": set(),
    "types": set(),
    "presets": set(),
    "provenance": set(),
    "bootstrap": set(),
    "progress": set(),
    "processes": {"errors"},
    "stopping": set(),
    "agreement": {"errors", "files", "processes", "stopping"},
    "launch": {"errors", "loading", "processes"},
    "loading": set(),
    "names": {"errors", "config"},
    "installed": set(),
    "hub_access": {"errors"},
    "records": {"errors", "files"},
    "checksums": {"errors", "files", "records"},
    "files": {"errors"},
    "config": {"types", "errors"},
    "data": _BASE | {"checksums", "hub_access", "installed", "names", "progress", "records"},
    "models": {"types", "errors", "files", "checksums", "hub_access", "records", "objective.products"}
    | {"processes"},
    "objective": {"types", "errors", "config"},
    "teachers": _BASE
    | {"names", "processes", "progress", "records", "stopping", "data", "models", "objective"},
    "run_directory": _BASE | {"checksums", "records", "data", "models", "names", "teachers.cache.layout"},
    "earlier_runs": {"config", "errors", "files", "names", "run_directory"},
    "run_footprint": {"errors", "config", "data", "models", "run_directory", "teachers.cache.layout"},
    "run_plan": {"errors", "config", "models", "run_directory", "run_footprint"},
    "train": _BASE
    | _ROOMS
    | {"agreement", "checksums", "installed", "progress", "processes", "provenance"}
    | {"run_directory", "stopping"},
    "evals": _BASE
    | {"data", "models", "names", "progress", "provenance", "bootstrap", "checksums", "records"}
    | {"hub_access", "installed", "run_directory"}
    | {"teachers.cache.layout"},
    "run": _BASE
    | {
        "data",
        "models",
        "evals",
        "agreement",
        "progress",
        "processes",
        "provenance",
        "earlier_runs",
        "run_directory",
        "run_plan",
        "stopping",
        "train",
    },
    "study": _BASE
    | {"agreement", "checksums", "data", "evals", "launch", "loading", "models", "names", "processes"}
    | {"installed", "progress", "provenance", "records", "stopping"}
    | {"run", "run_directory", "run_plan"},
    "planner": {"config", "data.store_manifest", "errors", "evals", "files", "models", "names", "records"}
    | {"run_directory", "run_plan", "study.cache_cost", "study.given_models"},
    "analysis": {
        "types",
        "errors",
        "files",
        "bootstrap",
        "records",
        "models",
        "planner",
        "study.results",
        "study.score_tables",
        "study.plan",
        "study.token_tables",
    },
    "api": {"types", "errors", "names", "progress", "records", "config", "data", "run", "run_directory"}
    | {"study", "analysis"},
    "__main__": {"cli"},
    "verify": {
        "errors",
        "checksums",
        "config",
        "files",
        "models.directory",
        "records",
        "data.store",
        "run_directory",
        "teachers.cache.layout",
        "teachers.cache.reader",
        "train.checkpoint_files",
    },
    "cli": _BASE
    | {"data", "models", "teachers", "evals", "study", "planner", "analysis"}
    | {
        "agreement",
        "launch",
        "loading",
        "names",
        "processes",
        "progress",
        "provenance",
        "run",
        "run_directory",
    }
    | {"installed", "run_plan", "stopping", "verify"},
}
"""What the modules of a room may import from tutelage, besides their own room."""

REGISTRIES = [
    ("tutelage.models.shapes", "LADDER", attrgetter("summary")),
    ("tutelage.data.corpora", "CORPORA", attrgetter("summary")),
    ("tutelage.data.corpora", "PAIR_CORPORA", attrgetter("summary")),
    ("tutelage.objective.divergences", "DIVERGENCES", attrgetter("summary")),
    ("tutelage.objective.gates", "GATES", inspect.getdoc),
    ("tutelage.teachers.kinds", "TEACHERS", attrgetter("summary")),
    ("tutelage.teachers.cache.formats", "FORMATS", attrgetter("summary")),
    ("tutelage.train.trackers", "TRACKERS", inspect.getdoc),
    ("tutelage.evals.domains", "DOMAINS", attrgetter("summary")),
    ("tutelage.models.devices", "DEVICES", attrgetter("summary")),
    ("tutelage.analysis.claims.registry", "CLAIMS", attrgetter("text")),
    ("tutelage.evals.lm_eval_tasks", "PACKAGE_TASKS", attrgetter("summary")),
]
"""Every registry, a dict from the name users write, and what to read an entry's explanation from."""

PICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def room_of(module: Module) -> str:
    """The first part of a module's path, which is a directory or a file at the top."""
    return module.path.removesuffix(".py").split("/")[0]


def wrong_length(module: Module) -> bool:
    short = module.lines < MIN_FILE_LINES and not module.is_package and module.path not in SHORT_FILES
    return short or module.lines > MAX_FILE_LINES


def tree_of(readme: str) -> list[str]:
    """Paths in README's tree of the source: a line with its indentation, a name and what it is."""
    lines = readme.split("```\nsrc/tutelage/\n")[1].split("```", maxsplit=1)[0].splitlines()
    folders: list[str] = []
    paths = []
    for line in lines:
        name = line.split()[0]
        folders = folders[: (len(line) - len(line.lstrip())) // 2 - 1]
        if name.endswith("/"):
            folders.append(name)
        else:
            paths.append("".join([*folders, name]))
    return paths


def forbidden_imports(tree: ast.AST, room: str) -> list[str]:
    return [
        name for name in inside(tree) if not any(is_below(name, target) for target in ALLOWED[room] | {room})
    ]


def unused_grants(trees: list[ast.AST], room: str) -> list[str]:
    """What a room may import and does not."""
    used = [name for tree in trees for name in inside(tree)]
    return [target for target in sorted(ALLOWED[room]) if not any(is_below(name, target) for name in used)]


def inside(tree: ast.AST) -> list[str]:
    """What is imported from tutelage, without its first word."""
    return [
        name.removeprefix("tutelage.") for name in imported_names(tree) if name.startswith(("tutelage.", "."))
    ]


def is_below(name: str, target: str) -> bool:
    return f"{name}.".startswith(f"{target}.")


def long_functions(tree: ast.AST) -> list[str]:
    return [node.name for node in functions(tree) if length(node) > MAX_FUNCTION_LINES]


def attribute_guessing(tree: ast.AST) -> list[int]:
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("hasattr", "getattr")
    ]


def unsafe_loading(tree: ast.AST) -> list[str]:
    found = [name for name in imported_names(tree) if name.split(".")[0] in PICKLERS]
    found += [name for name in imported_names(tree) if name in ("torch.load", "torch.save")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("load", "save"):
            found += [f"torch.{node.attr}"] if ast.unparse(node.value) == "torch" else []
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
            safe = isinstance(node.value, ast.Constant) and node.value.value is False
            found += [] if safe else [f"{node.arg}={ast.unparse(node.value)}"]
    return found


@pytest.mark.parametrize(
    ("rule", "offence"),
    [
        (lambda tree: forbidden_imports(tree, "types"), "from tutelage.config.run_config import RunConfig"),
        (lambda tree: forbidden_imports(tree, "train"), "def f():\n    import tutelage.evals.evaluate"),
        (lambda tree: forbidden_imports(tree, "study"), "from tutelage.train import loop"),
        (lambda tree: forbidden_imports(tree, "study"), "from tutelage import train"),
        (lambda tree: forbidden_imports(tree, "evals"), "from tutelage.run_directories import x"),
        (lambda tree: forbidden_imports(tree, "analysis"), "from tutelage.study.grid import expand"),
        (lambda tree: forbidden_imports(tree, "models"), "from ..train import loop"),
        (long_functions, "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES),
        (attribute_guessing, "y = hasattr(x, 'y')"),
        (attribute_guessing, "y = [getattr(x, name, None) for name in z]"),
        (unsafe_loading, "import pickle"),
        (unsafe_loading, "from joblib import load"),
        (unsafe_loading, "x = torch.load(path)"),
        (unsafe_loading, "from torch import load"),
        (unsafe_loading, "load(path, trust_remote_code=flag)"),
        (unsafe_loading, "np.load(path, allow_pickle=True)"),
    ],
)
def test_every_rule_can_fail(rule, offence):
    assert rule(ast.parse(offence))


@pytest.mark.parametrize(
    ("rule", "innocent"),
    [
        (lambda tree: forbidden_imports(tree, "train"), "from tutelage.types import Batch\nimport torch"),
        (lambda tree: forbidden_imports(tree, "evals"), "from tutelage.run_directory import RunDirectory"),
        (long_functions, "def f():\n" + "    x = 1\n" * (MAX_FUNCTION_LINES - 1)),
        (attribute_guessing, "def __getattr__(name):\n    return x.y"),
        (unsafe_loading, "json.load(file)\nload(path, trust_remote_code=False)"),
    ],
)
def test_no_rule_fires_without_reason(rule, innocent):
    assert not rule(ast.parse(innocent))


PLANTED = {
    "one/a.py": "from house.two import b\nclass Thing: ...\nKind = str",
    "two/b.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.two.c import x",
    "two/c.py": "def f():\n    import house.one.a\nclass Thing: ...",
    "three/a.py": "import house.two.b\nKind = int",
}
"""A package with a circle (one of its imports for types, one in a function) and names used twice."""


@pytest.fixture
def planted(tmp_path):
    for path, text in PLANTED.items():
        file = tmp_path / "house" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return read_package(tmp_path / "house")


def test_circles_and_names_used_twice_are_found(planted):
    assert circles(import_graph(planted)) == [["house.one.a", "house.two.b", "house.two.c"]]
    assert file_names_used_twice(planted) == {"a.py": ["one/a.py", "three/a.py"]}
    assert types_used_twice(planted) == {
        "Thing": ["one/a.py", "two/c.py"],
        "Kind": ["one/a.py", "three/a.py"],
    }


def test_files_that_are_too_short_or_too_long_are_found():
    def module(path, lines):
        return Module(path, "x", "x = 1\n" * lines)

    wrong = [
        ("a.py", MIN_FILE_LINES - 1),
        ("a.py", MAX_FILE_LINES + 1),
        ("a/__init__.py", MAX_FILE_LINES + 1),
    ]
    right = [("a.py", MIN_FILE_LINES), ("a.py", MAX_FILE_LINES), ("a/__init__.py", 1), ("errors.py", 1)]
    assert all(wrong_length(module(*one)) for one in wrong)
    assert not any(wrong_length(module(*one)) for one in right)


def test_a_grant_that_nobody_uses_is_found():
    used = [ast.parse(f"from tutelage.{target} import x") for target in ALLOWED["train"] - {"objective"}]
    assert unused_grants(used, "train") == ["objective"]
    assert unused_grants([*used, ast.parse("import tutelage.objective.gates")], "train") == []


def test_the_tree_of_a_readme_is_read():
    tree = "  data/    texts\n    a.py   one\n    deep/  more\n      b.py x\n  c.py     y\n"
    text = f"words\n```\nsrc/tutelage/\n{tree}```\nmore"
    assert tree_of(text) == ["data/a.py", "data/deep/b.py", "c.py"]


def test_the_source_is_really_looked_at():
    assert {room_of(module) for module in MODULES} >= {
        "data",
        "models",
        "objective",
        "teachers",
        "train",
        "analysis",
    }
    assert len(MODULES) > 30


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.path)
def test_file(module):
    assert not wrong_length(module)
    assert long_functions(module.tree) == []
    assert attribute_guessing(module.tree) == []
    assert unsafe_loading(module.tree) == []
    room = room_of(module)
    assert room in ALLOWED, f"say in ALLOWED what {room} may import"
    assert forbidden_imports(module.tree, room) == []


def test_nothing_imports_in_a_circle():
    assert circles(import_graph(MODULES)) == []


def test_no_file_name_and_no_type_name_is_used_twice():
    assert file_names_used_twice(MODULES) == {}
    assert types_used_twice(MODULES) == {}


def test_the_table_of_rooms_is_not_stale():
    assert {room_of(module) for module in MODULES} == set(ALLOWED)
    assert {path for path in SHORT_FILES if path not in {module.path for module in MODULES}} == set()


@pytest.mark.parametrize("room", ALLOWED)
def test_every_grant_is_used(room):
    assert unused_grants([module.tree for module in MODULES if room_of(module) == room], room) == []


def test_the_tree_in_the_readme_is_complete():
    listed = tree_of(README.read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(module.path for module in MODULES if not module.is_package)


@pytest.mark.parametrize(("module", "name", "explain"), REGISTRIES, ids=[row[1] for row in REGISTRIES])
def test_every_registry_entry_says_what_it_is(module, name, explain):
    registry = vars(importlib.import_module(module))[name]
    assert registry
    assert [key for key, entry in registry.items() if len(explain(entry) or "") < MIN_EXPLANATION] == []


def public_tables(tree: ast.Module) -> list[str]:
    """Public upper-case names that a module binds to a dict."""
    bound = [(node.targets[0], node.value) for node in tree.body if isinstance(node, ast.Assign)]
    bound += [(node.target, node.value) for node in tree.body if isinstance(node, ast.AnnAssign)]
    named = [target.id for target, value in bound if isinstance(target, ast.Name) and is_dict(value)]
    return [name for name in named if name.isupper() and not name.startswith("_")]


def is_dict(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Dict | ast.DictComp)


def test_no_registry_is_forgotten():
    found = {name for module in MODULES for name in public_tables(module.tree)}
    assert found == {name for _, name, _ in REGISTRIES}


def modules_loaded_by(code: str) -> set[str]:
    """Names of the modules in `sys.modules` of a fresh interpreter after `code`."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint('\\n'.join(['', *sys.modules]))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.splitlines())


HEAVY = {"torch", "transformers", "scipy", "polars", "altair", "pyarrow", "datasets"}


def test_importing_tutelage_is_free():
    assert "torch" in modules_loaded_by("import tutelage.train.step")
    assert not modules_loaded_by("import tutelage") & HEAVY


def test_help_loads_nothing_heavy():
    code = (
        "from tutelage.cli.main import app\n"
        "try:\n    app(['--help'], standalone_mode=False)\n"
        "except SystemExit as leave:\n    assert not leave.code"
    )
    loaded = modules_loaded_by(code)
    assert "tutelage.cli.main" in loaded
    assert not loaded & HEAVY


def test_the_analysis_needs_no_torch():
    names = [module.name for module in MODULES if room_of(module) == "analysis"]
    loaded = modules_loaded_by("\n".join(f"import {name}" for name in names))
    assert set(names) <= loaded
    assert not loaded & {"torch", "transformers"}
