"""Named model shapes. Importing this module costs nothing: transformers is loaded only to make a config.

Two ladders. The paper's eight shapes (arXiv 2605.23857) at 0.14 to 8 billion parameters, and tiny Llama
shapes for CPUs, named by their non-embedding parameters, that keep the paper's steps between sizes. Some of
these also exist with the normalised queries and keys of Qwen 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tutelage.errors import lookup

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from transformers import LlamaConfig, Qwen3Config

Family = Literal["llama", "qwen3"]


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Shape of a decoder with rotary positions, RMS norm, gated MLP and grouped queries.

    Attributes:
        name: value of `model.shape` in a config.
        family: "llama", or "qwen3" (which also normalises queries and keys).
        hidden: width of the residual stream.
        layers: number of decoder layers.
        heads: query heads.
        kv_heads: key and value heads; divides `heads`.
        head_dim: width of one head; heads * head_dim may differ from `hidden`.
        mlp: width of the gated MLP.
        tied: whether the head is the input embedding.
        lr: peak learning rate that suits the shape.
        vocab_size: the paper's vocabulary; None takes the token store's.
        summary: where the shape comes from and what it is for.
    """

    name: str
    family: Family
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    tied: bool
    lr: float
    vocab_size: int | None
    summary: str

    def config(self, vocab_size: int, context: int) -> LlamaConfig | Qwen3Config:
        """Make the transformers config of this shape, for training, without special token ids.

        Args:
            vocab_size: rows of the embedding, the tokenizer's ids.
            context: longest sequence in tokens.
        """
        from transformers import LlamaConfig, Qwen3Config  # noqa: PLC0415 - 4 s that the table must not cost

        kind, theta, eps = {"llama": (LlamaConfig, 5e5, 1e-5), "qwen3": (Qwen3Config, 1e6, 1e-6)}[self.family]
        return kind(
            vocab_size=vocab_size,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.mlp,
            tie_word_embeddings=self.tied,
            max_position_embeddings=context,
            rope_parameters={"rope_type": "default", "rope_theta": theta},
            rms_norm_eps=eps,
            attention_dropout=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )


# name, hidden, layers, heads, head_dim, mlp, lr, summary
_NANO = (
    ("nano-20k", 32, 2, 4, 8, 80, 8.0e-3, "CPU: weak teacher of the mini study"),
    ("nano-50k", 48, 2, 4, 16, 120, 6.0e-3, "CPU: tests, and the weak teacher of the demo"),
    ("nano-150k", 64, 3, 4, 16, 192, 6.0e-3, "CPU: student of the demo"),
    ("nano-350k", 96, 3, 6, 16, 320, 6.0e-3, "CPU: strong teacher of the demo"),
    ("nano-700k", 128, 4, 4, 32, 336, 4.0e-3, "CPU: larger studies"),
    ("nano-2m", 192, 5, 6, 32, 528, 3.0e-3, "CPU: larger studies"),
    ("nano-6m", 320, 6, 10, 32, 800, 2.0e-3, "CPU with patience, or a small GPU"),
    ("nano-20m", 512, 8, 16, 32, 1280, 1.0e-3, "a laptop's GPU"),
)
_NORMALISED = ("nano-50k", "nano-150k", "nano-350k")
"""Tiny shapes that also exist with normalised queries and keys, named with "-qk" at the end."""
# name, hidden, layers, mlp, summary
_LLAMA = (
    ("llama-0.7b", 1024, 12, 8192, "arXiv 2605.23857: weak teacher, small student"),
    ("llama-1.7b", 2048, 16, 8192, "arXiv 2605.23857: the main student"),
    ("llama-3.8b", 3072, 28, 8192, "arXiv 2605.23857: strong teacher, large student"),
    ("llama-8b", 4096, 32, 14_336, "arXiv 2605.23857: strongest teacher, largest student"),
)
# name, hidden, layers, heads, kv_heads, head_dim, summary
_QWEN3 = (
    ("qwen3-0.15b", 512, 20, 8, 4, 64, "arXiv 2605.23857: weak teacher of the architecture study"),
    ("qwen3-0.3b", 768, 24, 12, 4, 64, "arXiv 2605.23857: student of the architecture study"),
    ("qwen3-0.6b", 1024, 28, 16, 8, 128, "arXiv 2605.23857: student and teacher of the architecture study"),
    ("qwen3-1b", 1536, 28, 12, 4, 128, "arXiv 2605.23857: student and teacher of the architecture study"),
)

_SHAPES = (
    *(
        ModelShape(name, "llama", hidden, layers, heads, 2, head_dim, mlp, False, lr, None, summary)
        for name, hidden, layers, heads, head_dim, mlp, lr, summary in _NANO
    ),
    *(
        ModelShape(
            f"{name}-qk",
            "qwen3",
            hidden,
            layers,
            heads,
            2,
            head_dim,
            mlp,
            False,
            lr,
            None,
            f"CPU: {name} with normalised queries and keys, which vary less between seeds",
        )
        for name, hidden, layers, heads, head_dim, mlp, lr, _ in _NANO
        if name in _NORMALISED
    ),
    *(
        ModelShape(name, "llama", hidden, layers, 32, 8, 128, mlp, False, 3e-4, 128_256, summary)
        for name, hidden, layers, mlp, summary in _LLAMA
    ),
    *(
        ModelShape(
            name, "qwen3", hidden, layers, heads, kv_heads, head_dim, 3 * hidden, True, 5e-4, 151_936, summary
        )
        for name, hidden, layers, heads, kv_heads, head_dim, summary in _QWEN3
    ),
)

LADDER: dict[str, ModelShape] = {shape.name: shape for shape in _SHAPES}
"""Every shape by name, each ladder from small to large."""


def find_shape(name: str) -> ModelShape:
    """Look up the shape called `name`.

    Raises:
        UserError: there is none; the message suggests the nearest name.
    """
    return lookup(LADDER, name, "model.shape =")


EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Fields of a config.json, by family, that say how many experts a layer has."""


def read_shape(config: Mapping[str, Any], name: str) -> ModelShape | None:
    """The shape that a model's config.json describes, without its learning rate.

    None for a family whose layers are not attention with rotary positions and one gated MLP, as far as the
    fields tell: another count of weights would be wrong.

    Args:
        config: content of config.json.
        name: of the model.
    """
    known = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    optional = (config.get(field) or 1 for field in ("num_key_value_heads", "head_dim"))
    sizes = [*(config.get(field) for field in known), *optional]  # a list has one size per layer
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return None
    if any(config.get(field) for field in EXPERTS):
        return None
    heads = int(config["num_attention_heads"])
    return ModelShape(
        name=name,
        family="qwen3" if config.get("model_type") == "qwen3" else "llama",
        hidden=int(config["hidden_size"]),
        layers=int(config["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
        mlp=int(config["intermediate_size"]),
        tied=bool(config.get("tie_word_embeddings", True)),
        lr=0.0,
        vocab_size=int(config["vocab_size"]),
        summary=f"read from the config.json of {name}",
    )
