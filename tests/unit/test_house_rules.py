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

import tutelage

SOURCE = Path(tutelage.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MIN_EXPLANATION = 12

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
    "records": {"errors"},
    "files": {"errors"},
    "config": {"types", "errors"},
    "data": _BASE | {"progress", "records"},
    "models": _BASE | {"objective.products"},
    "objective": _BASE,
    "teachers": _BASE | {"progress", "records", "data", "models", "objective"},
    "run_directory": _BASE | {"data", "models", "teachers.cache.layout"},
    "train": _BASE | _ROOMS | {"progress", "provenance", "run_directory"},
    "evals": _BASE
    | {"data", "models", "progress", "provenance", "bootstrap", "records", "run_directory"}
    | {"teachers.cache.layout"},
    "run": _BASE | _ROOMS | {"evals", "progress", "provenance", "run_directory", "train"},
    "study": _BASE | {"data", "models", "presets", "progress", "records", "run", "run_directory"},
    "analysis": {
        "types",
        "errors",
        "files",
        "bootstrap",
        "study.results",
        "study.plan",
        "study.token_tables",
    },
    "__main__": {"cli"},
    "cli": _BASE
    | _ROOMS
    | {"analysis", "evals", "presets", "provenance", "run", "run_directory", "study", "train"},
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
    ("tutelage.study.devices", "DEVICES", attrgetter("summary")),
    ("tutelage.analysis.claims.registry", "CLAIMS", attrgetter("text")),
    ("tutelage.evals.lm_eval_tasks", "PACKAGE_TASKS", attrgetter("summary")),
]
"""Every registry, a dict from the name users write, and what to read an entry's explanation from."""

PICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def room_of(path: Path) -> str:
    """The first part of a module's name below `tutelage`."""
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imports(tree: ast.AST) -> list[str]:
    """Dotted names of everything imported anywhere in a module, type-only imports included."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names]
    return names


def forbidden_imports(tree: ast.AST, room: str) -> list[str]:
    allowed = ALLOWED[room] | {room}
    inside = [name.removeprefix("tutelage.") for name in imports(tree) if name.startswith(("tutelage.", "."))]
    return [name for name in inside if not any(f"{name}.".startswith(f"{target}.") for target in allowed)]


def long_functions(tree: ast.AST) -> list[str]:
    return [
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION_LINES
    ]


def attribute_guessing(tree: ast.AST) -> list[int]:
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("hasattr", "getattr")
    ]


def unsafe_loading(tree: ast.AST) -> list[str]:
    found = [name for name in imports(tree) if name.split(".")[0] in PICKLERS]
    found += [name for name in imports(tree) if name in ("torch.load", "torch.save")]
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


def test_the_source_is_really_looked_at():
    assert {room_of(path) for path in FILES} >= {
        "data",
        "models",
        "objective",
        "teachers",
        "train",
        "analysis",
    }
    assert len(FILES) > 30


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_file(path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert len(text.splitlines()) <= MAX_FILE_LINES
    assert long_functions(tree) == []
    assert attribute_guessing(tree) == []
    assert unsafe_loading(tree) == []
    room = room_of(path)
    assert room in ALLOWED, f"say in ALLOWED what {room} may import"
    assert forbidden_imports(tree, room) == []


def test_the_table_of_rooms_is_not_stale():
    assert {room_of(path) for path in FILES} == set(ALLOWED)


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
    found = {name for path in FILES for name in public_tables(ast.parse(path.read_text(encoding="utf-8")))}
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
    names = [
        ".".join(("tutelage", *path.relative_to(SOURCE).with_suffix("").parts))
        for path in (SOURCE / "analysis").rglob("*.py")
        if path.stem != "__init__"
    ]
    loaded = modules_loaded_by("\n".join(f"import {name}" for name in names))
    assert set(names) <= loaded
    assert not loaded & {"torch", "transformers"}
