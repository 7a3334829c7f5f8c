"""Downstream tasks: how built ones are made, and that lm-eval's own command line gives the same numbers."""

from __future__ import annotations

import collections
import dataclasses
import errno
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys

import pytest
import yaml
from manifests import change_manifest
from own_task_files import own_task
from tokenizers import Tokenizer
from told_progress import Told

from tutelage.data.store import open_store
from tutelage.errors import UserError
from tutelage.evals.evaluated_model import EvaluatedModel
from tutelage.evals.lm_eval import check_tasks, run_downstream
from tutelage.evals.lm_eval_prepared import OwnTasks, TaskLoader, check_known, task_manager
from tutelage.evals.lm_eval_prompts import Asked
from tutelage.evals.lm_eval_tasks import (
    KINDS,
    PACKAGE_TASKS,
    PAPER_TASKS,
    build_package_task,
    build_task,
    continuation_items,
    held_out_texts,
    last_word_items,
)
from tutelage.evals.score_files import read_scores
from tutelage.models import hub
from tutelage.models.shapes import LADDER

CONTEXT = 96
BOTH = ("continuation", "last_word")

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"
)


@pytest.fixture(scope="module")
def texts(store):
    return held_out_texts(open_store(store))


@pytest.fixture(scope="module")
def tokenizer(store):
    return Tokenizer.from_file(str(store / "tokenizer.json"))


@pytest.fixture(scope="module")
def model_directory(store, tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "tiny"
    model = hub.build(LADDER["nano-50k"], open_store(store).vocab_size, CONTEXT, seed=0)
    hub.save(model, directory, store)
    return directory


@pytest.fixture
def evaluated(model_directory, store, tmp_path):
    return EvaluatedModel("tiny-1", model_directory, CONTEXT, tmp_path / "out", 7, 900, store)


def tokens(tokenizer, text):
    return len(tokenizer.encode(text, add_special_tokens=False).ids)


def test_held_out_texts_are_the_test_split(store, texts):
    record = open_store(store).manifest.splits["test"]
    assert len(texts) == record.documents
    assert sum(len(text.encode()) for text in texts) == record.bytes


def test_exactly_one_choice_goes_on_from_the_prompt(texts, tokenizer):
    items = continuation_items(texts, tokenizer, CONTEXT)
    assert len(items) > 100
    for item in items:
        own = texts[item["document"]]
        right = item["choices"][item["gold"]]
        assert f"{item['prompt']} {right}" in own
        assert len(set(item["choices"])) == 4
        for wrong in set(item["choices"]) - {right}:
            assert wrong not in own
            assert any(f" {wrong}" in other for other in texts)
        assert all(40 <= len(choice) <= 64 for choice in item["choices"])


def test_the_right_choice_is_everywhere_equally_often(texts, tokenizer):
    items = continuation_items(texts, tokenizer, CONTEXT)
    counts = collections.Counter(item["gold"] for item in items)
    assert max(counts.values()) - min(counts[place] for place in range(4)) <= 1


def test_last_words_end_their_clause(texts, tokenizer):
    items = last_word_items(texts, tokenizer, CONTEXT)
    assert len(items) > 100
    for item in items:
        assert item["target"][0] == " "
        assert item["target"][1:].isalpha()
        after = texts[item["document"]].partition(item["prompt"] + item["target"])[2]
        assert after[:1] in {"", *".,;:!?)\n"}


@pytest.mark.parametrize("context", [64, 128, 4096])
def test_everything_fits_the_trained_context_and_uses_it(texts, tokenizer, context):
    for item in continuation_items(texts, tokenizer, context):
        longest = max(tokens(tokenizer, f" {choice}") for choice in item["choices"])
        prompt = tokens(tokenizer, item["prompt"])
        assert prompt + longest <= context
        if context == 128:  # a word more would not fit, or there is no word more
            more = texts[item["document"]].partition(item["prompt"])[0][-40:]
            assert not more or prompt + longest > context - 30
    for item in last_word_items(texts, tokenizer, context):
        assert tokens(tokenizer, item["prompt"] + item["target"]) <= context


def test_a_task_is_a_function_of_its_text(texts, tokenizer, tmp_path):
    first, second = (
        build_task("continuation", "a b/c", texts, tokenizer, CONTEXT, tmp_path / place) for place in "xy"
    )
    assert first.name == "continuation_a_b_c"
    assert first.directory.name == second.directory.name
    data = [task.directory / "items.jsonl" for task in (first, second)]
    assert data[0].read_bytes() == data[1].read_bytes()
    moved = first.directory.parent.rename(tmp_path / "z")
    again = build_task("continuation", "a b/c", texts, tokenizer, CONTEXT, moved)
    config = yaml.safe_load((again.directory / "continuation_a_b_c.yaml").read_text(encoding="utf-8"))
    assert config["dataset_kwargs"]["data_files"]["test"] == str(moved / first.directory.name / "items.jsonl")
    other = build_task("continuation", "a b/c", texts[1:], tokenizer, CONTEXT, tmp_path / "x")
    assert other.directory.name != first.directory.name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("documents", "context"), [(5, 2), (0, 256)])
