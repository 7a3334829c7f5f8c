"""What every loss is given, and what it should answer: inputs from a seed, gradients from float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

STUDENT, TEACHER, KEPT, ALPHA = 512, 1024, 64, 0.5


@dataclass(frozen=True)
class Problem:
    """Identical for every method: hidden states and heads of student and teacher, labels, sparse targets.

    `sparse` maps "top" and "samples" to (ids_NK, probs_NK, tail_N), and "gold" to log p_teacher(label).
    """

    hs: Tensor
    Ws: Tensor
    ht: Tensor
    Wt: Tensor
    labels: Tensor
    sparse: dict[str, Tensor]


def make_problem(tokens: int, vocab: int, sparse: dict[str, Tensor]) -> Problem:
    """Gaussian hidden states and heads; student logits have deviation 2, the teacher's 3."""
    random = torch.Generator().manual_seed(20)
    hs = torch.randn(tokens, STUDENT, generator=random)
    Ws = torch.randn(vocab, STUDENT, generator=random).mul_(2 / STUDENT**0.5)
    ht = torch.randn(tokens, TEACHER, generator=random)
    Wt = torch.randn(vocab, TEACHER, generator=random).mul_(3 / TEACHER**0.5)
    labels = torch.randint(vocab, (tokens,), generator=random)
    return Problem(hs.requires_grad_(), Ws.requires_grad_(), ht, Wt, labels, sparse)


def tiny_problem() -> Problem:
    """Small enough to load every library without touching the high-water mark."""
    problem = make_problem(16, 4 * KEPT, {})
    return make_problem(16, 4 * KEPT, sparse_targets(problem))


@torch.no_grad()
def sparse_targets(problem: Problem) -> dict[str, Tensor]:
    """The teacher's top 64, and 64 draws as distinct ids with weight count / 64."""
    found: dict[str, list[Tensor]] = {}
    for rows in torch.arange(len(problem.ht)).split(128):
        logp = (problem.ht[rows] @ problem.Wt.T).log_softmax(-1)
        top, ids = logp.exp().topk(KEPT)
        drawn = torch.multinomial(
            logp.exp(), KEPT, replacement=True, generator=torch.Generator().manual_seed(len(found))
        )
        drawn = drawn.sort().values
        first = torch.ones_like(drawn, dtype=torch.bool)
        first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
        counts = (drawn.unsqueeze(2) == drawn.unsqueeze(1)).sum(2)
        for name, part in {
            "top.ids": ids,
            "top.probs": top,
            "top.tail": (1 - top.sum(1)).clamp(min=0),
            "samples.ids": drawn,
            "samples.probs": torch.where(first, counts / KEPT, 0.0),
            "samples.tail": torch.zeros(len(rows)),
            "gold": logp.gather(1, problem.labels[rows].unsqueeze(1)).squeeze(1),
        }.items():
            found.setdefault(name, []).append(part)
    return {name: torch.cat(parts) for name, parts in found.items()}


def _losses(s: Tensor, t: Tensor, labels: Tensor, sparse: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every loss of the table as a sum over tokens; the plain definition, in float64."""
    log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)
    found = {
        "ce": F.cross_entropy(s, labels, reduction="sum"),
        "kl": (log_p.exp() * (log_p - log_q)).sum(),
    }
    for name in ("top", "samples"):
        p = sparse[f"{name}.probs"].double()
        log_q_kept = log_q.gather(1, sparse[f"{name}.ids"])
        found[name] = (torch.special.xlogy(p, p) - p * log_q_kept).sum()  # the tail left out
        if name == "top":
            tail, q_tail = 1 - p.sum(1), 1 - log_q_kept.exp().sum(1)
            found["top+bucket"] = found["top"] + (tail * (tail.log() - q_tail.log())).sum()
            p = p / p.sum(1, keepdim=True)
            found["top, renormalised"] = (torch.special.xlogy(p, p) - p * log_q_kept).sum()
    return found


def save_truth(problem: Problem, folder: Path) -> None:
    """Write loss and gradients per token mean of every loss, and the sparse targets, below `folder`."""
    save_file(problem.sparse, folder / "sparse.safetensors")
    n = len(problem.hs)
    hs, Ws = (x.detach().double().requires_grad_() for x in (problem.hs, problem.Ws))
    ht, Wt = problem.ht.double(), problem.Wt.double()
    sums: dict[str, list[Tensor]] = {}
    for rows in torch.arange(n).split(64):
        sparse = {name: part[rows] for name, part in problem.sparse.items()}
        losses = _losses(hs[rows] @ Ws.T, ht[rows] @ Wt.T, problem.labels[rows], sparse)
        for name, loss in losses.items():
            d_hs, d_Ws = torch.autograd.grad(loss, (hs, Ws), retain_graph=True)
            parts = (loss.detach(), d_hs, d_Ws)
            if name in sums:
                for total, part in zip(sums[name], parts, strict=True):
                    total.add_(part)
            else:
                sums[name] = [part.clone() for part in parts]
    for name, (loss, d_hs, d_Ws) in sums.items():
        save_file({"loss": loss / n, "hs": d_hs / n, "Ws": d_Ws / n}, folder / f"{name}.safetensors")


def load_truth(folder: Path, weights: dict[str, float]) -> dict[str, Tensor]:
    """The weighted sum of saved losses and their gradients."""
    total: dict[str, Tensor] = {}
    for name, weight in weights.items():
        for key, value in load_file(folder / f"{name}.safetensors").items():
            total[key] = total[key] + weight * value if key in total else weight * value
    return total


def load_sparse(folder: Path) -> dict[str, Tensor]:
    """The sparse targets, copied out of the mapped file."""
    return {name: part.clone() for name, part in load_file(folder / "sparse.safetensors").items()}
