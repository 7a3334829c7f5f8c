"""Parameters of a shape, and floating-point operations of shapes and models, by formula. No torch.

Counted: every matrix product of the forward pass, one multiply and one add each, with attention at half
the context, since a causal query sees half of the keys on average. Left out: embedding lookup, norms,
rotary positions, softmax, activations and the loss, together below one per cent at the paper's sizes;
also recomputation, so these are the operations of the model and not of an implementation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tutelage.models.shapes import EXPERTS

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

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


_ACTIVE = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
"""Fields of a config.json, by family, that say to how many experts of a layer a token is sent."""


def model_forward_flops(model: PreTrainedModel, context: int) -> float:
    """Operations of a forward pass per token, as `forward_flops` counts them, for any model.

    Every matrix outside the input embedding multiplies every token, but of a layer's routed experts as many
    as a token is sent to; shared experts count whole. That some implementations compute more (Llama 4 runs
    all experts) is not counted. Attention is left out where the config does not name its heads.
    """
    settings = model.config.get_text_config(decoder=True).to_dict()
    experts = _first(settings, EXPERTS)
    active = min(1.0, _first(settings, _ACTIVE) / experts) if experts else 1.0
    head, lookup = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    used = 0.0
    for weight in model.parameters():
        stacked = weight.ndim == 3 and weight.shape[0] == experts  # noqa: PLR2004 - experts, rows, columns
        if weight.ndim > 1 and (weight is head or weight is not lookup):
            used += weight.numel() * (active or 1.0 if stacked else 1.0)
    config = model.config
    try:
        heads, layers = int(config.num_attention_heads), int(config.num_hidden_layers)
    except AttributeError:
        return 2.0 * used
    return 2.0 * used + 2.0 * context * heads * layers * _head_dim(settings, config.hidden_size // heads)


def _first(settings: dict[str, Any], names: Iterable[str]) -> float:
    """The first of these fields that a config has; of one with a number for each layer the mean; 0: none."""
    for name in names:
        value = settings.get(name)
        if isinstance(value, list):
            value = sum(value) / len(value)
        if value:
            return float(value)
    return 0.0


def _head_dim(settings: dict[str, Any], usual: int) -> float:
    """Width of a head; where values have another than queries and keys, the mean of both."""
    if (rotary := settings.get("qk_rope_head_dim")) and (values := settings.get("v_head_dim")):
        return float(settings["qk_nope_head_dim"] + rotary + values) / 2
    return float(settings.get("head_dim") or usual)


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
