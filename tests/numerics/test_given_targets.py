"""Targets and gates as somebody gives them who has only read the docstrings: right, or refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from tutelage.config import objective_config as settings
from tutelage.config.alpha_config import ConstantAlpha
from tutelage.objective import (
    DIVERGENCES,
    Objective,
    TopK,
    TopP,
    chunked_objective,
    make_gate,
    make_policy,
    reference_objective,
)
from tutelage.objective.gates import TeacherBetter
from tutelage.types import DenseTargets, LogitTargets, MeanTargets, SparseTargets

N, D, V, K = 400, 8, 50, 16
FUNCTIONS = [chunked_objective, reference_objective]
GATE = settings.TeacherBetterGate(kind="teacher_better")
GATES = [
    settings.TeacherConfidenceGate(kind="teacher_confidence"),
    settings.TeacherEntropyGate(kind="teacher_entropy", drop=0.25),
    settings.TeacherCertaintyGate(kind="teacher_certainty", keep=0.2),
]


@pytest.fixture
def problem():
    """Hidden states, head, labels and a teacher of every degree of certainty."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, D, generator=g), torch.randn(V, D, generator=g)
    labels = torch.randint(0, V, (N,), generator=g)
    return hidden, weight, labels, torch.randn(N, V, generator=g) * torch.rand(N, 1, generator=g) * 6


def label_logp(logits, labels):
    return logits.log_softmax(-1).gather(1, labels.unsqueeze(1)).squeeze(1)


def top(logits, labels, k=K):
    """The k most probable ids, with nothing for the rest."""
    kept = logits.softmax(-1).topk(k)
    return SparseTargets(kept.indices, kept.values, torch.zeros(N), label_logp(logits, labels))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.kind)
def test_gates_see_draws_as_the_probabilities_that_they_are(problem, gate, function):
    """Of an id in several slots the probabilities are added; at first against a sum over the vocabulary."""
    hidden, weight, labels, logits = problem
    drawn = torch.multinomial(logits.softmax(-1), K, replacement=True, generator=torch.Generator())
    dense = torch.zeros(N, V).scatter_add_(1, drawn, torch.full((N, K), 1 / K))
    merged = dense.topk(K)
    given = drawn, torch.full((N, K), 1 / K)
    shares = []
    for ids, probs in (given, (merged.indices, merged.values)):
        targets = SparseTargets(ids, probs, torch.zeros(N), label_logp(logits, labels))
        own = make_gate(gate)
        for _ in range(2):
            sums = function(hidden, weight, labels, targets, 1.0, Objective(tail="none"), own)
            own.update(torch.zeros(()))
        shares.append(float(sums.effective_alpha) / N)
    assert shares[0] == pytest.approx(shares[1], abs=1e-6)
    if gate.kind == "teacher_confidence":
        assert shares[0] == pytest.approx(float(dense.amax(-1).mean()), rel=1e-5)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.kind)
def test_gates_that_go_by_the_teacher_refuse_ids_kept_at_another_temperature(problem, gate, function):
    hidden, weight, labels, logits = problem
    kept = (logits / 4).softmax(-1).topk(V)
    targets = SparseTargets(kept.indices, kept.values, torch.zeros(N), label_logp(logits, labels), 4.0)
    objective = Objective(temperature=4.0)
    with pytest.raises(ValueError, match=r"targets.temperature 4.0: gate Teacher"):
        function(hidden, weight, labels, targets, 0.5, objective, make_gate(gate))
    function(hidden, weight, labels, targets, 0.5, objective, make_gate(GATE))
    function(hidden, weight, labels, LogitTargets(logits), 0.5, objective, make_gate(gate))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("truncation", [TopP(p=1.0), TopK(k=V)], ids=str)
