"""The rule for alpha: surfaces of known coefficients, coverage of intervals, regrets of the backtest."""

from __future__ import annotations

import numpy as np
import pytest

from tutelage.errors import UserError
from tutelage.planner.backtest import backtest, gain_at
from tutelage.planner.mixing_rule import chosen_alpha, fit_surface
from tutelage.planner.points import AlonePoint, StudyPoints, TaughtPoint

KNOWN = np.array([6.0, 30.0, -8.0, 10.0, -40.0])
GAPS = (-0.1, -0.03, 0.02, 0.08, 0.15)
ALPHAS = (0.2, 0.4, 0.6, 0.8, 1.0)


def surface(alpha, gap):
    features = [alpha, alpha * gap, alpha**2, alpha**2 * gap, (alpha * gap) ** 2]
    return float(np.dot(KNOWN, features))


def point(teacher, gap, alpha, gain, student="s", size=5e4):
    return TaughtPoint(
        study="made", student=student, teacher=teacher, parameters=size, tokens=1e6,
        teacher_loss=2.0, alone_loss=2.0 * float(np.exp(gap)), loss=2.0, alpha=alpha, seeds=3,
        gains={"in_domain": gain},
    )  # fmt: skip


def points(gaps=GAPS, alphas=ALPHAS, noise=lambda *_: 0.0):
    return [
        point(f"t{i}", gap, alpha, surface(alpha, gap) + noise(gap, alpha))
        for i, gap in enumerate(gaps)
        for alpha in alphas
    ]


def test_a_surface_and_its_best_alpha_are_found_again():
    found = fit_surface(points(), "in_domain")
    assert found.coefficients == pytest.approx(KNOWN, abs=1e-6)
    assert found.error < 1e-9
    for gap in GAPS:
        dense = np.linspace(0, 1, 2001)
        best = dense[np.argmax([surface(alpha, gap) for alpha in dense])]
        alpha, gain = chosen_alpha(found, gap)
        assert alpha == pytest.approx(best, abs=0.03) or (alpha == 0.2 and best < 0.2)
        assert gain == pytest.approx(surface(alpha, gap))


def test_no_teacher_is_chosen_where_every_alpha_hurts():
    hurting = [point(f"t{i}", gap, a, -a) for i, gap in enumerate(GAPS) for a in ALPHAS]
    assert chosen_alpha(fit_surface(hurting, "in_domain"), 0.0) == (0.0, 0.0)


def test_an_alpha_between_the_steps_that_are_looked_at_is_chosen_too():
    """Of a study at alpha 1/3 alone the rule found no alpha that gains anything."""
    alpha = 1 / 3
    found = fit_surface(points((*GAPS, 0.2), (alpha,)), "in_domain")
    assert chosen_alpha(found, 0.08) == (alpha, pytest.approx(surface(alpha, 0.08), abs=0.05))


def test_a_teacher_beyond_the_fitted_ones_is_named():
    found = fit_surface(points(), "in_domain")
    assert found.outside(0.05) is None
    assert found.outside(0.3) == (
        "outside: a teacher at 0.741 of the student's own loss; known: 0.861 to 1.105"
    )


def test_two_pairs_are_too_few():
    assert fit_surface(points(GAPS[:2]), "in_domain") is None
    assert fit_surface(points(GAPS[:3], ALPHAS[:1]), "in_domain") is None
    assert fit_surface(points(), "fitted") is None


def test_intervals_hold_95_of_100_unknown_pairs():
    """Pairs differ from the surface by an amount of their own, larger at larger alphas, and by seed noise."""
    random, inside, total = np.random.default_rng(3), 0, 0
    for _ in range(150):
        gaps = random.uniform(-0.12, 0.18, 9)
        own = {gap: random.normal(0, 0.8) for gap in gaps}
        made = points(gaps, noise=lambda gap, alpha, own=own: alpha * own[gap] + random.normal(0, 0.3))
        found = fit_surface(made[5:], "in_domain")
        for one in made[:5]:
            predicted = found.predict(one.alpha, one.gap)
            inside += predicted.low <= one.gains["in_domain"] <= predicted.high
            total += 1
    assert 0.91 <= inside / total <= 0.99, inside / total


def study(taught):
    alone = AlonePoint(study="made", name="s", parameters=5e4, tokens=1e6, loss=2.0, runs=3)
    return StudyPoints(studies=("made",), texts=("text",), alone=(alone,), taught=tuple(taught))


def test_regrets_are_those_computed_by_hand():
    """On a noiseless surface the planner regrets nothing, and the others what the definition says."""
    taught = points()
    found = {(one.question, one.rule): one for one in backtest(study(taught))}
    gains = np.array([[surface(a, g) for a in ALPHAS] for g in GAPS])
    best = np.maximum(gains.max(axis=1), 0)
    assert found["alpha", "planner"].mean == pytest.approx(0, abs=1e-6)
    assert found["alpha", "planner"].best == 1
    assert found["alpha", "no teacher"].mean == pytest.approx(best.mean())
    assert found["alpha", "always 1"].worst == pytest.approx((best - gains[:, -1]).max())
    assert found["alpha", "always .5"].mean == pytest.approx((best - gains[:, 1:3].mean(axis=1)).mean())
    assert found["teacher", "planner"].mean == pytest.approx(0, abs=1e-6)
    strongest = gains[-1, 1:3].mean()
    assert found["teacher", "strongest at .5"].mean == pytest.approx(best.max() - strongest)
    assert {one.n for one in found.values() if one.question == "alpha"} == {len(GAPS)}


def test_what_is_hidden_is_hidden():
    """A pair whose gains are absurd misleads its own plan not at all, and others do not see through twins."""
    taught = points()
    absurd = [
        p.model_copy(update={"gains": {"in_domain": 500.0 * (p.alpha == 0.2)}})
        for p in taught
        if p.teacher == "t2"
    ]
    twins = [p.model_copy(update={"student": "s at another rate"}) for p in absurd]
    honest = fit_surface([p for p in taught if p.teacher != "t2"], "in_domain")
    promised, _ = chosen_alpha(honest, GAPS[2], ALPHAS)
    found = backtest(study([p for p in taught if p.teacher != "t2"] + absurd + twins))
    regret = next(one for one in found if (one.question, one.rule) == ("alpha", "planner"))
    assert regret.worst == pytest.approx(500.0 - 500.0 * (promised == 0.2))


def test_the_gain_at_an_alpha_that_was_not_run_is_that_of_the_nearest():
    pair = [point("t", 0.0, 0.4, 1.0), point("t", 0.0, 0.6, 3.0), point("t", 0.0, 1.0, 7.0)]
    assert [gain_at(pair, alpha, "in_domain") for alpha in (0.0, 0.3, 0.5, 0.9)] == [0.0, 1.0, 2.0, 7.0]


def test_a_study_without_alphas_to_choose_from_is_named():
    with pytest.raises(UserError, match=r"made: nothing to hide: 5 pairs"):
        backtest(study(points(alphas=(0.4,))))
