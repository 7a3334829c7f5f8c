"""The likely mistakes with the objective in Python: one sentence each, which says what to give."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import tutelage as tt
from tutelage.config.objective_config import ObjectiveConfig, RandomGate
from tutelage.objective import make_gate
from tutelage.types import DenseTargets, LogitTargets, SparseTargets

N, D, V = 6, 4, 11
HIDDEN, LABELS, LOGITS = torch.randn(N, D), torch.randint(0, V, (N,)), torch.randn(N, V)
HEAD = nn.Linear(D, V)
GIVEN = {
    "hidden_ND": HIDDEN,
    "weight_VD": HEAD.weight,
    "labels_N": LABELS,
    "targets": LogitTargets(LOGITS),
    "alpha": 0.4,
    "objective": tt.Objective(),
}
SPARSE = SparseTargets(LABELS.unsqueeze(1), torch.ones(N, 1), torch.zeros(N), torch.zeros(N))
MISTAKES = [
    ({"targets": LOGITS}, r"targets is a Tensor: give LogitTargets\(logits\), DenseTargets\(hidden"),
    ({"targets": (LOGITS,)}, r"targets is a tuple: give LogitTargets"),
    ({"targets": {"logits": LOGITS}}, r"targets is a dict: give LogitTargets"),
    ({"targets": DenseTargets(HIDDEN, HEAD)}, r"targets.head_VE is a Linear: must be a tensor; weight_and"),
    ({"targets": DenseTargets((HIDDEN,), HEAD.weight)}, r"targets.hidden_NE is a tuple: .* the last, \[-1\]"),
    ({"targets": dataclasses.replace(SPARSE, temperature="2")}, r"targets.temperature '2': must be a number"),
    ({"weight_VD": HEAD}, r"weight is a Linear: must be a tensor; weight_and_bias\(head\) takes weight and"),
    (
        {"hidden_ND": (HIDDEN, HIDDEN)},
        r"hidden is a tuple: must be a tensor; .* the last",
    ),
    ({"hidden_ND": HIDDEN.view(2, 3, D)}, r"hidden \(2, 3, 4\): must be \[tokens, 4\].* \.flatten\(0, 1\)"),
    ({"weight_VD": HEAD.weight.T}, r"hidden \(6, 4\): .*as weight \(4, 11\) is \[vocabulary, width\]"),
    ({"weight_VD": HEAD.weight[0]}, r"weight \(4,\): must be \[vocabulary, width\]"),
    ({"labels_N": LABELS.tolist()}, r"labels is a list: must be a tensor$"),
    ({"token_weights_N": [1.0] * N}, r"token_weights is a list: must be a tensor$"),
    ({"bias_V": [0.0] * V}, r"bias is a list: must be a tensor$"),
    ({"targets": LogitTargets(LOGITS.numpy())}, r"targets.logits is a ndarray: must be a tensor$"),
    (
        {"targets": dataclasses.replace(SPARSE, ids_NK=[[1]] * N)},
        r"targets.ids is a list: must be a tensor$",
    ),
    (
        {"targets": DenseTargets(HIDDEN, HEAD.weight, bias_V=[0.0] * V)},
        r"targets.bias is a list: must be a tensor$",
    ),
    (
        {"objective": {"temperature": 2.0}},
        r"objective is a dict: give .*, Objective\(\*\*settings\)",
    ),
    ({"objective": "jsd"}, r"objective is a str: give an Objective, Objective\(divergence=\.\.\.\)"),
    ({"objective": None}, r"objective is a NoneType: give an Objective, Objective\(temp"),
    (
        {"objective": ObjectiveConfig(gate={"kind": "teacher_better"})},
        r"gate None, but objective.gate is teacher_better: .*gate=make_gate\(objective.gate\)",
    ),
    (
        {"objective": ObjectiveConfig(alpha=0.9)},
        r"alpha 0.4, but objective.alpha is 0.9: .* same, or an Objective",
    ),
    ({"alpha": torch.rand(N)}, r"alpha is a tensor \(6,\): must be one number; .*token_weights_N, or .*gate"),
    ({"alpha": "0.4"}, r"alpha '0.4': must be a number"),
    ({"alpha": 40}, r"alpha 40: must be between 0 and 1"),
    ({"token_weights_N": torch.rand(N, 1)}, r"token_weights \(6, 1\): must be \[6\], one per token"),
    ({"token_weights_N": torch.rand(N).requires_grad_()}, r"token_weights: would get no gradient; .*detach"),
    ({"token_weights_N": torch.ones(N) / 0}, r"token_weights: has 6 values that are NaN or infinite"),
    (
        {"token_weights_N": torch.ones(N, dtype=torch.int64)},
        r"token_weights is torch.int64: must be float",
    ),
]


@pytest.mark.parametrize(("mistake", "sentence"), MISTAKES, ids=[pattern[:30] for _, pattern in MISTAKES])
@pytest.mark.parametrize("function", [tt.chunked_objective, tt.reference_objective])
def test_a_sentence_says_what_to_give(function, mistake, sentence):
    with pytest.raises((TypeError, ValueError), match=sentence) as refused:
        function(**GIVEN | mistake)
    assert len(str(refused.value).splitlines()) == 1


def test_what_the_sentences_advise_works():
    weight, bias = tt.weight_and_bias(HEAD)
    hidden_states = (torch.zeros(2, 3, D), HIDDEN.view(2, 3, D))
    sums = tt.chunked_objective(
        hidden_states[-1].flatten(0, 1), weight, LABELS, LogitTargets(LOGITS), 0.4,
        tt.Objective(temperature=2.0), bias_V=bias, token_weights_N=torch.rand(N).requires_grad_().detach(),
    )  # fmt: skip
    assert sums.loss.isfinite()


@pytest.mark.parametrize("retain", [True, False])
def test_a_second_backward_pass_says_so(retain):
    loss = tt.chunked_objective(
        HIDDEN.clone().requires_grad_(), HEAD.weight, LABELS, None, 0.0, tt.Objective()
    ).loss
    loss.backward(retain_graph=retain)
    with pytest.raises(RuntimeError, match=r"a second backward pass.*call the objective again|second time"):
        loss.backward()


@pytest.mark.parametrize("field", ["temperature", "label_smoothing", "z_loss", "jsd_beta"])
def test_a_number_as_text_is_one_line(field):
    with pytest.raises(ValueError, match=rf"{field} = '2'") as refused:
        tt.Objective(**{field: "2"})
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("kind", [np.int64, np.uint8])
def test_a_whole_number_of_numpy_is_one(kind):
    given = GIVEN | {"weight_VD": torch.randn(V + 2, D), "targets": LogitTargets(torch.randn(N, V))}
    expected, found = (tt.chunked_objective(**given, vocab_size=size).loss for size in (V, kind(V)))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("drawn", [torch.rand(N - 1), torch.rand(N + 1), torch.rand(2, 3), [0.5] * N])
@pytest.mark.parametrize("objective", [tt.chunked_objective, tt.reference_objective])
def test_a_random_gate_wants_a_number_for_each_token(drawn, objective):
    gate = make_gate(RandomGate(kind="random"))
    gate.begin(lambda: drawn)
    with pytest.raises(ValueError, match=r"gate random: draw\(\) gave .*: must be a tensor \(6,\)"):
        objective(**GIVEN, gate=gate)


@pytest.mark.parametrize(
    "settings", [{"temperature": 2.0}, {"alpha": 0.4, "temperature": 2.0}, {"alpha": "auto"}]
)
def test_the_objective_of_a_run_is_one(settings):
    """Where it says no other alpha or gate than the call."""
    plain = tt.Objective(temperature=settings.get("temperature", 1.0))
    of_run = ObjectiveConfig(**settings)
    expected, found = (tt.chunked_objective(**GIVEN | {"objective": one}).loss for one in (plain, of_run))
    assert torch.equal(found, expected)


def test_logits_that_are_no_probabilities_are_taken():
    flat = LogitTargets(torch.full((N, V), 1 / V).log())
    for logits in (flat.logits_NV, flat.logits_NV.exp() - 1, torch.zeros(N, V), torch.ones(N, V)):
        found = tt.chunked_objective(**GIVEN | {"targets": LogitTargets(logits)})
        torch.testing.assert_close(found.loss, tt.chunked_objective(**GIVEN | {"targets": flat}).loss)