def test_a_truncation_that_keeps_all_is_none(problem, truncation, divergence, function):
    """Of a teacher so sharp that probabilities underflow, where reverse KL was infinite."""
    hidden, weight, labels, logits = problem
    found = []
    for kept in (None, truncation):
        h, w = (x.clone().requires_grad_() for x in (hidden, weight))
        objective = Objective(divergence=divergence, temperature=0.5, truncation=kept)
        sums = function(h, w, labels, LogitTargets(20 * logits), 0.4, objective)
        sums.loss.backward()
        assert sums.loss.isfinite()
        found.append((sums.loss.detach(), sums.kd, h.grad, w.grad))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_mass_that_is_missing_is_asked_for(problem, function):
    hidden, weight, labels, logits = problem
    targets = top(logits, labels)
    with pytest.raises(ValueError, match=r"targets.tail: with it the probabilities of token \d+ sum to 0\."):
        function(hidden, weight, labels, targets, 0.5, Objective())
    function(hidden, weight, labels, targets, 0.5, Objective(tail="renormalise"))
    function(hidden, weight, torch.full_like(labels, -100), targets, 0.5, Objective())  # nothing is taught
    silent = SparseTargets(targets.ids_NK, targets.probs_NK * 0, targets.tail_N, targets.gold_logp_N)
    assert float(function(hidden, weight, labels, silent, 0.5, Objective()).kd) == 0.0
    rest = 1 - targets.probs_NK.sum(-1)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        probs, tail = targets.probs_NK.to(dtype), rest.clamp(min=0).to(dtype)
        rounded = SparseTargets(targets.ids_NK, probs, tail, targets.gold_logp_N)
        assert function(hidden, weight, labels, rounded, 0.5, Objective()).kd.isfinite()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_teacher_who_is_sure_is_refused_for_reverse_kl_and_has_a_floor(problem, function):
    hidden, weight, labels, logits = problem
    logits[3, 7] = 60.0
    kept = logits.softmax(-1).topk(8)
    objective = Objective(divergence="reverse_kl")
    for floor, refused in ((0.0, True), (torch.finfo(torch.float32).tiny, False)):
        tail = (1 - kept.values.sum(-1)).clamp(min=floor)
        targets = SparseTargets(kept.indices, kept.values, tail, label_logp(logits, labels))
        h = hidden.clone().requires_grad_()
        if refused:
            with pytest.raises(ValueError, match=r"targets\.tail: 0 at token 3, and reverse KL"):
                function(h, weight, labels, targets, 0.5, objective)
            continue
        function(h, weight, labels, targets, 0.5, objective).loss.backward()
        assert h.grad.isfinite().all()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_teacher_who_says_nothing_of_a_token_is_refused_for_reverse_kl(problem, function):
    """It is infinite there too; forward KL leaves such a token to its label."""
    hidden, weight, labels, logits = problem
    probs, ids = logits.softmax(-1).topk(8)
    tail = 1 - probs.sum(-1)
    probs[5], tail[5] = 0.0, 0.0
    targets = SparseTargets(ids, probs, tail, label_logp(logits, labels))
    forward = function(hidden, weight, labels, targets, 0.5, Objective(), per_token=True)
    assert forward.tokens.kd_N[5] == 0
    with pytest.raises(ValueError, match=r"targets\.tail: 0 at token 5, and reverse KL"):
        function(hidden, weight, labels, targets, 0.5, Objective(divergence="reverse_kl"))


def test_probabilities_are_no_log_probabilities(problem):
    hidden, weight, labels, logits = problem
    targets = SparseTargets(
        *logits.softmax(-1).topk(V)[::-1], torch.zeros(N), label_logp(logits, labels).exp()
    )
    with pytest.raises(ValueError, match=r"targets\.gold_logp: above 0"):
        chunked_objective(hidden, weight, labels, targets, 0.5, Objective())


