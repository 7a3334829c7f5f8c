"""Memory of a training run on one device, by formula and by part. No torch.

The parts are those that stand together when the most is needed: during the objective, when all activations
of a micro-batch exist; in the first layers of the backward pass; while the teacher runs; or at the update.
On a CPU a share is added for what the allocator keeps unused. Left out: what the libraries take, and on a
GPU what its allocator keeps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tutelage.models.flops import parameters
from tutelage.models.forward_memory import (
    ForwardPass,
    MemoryPlan,
    Recomputation,
    token_bytes,
    writing_parts,
)

if TYPE_CHECKING:
    from tutelage.models.shapes import ModelShape

_FLOAT, _HALF = 4, 2
_CACHED_TOKENS = 4096
"""Of a batch whose targets a run writes to a cache."""
_CHECKPOINT = 3 * _FLOAT
"""Of a weight in a copy of the state: itself and its two moments."""
_ROWS = 6 * 2**20
"""Bytes of the block of rows that the CPU's kernels work on, with its temporaries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What the memory of a training step depends on.

    Attributes:
        shape: of the student.
        vocab_size: rows of its head.
        micro_batch: tokens of a forward pass of one process.
        micro_batches: forward passes of one process per step.
        chunk: tokens whose logits the objective holds at a time.
        half: whether the forward pass is computed in half precision; weights, moments and sums are float32.
        replicate: copies of the model.
        shards: processes that share one copy; 1: each holds all of it.
        reshard: whether gathered weights of a layer are freed between forward and backward pass.
        recomputation: of activations in the backward pass.
        compiled: whether layers are compiled.
        mask_length: tokens of a sequence if attention is given a mask that keeps documents apart, else 0.
        eager: tokens of a sequence if attention forms the weights of all pairs, else 0.
        teachers: that run beside the student; none without one, and where targets are cached.
        teacher_bytes: of one of their weights, and of a value in their forward pass.
        teacher_shards: processes that share their weights.
        teacher_reshards: whether gathered weights of a layer are freed when it has been run.
        teacher_eager: as `eager`, of teachers.
        dense: whether targets come as hidden states, whose logits are formed chunk by chunk.
        mean: whether they are a mean of several teachers', whose logits are added one after the other.
        temporaries: of the objective, each as large as the logits of a chunk.
        cached: teachers whose targets are written to a cache before training, each whole on every process.
        target_bytes: of a token's targets that come from a cache, when they are used.
        read_bytes: of the same when they are read, for all of a step and of the next; 0 where another memory
            holds them until then.
        target_width: of the hidden states that a cache holds, whose head is in memory; 0 if it holds none.
        cuda: whether the head's products are made as on CUDA: half precision, results in float32.
        copied: whether checkpoints are copied to the memory of the device, where the copy stays.
        others: weights of the students that train together with this one.
    """

    shape: ModelShape
    vocab_size: int
    micro_batch: int
    micro_batches: int
    chunk: int
    half: bool = False
    replicate: int = 1
    shards: int = 1
    reshard: bool = True
    recomputation: Recomputation = "none"
    compiled: bool = False
    mask_length: int = 0
    eager: int = 0
    teachers: tuple[ModelShape, ...] = ()
    teacher_bytes: int = _FLOAT
    teacher_shards: int = 1
    teacher_reshards: bool = True
    teacher_eager: int = 0
    dense: bool = False
    mean: bool = False
    temporaries: int = 0
    cached: tuple[ModelShape, ...] = ()
    target_bytes: float = 0.0
    read_bytes: float = 0.0
    target_width: int = 0
    cuda: bool = False
    copied: bool = False
    others: int = 0

    @property
    def meshed(self) -> bool:
        """Whether there are several processes, which FSDP2 wraps the model for."""
        return self.replicate * self.shards > 1

    @property
    def blocks(self) -> int:
        """Blocks as large as the logits of a chunk that the objective holds at most: these and temporaries.

        The logits of each teacher of a mean are added to a sum, and take a temporary block themselves.
        """
        return 1 + self.dense + self.mean + max(self.mean, self.temporaries)

    @property
    def bytes(self) -> int:
        """Bytes of a value in the forward pass."""
        return _HALF if self.half else _FLOAT


def kept_bytes_of_layer(
    shape: ModelShape,
    *,
    half: bool,
    cast: bool,
    mask_length: int = 0,
    eager: int = 0,
    compiled: bool = False,
) -> int:
    """Bytes per token that a decoder layer keeps for its backward pass, attention computed in blocks.

    Kept are, per norm, its input, the normalised input and its output; rotated queries and keys, values, what
    attention gives and its log-sum-exp; in the MLP gate, its activation, up and their product. Qwen3 also
    norms queries and keys. Norms keep their input in float32 in any case. A compiler computes again what is
    no product, and keeps the layer's input, outputs of norms, and what products and attention give or take.

    Args:
        shape: of the model.
        half: whether matrix products are in half precision.
        cast: whether they are by autocast, where the residual stream is float32 and each product keeps its
            own copy of its input; else the weights are in half precision too.
        mask_length: as in `Footprint`; with a mask each layer keeps its own copy of it in the compute dtype,
            and keys and values once per query head.
        eager: as in `Footprint`; the weights are kept instead of the log-sum-exp, in half precision in
            float32 too, and keys and values once per query head.
        compiled: as in `Footprint`.
    """
    b = _HALF if half else _FLOAT
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    wide = _FLOAT if cast or not half else _HALF
    inputs = 5 * _HALF if half and cast else 2 * b
    norms = shape.hidden * (2 * _FLOAT + 2 * wide + inputs) + 2 * _FLOAT
    mlp = 4 * b * shape.mlp
    if compiled:
        norms, mlp = shape.hidden * (wide + 3 * b) + 2 * _FLOAT, 3 * b * shape.mlp
    attention = 2 * b * (queries + keys) + _FLOAT * shape.heads
    if shape.family == "qwen3":
        attention += (b if compiled else b + _FLOAT) * (queries + keys)
        attention += _FLOAT * (shape.heads + shape.kv_heads)
    if eager:
        attention += shape.heads * (eager * (b if b == _FLOAT else b + _FLOAT) - _FLOAT)
    elif mask_length:
        attention += b * mask_length
    if eager or mask_length:
        attention += 2 * b * (queries - keys)
    return norms + attention + mlp


def _kept_when_recomputed(run: Footprint) -> int:
    """Bytes per token that a recomputed layer keeps: its input, and with `selective` its products."""
    shape, wide = run.shape, _HALF if run.half and run.meshed else _FLOAT
    if run.recomputation == "full":
        return wide * shape.hidden
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    last = 0 if run.compiled else shape.hidden  # nothing needs the product that the layer ends with
    products = 2 * queries + 2 * keys + shape.hidden + 2 * shape.mlp + last
    attention = run.bytes * run.eager if run.eager else _FLOAT  # scores are a product; or the log-sum-exp
    return wide * shape.hidden + run.bytes * products + attention * shape.heads


def plan_memory(run: Footprint) -> MemoryPlan:
    """The parts of a run's memory at the moment when they are largest together."""
    moments = {
        "objective": _at_objective(run),
        "head's backward pass": _in_head(run),
        "layers' backward pass": _in_layers(run),
        "update": _at_update(run),
    }
    if run.teachers:
        moments["teacher's forward pass"] = _in_teachers(run)
    if run.cached:
        moments["writing of the cache, if it is not there yet"] = _at_cache(run)
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    return MemoryPlan.of(moments[moment], moment, cuda=run.cuda, recomputation=run.recomputation)


