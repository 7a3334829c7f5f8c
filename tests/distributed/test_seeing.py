"""One rank breaks or is slow: no rank updates, all count alike, and the user learns which rank it was."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from poison import trained_plainly
from training import opened, rows, weights

from tutelage.data.loader import Loader
from tutelage.data.store import open_store
from tutelage.run_directory import RunDirectory

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "support" / "poisoned_ranks.py"
DRAW = random.Random(20261126)  # noqa: S311 - of a test
STEPS = {what: (DRAW.randint(1, 11), DRAW.randint(0, 1)) for what in ("loss", "gradient")}
"""The step, from 1, and the rank that break; in 12 steps."""


@pytest.fixture(scope="module")
def found(tmp_path_factory, tiny_config):
    """What came of every case; one start of two processes for all."""
    folder = tmp_path_factory.mktemp("poisoned")
    cases = {}
    for what, (step, rank) in STEPS.items():
        config = tiny_config(folder / "runs", name=what)
        cases[what] = {"config": config, "rank": rank, "steps": [step], "what": what}
    runtime = {"device": "cpu", "threads": 1, "log_every": 1000, "max_skipped_steps": 1}
    config = tiny_config(folder / "runs", name="stops", runtime=runtime)
    cases["stops"] = {"config": config, "rank": 1, "steps": [2, 4, 5, 6], "what": "loss"}
    runtime = {"device": "cpu", "threads": 1, "log_every": 1, "profile": 1}
    config = tiny_config(folder / "runs", name="slow", runtime=runtime)
    cases["slow"] = {"config": config, "rank": 1, "steps": [], "seconds": 0.2}
    file = folder / "cases.json"
    texts = [case | {"config": case["config"].model_dump(mode="json")} for case in cases.values()]
    file.write_text(json.dumps(texts))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *(SCRIPT, file),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {
        name: outcome | {"config": case["config"]}
        for (name, case), outcome in zip(cases.items(), outcomes, strict=True)
    }


@pytest.mark.parametrize("what", STEPS)
def test_no_rank_makes_the_update_and_the_others_are_those_of_plain_torch(found, what):
    case, (step, _) = found[what], STEPS[what]
    directory = RunDirectory(Path(case["directory"]))
    logged = rows(directory)
    assert [row["step"] for row in logged] == [one for one in range(1, 13) if one != step]
    assert logged[-1]["skipped_steps"] == 1
    assert directory.is_done()
    expected, ours = trained_plainly(opened(case["config"]), skipped=(step,)), weights(directory)
    for name, weight in expected.items():
        assert ours[name].isfinite().all()
        torch.testing.assert_close(ours[name], weight, rtol=1e-3, atol=2e-4)
    assert sum("1 updates since the last row were skipped" in note for note in case["notes"]) == 1


def test_too_many_stop_all_ranks_with_the_rank_and_its_sequences(found):
    case = found["stops"]
    first, second = case["errors"]
    assert first == second
    config = case["config"]
    loader = Loader(open_store(config.data.store).split("train"), 32, 8, config.data.seed, 1, 2)
    starts = ", ".join(f"{start:,}" for start in loader.batch(3).starts)
    assert (
        f"step 4: loss is nan, gradient norm nan, on the sequences of rank 1 from tokens {starts} of" in first
    )
    assert "the updates of steps 4 to 5 were skipped" in first


def test_a_slow_rank_is_named_once(found):
    case = found["slow"]
    told = [note for note in case["notes"] if "straggler" in note]
    assert len(told) == 1
    assert "rank 1 takes" in told[0]
    state = RunDirectory(Path(case["directory"])).state()
    assert [text for text in state["warnings"] if "rank 1 takes" in text]
    row = rows(RunDirectory(Path(case["directory"])))[5]
    assert row["data_wait"] > 0.5
    assert row["tokens_per_second_per_device"] == pytest.approx(row["tokens_per_second"] / 2, rel=1e-3)
    per_token = state["train_flops"] / state["tokens"]
    expected = per_token * row["tokens_per_second"] / (2 * state["peak_flops"])
    assert row["mfu"] == pytest.approx(expected, rel=1e-2)


def test_every_rank_writes_its_trace(found):
    folder = Path(found["slow"]["directory"]) / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["rank-0.json", "rank-1.json"]
    for path in folder.iterdir():
        names = {event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]}
        assert any(name.startswith("ProfilerStep#") for name in names)
        assert any("allgather" in name or "all_gather" in name for name in names)
    assert sum("rank-0.json" in note for note in found["slow"]["notes"]) == 1