def test_a_second_derivative_is_refused(problem):
    hidden, weight, labels, _ = problem
    sums = chunked_objective(hidden.requires_grad_(), weight, labels, None, 0.0, Objective())
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(sums.loss, hidden, create_graph=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": "teacher_better"}, "gate is a str: give make_gate"),
        ({"gate": GATE}, "gate is a TeacherBetterGate: give make_gate"),
        ({"gate": torch.zeros(V)}, "gate is a Tensor"),
        ({"gate": lambda stats: stats.ce_C}, "gate is a function: give make_gate"),
        ({"gate": TeacherBetter}, "gate is a type: give make_gate"),
        ({"gate": 0.5}, "gate is a float: give make_gate"),
        ({"alpha": [0.4]}, r"alpha \[0.4\]: must be a number"),
        ({"alpha": True}, "alpha True: must be a number"),
        ({"alpha": ConstantAlpha(value=0.4)}, "alpha ConstantAlpha.*: must be a number"),
        (
            {"alpha": make_policy(ConstantAlpha(value=0.4), lambda *_: 1.0)},
            r"alpha .*Schedule.*: must be",
        ),
        ({"alpha": np.full(2, 0.4)}, "alpha array"),
        ({"transform": None}, "transform is a NoneType: give LogitTransform"),
        ({"transform": 30.0}, "transform is a float: give LogitTransform"),
        ({"targets": MeanTargets((LogitTargets(torch.zeros(N, V)),) * 2)}, r"parts\[0\] is a LogitTargets"),
    ],
)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_arguments_of_another_kind_are_named(problem, function, changes, message):
    hidden, weight, labels, logits = problem
    given = {"targets": LogitTargets(logits), "alpha": 0.5, "objective": Objective()} | changes
    with pytest.raises(TypeError, match=message):
        function(hidden, weight, labels, **given)


def test_a_gate_and_a_policy_are_made_of_their_settings():
    for wrong in ("teacher_better", ConstantAlpha(value=0.4), Objective()):
        with pytest.raises(TypeError, match=r"gate .*: give settings"):
            make_gate(wrong)
    for wrong in ("auto", 0.4, {"policy": "auto"}, GATE):
        with pytest.raises(TypeError, match=r"alpha .*: give settings"):
            make_policy(wrong, lambda *_: 1.0)


@pytest.mark.parametrize("tail", ["renormalise", "none"])
def test_probabilities_in_half_precision_are_added_and_divided_in_float32(problem, tail):
    """Rounded once, by whoever gave them: not again when those of an id are added, nor by their sum."""
    hidden, weight, labels, logits = problem
    kept = top(logits, labels)
    half = dataclasses.replace(kept, ids_NK=kept.ids_NK // 2, probs_NK=(0.9 * kept.probs_NK).bfloat16())
    wide = dataclasses.replace(half, probs_NK=half.probs_NK.float())
    found, expected = (
        chunked_objective(hidden, weight, labels, targets, 0.5, Objective(tail=tail))
        for targets in (half, wide)
    )
    torch.testing.assert_close(found.kd, expected.kd, rtol=1e-6, atol=0)


def test_targets_of_several_temperatures_are_no_targets(problem):
    cold = top(problem[3], problem[2])
    with pytest.raises(ValueError, match=r"temperatures \[1.0, 2.0\]: must be one"):
        SparseTargets.cat([cold, dataclasses.replace(cold, temperature=2.0)])


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_dtypes_and_devices_that_cannot_be_computed_with(problem, device):
    hidden, weight, labels, _ = (x.to(device) for x in problem)
    hidden, message = (
        (hidden, "hidden is on meta") if device == "meta" else (hidden.to(torch.float8_e5m2), "must")
    )
    with pytest.raises(ValueError, match=message):
        chunked_objective(hidden, weight, labels, None, 0.0, Objective())


@pytest.mark.parametrize("shape", [(V,), (1, V, D)], ids=str)
def test_a_teachers_head_is_a_matrix(problem, shape):
    hidden, weight, labels, _ = problem
    with pytest.raises(ValueError, match=r"targets.head .*must be \[vocabulary, width\]"):
        chunked_objective(hidden, weight, labels, DenseTargets(hidden, torch.zeros(shape)), 0.5, Objective())
