"""Advise whether to distil, from whom and how, beside the same compute without a teacher."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from math import exp, hypot, log
from typing import TYPE_CHECKING, Literal

import numpy as np

from tutelage.files import short
from tutelage.models.flops import forward_flops, parameters, training_flops
from tutelage.planner.laws import BEST_TEACHER, PAYS_BELOW, rule_alpha
from tutelage.planner.ledger import ways
from tutelage.planner.mixing_rule import Prediction, chosen_alpha
from tutelage.planner.study_fit import interval
from tutelage.run_plan import fewest_devices

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tutelage.config.run_config import RunConfig
    from tutelage.models.shapes import ModelShape
    from tutelage.planner.candidates import Candidate
    from tutelage.planner.ledger import Expense, Prices
    from tutelage.planner.points import GainSide
    from tutelage.planner.study_fit import Basis

Recommendation = Literal["distil", "do not distil", "cannot say"]
_BUDGETS = 200
_PERCENT = 100


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What is to be planned.

    Attributes:
        config: draft of the student's run.
        shape: of the student.
        vocab_size: of the student.
        tokens: that the student is to be trained on, whole batches.
        basis: what predictions are built on.
        prices: of operations.
        side: whose gain the alpha is chosen for.
        text_tokens: of the store's training split; None without a store.
        notes: what there is to say of the basis, sentences.
    """

    config: RunConfig
    shape: ModelShape
    vocab_size: int
    tokens: int
    basis: Basis
    prices: Prices
    side: GainSide
    text_tokens: int | None
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> float:
        """Of the student, without embeddings."""
        return float(parameters(self.shape, self.vocab_size).non_embedding)

    @property
    def flops(self) -> float:
        """Of the student per token, forward and backward."""
        return training_flops(forward_flops(self.shape, self.vocab_size, self.config.data.sequence_length))


@dataclass(frozen=True, slots=True)
class Outlook:
    """What one teacher promises.

    Attributes:
        teacher: who.
        alpha: that is recommended with it; 0: none.
        alpha_source: where that is from.
        gains: percent by side at that alpha, against the student alone on the same tokens; where only pure
            distillation can be predicted, of alpha 1.
        predicted_alpha: alpha that the gains are of.
        loss: of the student then, nats per token.
        ratio: loss of the teacher over the untaught student's own; None where one is not known.
        checks: sentences.
        costs: ways to train it.
        longer_tokens: tokens of an untaught student with the compute of one run, online, or all of the text.
        longer_gain: what these give it in domain, percent; None where no law says so.
        longer_known: False if they are beyond the law, so that they give at least that.
        break_even: budgets at which distilling beats that; empty where no law says so.
    """

    teacher: Candidate
    alpha: float
    alpha_source: str
    gains: dict[GainSide, Prediction]
    predicted_alpha: float
    loss: Prediction | None
    ratio: float | None
    checks: tuple[str, ...]
    costs: tuple[Expense, ...]
    longer_tokens: int
    longer_gain: Prediction | None
    longer_known: bool
    break_even: str

    @property
    def lead(self) -> float | None:
        """Gain in domain minus what the same compute gives without a teacher, percentage points.

        None where no law says which of the two is more.
        """
        return _lead(self.gains.get("in_domain"), self.longer_gain, known=self.longer_known)


@dataclass(frozen=True, slots=True)
class Advice:
    """The answer.

    Attributes:
        answer: whether to distil.
        why: sentences.
        alone: loss of the untaught student; None where nothing says it.
        alone_cost: of training it.
        outside: what of the student is outside of the range of predictions; None if nothing is.
        outlooks: of every teacher.
        best: the teacher to take, or the best of those not worth taking; None where none is known.
    """

    answer: Recommendation
    why: tuple[str, ...]
    alone: Prediction | None
    alone_cost: Expense
    outside: str | None
    outlooks: tuple[Outlook, ...]
    best: Outlook | None = field(default=None)


