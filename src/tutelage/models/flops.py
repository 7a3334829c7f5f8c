"""Parameters of a shape, and floating-point operations of shapes and models, by formula. No torch.

Counted: every matrix product of the forward pass, one multiply and one add each, with attention at half
the context, since a causal query sees half of the keys on average. Left out: embedding lookup, norms,
rotary positions, softmax, activations and the loss, together below one per cent at the paper's sizes;
also recomputation, so these are the operations of the model and not of an implementation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tutelage.models.shapes import ModelShape


@dataclass(frozen=True, slots=True)
class Parameters:
    """Sizes of a model.

    Attributes:
        total: all weights, each counted once, so a tied head adds nothing.
        non_embedding: without the input embedding and without the head.
    """

    total: int
    non_embedding: int


def _matmul_weights(shape: ModelShape) -> int:
    """Weights of the decoder layers that take part in matrix products."""
    attention = shape.hidden * shape.head_dim * 2 * (shape.heads + shape.kv_heads)
    return shape.layers * (attention + 3 * shape.hidden * shape.mlp)


def parameters(shape: ModelShape, vocab_size: int) -> Parameters:
    """Count the weights of `shape` with an embedding of `vocab_size` rows."""
    norms = 2 * shape.hidden + (2 * shape.head_dim if shape.family == "qwen3" else 0)
    non_embedding = _matmul_weights(shape) + shape.layers * norms + shape.hidden
    embeddings = 1 if shape.tied else 2
    return Parameters(non_embedding + embeddings * vocab_size * shape.hidden, non_embedding)


def forward_flops(shape: ModelShape, vocab_size: int, context: int) -> float:
    """Operations of a forward pass per token, averaged over a sequence of `context` tokens.

    2 (matmul weights + hidden * vocab_size) for the layers and the head, and
    2 * 2 * (context / 2) * heads * head_dim * layers for queries times keys and weights times values.
    """
    attention = 2 * context * shape.heads * shape.head_dim * shape.layers
    return float(2 * (_matmul_weights(shape) + shape.hidden * vocab_size) + attention)


def model_forward_flops(model: PreTrainedModel, context: int) -> float:
    """Operations of a forward pass per token, as `forward_flops` counts them, for any model.

    Every matrix outside the input embedding is taken to multiply every token: of a mixture of experts
    that is too much. Attention is left out where the config does not name its heads.
    """
    head, lookup = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    matrices = sum(weight.numel() for weight in model.parameters() if weight.ndim > 1)
    used = int(matrices if head is lookup else matrices - lookup.numel())
    config = model.config
    try:
        heads, layers = int(config.num_attention_heads), int(config.num_hidden_layers)
    except AttributeError:
        return 2.0 * used
    head_dim = int(config.to_dict().get("head_dim") or config.hidden_size // heads)
    return 2.0 * used + 2.0 * context * heads * head_dim * layers


def training_flops(forward: float) -> float:
    """Operations of forward and backward pass; the latter takes twice the `forward` ones."""
    return 3.0 * forward


def kd_cost_factor(teacher: float, student: float) -> float:
    """Return the cost of a token with an online teacher over one without: 1 + teacher / (3 student).

    Args:
        teacher: forward operations per token of the teacher, which never runs backward.
        student: forward operations per token of the student, in the same unit. Parameters may stand in
            for operations (2 N per token) on both sides where the shape is not known.
    """
    return 1.0 + teacher / training_flops(student)
