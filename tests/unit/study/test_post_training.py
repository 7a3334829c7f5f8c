"""Runs that go on from other runs, alone and as stages of a study."""

from __future__ import annotations

import json
import shutil

import pytest
from tiny_study import run_tiny, tiny_study

from tutelage.config.data_config import StoreConfig, TokenizerConfig
from tutelage.config.load import load
from tutelage.config.run_config import RunConfig
from tutelage.data.build import build_store
from tutelage.data.store import open_store
from tutelage.errors import UserError
from tutelage.evals.score_files import read_scores
from tutelage.run import run
from tutelage.run_directory import RunDirectory, run_id
from tutelage.study.expand import expand
from tutelage.study.nodes import check_cells
from tutelage.study.plan import load_plan
from tutelage.study.texts import other_texts

PAIRS = {"kind": "corpus_pairs", "name": "rare_diseases"}


@pytest.fixture(scope="module")
def pairs(store, tmp_path_factory):
    config = StoreConfig(
        name="pairs", sources=(PAIRS,), tokenizer=TokenizerConfig(path=store), max_bytes=60_000
    )
    return build_store(config, tmp_path_factory.mktemp("pairs"))


@pytest.fixture
def make_after(make_config, pairs):
    """A function from where to begin to a run of stage sft."""

    def make(model, **changes):
        data = {"store": str(pairs), "sequence_length": 32}
        return make_config(**({"name": "after", "stage": "sft", "model": model, "data": data} | changes))

    return make


def weights(directory):
    return (directory.model / "model.safetensors").read_bytes()


def test_a_run_goes_on_from_another_by_id_as_from_its_directory(make_config, make_after):
    base = make_config(name="base")
    by_id = make_after({"run": run_id(base)})
    known = run_id(by_id)  # nothing is trained yet
    first = run(base)
    second = run(by_id)
    assert second.id == known == run_id(by_id)
    by_path = run(make_after({"path": str(first.model)}, name="by-path"))
    assert weights(second) == weights(by_path) != weights(first)


def test_its_id_follows_the_run_it_begins_with(make_config, make_after):
    ids = {run_id(make_after({"run": run_id(make_config(seed=seed))})) for seed in (1, 2)}
    assert len(ids) == 2


def test_the_run_must_be_there_and_at_its_end(make_config, make_after):
    base = make_config(name="base")
    config = make_after({"run": run_id(base)})
    with pytest.raises(UserError, match=f"model.run {run_id(base)}: .* train that run to its end first"):
        run(config)
    unfinished = RunDirectory(base.output / run_id(base))
    unfinished.checkpoints.mkdir(parents=True)
    unfinished.write_state("stopped")
    with pytest.raises(UserError, match="train that run to its end first"):
        run(config)
    run(base)
    assert run(config).is_done()


def test_exactly_one_beginning(make_config):
    with pytest.raises(UserError, match="exactly one of 'shape', 'path' and 'run'"):
        make_config(model={"shape": "nano-50k", "run": "x"})


@pytest.mark.slow
def test_a_study_fine_tunes_and_scores_students_and_baselines_alike(tmp_path):
    stage = {
        "corpus": {"name": "diseases", "sources": [PAIRS], "max_bytes": 100_000},
        "tokens": "3K",
        "run": {"optim": {"lr": 0.002}},
    }
    main = tiny_study().students["main"].model_dump(mode="json")
    study = tiny_study(students={"main": main | {"then": ["sft"]}}, post_training={"sft": stage})
    run_tiny(study, tmp_path, workers=2)
    plan = {one.run: one for one in load_plan(tmp_path).runs}
    assert sorted(one.kind for one in plan.values()) == ["after", "after", "baseline", "student", "teacher"]
    for one in plan.values():
        directory = RunDirectory(tmp_path / "runs" / one.run)
        assert directory.is_done()
        assert {score.domain for score in read_scores(directory.scores)} == {"in-domain", "scripture"}
        if one.kind == "after":
            config = load(RunConfig, directory.path / "config.yaml")
            assert (config.stage, config.model.run, config.optim.warmup) == ("sft", one.after, 0.01)
            assert plan[one.after].kind in {"baseline", "student"}
            log = (directory.path / "metrics.jsonl").read_text().splitlines()
            assert json.loads(log[-1])["ce"] < json.loads(log[0])["ce"]
    (taught,) = (one for one in plan.values() if one.kind == "after" and one.teacher is not None)
    assert plan[taught.baseline].kind == "after"
    assert plan[plan[taught.baseline].after].run == plan[taught.after].baseline