def test_too_little_text_or_context_is_said(kind, documents, context, texts, tokenizer, tmp_path):
    with pytest.raises(UserError, match=f"{kind}_x: {documents} documents, .* {context} tokens: not one"):
        build_task(kind, "x", texts[:documents], tokenizer, context, tmp_path)


def test_one_document_has_no_wrong_continuations(texts, tokenizer):
    assert continuation_items(texts[:1], tokenizer, CONTEXT) == []


def test_analogies_are_the_files_and_each_has_one_right_answer(tmp_path):
    task = PACKAGE_TASKS["word_analogy"]
    lines = list(task.source.documents())
    known = {tuple(line.split()) for line in lines if not line.startswith(":")}
    pairs = {(question[:3], question[3]) for question in known}
    built = build_package_task("word_analogy", tmp_path)
    items = [json.loads(line) for line in (built.directory / "items.jsonl").read_text("utf-8").splitlines()]
    assert len(items) == 1400
    assert max(collections.Counter(item["category"] for item in items).values()) == 100
    for item in items:
        a, _, _, b, _, c, _, _ = item["prompt"].split()
        d = item["choices"][item["gold"]]
        assert (a, b, c, d) in known
        assert sum(((a, b, c), choice) in pairs for choice in item["choices"]) == 1
        assert len({a, b, c, *item["choices"]}) == 7
    assert len({item["category"] for item in items[:40]}) > 8  # so that --limit takes of everything


def test_a_missing_package_comes_with_its_command(evaluated, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"'lm_eval' is missing; run: .* install .*\[eval\]'"):
        run_downstream(evaluated, BOTH)


@needs_lm_eval
def test_a_model_without_a_store_needs_one_named(evaluated):
    alone = dataclasses.replace(evaluated, training_store=None)
    with pytest.raises(UserError, match="tiny-1 has no training store; write continuation:DOMAIN or"):
        run_downstream(alone, ["continuation"])


@needs_lm_eval
def test_a_task_can_be_built_from_a_domain(evaluated, tmp_path):
    (score,) = run_downstream(evaluated, ["last_word:kjv"], limit=5, stores=tmp_path / "stores")
    assert (score.domain, score.n) == ("last_word_kjv", 5)
    with pytest.raises(UserError, match="domain 'kvj' is unknown; did you mean 'kjv'"):
        run_downstream(evaluated, ["last_word:kvj"], stores=tmp_path / "stores")


@needs_lm_eval
def test_two_texts_of_one_name_are_refused(evaluated, store, other_store, tmp_path):
    shutil.copytree(other_store, tmp_path / "twin")
    change_manifest(tmp_path / "twin", name="speeches")
    with pytest.raises(UserError, match="twin: another text of the same name is asked for"):
        run_downstream(evaluated, ["last_word", f"last_word:{tmp_path / 'twin'}"])


