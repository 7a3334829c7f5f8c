"""Two gloo processes, scored on the way: once, on rank 0, with the scores of one process."""

from __future__ import annotations

import json
import subprocess
import sys

import polars as pl
import pytest
import yaml

from tutelage.run import run


@pytest.mark.slow
def test_two_ranks_score_once_and_stay_in_step(make_config, store, tmp_path):
    evaluation = {
        "every": 5 * 256,
        "domains": [{"name": "speeches", "store": str(store), "role": "in_domain"}],
        "max_documents": 4,
        "max_tokens": 80,
    }
    config = make_config(eval=evaluation, output=str(tmp_path / "two"))
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        [*torchrun, "-m", "tutelage", "train", str(file)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    alone = run(make_config(eval=evaluation))
    (two,) = (tmp_path / "two").iterdir()
    ours, theirs = pl.read_ndjson(two / "scores.jsonl"), pl.read_ndjson(alone.scores)
    key = ["step", "domain", "split", "metric", "version", "n"]
    assert ours.select(key).equals(theirs.select(key))
    assert ours["step"].unique().sort().to_list() == [5, 10, 12]
    for metric in ("bits_per_byte", "brier", "ece"):
        a, b = (frame.filter(metric=metric)["value"].to_list() for frame in (ours, theirs))
        assert a == pytest.approx(b, rel=1e-2)
    logs = [
        [json.loads(line)["loss"] for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (two, alone.path)
    ]
    assert len(logs[0]) == 12
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)