def _state(run: Footprint, *, gradients: bool) -> dict[str, float]:
    """Weights and moments of the student, the weights of the teacher, and the batch.

    Of other students their gradients too: those that come first in a step keep them until all are updated.
    """
    weights = parameters(run.shape, run.vocab_size).total / run.shards
    parts = {"weights": _FLOAT * weights, "moments": 2 * _FLOAT * weights}
    if gradients:
        parts["gradients"] = _FLOAT * weights
    if run.teachers:
        taught = sum(parameters(teacher, run.vocab_size).total for teacher in run.teachers)
        parts["teacher"] = run.teacher_bytes * taught / run.teacher_shards
    targets = run.target_bytes + 2 * run.micro_batches * run.read_bytes
    parts["cache"] = run.micro_batch * targets + _FLOAT * run.vocab_size * run.target_width
    parts["checkpoint"] = _CHECKPOINT * weights * run.copied
    parts["other students"] = run.others / run.shards * (4 * _FLOAT + _CHECKPOINT * run.copied)
    parts["batches"] = 3 * 8 * run.micro_batch * run.micro_batches + run.micro_batch * run.mask_length
    return parts


def _activations(run: Footprint) -> float:
    """Bytes that are kept of a micro-batch when its forward pass ends."""
    shape, cast = run.shape, run.half and not run.meshed
    layer = _layer_bytes(run)
    if run.recomputation != "none":
        layer = _kept_when_recomputed(run)
    wide = run.bytes if run.meshed else _FLOAT
    last = shape.hidden * (_FLOAT + 2 * wide + (_HALF if cast else 0))
    kept = float(run.micro_batch * (shape.layers * layer + last))
    if cast and run.recomputation == "none":  # a copy of each matrix, which its backward pass needs
        kept += _HALF * _layer_weights(run.shape) * shape.layers
    return kept


def _layer_bytes(run: Footprint) -> int:
    """Bytes per token that a layer of the student keeps if nothing is recomputed."""
    cast = run.half and not run.meshed
    return kept_bytes_of_layer(
        run.shape,
        half=run.half,
        cast=cast,
        mask_length=run.mask_length,
        eager=run.eager,
        compiled=run.compiled,
    )


