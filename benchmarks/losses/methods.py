"""Every loss that is measured, ours and the peers', called the way its own documentation calls it.

A method builds a step; a step runs forward and backward and returns the mean loss per token. The student's
and teacher's head products are inside every step. Peers are imported where they are used.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from importlib.metadata import distribution
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from losses.problem import ALPHA
from tutelage.objective import Objective, chunked_objective
from tutelage.types import DenseTargets, SparseTargets

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from losses.problem import Problem

    Step = Callable[[], Tensor]

GROUP_CE, GROUP_KL, GROUP_BOTH, GROUP_SPARSE = "CE", "KL alone", "CE + KL", "64 ids per token"
CE = {"ce": 1.0}
KL = {"kl": 1.0}
CE_HALF = {"ce": 1 - ALPHA}
BOTH = CE_HALF | {"kl": ALPHA}


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: as shown; methods that differ only after ", chunk" are one row, the fastest.
        group: heading under which it is compared.
        truth: weights of the losses of `problem.save_truth` that it should equal.
        make: builds the step.
        package: what to install from PyPI for it.
    """

    name: str
    group: str
    truth: dict[str, float]
    make: Callable[[Problem], Step]
    package: str = ""


def load_alone(package: str, path: str) -> Any:  # noqa: ANN401 - a module of somebody else's
    """One file of an installed package, where importing the whole package needs what a CPU has not."""
    name = path.removesuffix(".py").replace("/", ".")
    spec = importlib.util.spec_from_file_location(name, str(distribution(package).locate_file(path)))
    assert spec is not None  # noqa: S101 - a .py file has a spec
    assert spec.loader is not None  # noqa: S101 - and a loader
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def differentiated(loss: Callable[[Problem], Tensor]) -> Callable[[Problem], Step]:
    """A step out of a function that returns the mean loss."""

    def make(problem: Problem) -> Step:
        def step() -> Tensor:
            value = loss(problem)
            value.backward()  # type: ignore[no-untyped-call]
            return value.detach()

        return step

    return make


def products(p: Problem, group: str) -> Callable[[], None]:
    """The matrix products that no method of the group can do without, into buffers that exist already.

    Student logits, the gradients of its hidden states and head, and the teacher's logits where there are any.
    """
    hs, Ws = p.hs.detach(), p.Ws.detach()
    s = torch.zeros(len(hs), len(Ws))
    t = torch.zeros_like(s) if group in {GROUP_KL, GROUP_BOTH} else None
    d_hs, d_Ws = torch.zeros_like(hs), torch.zeros_like(Ws)

    def step() -> None:
        torch.mm(hs, Ws.T, out=s)
        if t is not None:
            torch.mm(p.ht, p.Wt.T, out=t)
        torch.mm(s, Ws, out=d_hs)
        torch.mm(s.T, hs, out=d_Ws)

    return step


# ours


def ours_dense(alpha: float) -> Callable[[Problem], Tensor]:
    """Forward KL at T=1 from hidden states; alpha 0 is cross-entropy alone."""

    def loss(p: Problem) -> Tensor:
        targets = DenseTargets(p.ht, p.Wt) if alpha else None
        return chunked_objective(p.hs, p.Ws, p.labels, targets, alpha, Objective()).loss / len(p.hs)

    return loss


def ours_sparse(kind: str, tail: str) -> Callable[[Problem], Tensor]:
    """CE + KL from 64 stored ids per token."""

    def loss(p: Problem) -> Tensor:
        ids, probs, rest = (p.sparse[f"{kind}.{part}"] for part in ("ids", "probs", "tail"))
        targets = SparseTargets(ids, probs, rest, p.sparse["gold"])
        objective = Objective(tail=tail)
        return chunked_objective(p.hs, p.Ws, p.labels, targets, ALPHA, objective).loss / len(p.hs)

    return loss


# plain torch


def plain_ce(p: Problem) -> Tensor:
    """Cross-entropy over materialised logits."""
    return F.cross_entropy(p.hs @ p.Ws.T, p.labels)


def plain_kl(s: Tensor, t: Tensor) -> Tensor:
    """The textbook lines."""
    return F.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="batchmean", log_target=True)


def plain_both(p: Problem) -> Tensor:
    """(1 - alpha) CE + alpha KL over materialised logits."""
    s, t = p.hs @ p.Ws.T, p.ht @ p.Wt.T
    return (1 - ALPHA) * F.cross_entropy(s, p.labels) + ALPHA * plain_kl(s, t)


# peers


def on_logits(load: Callable[[], Callable[[Tensor, Tensor, Tensor], Tensor]]) -> Callable[[Problem], Step]:
    """A peer that takes materialised (student logits, teacher logits, labels)."""

    def make(problem: Problem) -> Step:
        function = load()
        return differentiated(lambda p: function(p.hs @ p.Ws.T, p.ht @ p.Wt.T, p.labels))(problem)

    return make


def trl_gkd() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """TRL's loss over logits of shape [batch, sequence, vocab]; beta 0 is forward KL."""
    from trl.experimental.gkd import GKDTrainer  # noqa: PLC0415 - optional

    return lambda s, t, y: GKDTrainer.generalized_jsd_loss(s[None], t[None], labels=y[None], beta=0)