@needs_lm_eval
def test_names_are_checked_against_what_lm_eval_has():
    manager = task_manager([], defaults=True)
    check_known([task.name for task in PAPER_TASKS], manager)
    with pytest.raises(UserError, match=r"task 'helaswag' is unknown; did you mean 'hellaswag'\?"):
        check_known(["helaswag"], manager)
    with pytest.raises(UserError, match="task 'hellaswag,piqa' is unknown; give --task once for each; "):
        check_known(["hellaswag,piqa"], manager)
    with pytest.raises(UserError, match=r"task 'word_analogies' is unknown; did you mean 'word_analogy'\?"):
        check_known(["word_analogies"], manager)


@needs_lm_eval
def test_scores_are_rows_and_come_once(evaluated, other_store):
    tasks = ["continuation", "last_word", f"continuation:{other_store}"]
    told = Told()
    scores = run_downstream(evaluated, tasks, limit=30, progress=told)
    for stage, (wanted, unit, *done, outcome) in told.stages.items():
        assert (done[-1], unit, outcome) == (wanted, "answers", "done"), stage
        assert done == [*range(1, wanted + 1)]
        assert wanted == (30 if "last_word" in stage else 120)  # one answer to a question, or four
    assert [(score.domain, score.metric) for score in scores] == [
        ("continuation_speeches", "acc"),
        ("continuation_speeches", "acc_norm"),
        ("last_word_speeches", "acc"),
        ("continuation_scripture", "acc"),
        ("continuation_scripture", "acc_norm"),
    ]
    for score in scores:
        assert (score.run, score.step, score.tokens) == ("tiny-1", 7, 900)
        assert (score.role, score.split, score.n, score.higher_is_better) == ("downstream", "test", 30, True)
        assert score.stderr == pytest.approx((score.value * (1 - score.value) / 29) ** 0.5)
    assert read_scores(evaluated.scores) == scores
    before = evaluated.scores.read_bytes()
    assert run_downstream(evaluated, tasks, limit=30) == scores
    assert evaluated.scores.read_bytes() == before
    assert {score.version for score in run_downstream(evaluated, ["last_word"], limit=31)}.isdisjoint(
        score.version for score in scores
    )


@needs_lm_eval
def test_batch_size_moves_at_most_one_question_in_sixty(evaluated):
    values = []
    for size in (1, 7, 64):
        elsewhere = dataclasses.replace(evaluated, output=evaluated.output / str(size))
        found = run_downstream(elsewhere, ["continuation"], limit=60, batch_size=size)
        values.append([score.value for score in found])
    for other in values[1:]:
        assert other == pytest.approx(values[0], abs=1 / 60 + 1e-9)


@needs_lm_eval
def test_a_task_file_of_ones_own_is_asked_quietly_and_counts_by_its_content(evaluated, tmp_path, capfd):
    folder = own_task(tmp_path / "own", [" of the lord", " of the states"])
    first = run_downstream(evaluated, ["own"], include=folder)
    assert [(score.domain, score.metric, score.n) for score in first] == [
        ("own", metric, 6) for metric in ("acc", "acc_norm")
    ]
    assert capfd.readouterr() == ("", "")
    assert run_downstream(evaluated, ["own"], include=folder) == first
    with (folder / "helpers.py").open("a", encoding="utf-8") as file:
        file.write("# another version\n")
    assert run_downstream(evaluated, ["own"], include=folder)[0].version != first[0].version


