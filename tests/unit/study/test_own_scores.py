"""What a study's numbers are made of: its own version of each score, without text that was trained on."""

from __future__ import annotations

import itertools
import json
import shutil

import polars as pl
import pytest
from tiny_study import TINY, run_tiny, tiny_study
from tokenizers import Tokenizer

from tutelage.analysis.claims.judge import judge_study
from tutelage.analysis.report.html import build_report
from tutelage.config.data_config import StoreConfig
from tutelage.config.load import validate
from tutelage.data.build import build_store
from tutelage.data.corpora import find_corpus
from tutelage.data.store import open_store
from tutelage.errors import UserError
from tutelage.records import read_sealed, write_sealed
from tutelage.study.results import load_results


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pristine") / "study"
    run_tiny(tiny_study(), directory)
    return directory


@pytest.fixture
def study(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "study")


def numbers(directory):
    results = load_results(directory)
    assert results.problems == ()
    return results.scores, results.documents


def runs_of(directory):
    return {run.kind: directory / "runs" / run.run for run in load_results(directory).plan.runs}


def eval_arguments(study, *runs):
    """Scores of the study's own domain under its own name, in other settings than the study's."""
    (store,) = (study / "data").glob("scripture-*")
    limits = ["--max-documents", 4, "--max-tokens", 40, "--device", "cpu", "--output", study / "evals"]
    return ["eval", "score", *runs, "--store", f"scripture={store}", *limits]


@pytest.mark.slow
@pytest.mark.parametrize("which", ["baseline", "all"])
def test_other_scores_beside_the_studys_own_change_nothing(study, command, which):
    """Of one run, and of all: then the other settings would be what most runs have."""
    before = numbers(study)
    runs = runs_of(study)
    command(*eval_arguments(study, *([runs["baseline"]] if which == "baseline" else runs.values())))
    rows = pl.read_ndjson(runs["baseline"] / "scores.jsonl").filter(
        domain="scripture", metric="bits_per_byte", split="test"
    )
    assert sorted(rows["n"]) == [2, 4]  # both are kept
    documents = pl.read_parquet(runs["baseline"] / "documents.parquet").filter(
        domain="scripture", split="test"
    )
    assert sorted(documents.group_by("version").len()["len"]) == [2, 4]
    assert all(ours.equals(theirs) for ours, theirs in zip(numbers(study), before, strict=True))
    report = build_report(judge_study(load_results(study)), study).read_text()
    run_tiny(tiny_study(), study)
    assert all(ours.equals(theirs) for ours, theirs in zip(numbers(study), before, strict=True))
    assert build_report(judge_study(load_results(study)), study).read_text() == report


def test_training_again_with_other_settings_changes_nothing(study, command):
    """`tutelage train` on a run of the study scores it once more; the study keeps to its own."""
    before = numbers(study)
    run = runs_of(study)["baseline"]
    command("train", run / "config.yaml", "eval.max_documents=4", f"output={study / 'runs'}")
    assert len(json.loads((run / "state.json").read_text())["evaluations"]) == 2
    assert all(ours.equals(theirs) for ours, theirs in zip(numbers(study), before, strict=True))


def test_other_settings_of_a_study_score_its_runs_again(study):
    before = numbers(study)
    run_tiny(tiny_study(run=TINY["run"] | {"eval": {"max_documents": 3, "max_tokens": 64}}), study)
    scores, documents = numbers(study)
    assert set(scores.filter(metric="bits_per_byte")["n"]) == {3}
    assert set(before[0].filter(metric="bits_per_byte")["n"]) == {2}
    assert documents.height > before[1].height
    run_tiny(tiny_study(), study)
    assert all(ours.equals(theirs) for ours, theirs in zip(numbers(study), before, strict=True))


def test_runs_that_were_scored_otherwise_are_named_in_one_line_with_the_remedy(study):
    """As of another machine with other settings: two of three."""
    for kind in ("teacher", "student"):
        path = runs_of(study)[kind] / "state.json"
        write_sealed(path, read_sealed(path) | {"evaluations": {}})
    results = load_results(study)
    assert len(results.problems) == 1
    assert "and 1 more runs: scored by other rules or settings" in results.problems[0]
    assert f"`tutelage study run FILE --output {study}`" in results.problems[0]
    assert results.scores["run"].n_unique() == 1


