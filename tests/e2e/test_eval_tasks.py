"""`tutelage eval tasks` and `probe` as a user types them."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest

from tutelage.data.store import open_store
from tutelage.models import hub
from tutelage.models.shapes import LADDER

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"
)


@pytest.fixture(scope="module")
def folder(store, tmp_path_factory):
    """Two models side by side."""
    path = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        model = hub.build(LADDER["nano-50k"], open_store(store).vocab_size, 96, seed=seed)
        hub.save(model, path / f"seed-{seed}", store)
    return path


def test_models_side_by_side(folder, store, command, monkeypatch):
    monkeypatch.chdir(folder)
    task = f"continuation:{store}"
    _, shown, _ = command("eval", "tasks", "seed-0", "seed-1", "--task", task, "--limit", "12")
    assert "continuation_speeches" in shown
    assert "(n=12)" in shown
    files = sorted(folder.glob("evals/seed-*/scores.jsonl"))
    assert len(files) == 2
    rows = [[json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in files]
    assert [[row["metric"] for row in found] for found in rows] == [["acc", "acc_norm"]] * 2
    assert rows[0][0]["version"] == rows[1][0]["version"]


def test_models_side_by_side_in_conversations(folder, command, monkeypatch):
    monkeypatch.chdir(folder)
    arguments = ("--task", "word_analogy", "--limit", "6", "--apply-chat-template")
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}assistant:"
    for name in ("talks-0", "talks-1"):
        shutil.copytree(folder / name.replace("talks", "seed"), name)
        (folder / name / "chat_template.jinja").write_text(template, encoding="utf-8")
    code, _, complaint = command("eval", "tasks", "talks-0", "seed-1", *arguments)
    assert (code, complaint.count("\n")) == (2, 1)
    assert "seed-1: no chat template" in complaint
    assert not [*folder.glob("evals/talks-*")]  # the first one is not asked either
    _, shown, _ = command("eval", "tasks", "talks-0", "talks-1", *arguments, "--system-instruction", "Think.")
    rows = [
        json.loads(file.read_text("utf-8").splitlines()[0]) for file in folder.glob("evals/talks-*/*.jsonl")
    ]
    assert [row["domain"] for row in rows] == ["word_analogy (chat, system)"] * 2
    assert "(chat, system)" in shown
    code, _, complaint = command("eval", "tasks", "talks-0", "--task", "roll", "--no-fewshot-as-multiturn")
    assert (code, complaint.count("\n")) == (2, 1)
    assert "apply the chat template as well" in complaint


def test_probes_side_by_side(folder, store, command, monkeypatch):
    monkeypatch.chdir(folder)
    arguments = ("--store", store, "--teacher", "seed-1", "--device", "cpu")
    _, printed, _ = command("eval", "probe", "seed-0", *arguments)
    for text in ("copying", "acceptance:seed-1", "accepted_length", "(n=64)", "samples.md"):
        assert text in printed
    (page,) = folder.glob("evals/seed-0*/samples.md")
    assert page.read_text(encoding="utf-8").count("Greedy:") == 4


def test_word_analogies_come_from_a_package(folder, command, monkeypatch):
    monkeypatch.chdir(folder)
    _, printed, _ = command("eval", "tasks", "seed-0", "--task", "word_analogy", "--limit", "20")
    assert "word_analogy" in printed
    assert "(n=20)" in printed


def test_a_file_that_is_called_as_a_studys_plan_is_makes_no_study(folder, store, command, monkeypatch):
    """`tutelage study plan --json > plan.json` beside runs, as the page on studies does."""
    monkeypatch.chdir(folder)
    (folder / "plan.json").write_text('{"total_runs": 4}', encoding="utf-8")
    task = f"continuation:{store}"
    code, shown, complaint = command(
        "eval", "tasks", "seed-0", "--task", task, "--limit", "4", "--output", "runs"
    )
    assert code == 0, complaint
    assert "`tutelage eval score` measures the same models" in shown
    (folder / "plan.json").unlink()


def test_a_stop_is_told(folder, command, monkeypatch):
    def stopped(*_, **_more):
        raise KeyboardInterrupt

    monkeypatch.chdir(folder)
    monkeypatch.setattr("tutelage.evals.lm_eval.run_downstream", stopped)
    code, _, complaint = command("eval", "tasks", "seed-0", "--task", "word_analogy")
    assert code == 130
    assert "stopped; run the same command again to resume" in complaint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tasks", "--task", "continuation:kvj"], "did you mean 'kjv'?"),
        (["tasks"], "Missing option '--task'"),
        (["score", "--limit", "3"], "No such option: --limit"),
        (["score", "--teacher", "seed-1"], "No such option: --teacher"),
        (["tasks", "--domain", "kjv"], "No such option: --domain"),
        (["probe"], "probes need a token store"),
        (["probe", "--domain", "kjv"], "No such option: --domain"),
        (["tokens", "--baseline", "seed-1"], "Missing option '--teacher'"),
        (["tokens", "--teacher", "seed-1"], "Missing option '--baseline'"),
    ],
)
def test_what_is_wrong_is_said(arguments, message, folder, command, monkeypatch):
    monkeypatch.chdir(folder)
    code, _, complaint = command("eval", *arguments, "seed-0")
    assert code == 2
    assert message in complaint
    assert "Traceback" not in complaint