@needs_lm_eval
def test_a_task_that_shuffles_its_answers_is_the_same_for_every_model(evaluated, tmp_path):
    """As gpqa does, by Python's random numbers, as it is read."""
    folder = own_task(tmp_path / "own", [" of the lord", " of the states", " of peace", " of war"])
    with (folder / "own.yaml").open("a", encoding="utf-8") as file:
        file.write("process_docs: !function helpers.shuffled\n")
    with (folder / "helpers.py").open("a", encoding="utf-8") as file:
        file.write(
            "import random\n"
            "def shuffled(docs):\n"
            "    order = random.sample(range(4), 4)\n"
            "    shuffle = lambda doc: {'a': [doc['a'][i] for i in order]}\n"
            "    return docs.map(shuffle, load_from_cache_file=False)\n"
        )
    random.seed(5)
    found = [
        run_downstream(dataclasses.replace(evaluated, output=tmp_path / name), ["own"], include=folder)
        for name in "abc"
    ]
    assert len({score.version for scores in found for score in scores}) == 1
    assert random.random() == random.Random(5).random()  # noqa: S311 - what was drawn is put back


@needs_lm_eval
def test_what_is_wrong_with_a_task_file_is_one_line(evaluated, tmp_path):
    none = tmp_path / "none"
    with pytest.raises(UserError, match=r"^include .*none: no such directory, or none with task files"):
        run_downstream(evaluated, ["own"], include=none)
    long = " of the people" * CONTEXT
    cases = [
        (
            {"answers": [long, " of"]},
            r"task own: an answer to question 0 has \d+ tokens and the model's context 96",
        ),
        (
            {"answers": [" of"], "output_type": "loglikelihood", "doc_to_choice": None, "doc_to_target": ""},
            r"task own: an answer to question 0, '', has no token of its own: it is empty",
        ),
        (
            {"answers": [" of"], "doc_to_choice": "b"},
            r"task own: its data cannot be loaded .*look into its file",
        ),
        (
            {"answers": [" of"], "num_fewshot": 7, "fewshot_split": "test"},
            r"task own: its data cannot be loaded \(ValueError: Sample larger than population.*look into",
        ),
        (
            {"answers": [" of"], "output_type": "generate_until", "doc_to_choice": None},
            r"task own: answers of up to 256 tokens are asked for, and the model's context is 96",
        ),
        (
            {
                "answers": "xyz" * 300,  # one word, whose perplexity no float holds
                "output_type": "loglikelihood_rolling",
                "doc_to_choice": None,
                "doc_to_target": "a",
                "metric_list": [{"metric": "word_perplexity"}],
            },
            r"task own: no score by the metrics of its task file \(OverflowError: math range error\)",
        ),
    ]
    for changes, message in cases:
        folder = own_task(tmp_path / "own", **changes)
        with pytest.raises(UserError, match=message) as caught:
            run_downstream(evaluated, ["own"], include=folder)
        assert "\n" not in str(caught.value)
    (folder / "own.yaml").write_text("task: [own", encoding="utf-8")
    with pytest.raises(UserError, match=r"^include .*own.yaml: no YAML: while parsing"):
        run_downstream(evaluated, ["own"], include=folder)


