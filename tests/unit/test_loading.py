"""What a command has loaded costs it no collections afterwards."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import gc
from contextlib import suppress
from tutelage.loading import loading

with loading():
    collects = gc.isenabled()
    loaded = [[] for _ in range(100_000)]
print(collects, gc.isenabled(), gc.get_freeze_count() > 100_000, len(gc.get_objects()) < 50_000)
with suppress(ImportError), loading():
    later = [[] for _ in range(100_000)]
    raise ImportError
print(gc.isenabled(), len(gc.get_objects()) > 100_000)
"""


def test_collections_begin_again_and_pass_over_what_was_loaded_first():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout == "False True True True\nTrue True\n"


@pytest.mark.parametrize("command", [["verify"], ["eval", "score"]])
def test_commands_load_torch_inside(command, tmp_path):
    """So they freeze first where torch is there and nothing is collected, not at the end."""
    script = (
        f"import gc, sys; sys.argv = ['tutelage', *{command}, sys.argv[1]];"
        "from tutelage.cli.main import main;"
        "freeze = gc.freeze;"
        "gc.freeze = lambda: (freeze(), print('frozen', 'torch' in sys.modules, gc.isenabled()));"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False
    )
    frozen = [line for line in done.stdout.splitlines() if line.startswith("frozen")]
    assert frozen[0] == "frozen True False", done.stdout + done.stderr
