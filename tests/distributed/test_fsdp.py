"""FSDP2 stays in charge of the head: it gathers it once a step and reduces its gradient once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "support" / "sharded_head.py"


@pytest.mark.slow
def test_sharded_and_copied_heads_give_the_same_and_a_sharded_one_is_gathered_once():
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run([*launcher, str(SCRIPT)], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "view tensor" not in done.stderr  # of which FSDP2 warns
    traffic = [json.loads(line) for line in done.stdout.splitlines()]
    # One for the body and one for the head, although the head works through three chunks of tokens, and in
    # the last of four steps through two micro-batches.
    assert traffic == [{"_allgather_base_": 2, "_reduce_scatter_base_": 2}] * 8