def advise(request: PlanRequest, teachers: Sequence[Candidate]) -> Advice:
    """Judge every teacher, and the student without one."""
    basis, tokens = request.basis, request.tokens
    outside = basis.range.outside(request.parameters, tokens)
    if (request.parameters, float(tokens)) in basis.measured:
        outside = None
    alone = basis.alone(request.parameters, tokens) if outside is None else None
    outlooks = tuple(_outlook(request, alone, teacher) for teacher in teachers)
    unknown = (
        "the fitted studies have too few sizes and budgets for a law, or several texts"
        if alone is None
        else None
    )
    answer, why, best = _answer(request, outside or unknown, outlooks)
    cost = request.prices.cost("1", training=0.0, forward=0.0, student=request.flops * tokens)
    return Advice(answer, (*why, *request.notes), alone, cost, outside, outlooks, best)


def _outlook(request: PlanRequest, alone: Prediction | None, teacher: Candidate) -> Outlook:
    gap = _gap(alone, teacher)
    alpha, source, checks = _alpha(request, gap)
    gains, at = _gains(request, request.tokens, teacher, alpha) if gap is not None else ({}, 1.0)
    inside = gains.get("in_domain")
    text = request.tokens if request.text_tokens is None else request.text_tokens
    costs = ways(teacher, request.flops, request.tokens, text, request.vocab_size, request.prices)
    longer = int(_as_many(request, request.tokens, costs[0].flops))
    more, reached = _longer(request, request.tokens, longer)
    return Outlook(
        teacher=teacher,
        alpha=alpha,
        alpha_source=source,
        gains=gains,
        predicted_alpha=at,
        loss=None if inside is None or alone is None else _after(alone.mean, inside),
        ratio=None if gap is None else exp(-gap),
        checks=(*_checks(request, teacher, gap), *checks, *_memory(request, teacher)),
        costs=tuple(costs),
        longer_tokens=longer,
        longer_gain=more,
        longer_known=reached,
        break_even=_break_even(request, teacher) if inside is not None else "",
    )


def _gap(alone: Prediction | None, teacher: Candidate) -> float | None:
    """log(loss of the untaught student / loss of the teacher); None where one is not known."""
    return None if alone is None or teacher.loss is None else log(alone.mean / teacher.loss.mean)


def _alpha(request: PlanRequest, gap: float | None) -> tuple[float, str, list[str]]:
    """The alpha to take, where it is from, and what there is to say about it."""
    surfaces = request.basis.surfaces
    if gap is None:
        return 0.0, "", []
    if request.side in surfaces:
        surface = surfaces[request.side]
        alpha, _ = chosen_alpha(surface, gap)
        words = f"rule fitted on {surface.pairs} pairs, off by {surface.error:.2g} points where left out"
        words = words if alpha else f"{_NONE}: {words}"
        return alpha, words, []
    words = "where auto, the default, settles for such a teacher; no law predicts its gain"
    missing = "no correction for alpha below 1: no study was fitted (--study or --fit)"
    return rule_alpha(gap), words, [missing]


def _gains(
    request: PlanRequest, tokens: float, teacher: Candidate, alpha: float
) -> tuple[dict[GainSide, Prediction], float]:
    """Gains by side, and the alpha that they are of; none outside of what was fitted."""
    basis = request.basis
    alone = basis.alone(request.parameters, tokens)
    gap = _gap(alone, teacher)
    if alone is None or teacher.loss is None or gap is None:
        return {}, alpha
    if basis.surfaces:
        unsure = hypot(_relative(alone), _relative(teacher.loss))
        able = {side: one for side, one in basis.surfaces.items() if one.outside(gap) is None}
        return {side: one.predict(alpha, gap, unsure) for side, one in able.items()}, alpha
    low, high = basis.teachers
    if basis.taught is None or not low <= teacher.loss.mean <= high:
        return {}, 1.0
    taught = float(basis.taught.loss(request.parameters, tokens, teacher.loss.mean, alone.mean))
    after = interval(taught, basis.taught_half_width)
    ends = [_PERCENT * (1 - loss / alone.mean) for loss in (after.mean, after.high or 0.0, after.low or 0.0)]
    return {"in_domain": Prediction(ends[0], ends[1], ends[2])}, 1.0


def _relative(loss: Prediction) -> float:
    """Half of the interval of a predicted loss as a part of it; 0 of a measured one."""
    return 0.0 if loss.low is None or loss.high is None else (loss.high - loss.low) / (2 * loss.mean)


def _after(alone: float, gain: Prediction) -> Prediction:
    """The loss that a gain in percent leaves."""
    ends = [None if end is None else alone * (1 - end / _PERCENT) for end in (gain.high, gain.low)]
    return Prediction(alone * (1 - gain.mean / _PERCENT), ends[0], ends[1])


