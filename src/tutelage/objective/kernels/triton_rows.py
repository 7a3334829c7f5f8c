"""Row kernels in Triton, for CUDA: the same two functions as in `rows`.

They are registered as custom operators, which `torch.compile` keeps whole in its graph.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from tutelage.objective.kernels.triton_kernels import dense_kernel, sparse_kernel
from tutelage.objective.sparse import teacher_slots


def dense_rows(
    student_CV: Tensor,
    teacher_CV: Tensor,
    labels_C: Tensor,
    ce_weight_C: Tensor,
    kd_weight_C: Tensor,
    temperature: float,
    addends_AV: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `rows.dense_rows`; the gradient goes to `addends_AV` if it is given.

    Raises:
        ValueError: if the entries of a row are not adjacent in memory, or the two shapes differ.
    """
    _check_rows("student", student_CV)
    _check_rows("teacher", teacher_CV)
    if teacher_CV.shape != student_CV.shape:
        raise ValueError(f"teacher logits {tuple(teacher_CV.shape)}: must be {tuple(student_CV.shape)}")
    out_3C = student_CV.new_empty((3, student_CV.shape[0]), dtype=torch.float32)
    _dense(student_CV, teacher_CV, labels_C, ce_weight_C, kd_weight_C, temperature, out_3C, addends_AV)
    ce_C, kd_C, teacher_ce_C = out_3C.unbind()
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
    addends_AV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `rows.sparse_rows`; the gradient goes to `addends_AV` if it is given.

    Raises:
        ValueError: if the entries of a row are not adjacent in memory, or the tail policy is unknown.
    """
    _check_rows("student", student_CV)
    slots = teacher_slots(ids_CK, probs_CK, tail_C, tail)
    out_2C = student_CV.new_empty((2, student_CV.shape[0]), dtype=torch.float32)
    _sparse(
        student_CV,
        slots.ids_BK,
        slots.p_BK,
        slots.tail_B1,
        slots.has_bucket,
        labels_C,
        ce_weight_C,
        kd_weight_C,
        temperature,
        out_2C,
        addends_AV,
    )
    ce_C, kd_C = out_2C.unbind()
    return ce_C, kd_C


def _check_rows(name: str, logits_CV: Tensor) -> None:
    """Check that the entries of a row are adjacent, as the kernels assume."""
    if logits_CV.stride(1) != 1:
        raise ValueError(
            f"{name} logits with strides {logits_CV.stride()}: entries of a row must be adjacent"
        )


@torch.library.custom_op("tutelage::dense_rows", mutates_args=("student_CV", "out_3C", "addends_AV"))
def _dense(
    student_CV: Tensor,
    teacher_CV: Tensor,
    labels_C: Tensor,
    ce_weight_C: Tensor,
    kd_weight_C: Tensor,
    temperature: float,
    out_3C: Tensor,
    addends_AV: Tensor | None,
) -> None:
    tokens, vocab = student_CV.shape
    if tokens == 0:
        return
    dense_kernel[(tokens,)](
        student_CV,
        teacher_CV,
        labels_C.contiguous(),
        ce_weight_C.contiguous(),
        kd_weight_C.contiguous(),
        out_3C,
        student_CV if addends_AV is None else addends_AV,
        tokens,
        vocab,
        student_CV.stride(0),
        teacher_CV.stride(0),
        temperature,
        HEATED=temperature != 1.0,
        HALVED=addends_AV is not None,
        enable_fp_fusion=True,
    )


@torch.library.custom_op("tutelage::sparse_rows", mutates_args=("student_CV", "out_2C", "addends_AV"))
def _sparse(
    student_CV: Tensor,
    ids_CK: Tensor,
    p_CK: Tensor,
    tail_C1: Tensor,
    has_bucket: bool,
    labels_C: Tensor,
    ce_weight_C: Tensor,
    kd_weight_C: Tensor,
    temperature: float,
    out_2C: Tensor,
    addends_AV: Tensor | None,
) -> None:
    tokens, vocab = student_CV.shape
    if tokens == 0:
        return
    ids_CK = ids_CK.contiguous()
    sparse_kernel[(tokens,)](
        student_CV,
        ids_CK,
        p_CK.contiguous(),
        student_CV.gather(1, ids_CK),
        tail_C1.contiguous(),
        labels_C.contiguous(),
        ce_weight_C.contiguous(),
        kd_weight_C.contiguous(),
        out_2C,
        student_CV if addends_AV is None else addends_AV,
        tokens,
        vocab,
        ids_CK.shape[1],
        student_CV.stride(0),
        temperature,
        HEATED=temperature != 1.0,
        HALVED=addends_AV is not None,
        enable_fp_fusion=True,
        BUCKET=has_bucket,
        BLOCK_K=min(1024, triton.next_power_of_2(ids_CK.shape[1])),
    )


@_dense.register_fake
@_sparse.register_fake
def _writes_in_place(*_: object) -> None:
    """No-op: the operators return nothing, so the compiler needs no shapes."""
