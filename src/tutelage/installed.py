"""Say how this package was installed, and the command that adds an extra of it to the same environment.

`pip install 'tutelage[eval]'` asks an index that may not have the package. What pip and uv wrote down when
they installed it (`direct_url.json`, PEP 610) says where it came from: a checkout, a wheel, a repository or
an index.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

_ROOT = Path(__file__).parents[2]
"""The checkout, if this file lies in one."""


def install_extra(extra: str) -> str:
    """The command that installs an extra, such as `eval`, where this package was installed from."""
    return f"{_pip()} {_requirement(extra)}"


def install_package(requirement: str) -> str:
    """The command that installs another package into the environment of this process."""
    return f"{_pip()} {requirement}"


def describe() -> str:
    """Version and origin of this package, in words."""
    return f"tutelage {version('tutelage')} ({_origin()}; Python {sys.version.split()[0]})"


def _origin() -> str:
    record = _record()
    if record is None:
        return f"run from {_ROOT}, not installed"
    url = record.get("url")
    if url is None:
        return "installed from a package index"
    path = _path(url)
    if not record.get("dir_info", {}).get("editable"):
        return f"installed from {url if path is None else path}"
    elsewhere = "" if path is None or path.resolve() == _ROOT.resolve() else f", but run from {_ROOT}"
    return f"editable checkout {url if path is None else path}{elsewhere}"


def _requirement(extra: str) -> str:
    record = _record()
    if record is None:
        return "-e " + shlex.quote(f"{_ROOT}[{extra}]")
    url = record.get("url")
    if url is None:
        return f"'tutelage[{extra}]'"
    path = _path(url)
    if path is not None:
        editable = "-e " if record.get("dir_info", {}).get("editable") else ""
        return editable + shlex.quote(f"{path}[{extra}]")
    vcs = record.get("vcs_info")
    place = f"{vcs['vcs']}+{url}@{vcs['commit_id']}" if vcs else url
    return f"'tutelage[{extra}] @ {place}'"


def _record() -> dict[str, Any] | None:
    """What was written down of the installation; {} if it came from an index, None if there was none."""
    try:
        text = distribution("tutelage").read_text("direct_url.json")
    except PackageNotFoundError:
        return None
    found = json.loads(text) if text else {}
    return found if isinstance(found, dict) else {}


def _path(url: str) -> Path | None:
    parts = urlparse(url)
    return Path(url2pathname(parts.path)) if parts.scheme == "file" else None


def _pip() -> str:
    """The pip of this process's environment: its plain name only where the shell would find the same."""
    if find_spec("pip") is None:  # as in environments that uv makes
        return f"uv pip install --python {shlex.quote(sys.executable)}"
    found, own = shutil.which("pip"), Path(sys.executable).with_name("pip")
    if found is not None and Path(found) == own:
        return "pip install"
    return f"{shlex.quote(sys.executable)} -m pip install"
