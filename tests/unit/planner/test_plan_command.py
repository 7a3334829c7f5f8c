"""The command `tutelage plan`: numbers against definitions, run files that start, and wrong input by name."""

from __future__ import annotations

import json
import math
import re
import shutil
from functools import partial

import numpy as np
import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from tutelage.data.store import open_store
from tutelage.models.flops import parameters
from tutelage.models.hub import build
from tutelage.models.shapes import find_shape
from tutelage.planner.candidates import learned_text
from tutelage.planner.laws import PUBLISHED, PUBLISHED_TAUGHT, SupervisedLaw
from tutelage.planner.points import AlonePoint, StudyPoints, TaughtPoint
from tutelage.planner.study_fit import fit_points, load_fit, save_fit
from tutelage.run import run

FLAT = SupervisedLaw(2.0, 500.0, 0.4, 20.0, 0.5, 0.8)
"""More tokens give next to nothing, so teachers pay."""
STEEP = SupervisedLaw(2.0, 500.0, 0.4, 400.0, 0.5, 0.8)
SHAPES = ("nano-20k", "nano-50k", "nano-150k", "nano-350k")
SMALL = (
    "--set",
    "data.sequence_length=32",
    "--set",
    "global_batch_tokens=256",
    "--set",
    "runtime.device=cpu",
)
STUDENT = ("--student", "nano-50k", "--tokens", "4K", "--hardware", "cpux2", *SMALL)


def size(name):
    return float(parameters(find_shape(name), 0).non_embedding)


def gain(alpha, gap):
    return alpha * (8 + 40 * gap) - alpha**2 * (9 - 10 * gap)


def fit_of(law, path):
    """A fit to a made study: four sizes, four budgets, a student with teachers of other sizes."""
    loss = lambda name, tokens: float(law.loss(size(name), tokens))  # noqa: E731
    alone = [
        AlonePoint(
            study="made", name=f"{name} {d}", parameters=size(name), tokens=d, loss=loss(name, d), runs=3
        )
        for name in SHAPES
        for d in (2e3, 4e3, 2e4, 2e5)
    ]
    taught = []
    for name in SHAPES:
        gap = math.log(loss("nano-50k", 2e4) / loss(name, 2e5))
        taught += [
            TaughtPoint(
                study="made", student="s", teacher=name, parameters=size("nano-50k"), tokens=2e4,
                teacher_loss=loss(name, 2e5), alone_loss=loss("nano-50k", 2e4), loss=1.0, alpha=alpha,
                seeds=3,
                gains={"in_domain": gain(alpha, gap)},
            )
            for alpha in (0.2, 0.6, 1.0)
        ]  # fmt: skip
    points = StudyPoints(studies=("made",), texts=("speeches",), alone=tuple(alone), taught=tuple(taught))
    save_fit(path, fit_points(points))
    return path


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    return fit_of(FLAT, tmp_path_factory.mktemp("fits") / "flat.json")


