"""Describe next-token distributions, and the differences between two of them, by token and group of tokens.

Every quantity is one float32 or integer per row. If a vocabulary is smaller than a K below, K is its size.

Tokens of one document depend on each other, so the document is the unit of the means over groups. With S_d
the sum and n_d the number of a group's tokens in document d, the mean is r = sum S_d / sum n_d and its
standard error sqrt(G / (G - 1) sum (S_d - r n_d)^2) / sum n_d over the G documents with tokens in the group.
The borders of groups count as given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    Array = NDArray[np.float64]

_TOP5, _TOP10, _TOP50 = 5, 10, 50


@dataclass(frozen=True, slots=True)
class Predictions:
    """Next-token distributions of one model at N positions, float32.

    Attributes:
        logp_NV: natural log-probabilities.
        p_NV: probabilities.
        top_ids_NK: ids of the 50 most probable tokens, the most probable first.
    """

    logp_NV: Tensor
    p_NV: Tensor
    top_ids_NK: Tensor

    @classmethod
    def of(cls, logits_NV: Tensor) -> Predictions:
        """From logits, float32."""
        logp_NV = logits_NV.log_softmax(1)
        top_ids_NK = logits_NV.topk(min(_TOP50, logits_NV.shape[1])).indices
        return cls(logp_NV, logp_NV.exp(), top_ids_NK)


def alone(of: Predictions, gold_N: Tensor) -> dict[str, Tensor]:
    """Quantities of one model.

    Args:
        of: its predictions.
        gold_N: int64 ids of the actual tokens.

    Returns:
        entropy: nats, 0 to log V.
        max_prob: largest probability.
        gold_logp: log-probability of the gold token, nats.
        gold_rank: 1 plus the number of tokens with a larger probability than the gold one.
        above_uniform: number of tokens with a probability above 1/V.
        top10_mass, top50_mass: sum of the 10 and 50 largest probabilities.
    """
    gold_logp_N1 = of.logp_NV.gather(1, gold_N[:, None])
    top_NK = of.p_NV.gather(1, of.top_ids_NK)
    return {
        "entropy": -torch.linalg.vecdot(of.p_NV, of.logp_NV),
        "max_prob": top_NK[:, 0],
        "gold_logp": gold_logp_N1[:, 0],
        "gold_rank": 1 + (of.logp_NV > gold_logp_N1).sum(1),
        "above_uniform": (of.logp_NV > -math.log(of.logp_NV.shape[1])).sum(1),
        "top10_mass": top_NK[:, :_TOP10].sum(1),
        "top50_mass": top_NK.sum(1),
    }


def kl_both_ways(p: Predictions, q: Predictions) -> tuple[Tensor, Tensor]:
    """KL(p || q) and KL(q || p) in nats."""
    difference_NV = p.logp_NV - q.logp_NV
    return torch.linalg.vecdot(p.p_NV, difference_NV), -torch.linalg.vecdot(q.p_NV, difference_NV)


def together(p: Predictions, q: Predictions) -> dict[str, Tensor]:
    """Quantities of two models that are symmetric in them.

    Returns:
        js: Jensen-Shannon divergence, nats, 0 to log 2.
        top1_agreement: 1 where the most probable token is the same, else 0.
        top5_overlap: share of the 5 most probable tokens that both have, 0 to 1.
        top10_spearman: `spearman` over the 10 most probable tokens of both, -1 to 1.
        shared_mass: sum of min(p, q), 0 to 1; one minus the total variation distance.
    """
    fives = p.top_ids_NK[:, :_TOP5, None] == q.top_ids_NK[:, None, :_TOP5]
    tens_NK = torch.cat([p.top_ids_NK[:, :_TOP10], q.top_ids_NK[:, :_TOP10]], 1)
    return {
        "js": _js(p, q),
        "top1_agreement": (p.top_ids_NK[:, 0] == q.top_ids_NK[:, 0]).float(),
        "top5_overlap": fives.sum((1, 2)) / fives.shape[1],
        "top10_spearman": spearman(p.logp_NV, q.logp_NV, tens_NK),
        "shared_mass": torch.minimum(p.p_NV, q.p_NV).sum(1),
    }


def _js(p: Predictions, q: Predictions) -> Tensor:
    """Mean KL from the mean distribution; not as a difference of entropies, which would cancel."""
    mean_NV = (p.p_NV + q.p_NV).div_(2)
    logm_NV = mean_NV.clamp_(min=torch.finfo(mean_NV.dtype).tiny).log_()  # both may underflow: 0 log 0
    from_p_N: Tensor = torch.linalg.vecdot(p.p_NV, p.logp_NV - logm_NV)
    from_q_N: Tensor = torch.linalg.vecdot(q.p_NV, q.logp_NV - logm_NV)
    return (from_p_N + from_q_N) / 2


def spearman(logp_NV: Tensor, logq_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """Rank correlation of p and q over the different ids of each row; ties share their mean rank.

    The ids are the union of both models' most probable tokens, so that the value is symmetric. Tokens that
    only one of them ranks high lower it: that of two unrelated models is negative. NaN where either gives
    all ids the same probability.
    """
    ids_NK = ids_NK.sort(1).values
    new_NK = torch.ones_like(ids_NK, dtype=torch.bool)
    new_NK[:, 1:] = ids_NK[:, 1:] != ids_NK[:, :-1]
    p_NK = _centred_ranks(logp_NV.gather(1, ids_NK), new_NK)
    q_NK = _centred_ranks(logq_NV.gather(1, ids_NK), new_NK)
    return (p_NK * q_NK).sum(1) / (p_NK.square().sum(1) * q_NK.square().sum(1)).sqrt()


def _centred_ranks(values_NK: Tensor, valid_NK: Tensor) -> Tensor:
    """Mean ranks among the valid values of a row, minus their average; 0 where not valid.

    A value's rank, up to a constant, is half of (values below it minus values above it).
    """
    difference_NKK = values_NK[:, :, None] - values_NK[:, None, :]
    return (difference_NKK.sign() * valid_NK[:, None, :]).sum(2) * valid_NK / 2


_ENTROPY_BINS = 5
_POSITION_BINS = 20
_SCHEMA = {
    "grouping": pl.String,
    "bin": pl.Int64,
    "label": pl.String,
    "low": pl.Float64,
    "high": pl.Float64,
    "quantity": pl.String,
    "of": pl.String,
    "mean": pl.Float64,
    "stderr": pl.Float64,
    "n": pl.Int64,
    "documents": pl.Int64,
}


@dataclass(frozen=True, eq=False)
class Grouping:
    """A partition of all tokens into groups.

    Attributes:
        name: all, entropy, position, right or closer.
        bin_N: group of every token.
        labels: name of every group.
        edges: borders of the groups, one more than groups; None if they are not ranges.
        contrast: groups (a, b) whose difference a - b is reported too.
    """

    name: str
    bin_N: NDArray[np.int64]
    labels: tuple[str, ...]
    edges: Array | None = None
    contrast: tuple[int, int] | None = None


def sorted_by(tokens: pl.DataFrame) -> str:
    """The role that stands for an untaught model in groupings: the sorter, or without one the baseline.

    The baseline is half of every gain, so tokens sorted by it are sorted by its luck too: where it was
    unlucky, any other model gains.
    """
    return "sorter" if "entropy.sorter" in tokens.columns else "baseline"


def groupings(tokens: pl.DataFrame, context: int) -> list[Grouping]:
    """All groupings of a comparison. The untaught model is the sorter, or without one the baseline.

    all: one group. entropy: fifths by the untaught model's entropy in nats; a token on a border is in the
    upper group, so equal entropies stay together and groups may differ in size. position: twentieths of the
    context, borders in tokens. right: whose most probable token is the gold one. closer: whether the teacher
    gives the gold token more probability than the untaught model does.
    """
    alone = sorted_by(tokens)
    entropy = tokens[f"entropy.{alone}"].to_numpy().astype(np.float64)
    edges = np.quantile(entropy, np.linspace(0, 1, _ENTROPY_BINS + 1))
    teacher, untaught = (tokens[f"gold_rank.{role}"].to_numpy() == 1 for role in ("teacher", alone))
    ahead = tokens["gold_logp.teacher"].to_numpy() > tokens[f"gold_logp.{alone}"].to_numpy()
    return [
        Grouping("all", np.zeros(len(tokens), np.int64), ("all tokens",)),
        Grouping(
            "entropy",
            np.searchsorted(edges[1:-1], entropy, side="right"),
            tuple(f"{a} to {b}" for a, b in pairwise(_told_apart(edges.tolist()))),
            edges,
            (_ENTROPY_BINS - 1, 0),
        ),
        Grouping(
            "position",
            tokens["position"].to_numpy().astype(np.int64) * _POSITION_BINS // context,
            tuple(f"{100 * i // _POSITION_BINS}%" for i in range(_POSITION_BINS)),
            np.arange(_POSITION_BINS + 1) * context / _POSITION_BINS,
        ),
        Grouping(
            "right",
            np.where(teacher, np.where(untaught, 2, 0), np.where(untaught, 1, 3)),
            ("teacher only", f"{alone} only", "both", "neither"),
            contrast=(0, 1),
        ),
        Grouping("closer", np.where(ahead, 0, 1), ("teacher closer", "not closer"), contrast=(0, 1)),
    ]


def _told_apart(values: Sequence[float]) -> list[str]:
    """Numbers with as many digits as tell unequal ones apart: a model may be as sure of nearly all tokens."""
    texts: list[str] = []
    for digits in range(2, 16):
        texts = [f"{value:.{digits}f}" for value in values]
        if len({*texts}) == len({*values}):
            break
    return texts


def summarise(tokens: pl.DataFrame, context: int) -> pl.DataFrame:
    """The long table of group means.

    Args:
        tokens: one row per token: document, position and the quantities, columns `<quantity>.<of>`.
        context: length of the windows, in tokens.

    Returns:
        grouping, bin, label, low, high, quantity, of, mean, stderr, n (tokens), documents. Groups without
        tokens have no row. `stderr` is null for one document. Rows of a grouping "<name> contrast" are the
        difference of two groups. Quantity "gain" is the cross-entropy of the baseline minus that of the model
        `of`, in nats.
    """
    document_N = tokens["document"].to_numpy().astype(np.int64)
    columns = {name: tokens[name].to_numpy().astype(np.float64) for name in tokens.columns if "." in name}
    for role in ("student", "teacher"):
        columns[f"gain.{role}"] = columns[f"gold_logp.{role}"] - columns["gold_logp.baseline"]
    rows: list[dict[str, object]] = []
    for grouping in groupings(tokens, context):
        for name, values_N in columns.items():
            quantity, of = name.split(".", 1)
            rows.extend(
                {"quantity": quantity, "of": of} | row for row in _group_rows(grouping, document_N, values_N)
            )
    return pl.DataFrame(rows, schema=_SCHEMA)


def _group_rows(
    grouping: Grouping, document_N: NDArray[np.int64], values_N: Array
) -> Iterator[dict[str, object]]:
    """Every group of one grouping for one quantity; tokens where it is undefined are left out."""
    sums_BD, counts_BD = _sums(grouping, document_N, values_N)
    n_B = counts_BD.sum(1)
    mean_B = sums_BD.sum(1) / np.maximum(n_B, 1)
    influence_BD = (sums_BD - mean_B[:, None] * counts_BD) / np.maximum(n_B, 1)[:, None]
    for index, label in enumerate(grouping.labels):
        if n_B[index]:
            low, high = (None, None) if grouping.edges is None else grouping.edges[index : index + 2]
            yield {
                "grouping": grouping.name,
                "bin": index,
                "label": label,
                "low": low,
                "high": high,
                "n": n_B[index],
                **_estimate(mean_B[index], influence_BD[index], counts_BD[index]),
            }
    if grouping.contrast is None or not n_B[list(grouping.contrast)].all():
        return
    a, b = grouping.contrast
    yield {
        "grouping": f"{grouping.name} contrast",
        "bin": 0,
        "label": f"{grouping.labels[a]} minus {grouping.labels[b]}",
        "n": n_B[a] + n_B[b],
        **_estimate(mean_B[a] - mean_B[b], influence_BD[a] - influence_BD[b], counts_BD[a] + counts_BD[b]),
    }


def _sums(
    grouping: Grouping, document_N: NDArray[np.int64], values_N: Array
) -> tuple[Array, NDArray[np.int64]]:
    """Sum and number of the values of every group in every document."""
    defined_N = ~np.isnan(values_N)
    shape = len(grouping.labels), int(document_N.max()) + 1
    index_N = (grouping.bin_N * shape[1] + document_N)[defined_N]
    size = shape[0] * shape[1]
    sums = np.bincount(index_N, values_N[defined_N], size).astype(np.float64)
    return sums.reshape(shape), np.bincount(index_N, minlength=size).astype(np.int64).reshape(shape)


def _estimate(mean: float, influence_D: Array, counts_D: NDArray[np.int64]) -> dict[str, object]:
    """A mean and its standard error from each document's contribution to its deviation."""
    documents = int((counts_D > 0).sum())
    stderr = None
    if documents > 1:
        stderr = float(np.sqrt(documents / (documents - 1) * np.square(influence_D).sum()))
    return {"mean": float(mean), "stderr": stderr, "documents": documents}
