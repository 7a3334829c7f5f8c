"""A run whose files were lost or torn at any point is brought to its end by the same command."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from training import Notes, losses

from tutelage.config.load import to_yaml
from tutelage.earlier_runs import earlier_runs
from tutelage.run import run
from tutelage.run_directory import RunDirectory, run_id
from tutelage.verify import verify


@pytest.fixture(scope="module")
def finished(store, tiny_config, tmp_path_factory):
    """A finished run with scores, as (directory, function that makes its config for another output)."""

    def config(output):
        evaluation = {
            "domains": [{"name": "own", "store": str(store), "role": "in_domain"}],
            "max_documents": 3,
        }
        return tiny_config(output, eval=evaluation | {"max_tokens": 64})

    return run(config(tmp_path_factory.mktemp("finished"))), config


def everything(directory):
    """What must not depend on what happened to the run."""
    state = {
        k: v
        for k, v in directory.state().items()
        if k not in {"seconds", "tokens_per_second", "scoring_seconds"}
    }
    scores = [json.loads(line) for line in directory.scores.read_text().splitlines()]
    card = re.sub("output: .*", "", (directory.model / "README.md").read_text())
    return (directory.model / "model.safetensors").read_bytes(), card, losses(directory), scores, state


DAMAGE = {
    "state torn": lambda path: (path / "state.json").write_text('{"sta'),
    "state empty": lambda path: (path / "state.json").write_bytes(b""),
    "state no object": lambda path: (path / "state.json").write_text("[1]"),
    "state gone": lambda path: (path / "state.json").unlink(),
    "model gone": lambda path: shutil.rmtree(path / "model"),
    "model and state gone": lambda path: (shutil.rmtree(path / "model"), (path / "state.json").unlink()),
    "scores gone": lambda path: (path / "scores.jsonl").unlink(),
    "provenance torn": lambda path: (
        shutil.rmtree(path / "model"),
        (path / "provenance.json").write_text("{"),
    ),
    "metrics torn": lambda path: (
        shutil.rmtree(path / "model"),
        (path / "metrics.jsonl").write_text((path / "metrics.jsonl").read_text() + '{"step": 99'),
    ),
    "everything but config gone": lambda path: [
        shutil.rmtree(x) if x.is_dir() else x.unlink() for x in path.iterdir() if x.name != "config.yaml"
    ],
}


TORN = ("state torn", "state empty", "state no object")


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_the_same_command_ends_where_nothing_was_lost(finished, tmp_path, damage):
    original, config = finished
    shutil.copytree(original.path.parent, tmp_path / "runs")
    damage(tmp_path / "runs" / original.id)
    notes = Notes()
    again = run(config(tmp_path / "runs"), notes)
    assert again.id == original.id
    assert again.is_done()
    assert everything(again) == everything(original)
    unreadable = (tmp_path / "runs" / original.id / "state.json").name
    torn = [note for note in notes.notes if unreadable in note]
    assert len(torn) == (
        damage in [DAMAGE[name] for name in ("state torn", "state empty", "state no object")]
    )


@pytest.mark.parametrize("rows", [0, 1])
def test_rows_that_are_lost_whole_are_named_by_verify_and_by_the_next_start(finished, tmp_path, rows):
    original, config = finished
    run_directory = RunDirectory(tmp_path / "runs" / original.id)
    shutil.copytree(original.path, run_directory.path)
    shutil.rmtree(run_directory.model)
    run_directory.write_state("stopped")
    log = run_directory.path / "metrics.jsonl"
    whole = log.read_text().splitlines(keepends=True)
    assert [one.path for one in verify(run_directory.path, lambda _: None) if one.wrong] == []

    log.write_text("".join(whole[:rows]))
    (wrong,) = [one for one in verify(run_directory.path, lambda _: None) if one.wrong]
    assert (wrong.path, "there was one of step" in str(wrong.wrong)) == (log, True)

    notes = Notes()
    run(config(tmp_path / "runs"), notes)
    assert any(f"{log}: cut; the rows after step" in note for note in notes.notes), notes.notes


def test_a_run_that_begins_says_what_an_edited_file_leaves_behind(finished, tmp_path):
    """Whoever stopped a run, changed a setting and went on got another run, without a word."""
    original, config = finished
    shutil.copytree(original.path, tmp_path / "runs" / original.id)
    left = RunDirectory(tmp_path / "runs" / original.id)
    before = config(tmp_path / "runs")

    def said(changes):
        settings = before.model_copy(update=changes)
        begins = RunDirectory(tmp_path / "runs" / run_id(settings))
        return [*earlier_runs(begins, settings.model_dump(mode="json"))]

    assert said({"seed": before.seed + 1}) == []  # a finished one is as it was meant
    (renamed,) = said({"name": "new"})
    assert f"{left.path} (done, " in renamed
    assert "with name=tiny what it has computed is not computed again" in renamed
    left.write_state("stopped", step=1)
    assert said({}) == []  # it goes on
    assert said({"micro_batch_tokens": 64}) == []
    (edited,) = said({"seed": before.seed + 1})
    assert f"{left.path} (stopped, 1 of " in edited
    assert f"other settings (seed = {before.seed}) and is left as it is" in edited
    assert said({"name": "new", "seed": before.seed + 1}) == []
    shutil.copytree(left.path, tmp_path / "runs" / "tiny-more-00000000")  # another name that begins like it
    assert said({"seed": before.seed + 1}) == [edited]
    with left.lock():  # somebody is at it
        assert said({"seed": before.seed + 1}) == []
    notes = Notes()
    run(before.model_copy(update={"seed": before.seed + 1}), notes)
    assert edited in notes.notes
    moved = RunDirectory(tmp_path / "runs" / "tiny-00000000")
    left.path.rename(moved.path)
    (changed,) = earlier_runs(left, before.model_dump(mode="json"))
    assert changed.startswith(f"{moved.path} has the same settings: the token store")


def test_done_is_what_the_files_say(finished, tmp_path):
    original, _ = finished
    copy = RunDirectory(tmp_path / original.id)
    shutil.copytree(original.path, copy.path)
    assert copy.is_trained()
    assert copy.is_done()
    shutil.rmtree(copy.model)
    assert not copy.is_trained()
    assert not copy.is_done()
    shutil.rmtree(copy.checkpoints)
    assert copy.is_done()  # as runs are that were copied without their weights
    assert copy.last_metrics()
    (copy.path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\x00\xff\n')
    assert copy.last_metrics() == {}
    assert copy.recent_ce() is None


def test_a_lost_model_is_not_said_to_be_untrained(finished, tmp_path, command):
    """It was "done, step 12 of 12", and had not finished training."""
    original, _ = finished
    shutil.copytree(original.path, tmp_path / "runs" / original.id)
    shutil.rmtree(tmp_path / "runs" / original.id / "model")
    again = "not there; the same `tutelage train` writes it again from the last checkpoint"
    assert again in command("show", original.id)[1]
    code, _, said = command("eval", "score", original.id)
    assert (code, f"its model is {again}" in said) == (2, True), said


def test_results_without_weights_say_how_to_have_the_weights(finished, tmp_path, command):
    original, config = finished
    copy = RunDirectory(tmp_path / "runs" / original.id)
    shutil.copytree(original.path, copy.path)
    shutil.rmtree(copy.model)
    shutil.rmtree(copy.checkpoints)
    settings = config(tmp_path / "runs")
    (tmp_path / "run.yaml").write_text(to_yaml(settings))
    remedy = f"delete {copy.path} and"
    code, shown, said = command("train", "run.yaml")
    assert (code, "is finished; nothing to do" in said) == (0, True)
    assert f"to have the weights here, {remedy} run the same command" in shown
    assert "teach a student" not in shown
    taught = ("teacher={kind: run, run: tiny}", "objective.alpha=0.4")
    for begun in (taught, ("model={shape: null, run: tiny}",)):
        code, _, said = command("train", "run.yaml", "name=other", *begun)
        assert (code, f"{remedy} train that run again" in said) == (2, True), said
    relative = f"delete runs/{copy.id} and train"
    assert relative in command("show", "tiny")[1]
    assert remedy in command("eval", "score", "tiny", "--store", f"own={settings.data.store}")[2]

    shutil.rmtree(copy.path)
    code, shown, _ = command("train", "run.yaml")
    assert (code, "teach a student" in shown) == (0, True)
    assert everything(copy)[0] == everything(original)[0]
