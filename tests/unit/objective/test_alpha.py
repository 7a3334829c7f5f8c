"""Alpha policies: their values at the knots, and what every one of them promises."""

from __future__ import annotations

import re
import time
from functools import partial
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml
from training import opened

from tutelage.config.alpha_config import AlphaConfig
from tutelage.config.load import validate
from tutelage.config.objective_config import GateConfig, ObjectiveConfig
from tutelage.config.run_config import OptimConfig, RunConfig
from tutelage.errors import UserError
from tutelage.objective import GATES, make_policy
from tutelage.train.optim import learning_rate
from tutelage.train.step import train_step
from tutelage.train.student import StepInputs

WSD = OptimConfig(schedule="wsd", warmup=0.1, decay=0.2, final_lr=0.0)
EXAMPLES = {
    "constant": {"value": 0.4},
    "piecewise": {"knots": [[0.25, 0.1], [0.5, 0.9], [1.0, 0.0]]},
    "linear": {"start": 0.8, "end": 0.2},
    "cosine": {"start": 0.8, "end": 0.2},
    "two_phase": {"first": 0.1, "second": 0.3, "switch": 0.5},
    "wsd": {"peak": 0.6},
    "salt": {"value": 0.7, "until": 0.25},
    "gap_driven": {"window": 2},
    "auto": {"window": 2},
    "prequential": {"period": 10, "probe": 3},
}
POLICIES = {
    section.model_fields["policy"].annotation.__args__[0]: section
    for section in get_args(get_args(AlphaConfig)[0])
}
PAGE = Path(__file__).parents[3] / "docs/explanation/mixing-policies.md"


def make(name, **changes):
    settings = {"alpha": {"policy": name} | EXAMPLES[name] | changes}
    return make_policy(
        validate(ObjectiveConfig, settings, "test").alpha, partial(learning_rate, WSD, 1.0, batch_tokens=1)
    )


def feed(policy, gaps, first=0, steps=101):
    """Alphas of a run whose student is `gap` nats behind a teacher of 3 nats at each step."""
    alphas = []
    for step, gap in enumerate(gaps, first):
        alphas.append(policy.alpha(step, steps))
        heard = policy.needs_teacher_ce(step) or alphas[-1] > 0
        policy.observe(step, torch.tensor(3.0 + gap), torch.tensor(3.0 if heard else 0.0))
    return alphas


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("constant", {0: 0.4, 50: 0.4, 100: 0.4}),
        ("piecewise", {0: 0.1, 25: 0.1, 50: 0.9, 75: 0.45, 100: 0.0}),
        ("linear", {0: 0.8, 50: 0.5, 75: 0.35, 100: 0.2}),
        ("cosine", {0: 0.8, 25: 0.5 + 0.3 * 2**-0.5, 50: 0.5, 100: 0.2}),
        ("two_phase", {0: 0.1, 49: 0.1, 50: 0.3, 100: 0.3}),
        ("wsd", {0: 0.6 / 11, 10: 0.6, 50: 0.6, 80: 0.6, 90: 0.3, 100: 0.0}),
        ("salt", {0: 0.7, 24: 0.7, 25: 0.0, 100: 0.0}),
        ("gap_driven", {0: 0.9, 100: 0.9}),  # nothing heard yet
        ("auto", {0: 1.0, 100: 1.0}),
        ("prequential", {0: 0.0, 2: 0.0, 3: 0.5, 9: 0.5, 10: 0.0, 13: 0.5}),
    ],
)
def test_values_at_the_knots(name, values):
    policy = make(name)
    assert {step: policy.alpha(step, 101) for step in values} == pytest.approx(values)


@pytest.mark.parametrize("name", ["piecewise", "linear", "cosine", "two_phase", "salt"])
def test_a_run_of_one_step_takes_the_first_value(name):
    assert make(name).alpha(0, 1) == make(name).alpha(0, 101)


@pytest.mark.parametrize("name", ["piecewise", "linear", "cosine", "two_phase", "salt"])
def test_a_loop_that_goes_on_keeps_the_last_value(name):
    """Linear ones left [0, 1], and a cosine rose again."""
    policy = make(name)
    assert {policy.alpha(step, 101) for step in (101, 150, 1000)} == {policy.alpha(100, 101)}


def test_wsd_follows_the_learning_rate_to_the_digit():
    policy = make("wsd", peak=1.0)
    assert [policy.alpha(step, 37) for step in range(37)] == [
        learning_rate(WSD, 1.0, step, 37, batch_tokens=1) for step in range(37)
    ]


