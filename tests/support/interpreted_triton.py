"""The tests of a file once more, over Triton's kernels in its interpreter.

A process of its own: triton reads TRITON_INTERPRET when it is imported.
"""

import importlib.util
import os
import subprocess
import sys

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
where_triton_is = pytest.mark.skipif(
    INTERPRETED or importlib.util.find_spec("triton") is None, reason="no triton, or it is here"
)


def run_again(file, chosen="not triton"):
    """Run the tests of `file` whose names `chosen` selects."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "TUTELAGE_KERNELS": "triton"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", file, "-k", chosen, "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
