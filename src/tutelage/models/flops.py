"""Parameters of a shape, and floating-point operations of shapes and models, by formula. No torch.

Counted: every matrix product of the forward pass, one multiply and one add each, with attention at half
the context, since a causal query sees half of the keys on average. Left out: embedding lookup, norms,
rotary positions, softmax, activations and the loss, together below one per cent at the paper's sizes;
also recomputation, so these are the operations of the model and not of an implementation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tutelage.models.shapes import EXPERTS

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from torch import Tensor
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


_SMALL = 0.05
"""Part of a model's weights, without embedding and head, that its biases and further norms may be."""


def shape_of(shape: ModelShape | None, model: PreTrainedModel) -> ModelShape | None:
    """The shape that a model has, if it has as many weights as its config.json seems to describe; else None.

    No field says whether an MLP has a gate (Phi and GPT-NeoX have none), or what
    layers without attention hold; and families differ in whether a head is the embedding that no field ties.

    Args:
        shape: by `tutelage.models.shapes.read_shape`.
        model: made from the same config.json; may be on the meta device.
    """
    ends = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    counted: int = sum(weight.numel() for weight in {*model.parameters()} - ends)
    if shape is None or abs(parameters(shape, 0).non_embedding - counted) > _SMALL * counted:
        return None
    return replace(shape, tied=len(ends) == 1)


def forward_flops(shape: ModelShape, vocab_size: int, context: int) -> float:
    """Operations of a forward pass per token, averaged over a sequence of `context` tokens.

    2 (matmul weights + hidden * vocab_size) for the layers and the head, and
    2 * 2 * (context / 2) * heads * head_dim * layers for queries times keys and weights times values.
    """
    attention = 2 * context * shape.heads * shape.head_dim * shape.layers
    return float(2 * (_matmul_weights(shape) + shape.hidden * vocab_size) + attention)


_ACTIVE = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
"""Fields of a config.json, by family, that say to how many experts of a layer a token is sent."""
_WITHOUT_ATTENTION = ("linear_attention", "mamba", "conv", "mlp", "moe")
"""Types of layers, in a config's `layer_types`, whose queries see no keys: what they keep has one size."""


def model_forward_flops(model: PreTrainedModel, context: int) -> float:
    """Operations of a forward pass per token, as `forward_flops` counts them, for any model.

    Every matrix outside embeddings multiplies every token, but of a layer's routed experts as many as a
    token is sent to; shared experts count whole. Keys and heads are those of each layer's own config. That
    some implementations compute more (Llama 4 runs all experts, DiffLlama its values twice) is not counted,
    nor are the recurrences of linear attention and state spaces beyond their matrices, nor the products by
    which sparse attention finds its keys. Attention is left out where the config does not name its heads.
    """
    config = model.config.get_text_config(decoder=True)
    used = _multiplied(model, config.to_dict())
    try:
        layers = list(config.per_layer_config)
        heads = [int(layer.num_attention_heads) for layer in layers]
    except AttributeError:
        return 2.0 * used
    try:
        kinds = list(config.layer_types or ())
    except AttributeError:
        kinds = []
    kinds = kinds or ["sliding_attention"] * len(layers)  # a window given without types is each layer's
    seen = 0.0
    for layer, own, kind in zip(layers, heads, kinds, strict=True):
        settings = layer.to_dict()
        seen += _keys(kind, settings, context) * own * _head_dim(settings, layer.hidden_size / own)
    return 2.0 * used + 4.0 * seen


def _multiplied(model: PreTrainedModel, settings: dict[str, Any]) -> float:
    """Weights that multiply a token of text, on average over tokens."""
    from torch.nn import Embedding  # noqa: PLC0415 - the planner does without torch

    from tutelage.models.packed import body_of  # noqa: PLC0415 - which imports it too

    experts = _first(settings, EXPERTS)
    sent = _first(settings, _ACTIVE) / (experts + _first(settings, ("zero_expert_num",))) if experts else 1.0
    used = {id(head := model.get_output_embeddings().weight): float(head.numel())}
    for module in body_of(model).modules():
        if isinstance(module, Embedding):
            continue
        weights = list(module.parameters(recurse=False))
        stacked = any(_is_stacked(weight, experts) for weight in weights)
        for weight in weights:
            if _is_stacked(weight, experts):
                used.setdefault(id(weight), weight.numel() * min(1.0, sent or 1.0))
            elif weight.ndim > 1 and not stacked:  # beside stacked matrices, theirs are the biases
                used.setdefault(id(weight), float(weight.numel()))
    return sum(used.values())


def _is_stacked(weight: Tensor, experts: float) -> bool:
    return weight.ndim == 3 and weight.shape[0] == experts  # noqa: PLR2004 - experts, rows, columns


def _keys(kind: str, settings: dict[str, Any], context: int) -> float:
    """Keys that a query of a layer sees, on average over a sequence."""
    if kind in _WITHOUT_ATTENTION:
        return 0.0
    if kind == "chunked_attention":
        return min(context, settings.get("attention_chunk_size") or context) / 2
    window = context
    if kind == "sliding_attention":
        window = min(context, settings.get("sliding_window") or context)
    return window - window**2 / (2 * context)


def _first(settings: dict[str, Any], names: Iterable[str]) -> float:
    """The first of these fields that a config has; of one with a number for each layer the mean; 0: none."""
    for name in names:
        value = settings.get(name)
        if isinstance(value, list):
            value = sum(value) / len(value)
        if value:
            return float(value)
    return 0.0


def _head_dim(settings: dict[str, Any], usual: float) -> float:
    """Width of a head; where values have another than queries and keys, the mean of both."""
    width = _first(settings, ("head_dim", "kv_channels")) or usual
    if plain := settings.get("qk_nope_head_dim"):
        width = float(plain + settings["qk_rope_head_dim"])
    return (width + (settings.get("v_head_dim") or width)) / 2


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
