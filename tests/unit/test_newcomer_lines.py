"""Lines that a newcomer meets: nothing essential cut at 80 columns, hints that work, sizes and counts."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tutelage.cli import doctor
from tutelage.cli.stages import Stage
from tutelage.data.corpora import CORPORA, PAIR_CORPORA
from tutelage.files import size_text
from tutelage.models import hub


def test_a_list_of_corpora_has_every_word_at_80_columns(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, shown, _ = command("data", "list")
    assert code == 0
    assert max(map(len, shown.splitlines())) <= 80
    words = " ".join(shown.split())
    for corpus in (CORPORA | PAIR_CORPORA).values():
        for text in (corpus.name, f"{corpus.package}=={corpus.version}; {corpus.licence}", corpus.summary):
            assert " ".join(text.split()) in words, text
    assert "…" not in shown


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (950, "950 bytes"),
        (3131, "3.13 KB"),
        (999_499, "999 KB"),
        (999_500, "1 MB"),
        (2.5e13, "25 TB"),
    ],
)
def test_sizes_have_three_digits_whatever_they_are(count, text):
    assert size_text(count) == text


def test_a_small_text_is_not_read_as_nothing():
    assert Stage("own", None, "bytes", done=3131).amount == "3.13 KB"


def test_one_thread_is_one(monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    assert doctor._devices()[0].detail.endswith(", 1 core, 1 thread")


@pytest.fixture
def run_file(store, tmp_path):
    settings = {
        "name": "mine",
        "model": {"shape": "nano-20k"},
        "data": {"store": str(store), "sequence_length": 32},
        "tokens": 512,
        "global_batch_tokens": 256,
        "runtime": {"device": "cpu", "threads": 1},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings))
    return "mine.yaml"


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("token", "did you mean 'tokens'? "),
        ("optim.lr", ""),
        ("tokens", ""),
        ("twice", ""),
    ],
)
def test_a_word_in_the_place_of_a_setting_is_answered_by_what_was_meant(command, run_file, word, near):
    code, _, said = command("train", run_file, word)
    assert code == 2
    assert said.startswith(
        f"error: train {word}: {near}neither a run file nor a setting to change; write KEY="
    )
    code, _, said = command("train", run_file, "missing.yaml")
    assert (code, said) == (2, "error: missing.yaml: no such file\n")


def test_a_run_without_texts_to_score_loads_no_model_and_says_nothing_of_scores(
    command, run_file, monkeypatch
):
    loaded = []
    load = hub.load
    monkeypatch.setattr(hub, "load", lambda path, **more: loaded.append(path) or load(path, **more))
    taught = ["name=other", "teacher.kind=unigram", "tokens=1K"]
    taught += ["objective.alpha=0.3", "objective.mixing=keep_full_kd", "objective.label_smoothing=0.1"]
    code, shown, said = command("train", run_file, *taught)
    assert code == 0
    assert [path.name[:14] for path in loaded] == [".partial-model"]  # the export, which is read back
    assert "scores" not in said
    assert "scores" not in shown
    hint = re.search(r"`tutelage (train .*)`", shown)[1]
    assert shlex.split(hint) == [
        *(
            "train",
            run_file,
            "tokens=1K",
            "objective.label_smoothing=0.1",
            "name=other-alone",
            "teacher=null",
        ),
        "objective={alpha: 0, gate: null, mixing: convex}",
    ]
    assert command(*shlex.split(hint))[0] == 0
    code, _, said = command("train", run_file, *taught)
    assert code == 0
    assert "is finished; nothing to do" in said


@pytest.mark.parametrize("place", ["runs", "my runs"])
def test_a_student_finds_its_teacher_by_the_line_that_names_it(command, run_file, place):
    elsewhere = [] if place == "runs" else [f"output={place}"]
    code, shown, _ = command("train", run_file, *elsewhere)
    assert code == 0
    hint = shlex.split(re.search(r"teach a student with it: (.*)", shown)[1])
    assert hint[1:] == elsewhere
    assert command("train", run_file, "name=taught", "objective.alpha=0.5", *hint)[0] == 0
    assert len(list(Path(place).iterdir())) == 2


@pytest.mark.parametrize("place", ["runs", "my runs"])
def test_a_fine_tuned_model_is_scored_beside_its_beginning_by_the_line_that_says_so(
    command, run_file, store, place
):
    elsewhere = [] if place == "runs" else [f"output={place}"]
    assert command("train", run_file, *elsewhere)[0] == 0
    (base,) = Path(place).iterdir()
    rows = [json.dumps({"prompt": f"{n}?", "completion": f"{n}. " * 9}) for n in range(60)]
    Path("pairs.jsonl").write_text("\n".join(rows))
    pairs = {"name": "pairs", "sources": [{"kind": "pairs", "paths": ["pairs.jsonl"]}]}
    pairs |= {"tokenizer": {"path": str(base / "model")}, "validation": 0.3, "test": 0.3}
    Path("pairs.yaml").write_text(yaml.safe_dump(pairs))
    assert command("data", "build", "pairs.yaml")[0] == 0
    tuned = yaml.safe_load(Path(run_file).read_text()) | {"name": "tuned", "stage": "sft"}
    tuned |= {"model": {"run": "mine"}, "data": {"store": "pairs", "sequence_length": 32}}
    domains = [{"name": "answers", "store": "pairs"}, {"name": "text", "store": str(store)}]
    tuned |= {"eval": {"max_documents": 4, "domains": domains}}
    Path("tuned.yaml").write_text(yaml.safe_dump(tuned))
    code, shown, _ = command("train", "tuned.yaml", *elsewhere)
    assert code == 0
    hint = shlex.split(re.search(r"beside the model it began with: `tutelage (.*)`", shown)[1])
    code, shown, _ = command(*hint)
    assert code == 0
    assert re.search(r"^answers .*\n(.*\n)*text ", shown, re.MULTILINE)


def test_text_in_the_place_of_settings_is_told_what_settings_are(command, tmp_path):
    (tmp_path / "novel.txt").write_text("It was a dark night\n" * 10_000)
    (tmp_path / "line.txt").write_text("It was a dark night\n")
    assert command("data", "build", "novel.txt")[2] == (
        "error: novel.txt: no settings: they have at most 65,536 characters\n"
    )
    assert command("data", "build", "line.txt")[2].startswith(
        "error: line.txt: no settings: expected lines of"
    )


def test_a_tokenizer_is_looked_for_where_a_person_would(command, run_file):
    assert command("train", run_file)[0] == 0
    Path("text.yaml").write_text("{name: text, sources: [{kind: corpus, name: sotu}]}")
    (run,) = Path("runs").iterdir()
    code, _, said = command("data", "build", "text.yaml", f"tokenizer.path={run}")
    assert code == 2
    assert said.endswith(
        f"there is no tokenizer.json in this directory; that of this run is in {run}/model\n"
    )


NAMED = [["verify"], ["runs"], ["show"], ["report"], ["eval", "score"], ["study", "status"]]


@pytest.mark.parametrize("arguments", NAMED)
def test_a_name_too_long_for_a_file_is_one_line(command, arguments):
    """From Python 3.14 on it counts as one that is not there."""
    code, _, complaint = command(*arguments, "./" + "a" * 300)
    assert code == 2
    assert re.fullmatch(r"error: .*aaa(/plan\.json)?: File name too long\n", complaint)


@pytest.mark.parametrize("arguments", NAMED)
@pytest.mark.parametrize("name", ["./around", "./around/a", "./file/a"])
def test_below_a_link_to_itself_or_a_file_is_nothing(command, arguments, name):
    Path("around").symlink_to("around")
    Path("file").touch()
    code, _, complaint = command(*arguments, name)
    assert code == 2
    assert re.fullmatch(r"error: .*\bnor? .*\n", complaint)


TYPED = """
import contextlib, sys
from tutelage.cli.main import main
for words in ("verify", "runs", "show", "report", "eval score"):
    sys.argv = ["tutelage", *words.split(), sys.argv[-1]]
    with contextlib.suppress(SystemExit):
        main()
"""


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="root may look into everything")
def test_a_directory_that_may_not_be_entered_is_not_called_missing(tmp_path):
    closed = tmp_path / "closed"
    (closed / "a").mkdir(parents=True)
    closed.chmod(0)
    rights = "-dac_override,-dac_read_search"
    less = ["setpriv", "--bounding-set", rights, "--inh-caps", rights] if os.geteuid() == 0 else []
    command = [*less, sys.executable, "-c", TYPED, closed / "a"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    closed.chmod(0o700)
    assert done.returncode == 0
    told = re.findall(r"^error: .*/closed/a(?:/plan\.json)?: Permission denied$", done.stderr, re.MULTILINE)
    assert (len(told), done.stderr.count("\n")) == (5, 5)