def _layer_weights(shape: ModelShape) -> float:
    """Weights of one decoder layer."""
    return (parameters(shape, 0).non_embedding - shape.hidden) / shape.layers


def _gathered(run: Footprint) -> float:
    """Bytes of gathered weights: the head, and the group that is gathered next (or all) with its buffer."""
    if not run.meshed:
        return 0.0
    head, layer = run.vocab_size * run.shape.hidden, _layer_weights(run.shape)
    if run.reshard:
        return run.bytes * (head + max(head if run.micro_batches == 1 else 0, 2 * layer))
    return run.bytes * (parameters(run.shape, run.vocab_size).total + head)


def _unreduced(run: Footprint) -> float:
    """Bytes of gradients between micro-batches that are not shards yet.

    Those of the head, which is reduced once per step, and the buffer that the embedding was reduced from.
    """
    if run.micro_batches == 1 or run.shards == 1:
        return 0.0
    return 2.0 * _FLOAT * run.vocab_size * run.shape.hidden


def _at_objective(run: Footprint) -> dict[str, float]:
    head = run.vocab_size * run.shape.hidden
    chunks = math.ceil(run.micro_batch / run.chunk)  # of equal size
    chunk = _FLOAT * math.ceil(run.micro_batch / chunks) * run.vocab_size
    logits = chunk * run.blocks + (0 if run.cuda else _ROWS)
    gradients = _FLOAT * (head + run.micro_batch * run.shape.hidden)
    if run.cuda and run.half:
        logits += chunk  # the logits' gradient is two addends in half precision
        gradients += 0 if run.meshed else _HALF * head
    for teacher in run.teachers:
        logits += run.teacher_bytes * run.micro_batch * teacher.hidden
        if run.teacher_shards > 1:
            logits += run.teacher_bytes * run.vocab_size * teacher.hidden  # its head, whole
    return _state(run, gradients=run.micro_batches > 1) | {
        "activations": _activations(run),
        "objective": logits + gradients + _unreduced(run),
        "gathered layers": _gathered(run),
    }


def _in_head(run: Footprint) -> dict[str, float]:
    """Where the backward pass begins: the head's gradient in float32, and what it is reduced from."""
    head = float(run.vocab_size * run.shape.hidden)
    arriving = _FLOAT * head
    if run.meshed:
        arriving += run.bytes * head + _unreduced(run)
    return _state(run, gradients=run.micro_batches > 1) | {
        "activations": _activations(run) + _FLOAT * run.micro_batch * run.shape.hidden,
        "gathered layers": _gathered(run),
        "objective": arriving,
    }


def _in_layers(run: Footprint) -> dict[str, float]:
    """In the first layer of the backward pass: its temporary values, whose place gradients take."""
    shape, layer = run.shape, _layer_weights(run.shape)
    pairs = 2 * _FLOAT * shape.heads * run.eager
    passing = float(run.micro_batch * (max(3 * run.bytes * shape.mlp, pairs) + 2 * _FLOAT * shape.hidden))
    if run.recomputation != "none":
        passing += run.micro_batch * _layer_bytes(run)
    arriving = _FLOAT * run.vocab_size * shape.hidden if run.micro_batches == 1 else 0.0
    if run.meshed:
        passing = max(passing, (run.bytes + _FLOAT) * 2 * layer)
        arriving = _unreduced(run)
    return _state(run, gradients=run.micro_batches > 1) | {
        "activations": _activations(run) + passing,
        "gathered layers": _gathered(run),
        "objective": arriving,
    }


def _at_update(run: Footprint) -> dict[str, float]:
    return _state(run, gradients=True) | {"gathered layers": 0 if run.reshard else _gathered(run)}


def _at_cache(run: Footprint) -> dict[str, float]:
    """While a cache is written, which no optimizer has begun before."""
    students = run.others + parameters(run.shape, run.vocab_size).total
    one = ForwardPass(
        shapes=run.cached,
        vocab_size=run.vocab_size,
        tokens=_CACHED_TOKENS,
        bytes=run.teacher_bytes,
        eager=run.teacher_eager,
        cuda=run.cuda,
    )
    return {"weights": _FLOAT * students / run.shards} | writing_parts(one)


def _in_teachers(run: Footprint) -> dict[str, float]:
    """While the last of them runs: the largest, with the states that the others have left."""
    per_token = token_bytes(run.teachers, run.teacher_bytes, run.teacher_eager)
    passing = float(run.micro_batch * per_token)
    layers = 0.0
    if run.teacher_shards > 1:
        gathered = [_layer_weights(one) * (2 if run.teacher_reshards else one.layers) for one in run.teachers]
        layers = run.teacher_bytes * (max if run.teacher_reshards else sum)(gathered)
    return _state(run, gradients=run.micro_batches > 1) | {
        "activations": passing,
        "gathered layers": layers,
    }
