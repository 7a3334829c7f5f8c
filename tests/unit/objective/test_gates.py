"""Per-token gates: what they let through, and the thresholds that some of them keep."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch

from tutelage import objective
from tutelage.config.load import validate
from tutelage.config.objective_config import GateConfig, ObjectiveConfig
from tutelage.objective import GATES, TokenStats, make_gate


def make(kind, **settings):
    gate = make_gate(validate(ObjectiveConfig, {"gate": {"kind": kind} | settings}, "test").gate)
    gate.begin(lambda: torch.linspace(0.01, 0.99, 50))
    return gate


def stats(**known):
    """Statistics of tokens; what is not given is made up."""
    size = len(next(iter(known.values())))
    known = {f"{name}_C": torch.as_tensor(values, dtype=torch.float32) for name, values in known.items()}
    names = TokenStats.__dataclass_fields__.keys() - {"rows"}
    filled = {name: torch.linspace(0.1, 0.9, size) for name in names}
    return TokenStats(**filled | known)


def draws(steps, tokens):
    """Entropies in [0, 6), dense near 0."""
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(tokens, generator=generator).square() * 6 for _ in range(steps)]


def end_step(gate):
    gate.sums()
    gate.update(torch.zeros(()))


def test_teacher_better_compares_on_the_label():
    gate = make("teacher_better")
    assert gate(stats(ce=[2.0, 1.0, 1.5], teacher_ce=[1.0, 2.0, 1.5])).tolist() == [1.0, 0.0, 0.0]


def test_teacher_confidence_is_the_largest_probability():
    gate = make("teacher_confidence")
    assert gate(stats(teacher_max=[0.25, 1.0])).tolist() == [0.25, 1.0]
    assert gate.needs == {"teacher_max"}


@pytest.mark.parametrize("kind", ["student_entropy", "teacher_entropy"])
def test_entropy_gates_let_all_pass_in_the_first_step(kind):
    assert make(kind)(stats(**{kind: [0.5, 1.0, 1.5]})).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("kind", "settings", "kept"),
    [
        ("student_entropy", {}, 0.2),
        ("student_entropy", {"keep": 0.7}, 0.7),
        ("teacher_entropy", {}, 0.85),
        ("teacher_entropy", {"drop": 0.5}, 0.5),
        ("teacher_certainty", {}, 0.2),
        ("teacher_certainty", {"keep": 0.6}, 0.6),
    ],
)
@pytest.mark.parametrize(("low", "high"), [(0.0, 6.0), (0.0, 0.02), (5.6, 5.65), (10.0, 11.0)])
def test_entropy_gates_keep_their_fraction_whatever_the_distribution(kind, settings, kept, low, high):
    gate = make(kind, **settings)
    fractions = []
    for values in draws(60, 1024):
        measure = "teacher_entropy" if kind == "teacher_certainty" else kind
        fractions.append(gate(stats(**{measure: low + (high - low) * values / 6})).mean().item())
        end_step(gate)
    late = fractions[1:]
    assert sum(late) / len(late) == pytest.approx(kept, abs=0.02)
    assert max(abs(fraction - kept) for fraction in late) < 0.12  # token by token, not all or nothing


@pytest.mark.parametrize(("low", "high"), [(-6.0, 6.0), (-0.02, 0.0), (3.0, 30.0), (-15.0, -3.0)])
def test_teacher_ahead_keeps_its_fraction_whoever_is_better(low, high):
    gate, fractions = make("teacher_ahead"), []
    for values in draws(60, 1024):
        ahead = low + (high - low) * values / 6
        fractions.append(gate(stats(ce=40.0 + ahead, teacher_ce=torch.full((1024,), 40.0))).mean().item())
        end_step(gate)
    assert fractions[0] == 1.0
    beyond = high > gate.LARGEST  # differences above 16 nats are alike
    assert sum(fractions[1:]) / 59 == pytest.approx(0.2, abs=0.25 if beyond else 0.02)


def test_teacher_certainty_passes_the_lowest_entropies_and_none_at_first():
    gate = make("teacher_certainty", keep=0.25)
    values = torch.tensor([3.0, 0.5, 1.0, 2.0])
    assert gate.share == 0
    assert gate(stats(teacher_entropy=values)).tolist() == [0.0] * 4
    end_step(gate)
    assert gate.share == 0.25
    assert gate(stats(teacher_entropy=values)).tolist() == [0.0, 1.0, 0.0, 0.0]


def test_random_passes_by_the_number_of_each_token_whatever_the_chunks():
    gate = make("random", keep=0.5)
    drawn = torch.tensor([0.7, 0.2, 0.5, 0.4])
    gate.begin(lambda: drawn)
    whole = gate(stats(ce=[1.0] * 4))
    assert whole.tolist() == [0.0, 1.0, 0.0, 1.0]
    parts = [replace(stats(ce=[1.0]), rows=rows) for rows in (slice(0, 1), torch.tensor([1, 3]))]
    assert torch.cat([gate(part) for part in parts]).tolist() == [0.0, 1.0, 1.0]
    unbegun = make_gate(validate(ObjectiveConfig, {"gate": {"kind": "random"}}, "test").gate)
    with pytest.raises(ValueError, match="gate random: call begin"):
        unbegun(stats(ce=[1.0]))


@pytest.mark.parametrize("keep", [0.01, 0.2, 0.5, 0.99])
def test_the_threshold_is_the_quantile_of_the_last_step(keep):
    gate = make("student_entropy", keep=keep)
    for values in draws(3, 5000):
        gate(stats(student_entropy=values))
        end_step(gate)
        assert (values > gate.state()["threshold"]).float().mean().item() == pytest.approx(keep, abs=0.002)


@pytest.mark.parametrize(("kind", "lowest"), [("student_entropy", 0.0), ("teacher_ahead", -16.0)])
@pytest.mark.parametrize("keep", [0.02, 0.25, 0.9])
def test_a_quantile_in_the_lowest_bin(kind, lowest, keep):
    gate = make(kind, keep=keep)
    places = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000  # all in the first of the bins
    part = 2 * places / gate.BINS - 1
    values = 16 * part * part.abs() if lowest else 16 * (places / gate.BINS) ** 2
    known = {"student_entropy": values} if not lowest else {"ce": 40 + values, "teacher_ce": places * 0 + 40}
    gate(stats(**known))
    end_step(gate)
    threshold = gate.state()["threshold"]
    assert lowest < threshold <= values.max()
    assert (values > threshold).double().mean().item() == pytest.approx(keep, abs=0.003)
    assert gate.share == pytest.approx(keep)  # a threshold that is known, so that routing teaches


def test_entropies_that_are_zero_are_alike_whatever_the_fraction():
    gate = make("teacher_certainty", keep=0.2)
    values = torch.cat([torch.zeros(600), torch.linspace(0.1, 3.0, 400)])
    gate(stats(teacher_entropy=values))
    end_step(gate)
    assert gate(stats(teacher_entropy=values)).tolist() == [1.0] * 600 + [0.0] * 400
    assert gate.share == pytest.approx(0.2)


def test_entropies_out_of_range_do_not_break_the_histogram():
    gate = make("student_entropy")
    gate(stats(student_entropy=[-1e-7, 0.0, 16.0, 99.0]))
    end_step(gate)
    assert 0.0 <= gate.state()["threshold"] <= 16.0


def test_tokens_without_loss_are_not_counted():
    values = draws(1, 64)[0]
    ce = torch.rand(64) + 0.1
    masked = make("student_entropy")
    masked(
        stats(
            student_entropy=torch.cat([values, torch.full((64,), 9.0)]), ce=torch.cat([ce, torch.zeros(64)])
        )
    )
    plain = make("student_entropy")
    plain(stats(student_entropy=values, ce=ce))
    for gate in (masked, plain):
        end_step(gate)
    assert masked.state() == plain.state()


def test_a_step_without_a_single_token_moves_nothing():
    gate = make("student_entropy")
    gate(stats(student_entropy=[1.0, 2.0], ce=[0.0, 0.0]))
    end_step(gate)
    assert gate.state() == {"threshold": 0.0}


@pytest.mark.parametrize("kind", GATES)
def test_contract_factors_and_state(kind):
    whole, first, second = make(kind), make(kind), make(kind)
    made = [stats(ce=values + 0.1, student_entropy=values, teacher_entropy=values) for values in draws(9, 50)]
    expected = [step_of(whole, one) for one in made]
    assert all(((factor >= 0) & (factor <= 1)).all() for factor in expected)
    found = [step_of(first, one) for one in made[:4]]
    second.load(first.state())
    found += [step_of(second, one) for one in made[4:]]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert second.state() == whole.state()


@pytest.mark.parametrize("kind", GATES)
def test_contract_neither_chunks_nor_ranks_change_the_threshold(kind):
    whole, ranks = make(kind), [make(kind), make(kind)]
    for values in draws(20, 60):
        one = dict.fromkeys(("ce", "student_entropy", "teacher_entropy"), values + 0.01)
        one["teacher_ce"] = values.flip(0)
        whole(stats(**one))
        for rank, rows in ((0, slice(0, 10)), (1, slice(10, 40)), (0, slice(40, 60))):
            ranks[rank](stats(**{name: tensor[rows] for name, tensor in one.items()}))
        for mine, theirs in zip(
            *(gate.sums() for gate in ranks), strict=True
        ):  # what the step's all-reduce does
            total = mine + theirs
            mine.copy_(total)
            theirs.copy_(total)
        for gate in (whole, *ranks):
            gate.update(torch.zeros(()))
    assert whole.state() == ranks[0].state() == ranks[1].state()


def step_of(gate, one):
    factors = gate(one)
    end_step(gate)
    return factors


def test_gates_take_no_gradient_and_stay_on_the_device():
    gate = make("student_entropy")
    values = torch.rand(8, requires_grad=True)
    assert not gate(stats(student_entropy=values.detach())).requires_grad
    assert all(isinstance(total, torch.Tensor) and not total.requires_grad for total in gate.sums())


@pytest.mark.parametrize("kind", ["student_entropy", "teacher_entropy", "teacher_certainty"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_step_that_is_skipped_moves_no_threshold(kind, bad):
    """Numbers that are not finite reach a gate on CUDA, where the objective does not look at its inputs."""
    gate = make(kind)
    for values in draws(3, 40):
        step_of(gate, stats(**dict.fromkeys(("ce", "student_entropy", "teacher_entropy"), values + 0.01)))
    before = gate.state()
    gate(stats(ce=[1.0, bad, 2.0], student_entropy=[bad, 1.0, 2.0], teacher_entropy=[bad, 1.0, 2.0]))
    gate.sums()
    gate.update(torch.ones(()))
    assert gate.state() == before
    gate(stats(ce=[1.0], student_entropy=[5.0], teacher_entropy=[5.0]))
    end_step(gate)
    assert gate.state() != before


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_of_the_process_does_not_matter(dtype):
    values = torch.linspace(0.0, 8.0, 1000)
    states = []
    for default in (torch.float32, dtype):
        torch.set_default_dtype(default)
        try:
            gate = make("student_entropy", keep=0.3)
            gate(stats(student_entropy=values, ce=values + 1, teacher_ce=values))
            gate.update(torch.zeros(()))
            states.append(gate.state())
        finally:
            torch.set_default_dtype(torch.float32)
    assert states[0] == states[1]


def test_the_settings_of_every_gate_are_where_the_objective_is():
    known = {option.__name__: option for option in get_args(get_args(GateConfig)[0])}
    assert known.keys() <= set(objective.__all__)
    assert all(vars(objective)[name] is option for name, option in known.items())