def _as_many(request: PlanRequest, tokens: float, flops: float) -> float:
    """Tokens of the untaught student that cost so much, at most all of the text; `tokens` at least."""
    many = flops / request.flops
    return many if request.text_tokens is None else min(many, max(request.text_tokens, tokens))


def _lead(gain: Prediction | None, longer: Prediction | None, *, known: bool) -> float | None:
    """A gain minus what more tokens give, or `known` is False and they give at least that.

    None where that is less than the law of more tokens can tell.
    """
    if gain is None or longer is None:
        return None
    lead = gain.mean - longer.mean
    unsure = gain.mean > 0 and longer.holds(gain.mean)  # more tokens never give less than nothing
    return None if unsure or (lead > 0 and not known) else lead


def _longer(request: PlanRequest, tokens: float, longer: float) -> tuple[Prediction | None, bool]:
    """What more tokens give the untaught student in domain, percent, and whether the law reaches that far.

    Beyond its range it is what the most tokens of the range give, which more cannot fall below.
    """
    basis, size = request.basis, request.parameters
    reached = min(longer, basis.range.tokens[1])
    if basis.law is None or basis.range.outside(size, tokens) is not None:
        return None, False
    left = float(basis.law.loss(size, reached) / basis.law.loss(size, tokens))
    gain = _PERCENT * (1 - left)
    if basis.spread is None:
        return Prediction(gain, None, None), reached == longer
    half = _PERCENT * left * basis.spread.between(size, tokens, reached)
    return Prediction(gain, gain - half, gain + half), reached == longer


def _break_even(request: PlanRequest, teacher: Candidate) -> str:
    """Budgets of the student, as far as the text goes, at which distilling beats what as much compute gives.

    Each with the alpha that is recommended there.
    """
    low, high = request.basis.range.tokens
    high = min(high, request.text_tokens or high)
    pays: list[tuple[float, bool]] = []
    for tokens in np.geomspace(low, high, _BUDGETS) if low < high else ():
        spent = tokens * (request.flops + teacher.forward_flops) + teacher.training_flops
        longer, reached = _longer(request, tokens, _as_many(request, tokens, spent))
        alpha, _, _ = _alpha(request, _gap(request.basis.alone(request.parameters, tokens), teacher))
        gain = _gains(request, tokens, teacher, alpha)[0].get("in_domain")
        if (lead := _lead(gain, longer, known=reached)) is not None:
            pays.append((float(tokens), lead > 0))
    if not pays:
        return ""
    span = f"{short(pays[0][0])} to {short(pays[-1][0])} tokens"
    changes = [
        (here if now else there, now) for (there, before), (here, now) in pairwise(pays) if before != now
    ]
    if not changes:
        return f"{'on every' if pays[0][1] else 'on no'} budget of {span}"
    words = [f"{'above' if now else 'below'} {short(tokens)}" for tokens, now in changes]
    return f"{' and '.join(words)} tokens (looked at: {span})"


def _checks(request: PlanRequest, teacher: Candidate, gap: float | None) -> list[str]:
    """Sentences about a teacher beside its student."""
    if teacher.outside is not None:
        return [teacher.outside]
    if gap is None or teacher.loss is None:
        return []
    ratio, basis = exp(-gap), request.basis
    own = f"its loss is {ratio:.3f} of the student's own"
    if basis.surfaces:  # a rule of these studies, so none of the published models
        outside = (one.outside(gap) for one in basis.surfaces.values())
        return [own, *dict.fromkeys(text for text in outside if text is not None)]
    verb = "it does" if ratio < PAYS_BELOW else "it does not"
    found = [f"{own}; pure distillation (alpha 1) pays below {PAYS_BELOW:g}, so {verb}"]
    if ratio < BEST_TEACHER[0]:
        found.append(f"stronger than the best teachers, at {BEST_TEACHER[0]:g} to {BEST_TEACHER[1]:g}")
    low, high = basis.teachers
    if not low <= teacher.loss.mean <= high:
        found.append(
            f"outside: a teacher of {teacher.loss.mean:.3f} nats per token; known: {low:g} to {high:g}"
        )
    if teacher.measured:
        found.append("its loss is of your text, the law's of English web text: they may not compare")
    return found


