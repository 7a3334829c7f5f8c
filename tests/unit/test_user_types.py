"""mypy --strict on a user's script: without our plugin, and errors of the package itself not counted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "support" / "user_script.py"


@pytest.mark.slow
def test_a_users_script_has_types(tmp_path):
    empty = tmp_path / "mypy.ini"  # not this repository's own settings
    empty.write_text("[mypy]\n")
    root = SCRIPT.parents[2]
    cache = root / ".mypy_cache" / "user"  # torch, numpy and polars take a minute to read
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", str(SCRIPT)]
    done = subprocess.run(
        [*command, f"--config-file={empty}", f"--cache-dir={cache}"],
        capture_output=True,
        text=True,
        env=os.environ | {"MYPYPATH": str(root / "src")},
        check=False,
    )
    lines = SCRIPT.read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines, 1) if "reveal_type(" in line)
    told = re.findall(r"user_script\.py:(\d+): (error|note): (.*)", done.stdout)
    wrong = {int(number) for number, kind, _ in told if kind == "error"}
    assert wrong == set(range(first + 1, len(lines) + 1)), done.stdout
    revealed = next(text for _, _, text in told if "Revealed" in text)
    assert "hidden_ND" in revealed
    assert "LossSums" in revealed