def test_a_plan_of_an_older_version_is_one_line_with_the_remedy(study, command):
    plan = read_sealed(study / "plan.json")
    for run in plan["runs"]:
        del run["evaluation"]
    write_sealed(study / "plan.json", plan)
    with pytest.raises(UserError, match=r"plan\.json: by an older version.*tutelage study run FILE --output"):
        load_results(study)
    code, _, complaint = command("report", study)
    assert code == 2
    assert complaint.startswith("error: ")
    assert complaint.count("\n") == 1


@pytest.fixture(scope="module")
def seen_text(tmp_path_factory):
    """The file that is trained on, a copy with small changes, and a mixture of it and other text."""
    folder = tmp_path_factory.mktemp("texts")
    speeches = [text for text, _ in zip(find_corpus("sotu").documents(), range(60), strict=False)]
    scripture = [text for text, _ in zip(find_corpus("kjv").documents(), range(60), strict=False)]
    texts = {
        "trained": speeches,
        "near": [text[:2000].replace("the", "the ", 1) + " Amen." for text in speeches],
        "mixed": speeches[:30] + scripture,
        "other": scripture,
    }
    for name, documents in texts.items():
        lines = [json.dumps({"text": text[:4000]}) + "\n" for text in documents]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def source_of(folder, name):
    return {"kind": "files", "paths": [str(folder / f"{name}.jsonl")]}


def corpus_of(folder, name):
    return TINY["corpus"] | {"name": name, "sources": [source_of(folder, name)]}


@pytest.fixture(scope="module")
def contaminated(seen_text, tmp_path_factory):
    """A study on the file, with domains made of it in every way, and a teacher of the other text."""
    names = ("trained", "near", "mixed", "other")
    weak = {"shape": "nano-20k", "tokens": "4K"}
    directory = tmp_path_factory.mktemp("contaminated") / "study"
    study = tiny_study(
        corpus=corpus_of(seen_text, "trained"),
        domains={name: {"source": source_of(seen_text, name)} for name in names},
        teachers={"weak": weak, "foreign": weak | {"corpus": corpus_of(seen_text, "other")}},
        students={
            "main": TINY["students"]["main"]
            | {"grid": {"product": {"teacher": ["weak", "foreign"], "alpha": [0.4]}}}
        },
        run=TINY["run"] | {"eval": {"max_documents": 50, "max_tokens": 64}},
    )
    run_tiny(study, directory)
    return directory


def token_documents(store, split):
    view = store.split(split)
    return [view.tokens[a:b] for a, b in itertools.pairwise(view.offsets[:, 0].astype(int))]


def documents_of(store, split):
    return [tokens.tobytes() for tokens in token_documents(store, split)]


def test_documents_that_were_trained_on_are_left_out_and_counted(contaminated):
    """Against a plain search of every test document among the training documents."""
    results = load_results(contaminated)
    corpus = next(
        open_store(path)
        for path in (contaminated / "data").iterdir()
        if path.name.startswith("trained-") and open_store(path).manifest.splits["train"].documents
    )
    trained = {*documents_of(corpus, "train")}
    baseline = next(run.run for run in results.plan.runs if run.kind == "baseline")
    rows = pl.read_ndjson(contaminated / "runs" / baseline / "scores.jsonl").filter(split="test")
    for name in ("trained", "near", "mixed", "other"):
        store = next(
            open_store(path)
            for path in (contaminated / "data").iterdir()
            if path.name.startswith(f"{name}-") and not open_store(path).manifest.splits["train"].documents
        )
        texts = documents_of(store, "test")
        seen = [i for i, text in enumerate(texts) if text in trained]
        own = rows.filter(domain=name)
        found = dict(own.select("metric", "value").iter_rows())
        assert found["overlap_documents"] == pytest.approx(len(seen) / len(texts))
        scored = results.documents.filter(run=baseline, domain=name, split="test")["document"].to_list()
        assert sorted(scored) == [i for i in range(len(texts)) if i not in seen]
        assert (len(seen) > 0) == (name in {"trained", "mixed"})
        assert (found["overlap_near_documents"] > 0.5) == (name == "near")
        assert set(own["role"]) == {"in_domain" if name in {"trained", "mixed"} else "out_of_domain"}


