"""A policy and a gate that keep state give the same run on two gloo processes as on one."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml

from tutelage.run import run

STEPS = 40
"""Enough for the entropies to spread, so that counts of one rank alone would move the gate differently."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "tolerance"),
    [
        ({"alpha": {"policy": "gap_driven", "window": 3, "scale": 2.0}}, 1e-4),
        ({"alpha": {"policy": "prequential", "period": 4, "probe": 2}}, 1e-4),
        # A hard threshold: rounding decides about a token now and then, one of 256.
        ({"alpha": 0.5, "gate": {"kind": "student_entropy", "keep": 0.5}}, 4e-3),
    ],
    ids=["gap_driven", "prequential", "student_entropy"],
)
def test_two_ranks_choose_the_alphas_of_one(objective, tolerance, make_config, tmp_path):
    changes = {"tokens": STEPS * 256, "teacher": {"kind": "unigram"}, "objective": objective}
    alone = run(make_config(**changes))
    config = make_config(**changes, output=str(tmp_path / "two"))
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *("-m", "tutelage", "train", str(file)),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    two, one = (
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (tmp_path / "two" / alone.id, alone.path)
    )
    assert len(two) == len(one) == STEPS
    memory = {key for row in one for key in row if key.startswith(("policy_", "gate_"))}
    assert memory
    for a, b in zip(two, one, strict=True):
        for key in {"loss", "alpha", *memory} & a.keys():
            assert a[key] == pytest.approx(b[key], rel=tolerance, abs=tolerance)
