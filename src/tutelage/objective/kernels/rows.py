"""Row kernels in torch: few passes over memory, in place, as many rows at a time as fit the cache.

Both functions mix cross-entropy with forward KL and replace the student's logits by the gradient. They hold
exponentials of logits minus their maximum, and their sum Z, instead of softmax or log-softmax: one
exponential per entry and no division, because 1 / Z goes into the factors that rows are multiplied by anyway.
The exponentials are powers of 2 of logits times log2(e): torch takes `exp` from Intel's library, which needs
four times as long on processors of others, and `exp2` from its own.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from tutelage.objective.sparse import Slots, teacher_slots
from tutelage.types import IGNORE_INDEX

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

DENSE_ENTRIES = 2**18
"""Entries per thread that are processed at one time: 1 MiB of float32, about a core's own cache."""

SPARSE_ENTRIES = 2**20
"""The same for sparse targets, which need fewer passes over a row and more small operations per block."""

_LOG2_E = math.log2(math.e)


def dense_rows(
    student_CV: Tensor,
    teacher_CV: Tensor,
    labels_C: Tensor,
    ce_weight_C: Tensor,
    kd_weight_C: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy and KL(teacher || student) per token, in nats, and the gradient in place.

    Args:
        student_CV: logits, float32 or bfloat16 (float64 for checks). Overwritten by the gradient of
            sum_C (ce_weight CE + kd_weight KL) with respect to them.
        teacher_CV: logits of the teacher; left as they are.
        labels_C: next-token ids; where one is `IGNORE_INDEX`, outputs and gradient are zero, and where one
            is outside the vocabulary they are NaN.
        ce_weight_C: weight of each token's cross-entropy in the gradient.
        kd_weight_C: weight of each token's KL in the gradient, T^2 already in it.
        temperature: T > 0; both sides' logits are divided by it inside the KL only.

    Returns:
        (ce_C, kd_C, teacher_ce_C), unweighted: the student's cross-entropy and the teacher's, both at
        T = 1, and the KL at T without any T^2. At least float32. An entry that is -inf on both sides
        counts for nothing; one that is -inf for the student alone makes the KL inf.
    """
    out_3C = _outputs(3, student_CV)
    for rows, student_BV in _blocks(student_CV, DENSE_ENTRIES):
        gold_B1 = labels_C[rows].clamp(0, student_CV.shape[1] - 1).unsqueeze(1)
        weights = ce_weight_C[rows].unsqueeze(1), kd_weight_C[rows].unsqueeze(1)
        out_3C[:, rows] = _dense_block(student_BV, teacher_CV[rows], gold_B1, *weights, temperature)
    ce_C, kd_C, teacher_ce_C = _mark_labels(student_CV, out_3C, labels_C).unbind()
    return ce_C, kd_C, teacher_ce_C


def sparse_rows(
    student_CV: Tensor,
    ids_CK: Tensor,
    probs_CK: Tensor,
    tail_C: Tensor,
    labels_C: Tensor,
    ce_weight_C: Tensor,
    kd_weight_C: Tensor,
    temperature: float,
    tail: str,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and forward KL against kept teacher entries, in nats, and the gradient in place.

    Args:
        student_CV: logits, float32 or bfloat16 (float64 for checks). Overwritten by the gradient of
            sum_C (ce_weight CE + kd_weight KL) with respect to them.
        ids_CK: the kept entries, in any order.
        probs_CK: their teacher probabilities or sampling weights at T. An entry in a slot of probability 0
            is not kept, and the probabilities of one in several slots are added.
        tail_C: the teacher's mass outside `ids_CK`; read by `other_bucket` only.
        labels_C: next-token ids; where one is `IGNORE_INDEX`, outputs and gradient are zero, and where one
            is outside the vocabulary they are NaN.
        ce_weight_C: weight of each token's cross-entropy in the gradient.
        kd_weight_C: weight of each token's KL in the gradient, T^2 already in it.
        temperature: T > 0; the student's logits are divided by it inside the KL only.
        tail: what becomes of the teacher's mass outside the kept entries.
            `renormalise`: the kept probabilities are divided by their sum, q is the student's own. Where
            nothing is kept the divergence is 0, and so is its gradient.
            `none`: sum_k w_k (log w_k - log q_k) with the weights as they are. With sampled weights it
            is an estimate with an unbiased gradient, (sum_k w_k) q - w; its value may be negative and
            differs from the KL's by a constant that does not depend on the student.
            `other_bucket`: all other entries form one bucket; its student mass is summed over the
            complement, never taken as 1 - sum, so it is right however small. If every entry is kept,
            `tail_C` is taken as 0.

    Returns:
        (ce_C, kd_C), unweighted, at least float32: cross-entropy at T = 1 and the divergence at T.
    """
    out_2C = _outputs(2, student_CV)
    for rows, student_BV in _blocks(student_CV, SPARSE_ENTRIES):
        gold_B1 = labels_C[rows].clamp(0, student_CV.shape[1] - 1).unsqueeze(1)
        weights = ce_weight_C[rows].unsqueeze(1), kd_weight_C[rows].unsqueeze(1)
        slots = teacher_slots(ids_CK[rows], probs_CK[rows], tail_C[rows], tail)
        out_2C[:, rows] = _sparse_block(student_BV, slots, gold_B1, *weights, temperature)
    ce_C, kd_C = _mark_labels(student_CV, out_2C, labels_C).unbind()
    return ce_C, kd_C


def _dense_block(
    s_BV: Tensor,
    teacher_BV: Tensor,
    gold_B1: Tensor,
    ce_weight_B1: Tensor,
    kd_weight_B1: Tensor,
    temperature: float,
) -> Tensor:
    """[ce, kd, teacher_ce] of a few rows; `s_BV` becomes the gradient."""
    s_BV.sub_(s_BV.amax(-1, keepdim=True))
    teacher_BV = teacher_BV.to(s_BV.dtype)
    t_BV = teacher_BV - teacher_BV.amax(-1, keepdim=True)
    gold_logit_B1, teacher_gold_logit_B1 = s_BV.gather(1, gold_B1), t_BV.gather(1, gold_B1)
    s_BV.mul_(_LOG2_E)
    p_BV = t_BV.mul_(_LOG2_E).exp2()
    z_p_B1 = _sum(p_BV)
    teacher_ce_B1 = z_p_B1.log() - teacher_gold_logit_B1
    q_1_BV, heated = s_BV, temperature != 1.0
    if heated:
        q_1_BV = s_BV.exp2()
        torch.exp2(t_BV.div_(temperature), out=p_BV)
        z_p_B1 = _sum(p_BV)
        s_BV.div_(temperature)
    # nansum: an entry that is -inf on both sides is 0 * nan. A nan logit still shows, in both Z.
    ratio_B1 = t_BV.sub_(s_BV).mul_(p_BV).nansum(-1, keepdim=True) / (_LOG2_E * z_p_B1)
    z_q_B1 = _sum(s_BV.exp2_())
    kd_B1 = ratio_B1 - (z_p_B1.log() - z_q_B1.log())
    z_1_B1 = _sum(q_1_BV) if heated else z_q_B1
    ce_B1 = z_1_B1.log() - gold_logit_B1
    kd_weight_B1 = kd_weight_B1 / temperature
    if heated:
        s_BV.mul_(kd_weight_B1 / z_q_B1).addcmul_(q_1_BV, ce_weight_B1 / z_1_B1)
    else:
        # CE against the label and KL against p share their softmax: cross-entropy against a mixture.
        s_BV.mul_((ce_weight_B1 + kd_weight_B1) / z_q_B1)
    s_BV.addcmul_(p_BV, kd_weight_B1 / z_p_B1, value=-1.0)
    s_BV.scatter_add_(1, gold_B1, -ce_weight_B1.to(s_BV.dtype))
    return torch.cat([ce_B1, kd_B1, teacher_ce_B1], 1).T


def _sparse_block(
    s_BV: Tensor,
    slots: Slots,
    gold_B1: Tensor,
    ce_weight_B1: Tensor,
    kd_weight_B1: Tensor,
    temperature: float,
) -> Tensor:
    """[ce, kd] of a few rows; `s_BV` becomes the gradient."""
    ce_weight_B1 = ce_weight_B1.to(s_BV.dtype)
    kd_weight_B1 = kd_weight_B1.to(s_BV.dtype) / temperature
    gold_logit_B1 = s_BV.gather(1, gold_B1)
    if temperature == 1.0:
        max_B1, log_z_B1, kd_B1 = _teach(s_BV, slots, ce_weight_B1, kd_weight_B1)
    else:
        max_B1 = s_BV.amax(-1, keepdim=True)
        q_1_BV = (s_BV - max_B1).mul_(_LOG2_E).exp2_()
        z_1_B1 = _sum(q_1_BV)
        log_z_B1 = z_1_B1.log()
        _, _, kd_B1 = _teach(s_BV.div_(temperature), slots, torch.zeros_like(ce_weight_B1), kd_weight_B1)
        s_BV.addcmul_(q_1_BV, ce_weight_B1 / z_1_B1)
    s_BV.scatter_add_(1, gold_B1, -ce_weight_B1)
    return torch.cat([(max_B1 - gold_logit_B1) + log_z_B1, kd_B1], 1).T


def _teach(
    s_BV: Tensor, slots: Slots, extra_B1: Tensor, kd_weight_B1: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn logits into extra * softmax + kd_weight * (gradient of the KL).

    The softmax runs over the entries that are not kept, if these form a bucket, and over all entries
    otherwise. It is then the student's distribution *given* the bucket, which is what the bucket's
    gradient needs and which loses nothing when the bucket's mass is 1e-70. Its division by Z is left to the
    factor of the rows.

    Returns:
        (max_B1, log_z_B1, kd_B1): log-sum-exp of the logits is max + log_z.
    """
    ids_BK, tail_B1 = slots.ids_BK, slots.tail_B1.to(s_BV.dtype)
    p_BK = slots.p_BK.to(s_BV.dtype)
    kept_BK = s_BV.gather(1, ids_BK)
    if not slots.has_bucket:
        max_B1 = s_BV.amax(-1, keepdim=True)
        z_B1 = _sum(s_BV.sub_(max_B1).mul_(_LOG2_E).exp2_())
        log_z_B1 = z_B1.log()
        log_rest_B1 = torch.zeros_like(max_B1)
    else:
        unused_BK = p_BK == 0
        kept_BK.masked_fill_(unused_BK, -torch.inf)
        # Added, since an entry may stand in used and unused slots, and writes have no order.
        s_BV.scatter_add_(1, ids_BK, torch.full_like(p_BK, -torch.inf).masked_fill_(unused_BK, 0.0))
        rest_max_B1 = s_BV.amax(-1, keepdim=True)
        empty_B1 = rest_max_B1 == -torch.inf
        # -inf - -inf is nan. Where nothing is left, exponentials of 0 stand in, and the factor is 0.
        s_BV.index_fill_(0, empty_B1.squeeze(1).nonzero().squeeze(1), 0.0)
        z_B1 = _sum(s_BV.sub_(rest_max_B1.masked_fill(empty_B1, 0.0)).mul_(_LOG2_E).exp2_())
        tail_B1 = tail_B1.masked_fill(empty_B1, 0.0)
        max_B1 = torch.maximum(rest_max_B1, kept_BK.amax(-1, keepdim=True))
        rest_B1 = rest_max_B1 - max_B1 + z_B1.log()
        log_z_B1 = torch.cat([rest_B1, kept_BK - max_B1], 1).logsumexp(-1, keepdim=True)
        log_rest_B1 = rest_B1 - log_z_B1
    log_q_BK = kept_BK - max_B1 - log_z_B1
    kd_B1 = _slot_kl(p_BK, log_q_BK).sum(-1, keepdim=True) + _slot_kl(tail_B1, log_rest_B1)
    whole_B1 = extra_B1 + kd_weight_B1 * (p_BK.sum(-1, keepdim=True) + tail_B1)
    s_BV.mul_((whole_B1 * log_rest_B1.exp() - kd_weight_B1 * tail_B1) / z_B1)
    gradient_BK = -kd_weight_B1 * p_BK
    if slots.has_bucket:  # unused slots: log q is -inf, and adds nothing
        gradient_BK.addcmul_(log_q_BK.exp(), whole_B1)
    s_BV.scatter_add_(1, ids_BK, gradient_BK)
    return max_B1, log_z_B1, kd_B1


def _slot_kl(p: Tensor, log_q: Tensor) -> Tensor:
    """One slot's p (log p - log q), and 0 where p is 0, whatever q is."""
    return torch.where(p == 0, 0.0, p * (p.log() - log_q))


def _sum(rows_BV: Tensor) -> Tensor:
    return rows_BV.sum(-1, keepdim=True)


def _outputs(count: int, student_CV: Tensor) -> Tensor:
    dtype = torch.promote_types(student_CV.dtype, torch.float32)
    return student_CV.new_empty((count, student_CV.shape[0]), dtype=dtype)


def _working_copy(block_BV: Tensor) -> Tensor:
    """Return the block itself if it can be processed in place, else a float32 copy."""
    return block_BV.to(torch.promote_types(block_BV.dtype, torch.float32)).contiguous()


def _blocks(student_CV: Tensor, entries: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield row slices with a working copy of their logits, which is written back before the next."""
    tokens, vocab = student_CV.shape
    size = tokens
    if student_CV.device.type == "cpu":  # elsewhere a launch costs more than the cache saves
        size = entries * torch.get_num_threads() // vocab
    for start in range(0, tokens, max(1, size)):
        rows = slice(start, start + max(1, size))
        block_BV = student_CV[rows]
        working_BV = _working_copy(block_BV)
        yield rows, working_BV
        if working_BV.data_ptr() != block_BV.data_ptr():
            block_BV.copy_(working_BV)


def _mark_labels(student_CV: Tensor, out: Tensor, labels_C: Tensor) -> Tensor:
    """Zero outputs and gradient of ignored rows; make those of labels outside the vocabulary NaN."""
    ignored_C = labels_C == IGNORE_INDEX
    unknown_C = ~ignored_C & ((labels_C < 0) | (labels_C >= student_CV.shape[1]))
    for rows_C, value in ((ignored_C, 0.0), (unknown_C, torch.nan)):
        student_CV.index_fill_(0, rows_C.nonzero().squeeze(1), value)
        out.masked_fill_(rows_C, value)
    return out
