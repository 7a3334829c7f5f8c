"""Structure of a Python package, read from its text: files, lines, imports, circles, names used twice."""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path


@dataclass(frozen=True)
class Module:
    """One file: its path below the package, its dotted name and its text."""

    path: str
    name: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """What the text parses to."""
        return ast.parse(self.text)

    @property
    def lines(self) -> int:
        """Lines of text."""
        return len(self.text.splitlines())

    @property
    def is_package(self) -> bool:
        """Whether it is the `__init__` of a directory."""
        return self.path.rpartition("/")[2] == "__init__.py"


def read_package(root: Path) -> list[Module]:
    """Read every file of the package whose directory is `root`."""
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        parts = [root.name, *relative.with_suffix("").parts]
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text(encoding="utf-8")
        found.append(Module(relative.as_posix(), name, text))
    return found


@cache
def imported_names(tree: ast.AST) -> tuple[str, ...]:
    """Dotted names of everything imported anywhere in a module, type-only imports included."""
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names]
    return tuple(names)


def import_graph(modules: Iterable[Module]) -> dict[str, set[str]]:
    """Which module of the package imports which, by dotted name; inside functions and for types too."""
    known = {module.name: module for module in modules}
    graph = {}
    for module in known.values():
        targets = {_owner(name, known) for name in imported_names(module.tree)}
        graph[module.name] = {target for target in targets if target is not None} - {module.name}
    return graph


def _owner(name: str, known: Mapping[str, Module]) -> str | None:
    """The module that an imported name belongs to; None outside the package."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name or None


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Sets of modules that import each other, directly or through others (strongly connected components)."""
    reach = {name: _reachable(name, graph) for name in graph}
    found = {
        tuple(sorted({name} | {other for other in reach[name] if name in reach[other]}))
        for name in graph
        if name in reach[name]
    }
    return [list(circle) for circle in sorted(found)]


def _reachable(start: str, graph: Mapping[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for target in graph.get(waiting.pop(), ()):
            if target not in seen:
                seen.add(target)
                waiting.append(target)
    return seen


def file_names_used_twice(modules: Iterable[Module]) -> dict[str, list[str]]:
    """File names that several directories have, `__init__.py` and `__main__.py` aside."""
    places = defaultdict(list)
    for module in modules:
        name = module.path.rpartition("/")[2]
        if not name.startswith("__"):
            places[name].append(module.path)
    return {name: paths for name, paths in places.items() if len(paths) > 1}


def types_used_twice(modules: Iterable[Module]) -> dict[str, list[str]]:
    """Public names of classes and type aliases that several files define."""
    places = defaultdict(list)
    for module in modules:
        for name in {*_classes(module.tree), *_aliases(module.tree)}:
            if not name.startswith("_"):
                places[name].append(module.path)
    return {name: paths for name, paths in places.items() if len(paths) > 1}


def _classes(tree: ast.Module) -> list[str]:
    return [node.name for node in tree.body if isinstance(node, ast.ClassDef)]


def _aliases(tree: ast.Module) -> list[str]:
    """Names in CamelCase that a module binds: `Kind = Literal[...]`, `T = TypeVar("T")` aside."""
    bound = [node for node in tree.body if isinstance(node, ast.Assign)]
    return [
        target.id
        for node in bound
        for target in node.targets
        if isinstance(target, ast.Name)
        and target.id[0].isupper()
        and not target.id.isupper()
        and not ast.unparse(node.value).startswith("TypeVar(")
    ]


def importers(graph: Mapping[str, set[str]]) -> Counter[str]:
    """How many modules import each module."""
    return Counter(target for targets in graph.values() for target in targets)


def rooms(graph: Mapping[str, set[str]], modules: Iterable[Module]) -> dict[str, set[str]]:
    """The import graph between directories; a file at the top is a room of its own."""
    room = {module.name: module.path.rpartition("/")[0] or module.path for module in modules}
    found: dict[str, set[str]] = {name: set() for name in room.values()}
    for source, targets in graph.items():
        found[room[source]] |= {room[target] for target in targets} - {room[source]}
    return found


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method, nested ones too."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the last one."""
    return (function.end_lineno or 0) - function.lineno + 1