def _memory(request: PlanRequest, teacher: Candidate) -> list[str]:
    """A sentence if the student does not fit the devices beside its teacher."""
    hardware = request.prices.hardware
    beside = [] if teacher.shape is None else [teacher.shape]
    asked = request.config, request.shape, beside, (), request.vocab_size, hardware.name
    devices, memory = fewest_devices(*asked)
    if memory.total > hardware.memory:
        return [f"online it needs {memory.total / 1e9:.3g} GB on each device, of {hardware.memory / 1e9:.3g}"]
    if devices > hardware.devices:
        return [f"online it needs {devices} devices of {hardware.devices}, or a smaller micro_batch_tokens"]
    return []


def _answer(
    request: PlanRequest, unknown: str | None, outlooks: Sequence[Outlook]
) -> tuple[Recommendation, list[str], Outlook | None]:
    """The answer, the reasons, and the best teacher."""
    if unknown is not None:
        return "cannot say", [unknown, _MEASURE], None
    known = [one for one in outlooks if "in_domain" in one.gains]
    if not known:
        return "cannot say", ["no teacher is inside of what is known", _MEASURE], None
    if all(one.longer_gain is None for one in known):
        return _at_equal_tokens(known)
    paying = [one for one in known if (one.lead or 0.0) > 0]
    if paying:
        return _compared(request, max(paying, key=lambda one: one.lead or 0.0))
    unsure = [one for one in known if one.lead is None]
    return _compared(request, max(unsure or known, key=lambda one: one.gains["in_domain"].mean))


def _compared(request: PlanRequest, best: Outlook) -> tuple[Recommendation, list[str], Outlook]:
    """The answer about a teacher that can be compared with the same compute without it."""
    gain, more = best.gains["in_domain"], best.longer_gain
    longer = 0.0 if more is None else more.mean
    at = f"{best.teacher.name} at alpha {best.predicted_alpha:g}"
    least = "" if best.longer_known else "at least "
    spent, text = f"{short(best.longer_tokens)} tokens cost as much", request.text_tokens
    if text is not None and best.longer_tokens >= text:
        spent = f"all {short(text)} tokens of the text cost no more"
    alone = f"without a teacher, {spent} and gain {least}{longer:+.2f}%"
    if text is not None and request.tokens >= text:
        alone = f"without a teacher, there is no more text: all {short(text)} tokens are read already"
    gains = (
        f"{at} gains {gain.mean:+.2f}% in domain" if best.predicted_alpha else f"{best.teacher.name}: {_NONE}"
    )
    why = [f"{gains}; {alone}"]
    if best.lead is None:
        limit = f"the law ends at {short(request.basis.range.tokens[1])} tokens"
        if more is not None and more.holds(gain.mean):
            limit = f"the law's points leave {more.low:+.2f}% to {more.high:+.2f}% open for more tokens"
        return "cannot say", [*why, f"which of the two is more is not known: {limit}"], best
    pays = best.lead > 0 and best.predicted_alpha > 0
    if pays and (gain.low is None or gain.low <= longer):
        why.append("that is in the mean: the interval of its gain holds less too")
    elif not pays and gain.mean > 0:
        why.append(
            f"it is worth its compute only if there is no more text than {short(request.tokens)} tokens"
        )
    outside = best.gains.get("fitted") or best.gains.get("out_of_domain")
    if not pays and outside is not None and outside.low is not None and outside.low > 0:
        why.append(f"out of domain it gains {outside.mean:+.2f}%; what more tokens give there no law says")
    return ("distil" if pays else "do not distil"), why, best


_NONE = "the rule finds no alpha that gains anything"
_MEASURE = "measure it: `tutelage study run bake-off` with your text, then `tutelage plan --study` of it"


def _at_equal_tokens(known: Sequence[Outlook]) -> tuple[Recommendation, list[str], Outlook]:
    """Without a law of more tokens, only what the same tokens give."""
    best = max(known, key=lambda one: one.gains["in_domain"].mean)
    gain = best.gains["in_domain"]
    at = f"{best.teacher.name} at alpha {best.predicted_alpha:g}"
    words = f"{at} gains {gain.mean:+.2f}% in domain on the same tokens"
    rest = "what as much compute gives without a teacher is not known: that budget is outside of the law"
    return ("distil" if gain.mean > 0 and best.alpha else "do not distil"), [words, rest], best
