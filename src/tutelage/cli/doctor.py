"""The command `tutelage doctor`: check what an installation can do by doing it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from tutelage.errors import UserError
from tutelage.installed import install_extra, install_package
from tutelage.provenance import PACKAGES, cpu_model, installed

if TYPE_CHECKING:
    from collections.abc import Callable

    from tutelage.data.corpora import Corpus

_OPTIONAL = {
    "datasets": "hub",
    "lm_eval": "eval",
    "resiliparse": "html",
    "ray": "ray",
    "tensorboard": "trackers",
    "wandb": "trackers",
    "trackio": "trackers",
}
"""The extra that brings each optional module."""

_DISK_BYTES = 2 * 10**9
_IMPORT_SECONDS = 120
_SPEC = {
    "data": {"values": [{"x": 1}]},
    "mark": "point",
    "encoding": {"x": {"field": "x", "type": "quantitative"}},
}


@dataclass(frozen=True, slots=True)
class Check:
    """Result of one check.

    Attributes:
        name: what was checked.
        ok: whether it works.
        detail: a version, a name, or the error.
        fix: command or advice that mends it; None if it works, or if nothing can be done.
        required: whether training, scoring and reports on this machine need it.
    """

    name: str
    ok: bool
    detail: str
    fix: str | None = None
    required: bool = True


def examine() -> list[Check]:
    """Run every check. Takes some seconds, because each installed part is really used. Never raises."""
    return [
        _python(),
        *(_package(name) for name in PACKAGES),
        *_devices(),
        _disk(),
        *_corpora(),
        _works("tokenizer training", _train_tokenizer, install_package("--force-reinstall tokenizers")),
        _works("figures", _draw, install_package("--force-reinstall vl-convert-python")),
        *(_optional(module, install_extra(extra)) for module, extra in _OPTIONAL.items()),
        _optional("triton", "comes with torch's CUDA build on Linux; nothing else needs it"),
    ]


def _python() -> Check:
    ok = sys.version_info >= (3, 11)
    detail = f"{platform.python_version()} at {sys.executable}"
    return Check("python", ok, detail, None if ok else "use Python 3.11 or later")


def _package(name: str) -> Check:
    found = installed(name)
    if found is None:
        return Check(name, False, "not installed", install_package(name))
    return Check(name, True, found)


def _devices() -> list[Check]:
    """Check the CPU and the accelerators; only the CPU is required."""
    try:
        import torch
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what the user must hear
        why = f"torch cannot be imported: {_line(error)}"
        return [Check("cpu", False, why, install_package("--force-reinstall torch"))]
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    processor = (
        f"{cpu_model() or platform.machine()}, {cores} core{'s' * (cores != 1)}, "
        f"{threads} thread{'s' * (threads != 1)}"
    )
    checks = [Check("cpu", True, processor)]
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    checks += [Check(f"cuda:{index}", True, name, required=False) for index, name in enumerate(gpus)]
    if not gpus:
        checks.append(Check("cuda", False, "no CUDA device; runs use the CPU or mps", required=False))
    mps = torch.backends.mps.is_available()
    checks.append(Check("mps", mps, "available" if mps else "no Apple GPU", required=False))
    return checks


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free
    ok, detail = free >= _DISK_BYTES, f"{free / 1e9:.1f} GB free in {Path.cwd()}"
    return Check("disk", ok, detail, None if ok else "free some, or set output to another disk")


def _corpora() -> list[Check]:
    """Read the first document of every named corpus, which checks the content of all of its files."""
    from tutelage.data.corpora import CORPORA

    def read(corpus: Corpus[str]) -> str:
        first = next(iter(corpus.documents()))
        return f"{corpus.package} {corpus.version}, first document {len(first)} characters"

    return [
        _works(f"corpus {corpus.name}", partial(read, corpus), corpus.install, required=False)
        for corpus in CORPORA.values()
    ]


def _works(name: str, action: Callable[[], str], fix: str, *, required: bool = True) -> Check:
    try:
        return Check(name, True, action(), required=required)
    except UserError as error:  # says itself what mends it, which may be more than `fix`
        detail, _, own = str(error).partition("; run: ")
        return Check(name, False, detail, own or fix, required)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what the user must hear
        return Check(name, False, _line(error), fix, required)


def _train_tokenizer() -> str:
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["a weak teacher"] * 10, vocab_size=260, show_progress=False)
    return f"{tokenizer.get_vocab_size()} ids from a sentence"


def _draw() -> str:
    import vl_convert

    return f"{len(vl_convert.vegalite_to_svg(_SPEC))} bytes of SVG drawn"


def _optional(module: str, fix: str) -> Check:
    """Import a module in another process, since a broken binary may end a process instead of raising."""
    if find_spec(module) is None:
        return Check(module, False, "not installed", fix, required=False)
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {module}"],
            capture_output=True, text=True, timeout=_IMPORT_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Check(module, False, f"import takes more than {_IMPORT_SECONDS} s", fix, required=False)
    if done.returncode == 0:
        return Check(module, True, installed(module) or "imported", required=False)
    last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return Check(module, False, f"installed but broken: {last}", fix, required=False)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _demo() -> str:
    """Say how to start the demo, or what its texts lack."""
    from tutelage.study.expand import expand
    from tutelage.study.presets import load_study
    from tutelage.study.texts import check_corpora

    try:
        check_corpora(expand(load_study("demo")))
    except UserError as error:
        return f"; for `tutelage demo`: {error}"
    return ": `tutelage demo`"


def doctor() -> None:
    """Print versions and devices, and what works. Exit code 1 if a part that is needed does not."""
    from tutelage.cli.bars import out, say

    checks = examine()
    for check in checks:
        out.print("ok" if check.ok else "--", style="green" if check.ok else "yellow", end="  ")
        out.print(f"{check.name:<22}", end="")
        # A command that is broken where the screen ends cannot be copied.
        out.print(check.detail + (f"  ->  {check.fix}" if check.fix else ""), soft_wrap=True)
    broken = [check.name for check in checks if check.required and not check.ok]
    say("next", f"mend {', '.join(broken)}" if broken else f"everything needed works{_demo()}")
    raise typer.Exit(int(bool(broken)))