def planned(command, *arguments):
    code, out, err = command("plan", *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def test_published_predictions_are_the_laws_and_their_intervals(command):
    found = planned(
        command, "--student", "llama-1.7b", "--tokens", "50B", "--teacher", "llama-8b@50B",
        "--hardware", "h100x64", "--price", "2",
        "--set", "data.sequence_length=8192", "--set", "global_batch_tokens=2097152",
    )  # fmt: skip
    (teacher,) = found["teachers"]
    tokens = 50_000_000_000 // 2_097_152 * 2_097_152
    n, n_t = size("llama-1.7b"), size("llama-8b")
    alone, loss = float(PUBLISHED.loss(n, tokens)), float(PUBLISHED.loss(n_t, tokens))
    taught = float(PUBLISHED_TAUGHT.loss(n, tokens, loss, alone))
    assert found["alone"] == {"mean": pytest.approx(alone), "low": None, "high": None}
    assert teacher["student_loss"]["mean"] == pytest.approx(taught)
    assert teacher["student_loss"]["high"] - taught == pytest.approx(
        1.96 * 0.018, rel=0.1
    )  # of a loss of 2.4
    assert teacher["ratio"] == pytest.approx(loss / alone)
    assert list(teacher["gains"]) == ["in_domain"]  # nothing public speaks of other texts
    assert teacher["predicted_alpha"] == 1
    assert any("no correction for alpha below 1" in text for text in teacher["checks"])
    online = teacher["costs"][0]
    assert online["flops"] == sum(online[part] for part in ("teacher_training", "teacher_forward", "student"))
    assert online["teacher_training"] / online["teacher_forward"] == pytest.approx(3)
    assert online["seconds"] == pytest.approx(online["flops"] / (64 * 989e12 * 0.4))
    assert online["price"] == pytest.approx(online["seconds"] / 3600 * 64 * 2)
    assert teacher["longer_tokens"] == pytest.approx(
        tokens * online["flops"] / found["alone_cost"]["student"], rel=1e-6
    )
    longer = 100 * (1 - float(PUBLISHED.loss(n, teacher["longer_tokens"])) / alone)
    assert teacher["longer_gain"] == pytest.approx(longer)
    assert found["answer"] == "do not distil"
    assert found["files"]["alone.yaml"]["tokens"] == pytest.approx(teacher["longer_tokens"], abs=2_097_152)


def test_costs_are_what_torch_counts(command, store, flat):
    """Twice the context for us: torch counts all keys of a causal query, the formula half of them."""
    found = planned(
        command, "--store", store, "--fit", flat, "--teacher", "nano-150k@20K", *STUDENT, "--set",
        "data.sequence_length=64",
    )  # fmt: skip
    counted = {}
    for name in ("nano-50k", "nano-150k"):
        model = build(find_shape(name), 300, 32, seed=0)
        model.set_attn_implementation("eager")
        with FlopCounterMode(display=False) as counter:
            model(input_ids=torch.zeros(2, 32, dtype=torch.long)).logits.sum().backward()
        counted[name] = counter.get_total_flops() / 64
    cost = found["teachers"][0]["costs"][0]
    assert cost["student"] / found["tokens"] == pytest.approx(counted["nano-50k"], rel=0.01)
    assert cost["teacher_training"] / (20_000 // 256 * 256) == pytest.approx(counted["nano-150k"], rel=0.01)
    assert cost["teacher_forward"] / found["tokens"] == pytest.approx(counted["nano-150k"] / 3, rel=0.01)


def test_a_fit_predicts_by_its_surface_and_chooses_its_best_alpha(command, store, flat):
    found = planned(command, "--store", store, "--fit", flat, "--teacher", "nano-150k@20K", *STUDENT)
    (teacher,) = found["teachers"]
    tokens = 4000 // 256 * 256
    gap = math.log(FLAT.loss(size("nano-50k"), tokens) / FLAT.loss(size("nano-150k"), 2e4))
    best = max(np.arange(0.2, 1.01, 0.05), key=partial(gain, gap=gap))
    assert teacher["alpha"] == pytest.approx(best)
    assert teacher["gains"]["in_domain"]["mean"] == pytest.approx(gain(best, gap), abs=0.02)
    assert found["answer"] == "distil"
    assert found["best"] == "nano-150k@20K"


TEACHERS = ("--teacher", "nano-20k@20K", "--teacher", "nano-350k@20K", "--teacher", "nano-150k@20K")


def test_of_several_teachers_the_one_that_leads_most_is_named(command, store, flat):
    found = planned(command, "--store", store, "--fit", flat, *TEACHERS, *STUDENT)
    leads = {
        one["teacher"]: one["gains"]["in_domain"]["mean"] - one["longer_gain"] for one in found["teachers"]
    }
    assert found["best"] == max(leads, key=leads.get)
    assert len({*leads.values()}) == 3


def test_without_a_law_the_one_that_gains_most_at_equal_tokens_is_named(command, store, flat, tmp_path):
    """Four measured models are too few for a law, so what more tokens give is not known."""
    points, tokens, own = load_fit(flat).points, 4000 // 256 * 256, 20_000 // 256 * 256
    alone = [
        AlonePoint(
            study="made",
            name=name,
            parameters=size(name),
            tokens=d,
            loss=float(FLAT.loss(size(name), d)),
            runs=3,
        )
        for name, d in [("nano-50k", tokens), *((name, own) for name in SHAPES if name != "nano-50k")]
    ]
    save_fit(tmp_path / "few.json", fit_points(points.model_copy(update={"alone": tuple(alone)})))
    found = planned(command, "--store", store, "--fit", tmp_path / "few.json", *TEACHERS, *STUDENT)
    gains = {one["teacher"]: one["gains"]["in_domain"]["mean"] for one in found["teachers"]}
    assert found["best"] == max(gains, key=gains.get)
    assert found["answer"] == "distil"
    assert found["why"][0].startswith(f"{found['best']} at alpha ")
    assert found["why"][0].endswith(f"gains {gains[found['best']]:+.2f}% in domain on the same tokens")
    assert "as much compute gives without a teacher is not known" in found["why"][1]


@pytest.mark.slow
def test_run_files_start_as_they_are(command, store, flat, tmp_path):
    asked = (
        "--store",
        store,
        "--fit",
        flat,
        "--teacher",
        "nano-150k@6K",
        "--teacher",
        "nano-20k@6K",
        *STUDENT,
    )
    code, out, err = command("plan", *asked, "--output", "plan")
    assert code == 0, err
    commands = [line.split()[1:4] for line in out.splitlines() if "tutelage train" in line]
    assert [words[2] for words in commands] == [
        f"plan/{name}.yaml" for name in ("teacher", "student", "student-cached", "alone")
    ]
    for words in commands:
        code, out, err = command(*words[1:])
        assert code == 0, err
    students = {
        p.name.rpartition("-")[0]: yaml.safe_load((p / "config.yaml").read_text())
        for p in (tmp_path / "runs").iterdir()
    }
    assert {
        f"planned-{name}" for name in ("teacher-nano-150k-6K", "student", "student-cached", "alone")
    } == students.keys()
    assert (
        students["planned-student"]["objective"]["alpha"]["value"]
        == planned(command, *asked)["teachers"][0]["alpha"]
    )
    assert (
        students["planned-alone"]["data"]
        == students["planned-student"]["data"]
        != students["planned-teacher-nano-150k-6K"]["data"]
    )
    # The trained teacher can be planned with by its name: it costs nothing more, and its loss is the law's.
    again = planned(
        command, "--store", store, "--fit", flat, "--teacher", "planned-teacher-nano-150k-6K", *STUDENT
    )
    assert again["teachers"][0]["costs"][0]["teacher_training"] == 0
    assert again["files"]["student.yaml"]["teacher"]["run"].startswith("planned-teacher-nano-150k-6K-")
    # As a mere model it has no loss on the text until that is measured, by the command that is named.
    model = next((tmp_path / "runs").glob("planned-teacher-*")) / "model"
    code, _, err = command("plan", "--store", store, "--fit", flat, "--teacher", model, *STUDENT)
    assert code == 2
    told = err.split("`")[1].split()
    assert told[:4] == ["tutelage", "eval", "score", str(model)]
    assert command(*told[1:], "--max-documents", "2")[0] == 0
    measured = planned(command, "--store", store, "--fit", flat, "--teacher", model, *STUDENT)["teachers"][0]
    assert measured["measured"]
    assert 1 < measured["loss"]["mean"] < 10


def test_a_run_of_another_text_has_no_loss_by_the_law_of_this_one(
    command, store, other_store, flat, make_config
):
    """Of a teacher trained on scripture the law of speeches said 3.70, and its scores 3.97."""
    teacher = run(make_config(tokens="2K"))
    asked = ("--fit", flat, "--teacher", teacher.path, *STUDENT)
    assert not planned(command, "--store", store, *asked)["teachers"][0]["measured"]
    code, out, err = command("plan", "--store", other_store, *asked)
    assert (code, out) == (2, "")
    assert "its loss on the student's text is not known; measure it: `tutelage eval score" in err


def test_a_model_has_no_loss_of_another_that_its_name_would_fit_as_a_pattern(
    command, store, flat, make_config, tmp_path
):
    model = run(make_config(tokens="2K")).model
    asked = ("--store", store, "--fit", flat, *STUDENT, "--teacher")
    for name, code in (("mod1", 2), ("mod[1]", 2)):
        shutil.copytree(model, tmp_path / name)
        assert command("plan", *asked, tmp_path / name)[0] == code
    score = ("eval", "score", "--store", f"text={store}", "--max-documents", "1")
    assert command(*score, tmp_path / "mod1")[0] == 0
    assert planned(command, *asked, tmp_path / "mod1")["teachers"][0]["measured"]
    assert "its loss on the student's text is not known" in command("plan", *asked, tmp_path / "mod[1]")[2]
    assert command(*score, tmp_path / "mod[1]")[0] == 0
    assert planned(command, *asked, tmp_path / "mod[1]")["teachers"][0]["measured"]


def test_a_fit_to_another_text_is_said(command, store, other_store, flat, make_config, tmp_path):
    """The name of a text was all that a fit knew of it, and two texts may have one."""
    student = run(make_config(tokens="2K"))
    text = learned_text(student.path.parents[1], ["lost-00000000", student.path.name])
    assert text == open_store(student.config().data.store).fingerprint
    points = load_fit(flat).points.model_copy(update={"stores": (text,)})
    save_fit(tmp_path / "fit.json", fit_points(points))
    said = {}
    for place in (store, other_store):
        asked = ("--fit", tmp_path / "fit.json", "--teacher", "nano-150k@20K", *STUDENT)
        said[open_store(place).fingerprint] = planned(command, "--store", place, *asked)["why"]
    assert not any("--store" in line for line in said.pop(text))
    ((*_, last),) = said.values()
    assert last.startswith("--store is not the token store that the studies were run on: ")


def test_what_is_outside_is_said_and_not_predicted(command, store, flat):
    found = planned(command, "--store", store, "--teacher", "nano-150k@20K", *STUDENT)
    assert found["answer"] == "cannot say"
    assert found["alone"] is None
    assert found["why"][0].startswith("outside: 53.2K parameters without embeddings; known: 143M to 12.6B")
    assert found["teachers"][0]["gains"] == {}
    found = planned(command, "--store", store, "--fit", flat, "--teacher", "nano-2m@20K", *STUDENT)
    assert found["teachers"][0]["outside"].startswith(
        "outside: 2.01M parameters without embeddings; known: 21.7K to 351K"
    )
    assert found["answer"] == "cannot say"


def test_do_not_distil_is_an_answer_of_a_fit_too(command, store, tmp_path):
    fit = fit_of(STEEP, tmp_path / "steep.json")
    found = planned(command, "--store", store, "--fit", fit, "--teacher", "nano-150k@20K", *STUDENT)
    assert found["answer"] == "do not distil"
    assert list(found["files"]) == ["alone.yaml"]
    assert found["teachers"][0]["gains"]["in_domain"]["mean"] > 0
    assert found["teachers"][0]["break_even"] == "above 76.9K tokens (looked at: 2K to 155K tokens)"
    # From there on the rest of the text is too little to make up for the teacher.
    for tokens, answer in (("70K", "do not distil"), ("85K", "distil")):
        asked = ("--store", store, "--fit", fit, "--teacher", "nano-150k@20K", *STUDENT, "--tokens", tokens)
        again = planned(command, *asked)
        assert again["answer"] == answer
        assert again["teachers"][0]["break_even"] == found["teachers"][0]["break_even"]


def test_a_budget_beyond_the_text_is_not_called_text(command, store, flat):
    """Of 155K tokens a card said that all 200K tokens of the text cost no more."""
    asked = ("--store", store, "--fit", flat, "--teacher", "nano-150k@20K", *STUDENT, "--tokens", "200K")
    found = planned(command, *asked)
    assert found["why"][0].endswith(
        "; without a teacher, there is no more text: all 155K tokens are read already"
    )
    assert found["teachers"][0]["longer_gain"] == 0


def test_no_budgets_are_looked_at_where_the_text_ends_before_the_law_begins(command, store, flat, tmp_path):
    """The card said "on every budget of 200K to 200K tokens"."""
    points = load_fit(flat).points
    late = points.model_copy(update={"alone": tuple(one for one in points.alone if one.tokens >= 2e5)})
    more = [
        one.model_copy(update={"tokens": 4e5, "loss": float(FLAT.loss(one.parameters, 4e5))})
        for one in late.alone
    ]
    late = late.model_copy(update={"alone": (*late.alone, *more)})
    save_fit(tmp_path / "late.json", fit_points(late))
    asked = ("--fit", tmp_path / "late.json", "--teacher", "nano-150k@300K", *STUDENT, "--tokens", "250K")
    assert planned(command, "--store", store, *asked)["teachers"][0]["break_even"] == ""


def test_a_cache_covers_the_whole_text(command, store, flat):
    found = planned(command, "--store", store, "--fit", flat, "--teacher", "nano-150k@20K", *STUDENT)
    online, *_, cached = found["teachers"][0]["costs"]
    text = open_store(store).manifest.splits["train"].tokens
    assert cached["teacher_forward"] / text == pytest.approx(online["teacher_forward"] / found["tokens"])
    assert cached["cache_bytes"] == text * found["teachers"][0]["cache"]["bytes_per_token"]
    assert cached["student"] == pytest.approx(5 * online["student"])
    _, out, _ = command("plan", "--store", store, "--fit", flat, "--teacher", "nano-150k@20K", *STUDENT)
    runs = text // found["tokens"] + 1  # so many read more than the text once
    assert f"cache from run {runs} on: " in out


def test_the_rule_of_published_models_is_not_held_against_a_rule_of_studies(command, store, flat):
    """A card said that no alpha gains anything, and that alpha 1 pays."""
    asked = ("--store", store, "--fit", flat, "--teacher", "nano-150k@20K", *STUDENT)
    (first, *rest) = planned(command, *asked)["teachers"][0]["checks"]
    assert first.endswith("of the student's own")
    assert rest == []


def test_what_lies_beyond_the_law_is_not_decided(command, store, flat, tmp_path):
    """The same compute without a teacher is more tokens than any model of the fit had."""
    points = load_fit(flat).points
    short = points.model_copy(update={"alone": tuple(one for one in points.alone if one.tokens <= 2e4)})
    save_fit(tmp_path / "short.json", fit_points(short))
    asked = ("--store", store, "--fit", tmp_path / "short.json", "--teacher", "nano-150k@20K", *STUDENT)
    found = planned(command, *asked)
    (teacher,) = found["teachers"]
    assert teacher["longer_tokens"] > 20_000
    assert not teacher["longer_known"]
    most = 100 * (1 - FLAT.loss(size("nano-50k"), 2e4) / FLAT.loss(size("nano-50k"), found["tokens"]))
    assert teacher["longer_gain"] == pytest.approx(most, rel=1e-3)
    assert teacher["gains"]["in_domain"]["mean"] > most
    assert found["answer"] == "cannot say"
    assert found["why"][-1] == "which of the two is more is not known: the law ends at 20K tokens"


def test_what_the_points_of_a_law_leave_open_is_not_decided(command, store, flat, tmp_path):
    """A study with as many tokens a parameter everywhere does not say what more tokens give."""
    points, random = load_fit(flat).points, np.random.default_rng(0)
    sizes = np.geomspace(2e4, 4e5, 7)
    losses = FLAT.loss(sizes, sizes / 2) * np.exp(random.normal(0, 0.005, 7))
    alone = [
        AlonePoint(study="made", name=f"{n:.0f}", parameters=n, tokens=n / 2, loss=loss, runs=3)
        for n, loss in zip(sizes, losses, strict=True)
    ]
    save_fit(tmp_path / "fit.json", fit_points(points.model_copy(update={"alone": tuple(alone)})))
    asked = ("--store", store, "--fit", tmp_path / "fit.json", "--teacher", "nano-150k@30K", *STUDENT)
    found = planned(command, *asked, "--tokens", "26K")
    (teacher,) = found["teachers"]
    assert teacher["longer"]["low"] < teacher["gains"]["in_domain"]["mean"] < teacher["longer"]["high"]
    assert found["answer"] == "cannot say"
    assert re.fullmatch(
        r"which of the two is more is not known: the law's points leave -\d+\.\d\d% to \+\d+\.\d\d% open for "
        "more tokens",
        found["why"][-1],
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--student": "nano-5k"}, "--student: the shape 'nano-5k' is unknown; did you mean 'nano-50k'?"),
        ({"--tokens": "many"}, "tokens = 'many'"),
        ({"--tokens": "100"}, "100 tokens are less than one batch of 256"),
        ({"--teacher": "nano-50k@100"}, "--teacher nano-50k@100: 100 tokens are less than one batch of 256"),
        ({"--teacher": "nano-50k@lots"}, "--teacher nano-50k@lots: 'lots' is not a token budget"),
        ({"--teacher": "nano-51k@20K"}, "the shape 'nano-51k' is unknown; did you mean 'nano-50k'?"),
        ({"--teacher": "./nothing"}, "--teacher ./nothing: no shape with its tokens"),
        ({"--hardware": "h1000x8"}, "--hardware: the device 'h1000' is unknown; did you mean 'h100'?"),
        ({"--hardware": "h100x0"}, "--hardware h100x0: write how many, such as h100x8"),
        ({"--fit": "none.json"}, "none.json: no fit ("),
        ({"--study": "demo"}, "--study and --fit both say what to predict by; give one"),
        ({"--for": "fitted"}, "--for fitted: fit to made say nothing of that"),
        ({"--store": None}, "--student nano-50k: its vocabulary is that of a token store; give --store"),
        ({"--teacher": None}, "plan: give --student SHAPE --tokens TOKENS and a --teacher or more"),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)  # fmt: skip
def test_wrong_input_is_one_line(change, said, command, store, flat):
    options = {STUDENT[i]: STUDENT[i + 1] for i in (0, 2, 4)}
    options |= {"--teacher": "nano-150k@20K", "--store": store, "--fit": flat} | change
    given = [word for name, value in options.items() if value is not None for word in (name, value)]
    code, out, err = command("plan", *given, *SMALL)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_run_files_without_a_text_are_refused(command):
    asked = ("--student", "llama-1.7b", "--tokens", "50B", "--teacher", "llama-8b@50B")
    code, _, err = command("plan", *asked, "--output", "plan")
    assert (code, "give --store" in err) == (2, True)
