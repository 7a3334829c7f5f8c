"""Teachers of a study: targets computed once for all students, and budgets that are branches of one run."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from tiny_study import run_tiny, tiny_study
from whole_caches import verify_cache

from tutelage.analysis.claims.judge import judge_study
from tutelage.cli.study_commands import run_and_report
from tutelage.config.load import load
from tutelage.config.run_config import RunConfig
from tutelage.errors import UserError
from tutelage.models.shapes import find_shape
from tutelage.run_directory import RunDirectory
from tutelage.study.engines.local import LocalEngine
from tutelage.study.expand import expand
from tutelage.study.given_models import check_given_models
from tutelage.study.nodes import Stores, begun_anew, bind
from tutelage.study.plan import draft_of, load_plan, save_plan
from tutelage.study.results import load_results
from tutelage.study.run_study import RunnerOptions

TEACHER = {
    "shape": "nano-20k",
    "tokens": "4K",
    "cache": {"format": {"kind": "sample_min_variance", "ids": 8}},
}
GROUP = {"shape": "nano-50k", "tokens": "4K"}


@pytest.mark.slow
def test_students_of_a_study_share_their_teachers_cache(tmp_path):
    splits = {"max_bytes": 200_000, "validation": 0.3, "test": 0.3}
    corpus = tiny_study().corpus.model_dump(mode="json") | splits
    group = GROUP | {"grid": {"product": {"teacher": ["weak"], "alpha": [0.2, 0.6]}}}
    study = tiny_study(corpus=corpus, teachers={"weak": TEACHER}, students={"main": group})
    run_tiny(study, tmp_path, workers=2)
    (cache,) = (tmp_path / "caches").iterdir()
    verify_cache(cache)
    taught = [one for one in load_plan(tmp_path).runs if one.kind == "student"]
    assert len(taught) == 2
    for one in taught:
        directory = RunDirectory(tmp_path / "runs" / one.run)
        assert directory.is_done()
        assert load(RunConfig, directory.path / "config.yaml").teacher.cache.format.ids == 8
        assert directory.state()["teacher_flops"] == 0.0  # paid once, by the cache


def test_a_cell_that_its_teachers_cache_cannot_serve_is_named(store, other_store, tmp_path):
    group = GROUP | {"grid": {"product": {"teacher": ["weak"], "alpha": [0.2], "temperature": [2.0]}}}
    study = tiny_study(teachers={"weak": TEACHER}, students={"main": group})
    stores = Stores(store, {"scripture": other_store}, {}, {})
    with pytest.raises(UserError, match=r"student-nano-50k.*temperature = 2: teacher\.cache holds"):
        bind(expand(study), stores, tmp_path, 300)


def swapped(tokenizer):
    vocab = tokenizer["model"]["vocab"]
    first, second = (word for word, index in vocab.items() if index in {260, 261})
    vocab[first], vocab[second] = vocab[second], vocab[first]


def remerged(tokenizer):
    tokenizer["model"]["merges"][:2] = reversed(tokenizer["model"]["merges"][:2])


def given(place, store, rows=300, family="llama", edit=None, tokenizer=True):
    """A model without weights, which nobody reads before its first student is trained, and its tokenizer."""
    config = find_shape("nano-20k").config(rows, 64).to_dict() | {"model_type": family}
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text(json.dumps(config))
    save_file({f"{i}": torch.zeros(1) for i in range(8)}, place / "model.safetensors")
    settings = json.loads((store / "tokenizer.json").read_text())
    if edit is not None:
        edit(settings)
    if tokenizer:
        (place / "tokenizer.json").write_text(json.dumps(settings))
    return {"model": str(place)}


WRONG = {
    "id 260 is": {"edit": swapped},
    r"has no tokenizer, .* put its tokenizer\.json beside it$": {"tokenizer": False},
    "its tokenizer has 300 ids, the model knows 280": {"rows": 280},
    "transformers knows its model_type, but not as a model of text": {"family": "vit"},
}


@pytest.mark.parametrize(("message", "how"), WRONG.items())
@pytest.mark.parametrize("of", [{}, {"both": {"mean": ["given", "unigram"]}}], ids=["alone", "mean"])
def test_a_given_teacher_that_cannot_teach_is_refused(of, message, how, store, other_store, tmp_path):
    teachers = {"given": given(tmp_path / "given", store, **how), "unigram": {"control": "unigram"}} | of
    group = GROUP | {"grid": {"product": {"teacher": [*(of or ["given"])], "alpha": [0.4]}}}
    one = expand(tiny_study(teachers=teachers, students={"main": group}))
    nodes = bind(one, Stores(store, {"scripture": other_store}, {}, {}), tmp_path, 300)
    with pytest.raises(UserError, match=message):
        check_given_models(node.config for node in nodes)


def test_given_teachers_are_looked_at_before_anything_is_trained(store, other_store, tmp_path):
    """One that reads other tokens was met when all runs before its own were done, and notes were lost."""
    teachers = {
        "other-merges": given(tmp_path / "merges", store, edit=remerged),
        "same": given(tmp_path / "same", store),
    }
    group = GROUP | {"grid": {"product": {"teacher": list(teachers), "alpha": [0.4, 0.6]}}}
    study = tiny_study(teachers=teachers, students={"main": group})
    nodes = bind(expand(study), Stores(store, {"scripture": other_store}, {}, {}), tmp_path, 300)
    (note,) = check_given_models(node.config for node in nodes)
    assert "merges: its tokenizer has the ids of" in note
    assert given(tmp_path / "same", store, edit=swapped) == teachers["same"]
    corpus = study.corpus.model_dump(mode="json") | {"tokenizer": {"path": str(store)}}
    with pytest.raises(UserError, match="id 260 is"):
        run_tiny(tiny_study(corpus=corpus, teachers=teachers, students={"main": group}), tmp_path / "a")
    assert not (tmp_path / "a" / "runs").exists()


GRID = {"product": {"shape": ["nano-20k", "nano-50k"], "tokens": ["6K", "2K", "4K"]}}
OPTIM = {"schedule": "wsd", "warmup": "512"}


def study(**teacher):
    spec = {"branch_from_shorter": True, "run": {"optim": OPTIM}, "grid": GRID} | teacher
    return tiny_study(teachers={"{shape}@{tokens}": spec}, students={})


def test_budgets_are_chained_from_the_smallest_to_the_largest():
    cells = {cell.name: cell for cell in expand(study()).cells}
    assert {name: cell.branch_from for name, cell in cells.items()} == {
        f"teacher-{shape}-{tokens}": shorter and f"teacher-{shape}-{shorter}"
        for shape in ("nano-20k", "nano-50k")
        for tokens, shorter in (("2K", None), ("4K", "2K"), ("6K", "4K"))
    }
    for cell in cells.values():
        assert cell.needs == (() if cell.branch_from is None else (cell.branch_from,))
        assert cell.settings["checkpoint"]["keep_before_decay"] == (cell.tokens != 6000)
    assert all(cell.branch_from is None for cell in expand(study(branch_from_shorter=False)).cells)


def test_budgets_per_parameter_are_chained_by_length_and_not_with_others():
    grid = {"product": {"shape": ["nano-20k"], "tokens": ["1.4x", "0.6x", "0.9x"]}}
    cells = {cell.tokens: cell for cell in expand(study(grid=grid)).cells}
    assert [cells[one].branch_from for one in ("0.6x", "0.9x", "1.4x")] == [
        None,
        cells["0.6x"].name,
        cells["0.9x"].name,
    ]
    mixed = {"product": {"shape": ["nano-20k"], "tokens": ["1x", "4K"]}}
    with pytest.raises(UserError, match=r"teacher-nano-20k-4K and teacher-nano-20k-1x: .* not 4K and 1x"):
        expand(study(grid=mixed))


def test_other_recipes_are_other_branch_points(store, other_store, tmp_path):
    grid = {"product": {"shape": ["nano-20k"], "tokens": ["2K", "4K"], "lr": [0.001, 0.002]}}
    spec = {"branch_from_shorter": True, "run": {"optim": OPTIM}, "grid": grid}
    lr = tiny_study(teachers={"{shape}@{tokens}@{lr}": spec}, students={})
    nodes = bind(expand(lr), Stores(store, {"scripture": other_store}, {}, {}), tmp_path, 300)
    by_id = {node.id: node.config for node in nodes}
    branches = [config for config in by_id.values() if config.runtime.branch_from is not None]
    assert len(branches) == 2
    for config in branches:
        assert by_id[config.runtime.branch_from].optim.lr == config.optim.lr


def test_branching_does_not_change_ids_and_wrong_schedules_are_named(store, other_store, tmp_path):
    stores = Stores(store, {"scripture": other_store}, {}, {})
    ids = [
        {node.id for node in bind(expand(study(branch_from_shorter=branches)), stores, tmp_path, 300)}
        for branches in (True, False)
    ]
    assert ids[0] == ids[1]
    with pytest.raises(UserError, match=r"teacher-nano-20k-2K: .*need optim\.schedule = wsd"):
        bind(expand(study(run={})), stores, tmp_path, 300)


def test_a_branch_begins_anew_where_the_finished_shorter_run_has_kept_no_branch_point(
    store, other_store, tmp_path
):
    one = expand(study(grid={"product": {"shape": ["nano-20k"], "tokens": ["2K", "4K"]}}))
    stores = Stores(store, {"scripture": other_store}, {}, {})

    def bound():
        return bind(one, stores, tmp_path, 300)

    short, long = bound()
    assert long.config.runtime.branch_from == short.id
    short.directory.path.mkdir()
    short.directory.write_state("done")  # a copy of results, or trained before there was a longer one
    _, anew = bound()
    assert anew.config == long.config.model_copy(update={"runtime": short.config.runtime})
    assert (anew.id, anew.needs) == (long.id, long.needs)
    assert [line.partition(":")[0] for line in begun_anew([short, anew])] == [
        "teacher-nano-20k-4K is trained from its beginning"
    ]
    kept = short.directory.checkpoints / "branch-point-step-000000005"
    kept.mkdir(parents=True)
    assert bound()[1].config == long.config
    kept.rmdir()
    (long.directory.checkpoints / "step-000000006").mkdir(parents=True)  # it has begun, as a branch
    assert bound()[1].config == long.config


def test_a_study_of_teachers_alone_is_run_and_not_judged(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tutelage.study.run_study.run_study", lambda *_: None)
    run_and_report(study(), tmp_path, LocalEngine(1, []), RunnerOptions())
    assert "nothing to judge" in capsys.readouterr().out
    plan = draft_of(expand(study()))
    runs = tuple(run.model_copy(update={"evaluation": "0"}) for run in plan.runs)
    save_plan(tmp_path, plan.model_copy(update={"runs": runs}))
    with pytest.raises(UserError, match="there is nothing to report yet"):
        judge_study(load_results(tmp_path))


@pytest.mark.slow
def test_a_study_trains_the_branches_and_not_their_beginning_twice(tmp_path):
    one = {"product": {"shape": ["nano-20k"], "tokens": ["2K", "6K"]}}
    run_tiny(study(grid=one), tmp_path)
    short, long = sorted((tmp_path / "runs").iterdir(), key=lambda path: "6K" in path.name)
    assert RunDirectory(short).is_done()
    assert RunDirectory(long).is_done()
    logs = [(run / "metrics.jsonl").read_text().splitlines() for run in (short, long)]
    rows = [[json.loads(line) for line in log] for log in logs]
    assert [len(log) for log in rows] == [2000 // 256, 6000 // 256]
    # seconds too, so these were not computed again; of the first 7 steps, 1 is decay
    assert rows[0][:6] == rows[1][:6]
    assert rows[0][6]["lr"] < rows[1][6]["lr"]