@pytest.mark.parametrize(("gap", "alpha"), [(2.0, 0.9), (0.45, 0.9), (0.2, 0.4), (0.05, 0.1), (-1.0, 0.1)])
def test_gap_driven_settles_on_the_clipped_gap(gap, alpha):
    assert feed(make("gap_driven"), [gap] * 30)[-1] == pytest.approx(alpha, abs=1e-6)


@pytest.mark.parametrize(("gap", "alpha"), [(2.0, 1.0), (0.3, 0.9), (0.0, 0.4), (-0.12, 0.2), (-1.0, 0.1)])
def test_auto_settles_on_the_clipped_line_of_the_relative_gap(gap, alpha):
    assert feed(make("auto"), [gap] * 30)[-1] == pytest.approx(alpha, abs=1e-6)  # the teacher has 3 nats


def test_auto_is_one_word_and_takes_any_teacher():
    assert validate(ObjectiveConfig, {"alpha": "auto"}, "test").alpha.policy == "auto"
    policy = make("auto")
    for step in range(5):
        policy.observe(step, torch.tensor(2.0), torch.tensor(0.0))  # one that knows the text by heart
    assert policy.alpha(5, 100) == 1.0


def test_gap_driven_hears_each_step_two_steps_later_and_averages_over_the_window():
    alphas = feed(make("gap_driven", window=1), [0.4, 0.3, 0.2, 0.1, 0.0])
    assert alphas == pytest.approx([0.9, 0.9, 0.8, 0.6, 0.4], abs=1e-6)
    alphas = feed(make("gap_driven", window=2), [0.4, 0.2, 0.0, 0.0, 0.0])
    assert alphas == pytest.approx([0.9, 0.9, 0.8, 0.6, 0.3], abs=1e-6)


def test_prequential_bets_on_the_leader_and_comes_back():
    policy = make("prequential", rate=2.0)
    behind = feed(policy, [0.5] * 200, steps=300)
    weights = [alpha for alpha in behind if alpha > 0]
    assert weights == sorted(weights)
    assert weights[-1] == pytest.approx(0.9)
    ahead = feed(policy, [-0.5] * 60, first=200, steps=300)  # a long lead is no long memory
    assert ahead[-1] == pytest.approx(0.1)


def test_prequential_odds_are_exponential_weights_of_the_scored_steps_only():
    policy = make("prequential", rate=1.0)
    feed(policy, [9.0, 0.3, 0.4, *[9.0] * 7])  # steps 1 and 2 are scored
    assert policy.state()["log_odds"] == pytest.approx(0.7)
    assert policy.alpha(10, 101) == 0.0
    assert policy.alpha(13, 101) == pytest.approx(1 / (1 + 2.718281828459045**-0.7))


def test_prequential_runs_the_teacher_only_where_it_scores_it():
    policy = make("prequential")
    assert [step for step in range(20) if policy.needs_teacher_ce(step)] == [1, 2, 11, 12]


def test_the_examples_are_all_of_the_config_and_every_policy_says_what_it_is():
    assert set(POLICIES) == set(EXAMPLES)
    assert all(len(section.__doc__) > 12 for section in POLICIES.values())
    kinds = {kind.model_fields["kind"].annotation.__args__[0] for kind in get_args(get_args(GateConfig)[0])}
    assert kinds == set(GATES)


GAPS = [1.5 - 0.03 * step + 0.4 * (-1) ** step for step in range(100)]