def trl_chunked(problem: Problem) -> Step:
    """TRL's own fused linear divergence."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # noqa: PLC0415 - optional

    return differentiated(
        lambda p: (
            ChunkedDivergenceFunction.apply(p.hs, p.Ws, None, p.ht, p.Wt, None, 0.0, 1.0)[0].sum() / len(p.hs)
        )
    )(problem)


def liger(alpha: float, chunk: int) -> Callable[[Problem], Step]:
    """The peer closest to ours: CE and KL from hidden states in one call."""

    def make(problem: Problem) -> Step:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # noqa: PLC0415 - optional

        function = LigerFusedLinearJSDLoss(1 - alpha, alpha, beta=0.0, compiled=False, chunk_size=chunk)
        return differentiated(lambda p: function(p.hs, p.Ws, p.ht, p.Wt, p.labels))(problem)

    return make


def torchtune_whole() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Soft cross-entropy under the name of KL: the same gradient, another value."""
    return load_alone("torchtune", "torchtune/modules/loss/kd_losses.py").ForwardKLLoss()


def torchtune_chunked(problem: Problem) -> Step:
    """The same over a list of eight chunks of logits, as its recipe makes them."""
    module = load_alone("torchtune", "torchtune/modules/loss/kd_losses.py")
    function = module.ForwardKLWithChunkedOutputLoss(8)

    def loss(p: Problem) -> Tensor:
        s = [(h @ p.Ws.T)[None] for h in p.hs.chunk(8)]
        t = [(h @ p.Wt.T)[None] for h in p.ht.chunk(8)]
        return function(s, t, p.labels[None])

    return differentiated(loss)(problem)


def nemo(chunk: int) -> Callable[[], Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """NeMo Automodel; chunk 0 means whole."""
    return lambda: load_alone("nemo-automodel", "nemo_automodel/components/loss/kd_loss.py").KDLoss(
        chunk_size=chunk
    )


def modelopt() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Reduced by us, because its default divides by the vocabulary too."""
    function = load_alone("nvidia-modelopt", "modelopt/torch/distill/losses.py").LogitsDistillationLoss(
        reduction="none"
    )
    return lambda s, t, _: function(s, t).mean()


def axolotl(problem: Problem) -> Step:
    """Axolotl's fused top-k loss; it drops the tail and divides by nothing."""
    load_alone("axolotl", "axolotl/integrations/kd/utils.py")
    function = load_alone(
        "axolotl", "axolotl/integrations/kd/kernels/liger.py"
    ).LigerFusedLinearKLTopKLogprobLoss(
        0.0, 1.0, 1.0, 0.0, compiled=False, compute_ce_loss=False, normalize_topk=False
    )

    def loss(p: Problem) -> Tensor:
        ids, probs = p.sparse["top.ids"][None], p.sparse["top.probs"][None]
        value = function(p.Ws, p.hs[None], ids, probs.log(), torch.ones_like(ids), true_labels=p.labels[None])
        return value / len(p.hs)

    return differentiated(loss)(problem)


METHODS = [
    Method("plain torch", GROUP_CE, CE, differentiated(plain_ce)),
    Method("ours", GROUP_CE, CE, differentiated(ours_dense(0.0))),
    Method("plain torch", GROUP_KL, KL, on_logits(lambda: lambda s, t, _: plain_kl(s, t))),
    Method("TRL GKDTrainer", GROUP_KL, KL, on_logits(trl_gkd), "trl"),
    Method("TRL ChunkedDivergenceFunction", GROUP_KL, KL, trl_chunked, "trl"),
    *(
        Method(f"Liger FusedLinearJSD, chunk {size}", GROUP_KL, KL, liger(1.0, size), "liger-kernel")
        for size in (256, 512, 1024)
    ),
    Method("torchtune ForwardKL", GROUP_KL, KL, on_logits(torchtune_whole), "torchtune"),
    Method("torchtune ForwardKL, 8 pieces", GROUP_KL, KL, torchtune_chunked, "torchtune"),
    Method("NeMo Automodel KDLoss", GROUP_KL, KL, on_logits(nemo(0)), "nemo-automodel"),
    Method("NeMo Automodel KDLoss, 256 tokens", GROUP_KL, KL, on_logits(nemo(256)), "nemo-automodel"),
    Method("ModelOpt LogitsDistillationLoss", GROUP_KL, KL, on_logits(modelopt), "nvidia-modelopt"),
    Method("ours", GROUP_KL, KL, differentiated(ours_dense(1.0))),
    Method("plain torch", GROUP_BOTH, BOTH, differentiated(plain_both)),
    *(
        Method(f"Liger FusedLinearJSD, chunk {size}", GROUP_BOTH, BOTH, liger(ALPHA, size), "liger-kernel")
        for size in (256, 512, 1024)
    ),
    Method("ours", GROUP_BOTH, BOTH, differentiated(ours_dense(ALPHA))),
    Method("Axolotl top-64, KL alone", GROUP_SPARSE, {"top": 1.0}, axolotl, "axolotl"),
    *(
        Method(
            f"ours, {name}",
            GROUP_SPARSE,
            {"ce": 1 - ALPHA, key: ALPHA},
            differentiated(ours_sparse(kind, tail)),
        )
        for name, key, kind, tail in (
            ("top-64, other bucket", "top+bucket", "top", "other_bucket"),
            ("top-64, renormalised", "top, renormalised", "top", "renormalise"),
            ("64 samples", "samples", "samples", "none"),
        )
    ),
]
