"""`tutelage eval recall` as a user types it, beside lm-eval's own command, and in a study."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
import yaml
from tiny_study import TINY, run_tiny, tiny_study

from tutelage.analysis.claims.judge import judge_study
from tutelage.analysis.report.accuracy_rows import recall_gains
from tutelage.analysis.report.html import build_report
from tutelage.evals.score_files import read_scores
from tutelage.run import run
from tutelage.study.results import load_results

pytestmark = pytest.mark.slow


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_lm_evals_own_command_gives_the_same_accuracy(make_config, command, tmp_path, store, other_store):
    trained = run(make_config(tokens=150 * 256, data={"store": str(store), "sequence_length": 64}))
    code, printed, notes = command("eval", "recall", trained.path, "--device", "cpu")
    assert code == 0
    assert "accuracy_held_out" in printed
    assert "questions about facts read 2 or 3 times" in notes
    scores = {row.metric: row for row in read_scores(trained.scores)}
    (file,) = (tmp_path / "evals" / "stores").glob("recall-*.json")
    asked = json.loads(file.read_text())["found"]
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    bins = list(dict.fromkeys(row[3] for row in asked))
    assert bins == ["held_out", "0", "1"]
    for number, name in enumerate(bins):
        lines = [
            json.dumps({"prompt": prompt, "choices": choices, "gold": gold}) + "\n"
            for prompt, choices, gold, own, *_ in asked
            if own == name
        ]
        (tasks / f"{number}.jsonl").write_text("".join(lines))
        task = {
            "task": f"recall_{number}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(tasks / f"{number}.jsonl")}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "prompt",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        (tasks / f"{number}.yaml").write_text(yaml.safe_dump(task))
    names = ",".join(f"recall_{number}" for number in range(len(bins)))
    arguments = [
        "--model",
        "hf",
        "--model_args",
        f"pretrained={trained.model},max_length=64",
        "--tasks",
        names,
    ]
    arguments += [
        "--include_path",
        str(tasks),
        "--device",
        "cpu",
        "--batch_size",
        "8",
        "--output_path",
        str(tmp_path / "out"),
    ]
    subprocess.run(
        [sys.executable, "-m", "lm_eval", *arguments], check=True, timeout=300, capture_output=True
    )
    (results,) = (tmp_path / "out").glob("**/results_*.json")
    found = json.loads(results.read_text())["results"]
    for number, name in enumerate(bins):
        assert found[f"recall_{number}"]["acc,none"] == pytest.approx(scores[f"accuracy_{name}"].value)
    code, printed, _ = command("eval", "recall", trained.path, "--store", other_store, "--device", "cpu")
    assert code == 0, "a text that the run has not read"
    assert "recall:scripture" in printed
    assert "accuracy_1" not in printed
    code, printed, _ = command("eval", "recall", trained.model, "--store", store, "--device", "cpu")
    assert code == 0, "a model that is no run: all of the text counts"
    assert "recall:speeches" in printed
    assert "accuracy_0" not in printed


def test_a_study_shows_recall_beside_the_untaught(tmp_path):
    settings = TINY["run"] | {"eval": TINY["run"]["eval"] | {"recall": True}}
    run_tiny(
        tiny_study(run=settings, students={"main": TINY["students"]["main"] | {"tokens": "8K"}}), tmp_path
    )
    results = load_results(tmp_path)
    assert results.problems == ()
    study = judge_study(results)
    ((cell, gains),) = recall_gains(study).items()
    assert list(gains) == ["held_out", "0"]
    accuracy = {
        (kind, metric): value
        for kind, metric, value in results.runs.join(results.scores.filter(domain="recall"), on="run")
        .select("kind", "metric", "value")
        .iter_rows()
    }
    alone, change = gains["0"].untaught, gains["0"].gain
    assert alone == pytest.approx(100 * accuracy["baseline", "accuracy_0"])
    assert change.mean == pytest.approx(100 * accuracy["student", "accuracy_0"] - alone)
    assert change.n == 1
    page = build_report(study, tmp_path).read_text(encoding="utf-8")
    assert "Recall of the training text" in page
    assert "one seed; alone" in page
    assert cell == study.findings.verdicts[0].cell