def test_the_report_says_what_was_seen_and_by_whom(contaminated):
    results = load_results(contaminated)
    roles = {domain.name: domain.role for domain in results.plan.domains}
    assert roles["trained"] == roles["mixed"] == "in_domain"
    assert roles["near"] == roles["other"] == "out_of_domain"
    warnings = "\n".join(results.warnings)
    for text in (
        "trained: planned as out of domain, but it is of the training text's kind",
        "of its scored test documents are copies of training text with changes",
        "of its test documents were trained on by a teacher alone",
    ):
        assert text in warnings
    shares = results.scores.filter(domain="trained", metric="overlap_documents").group_by("split")
    for split, most in shares.agg(pl.col("value").max()).iter_rows():
        said = f"trained: {most:.1%} of its {split} documents were trained on; they are left out"
        assert results.warnings.count(said) == 1
    assert "other: " in warnings
    (foreign,) = (run.run for run in results.plan.runs if run.kind == "teacher" and run.teacher == "foreign")
    assert sorted(problem for problem in results.problems if problem.startswith(foreign)) == [
        f"{foreign}: scored on other documents or settings of {name} than the students; left out there"
        for name in ("mixed", "other", "trained")
    ]
    page = build_report(judge_study(load_results(contaminated)), contaminated).read_text()
    assert "were trained on; they are left out" in page


def test_a_domain_of_which_everything_was_trained_on_is_counted_and_has_no_scores(seen_text, tmp_path):
    """Its validation split in another study; both splits here, and then there is nothing to report."""
    corpus = corpus_of(seen_text, "trained") | {"validation": 0.1, "test": 0.1}
    store = open_store(build_store(validate(StoreConfig, corpus, "corpus"), tmp_path))
    tokenizer = Tokenizer.from_file(str(store.path / "tokenizer.json"))
    rest = [tokenizer.decode([*ids][:-1]) for ids in token_documents(store, "train")]
    lines = [json.dumps({"text": text}) + "\n" for text in rest]
    (seen_text / "rest.jsonl").write_text("".join(lines))
    study = tiny_study(corpus=corpus, domains={"rest": {"source": source_of(seen_text, "rest")}})
    run_tiny(study, tmp_path / "study")
    plan = json.loads((tmp_path / "study" / "plan.json").read_text())
    rows = pl.read_ndjson(tmp_path / "study" / "runs" / plan["runs"][1]["run"] / "scores.jsonl")
    found = rows.filter(domain="rest")
    assert found.select("split", "metric", "value").rows() == [
        ("validation", "overlap_documents", 1.0),
        ("test", "overlap_documents", 1.0),
    ]
    assert set(found["role"]) == {"in_domain"}
    with pytest.raises(UserError, match="every test document of rest was trained on"):
        load_results(tmp_path / "study")


def copy_without_weights(source, target):
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("model", "checkpoints", "lock"))


def test_runs_of_another_machine_are_not_trained_again(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    run_tiny(tiny_study(seeds=[43]), here)
    run_tiny(tiny_study(seeds=[44]), there)
    alone = load_results(there)
    for run in (there / "runs").iterdir():
        if not (here / "runs" / run.name).exists():
            copy_without_weights(run, here / "runs" / run.name)

    run_tiny(tiny_study(seeds=[43, 44]), here)

    merged = load_results(here)
    assert merged.problems == ()
    assert merged.runs["status"].to_list() == ["done"] * 5  # a teacher, and two students of each seed
    copied = [run for run in alone.runs["run"] if "-s44-" in run]
    assert len(copied) == 2
    for run in copied:
        assert not (here / "runs" / run / "model").exists()
        assert merged.scores.filter(run=run).equals(alone.scores.filter(run=run))