CHATS = {"sources": [PAIRS | {"template": "chat"}]}
TEXT = {"name": "text", "sources": [{"kind": "corpus", "name": "kjv"}]}
STAGE = {"name": "stage", **CHATS, "tokenizer": {"path": "chatty"}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"corpus": TEXT | {"sources": [PAIRS]}}, "corpus: holds prompts, which carry no loss"),
        (
            {
                "teachers": {
                    "weak": {"shape": "nano-20k", "tokens": "4K", "corpus": TEXT | {"sources": [PAIRS]}}
                }
            },
            "teachers.weak.corpus: holds prompts",
        ),
        ({"post_training": {"a": {"corpus": TEXT, "tokens": "3K"}}}, "a.corpus: every token counts"),
        (
            {"post_training": {"a": {"corpus": STAGE, "tokens": "3K"}}},
            "a.corpus.tokenizer.path: chatty, but .* set corpus.tokenizer.path to it",
        ),
        (
            {"domains": {"a": {"source": PAIRS | {"template": "chat"}}}},
            "domains.a: template: chat needs corpus.tokenizer.path",
        ),
    ],
)
def test_texts_that_no_run_could_read_are_refused_before_any_is_trained(changes, said):
    with pytest.raises(UserError, match=said):
        tiny_study(**changes)


def test_stages_that_differ_in_their_text_alone_are_two():
    main = tiny_study().students["main"].model_dump(mode="json") | {"then": ["a", "b"]}
    stages = {
        name: {"corpus": {"name": "pairs", "sources": [PAIRS], "max_bytes": limit}, "tokens": "3K"}
        for name, limit in (("a", 20_000), ("b", 40_000))
    }
    expanded = expand(tiny_study(students={"main": main}, post_training=stages))
    assert sum(name.endswith(("-a", "-b")) for name in check_cells(expanded)) == 4
    stages["b"]["corpus"] |= {"name": "other", "max_bytes": 20_000}
    with pytest.raises(UserError, match=r"-s43-a and .*-s43-b are the same run in different words"):
        check_cells(expand(tiny_study(students={"main": main}, post_training=stages)))


def test_conversations_of_a_study_are_in_its_tokens_with_the_template_of_its_tokenizer(store, tmp_path):
    chatty = tmp_path / "chatty"
    shutil.copytree(store, chatty)
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    (chatty / "chat_template.jinja").write_text(template)
    study = tiny_study(
        corpus=TEXT
        | {"tokenizer": {"path": str(chatty)}, "max_bytes": 60_000, "test": 0.2, "validation": 0.2},
        domains={"asked": {"source": PAIRS | {"template": "chat"}, "max_bytes": 20_000}},
        post_training={
            "a": {"corpus": STAGE | {"tokenizer": {"path": str(chatty)}, "max_bytes": 20_000}, "tokens": "3K"}
        },
    )
    corpus = build_store(study.corpus, tmp_path)
    texts = other_texts(expand(study), corpus)
    built = [open_store(build_store(texts[key], tmp_path)) for key in (("domain", "asked"), ("stage", "a"))]
    for text in built:
        assert text.manifest.masked
        assert text.manifest.tokenizer_sha256 == open_store(corpus).manifest.tokenizer_sha256
        settings = json.loads((text.path / "tokenizer_config.json").read_text())
        assert settings["chat_template"] == template
