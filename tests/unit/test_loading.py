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


END = """
import atexit, ctypes, sys
from tutelage.loading import end_soon

end_soon()
atexit.register(lambda: print("last words", file=sys.stderr))
sys.modules[sys.argv[1]] = sys
ctypes.pythonapi.Py_AtExit(ctypes.CDLL(None).malloc_stats)  # prints, when Python has ended
raise SystemExit(3)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="malloc_stats is glibc's")
@pytest.mark.parametrize(("loaded", "is_heard"), [("triton._C.libtriton", False), ("other", True)])
def test_what_lists_frozen_objects_as_leaked_is_not_heard(loaded, is_heard):
    """Triton 3.9, of any process that froze what it had loaded; what Python itself still runs is."""
    done = subprocess.run([sys.executable, "-c", END, loaded], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()[0]) == (3, "last words")
    assert ("system bytes" in done.stderr) is is_heard


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
