"""Row kernels: forward KL, cross-entropy and their logit gradient for one chunk of logits, in place.

`rows` is the torch implementation, `triton_rows` the CUDA one with the same two functions. Call the functions
of this module, which choose between them.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from typing import TYPE_CHECKING

import torch

from tutelage.errors import UserError
from tutelage.objective.kernels import rows

if TYPE_CHECKING:
    from torch import Tensor

VARIABLE = "TUTELAGE_KERNELS"
"""Environment variable, `torch` or `triton`, that overrides the choice; read once per device type."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def kernels_for(device_type: str) -> str:
    """Choose `triton` for CUDA tensors where it is installed, else `torch`; logged once per device type.

    A compiled caller keeps the choice that was made while it was traced.

    Raises:
        UserError: if `TUTELAGE_KERNELS` is set to an unknown name, or to `triton` where it cannot run.
    """
    return _choose(device_type)


@functools.cache
def _choose(device_type: str) -> str:
    installed = importlib.util.find_spec("triton") is not None
    asked = os.environ.get(VARIABLE)
    if asked not in (None, "torch", "triton"):
        raise UserError(f"{VARIABLE}={asked}: must be torch or triton")
    if asked == "triton" and not installed:
        raise UserError(f"{VARIABLE}=triton: triton is not installed; use {VARIABLE}=torch")
    name = asked or ("triton" if device_type == "cuda" and installed else "torch")
    if name == "triton" and device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(
            f"{VARIABLE}=triton: {device_type} tensors need {VARIABLE}=torch, or TRITON_INTERPRET=1"
        )
    logging.getLogger("tutelage").info("row kernels for %s tensors: %s", device_type, name)
    return name


def dense_rows(
    student_CV: Tensor,
    teacher_CV: Tensor,
    labels_C: Tensor,
    ce_weight_C: Tensor,
    kd_weight_C: Tensor,
    temperature: float,
    addends_AV: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Call `rows.dense_rows` or its CUDA twin, depending on the student's device.

    Triton's kernels write the gradient to `addends_AV` instead, [2 C, V] bfloat16, if it is given: as two
    addends, one below the other.
    """
    if kernels_for(student_CV.device.type) == "torch":
        return rows.dense_rows(student_CV, teacher_CV, labels_C, ce_weight_C, kd_weight_C, temperature)
    from tutelage.objective.kernels import triton_rows  # noqa: PLC0415 - triton exists on Linux only

    return triton_rows.dense_rows(
        student_CV, teacher_CV, labels_C, ce_weight_C, kd_weight_C, temperature, addends_AV
    )


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
    """Call `rows.sparse_rows` or its CUDA twin; `addends_AV` as in `dense_rows`."""
    weights = ce_weight_C, kd_weight_C
    if kernels_for(student_CV.device.type) == "torch":
        return rows.sparse_rows(student_CV, ids_CK, probs_CK, tail_C, labels_C, *weights, temperature, tail)
    from tutelage.objective.kernels import triton_rows  # noqa: PLC0415 - as above

    return triton_rows.sparse_rows(
        student_CV, ids_CK, probs_CK, tail_C, labels_C, *weights, temperature, tail, addends_AV
    )