@needs_lm_eval
def test_a_task_without_documents_is_called_so(evaluated, tmp_path):
    folder = own_task(tmp_path / "own", answers=[" of"])
    path, python, rows = (folder / name for name in ("own.yaml", "helpers.py", "own.jsonl"))
    text = path.read_text(encoding="utf-8")
    python.write_text(
        python.read_text(encoding="utf-8") + "def none(rows): return rows.select([])\n", encoding="utf-8"
    )
    path.write_text(text + "process_docs: !function helpers.none\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"task own: its data cannot be loaded \(IndexError: .* size 0"):
        run_downstream(evaluated, ["own"], include=folder)
    path.write_text(text, encoding="utf-8")
    rows.write_bytes(b"")
    with pytest.raises(UserError, match="task own: one of its data files has no rows"):
        run_downstream(evaluated, ["own"], include=folder)


@needs_lm_eval
@pytest.mark.parametrize("name", ["paper", "continuation", "last_word:kjv"])
def test_a_task_of_ones_own_that_has_the_name_of_another_is_refused(evaluated, tmp_path, name):
    """The other one was asked, without a word."""
    folder = own_task(tmp_path / "own", answers=[" of"], task=name)
    message = f"^task {name}: a task of that name in .*own would not be asked"
    with pytest.raises(UserError, match=message):
        run_downstream(evaluated, [name], include=folder)
    with pytest.raises(UserError, match=message):
        check_tasks([name], folder)


@needs_lm_eval
def test_a_name_that_is_no_text_is_one_line(evaluated, tmp_path):
    folder = own_task(tmp_path / "own", answers=[" of"], task=2024)
    with pytest.raises(UserError, match=r"own.yaml: task: 2024 is no text; write '2024'$"):
        run_downstream(evaluated, ["2024"], include=folder)


@needs_lm_eval
def test_a_full_disk_is_called_so_where_datasets_keeps_its_data(evaluated, tmp_path, monkeypatch):
    import datasets
    from datasets.exceptions import DatasetGenerationError

    def full(*_, **__):
        raise DatasetGenerationError("An error occurred") from OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr(datasets, "load_dataset", full)
    with pytest.raises(UserError, match=r"No space left\); `datasets` keeps data in .*: free some space"):
        run_downstream(evaluated, ["own"], include=own_task(tmp_path / "own", answers=[" of"]))


@needs_lm_eval
def test_a_home_that_cannot_be_written_is_not_taken_for_a_wrong_task_file(evaluated, tmp_path, monkeypatch):
    from datasets import config

    (tmp_path / "home").write_text("is a file")
    cache = tmp_path / "home" / "huggingface" / "datasets"
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", cache)
    message = f"task own: its data .*; `datasets` keeps data in {cache}: set HF_HOME"
    with pytest.raises(UserError, match=message):
        run_downstream(evaluated, ["own"], include=own_task(tmp_path / "own", answers=[" of"]))


@pytest.mark.slow
@needs_lm_eval
def test_lm_eval_on_its_own_command_line_gives_the_same_numbers(evaluated, tmp_path):
    folder = own_task(tmp_path / "own", [" of the lord", " of the states"])
    scores = run_downstream(evaluated, [*BOTH, "own"], batch_size=16, include=folder)
    shutil.copytree(folder, evaluated.output / "tasks" / "own")
    names = ",".join(dict.fromkeys(score.domain for score in scores))
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={evaluated.model},max_length={CONTEXT}", "--batch_size", "16"]
    command += ["--tasks", names, "--include_path", str(evaluated.output / "tasks")]
    command += ["--output_path", str(tmp_path / "theirs.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, timeout=240, env=environment)
    (path,) = tmp_path.glob("theirs*.json")
    theirs = json.loads(path.read_text(encoding="utf-8"))["results"]
    assert len(scores) == 5
    for score in scores:
        row = theirs[score.domain]
        assert score.value == row[f"{score.metric},none"]
        assert score.stderr == row[f"{score.metric}_stderr,none"]


@needs_lm_eval
def test_the_papers_tasks_get_the_papers_shots_and_metric(tmp_path):
    rows = [
        {"question": f"What is {i} plus one?", "choices": ["no", str(i + 1)], "gold": 1} for i in range(12)
    ]
    for split in ("train", "test"):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    config = {
        "task": "openbookqa",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "test")}
        },
        "test_split": "test",
        "fewshot_split": "train",
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
    }
    (tmp_path / "openbookqa.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    manager = task_manager([tmp_path], defaults=False)
    tasks = [TaskLoader(manager, OwnTasks(), Asked(limit)) for limit in (4, 4, 5)]
    (task,), (again,), (longer,) = [loader.prepare("openbookqa", on_hub=False) for loader in tasks]
    assert task.metric == "acc_norm"
    assert [task.leaves[0].instances[0].args[0].count("plus one?")] == [1 + 5]
    assert task.rows == again.rows
    assert task.rows[0].version != longer.rows[0].version