@pytest.mark.parametrize("name", POLICIES)
def test_contract_alpha_is_a_weight_and_within_what_the_config_says(name):
    highest = validate(ObjectiveConfig, {"alpha": {"policy": name} | EXAMPLES[name]}, "test").alpha.highest
    alphas = feed(make(name), GAPS, steps=100)
    assert 0.0 <= min(alphas) <= max(alphas) <= highest <= 1.0
    assert max(alphas) > 0


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("cut", [0, 1, 2, 11, 12, 57])
def test_contract_state_round_trips_at_any_step(name, cut):
    whole, first, second = make(name), make(name), make(name)
    expected = feed(whole, GAPS, steps=100)
    before = feed(first, GAPS[:cut], steps=100)
    state = first.state()
    second.load(state)
    assert second.state() == state
    assert before + feed(second, GAPS[cut:], first=cut, steps=100) == expected  # bitwise
    assert second.state() == whole.state()


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (
            {"alpha": {"policy": "gap_driven", "cap": 0.2, "floor": 0.3}},
            "floor (0.3) must not be above cap (0.2)",
        ),
        ({"alpha": {"policy": "gap_driven", "scale": 0}}, "objective.alpha.scale = 0"),
        ({"alpha": {"policy": "prequential", "floor": 0.0}}, "objective.alpha.floor = 0.0"),
        ({"alpha": {"policy": "prequential", "period": 5}}, "probe (5) must be shorter than period (5)"),
        ({"alpha": {"policy": "salt", "until": 0.3}}, "objective.alpha.value: required but not given"),
        ({"alpha": {"policy": "linear", "start": 0, "end": 0}}, "alpha is 0; raise alpha or drop 'teacher'"),
        ({"alpha": {"policy": "wsd", "peak": 0.5}}, "optim.schedule = cosine; set it to wsd"),
        (
            {"alpha": {"policy": "salt", "value": 0.5, "until": 0.3}, "mixing": "keep_full_kd"},
            "alpha.policy = salt has steps without a teacher",
        ),
        ({"alpha": 0.4, "gate": {"kind": "student_entropy", "keep": 1.0}}, "objective.gate.keep = 1.0"),
        ({"alpha": 0.4, "gate": {"kind": "teacher_entropy"}}, "the unigram teacher is equally uncertain"),
        ({"alpha": 0.4, "gate": {"kind": "oracle"}}, "choose from random, student_entropy, teacher_ahead"),
        ({"alpha": 0.4, "truncation": {"kind": "top_k", "k": 0}}, "objective.truncation.k = 0"),
        ({"alpha": 0.4, "truncation": {"kind": "top_p", "p": 1.5}}, "objective.truncation.p = 1.5"),
        ({"alpha": 0.4, "tail": "none", "divergence": "tvd"}, "tail = none is unbiased for forward_kl only"),
        ({"alpha": 0.4, "tail": "renormalise", "divergence": "reverse_kl"}, "reverse_kl is infinite where"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_line(objective, message):
    base = {"model": {"shape": "nano-50k"}, "data": {"store": "s"}, "tokens": "2M"}
    with pytest.raises(UserError) as caught:
        validate(RunConfig, base | {"teacher": {"kind": "unigram"}, "objective": objective}, "run.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_gate_without_a_teacher_is_refused():
    base = {"model": {"shape": "nano-50k"}, "data": {"store": "s"}, "tokens": "2M"}
    with pytest.raises(UserError, match=r"objective\.gate but objective\.alpha is 0"):
        validate(RunConfig, base | {"objective": {"gate": {"kind": "teacher_better"}}}, "run.yaml")


def test_the_page_shows_every_policy_and_gate_and_its_settings_are_valid():
    lines = re.findall(r"^(?:alpha|gate): .*$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    shown = [validate(ObjectiveConfig, yaml.safe_load(line), line) for line in lines]
    assert {one.alpha.policy for one in shown} == set(POLICIES)
    assert {one.gate.kind for one in shown if one.gate is not None} == set(GATES)


@pytest.mark.parametrize("name", ["gap_driven", "auto", "prequential"])
def test_a_policy_costs_less_than_a_hundredth_of_a_demo_step(name, make_config):
    config = make_config(
        model={"shape": "nano-150k"}, global_batch_tokens=1024, tokens=4096, objective={"alpha": 0.0}
    )
    student = opened(config)
    batch = [student.loader.batch(0)]
    step = min(cpu_seconds(lambda: train_step([StepInputs(student, 0.0, 1e-3)], batch)) for _ in range(5))
    policy, ce, teacher_ce = make(name), torch.tensor(3.5), torch.tensor(3.0)

    def hundred_steps():
        for index in range(100):
            policy.alpha(index, 100)
            policy.observe(index, ce, teacher_ce)

    hundred = min(cpu_seconds(hundred_steps) for _ in range(5))
    assert hundred / 100 < 0.01 * step


def cpu_seconds(call):
    start = time.process_time()
    call()
    return time.process_time() - start


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("steps", [1, 2, 7, 101])
@pytest.mark.parametrize("ends", [{}, {"final_lr": 0.0}, {"final_lr": 0.0, "decay": 0.0}, {"final_lr": 0.1}])
def test_contract_plans_know_on_which_share_of_steps_a_teacher_is_run(name, steps, ends):
    optim = WSD.model_copy(update=ends)
    for changes in ({}, {"first": 0.0}, {"start": 0.0}, {"knots": [[0.2, 0.0], [0.6, 0.0], [0.7, 0.5]]}):
        if changes.keys() - POLICIES[name].model_fields.keys():
            continue
        settings = validate(ObjectiveConfig, {"alpha": {"policy": name} | EXAMPLES[name] | changes}, "test")
        policy = make_policy(settings.alpha, partial(learning_rate, optim, 1.0, batch_tokens=1))
        run = [policy.alpha(step, steps) > 0 or policy.needs_teacher_ce(step) for step in range(steps)]
        share = settings.taught_share(steps, lr_vanishes=optim.vanishes(steps, 1))
        assert share == pytest.approx(sum(run) / steps)
