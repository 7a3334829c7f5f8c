"""Record the origin of a result: commit, command, versions, machine. Collecting it never stops a run."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_SECRETS = (
    (re.compile(r"(?<=://)[^/\s@]+@"), "***@"),
    (re.compile(r"(?i)((?:token|secret|password|api[_-]?key)\s*[=:]\s*)[^\s&]+"), r"\1***"),
    (re.compile(r"\b(?:hf_|sk-|ghp_|AKIA)[A-Za-z0-9_-]{16,}"), "***"),
)
"""Patterns of what is secret, and what is shown instead."""

PACKAGES = ("tutelage", "torch", "transformers", "tokenizers", "numpy")


def collect(device: str) -> dict[str, Any]:
    """Collect the contents of `provenance.json`; None stands for what cannot be found out.

    Args:
        device: torch device of the run, for example "cpu" or "cuda:0".

    Returns:
        JSON values: `time` (UTC, ISO 8601), `command` (arguments of this process, without secrets), `commit`
        and `dirty` (of the source tree, None when tutelage does not run from a git checkout), `versions`,
        `platform`, `cpu` (model), `cpus` (logical), `threads` (torch's, None before torch is imported)
        and `device` (with its name).
    """
    commit, dirty = _loaded_commit()
    cpu = cpu_model()
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(),
        "commit": commit,
        "dirty": dirty,
        "versions": {"python": platform.python_version()} | {name: installed(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu": cpu,
        "cpus": os.cpu_count(),
        "threads": _threads(),
        "device": f"{device} ({_accelerator(device) or cpu or platform.machine()})",
    }


def command() -> list[str]:
    """The arguments of this process, the program first, as they may be shown to others.

    A name that is not UTF-8, which no file of text can hold, has escapes in the place of its bytes.
    """
    plain = (argument.encode(errors="backslashreplace").decode() for argument in sys.argv)
    return [without_secrets(argument) for argument in plain]


def without_secrets(text: str) -> str:
    """Take out passwords in addresses, values of settings that are secrets, tokens, and who the user is."""
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    home = os.path.expanduser("~")  # noqa: PTH111 - Path.home raises where there is none
    return text if len(home) < 2 else re.sub(rf"{re.escape(home)}(?=/|$)", "~", text)  # noqa: PLR2004 - "/"


@functools.cache
def code() -> str:
    """Versions and commit in one line: "tutelage 0.1.0, torch 2.13.0, commit 0123abc, changed"."""
    commit, dirty = _loaded_commit()
    parts = [f"{name} {installed(name)}" for name in ("tutelage", "torch", "transformers")]
    parts += [f"commit {commit[:12]}"] if commit else []
    parts += ["changed"] if dirty else []
    return ", ".join(parts)


@functools.cache
def installed(package: str) -> str | None:
    """Version of a distribution; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_model() -> str | None:
    """Marketing name of the processor, None if the system does not tell."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if sys.platform == "darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string")
    return platform.processor() or None


@functools.cache
def _loaded_commit() -> tuple[str | None, bool | None]:
    """Commit of this source tree, and whether it was changed, when this process first asked.

    Later changes to the tree are not in the code that this process has loaded and computes with.
    """
    return _commit(Path(__file__))


def _commit(source: Path) -> tuple[str | None, bool | None]:
    """Commit of the checkout that tracks the file `source`, and whether tracked files were changed.

    A copy installed inside somebody else's repository is not tracked there, so that repository's
    commit is not taken for ours.
    """
    git = ("git", "-C", str(source.parent))
    if _output(*git, "ls-files", "--error-unmatch", source.name) is None:
        return None, None
    commit = _output(*git, "rev-parse", "HEAD")
    changes = _output(*git, "status", "--porcelain", "--untracked-files=no", ":/")
    return commit, None if commit is None or changes is None else bool(changes)


def _output(program: str, *arguments: str) -> str | None:
    """Standard output of a command, None if it is missing, fails or takes more than ten seconds."""
    path = shutil.which(program)
    if path is None:
        return None
    try:
        done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _threads() -> int | None:
    """Threads torch computes with; None when this process has not needed torch."""
    torch = sys.modules.get("torch")
    return None if torch is None else int(torch.get_num_threads())


def _accelerator(device: str) -> str | None:
    """Name of a GPU; None for the CPU and for what torch does not know."""
    torch = sys.modules.get("torch")
    if torch is None or not device.startswith("cuda"):
        return None
    try:
        return str(torch.cuda.get_device_name(device))
    except (AssertionError, RuntimeError, ValueError):  # no driver, no such device, no CUDA build
        return None
