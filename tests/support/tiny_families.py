"""Tiny random models of every family that transformers knows as a causal language model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PretrainedConfig

VOCAB, POSITIONS = 300, 64

FAMILIES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
"""Values of `model_type`."""

_WIDTH = ("hidden_size", "n_embd", "d_model", "emb_dim", "dim", "word_embed_proj_dim", "embedding_size")
_INNER = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "encoder_ffn_dim", "decoder_ffn_dim")
_LAYERS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    *("encoder_layers", "decoder_layers", "num_decoder_layers"),
)
_HEADS = (
    *("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"),
    *("encoder_attention_heads", "decoder_attention_heads"),
)
_LENGTH = ("max_position_embeddings", "n_positions", "max_seq_len", "context_length", "seq_length", "n_ctx")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_SIZES: dict[str, Any] = (
    dict.fromkeys(_WIDTH, 32)
    | dict.fromkeys(_INNER, 64)
    | dict.fromkeys(_LAYERS, 4)
    | dict.fromkeys(_HEADS, 4)
    | dict.fromkeys(_LENGTH, POSITIONS)
    | dict.fromkeys(_EXPERTS, 4)
    | {
        "vocab_size": VOCAB,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "attention_head_dim": 8,
        "rotary_dim": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "num_experts_per_tok": 2,
        "moe_topk": 2,
        "moe_k": 2,
        "n_group": 1,
        "topk_group": 1,
        "sliding_window": 16,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
)
"""Small values of the fields that say how large a model is, under the names of the families."""

_MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
_INDEXED = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 8}
_OF_A_FAMILY: dict[str, dict[str, Any]] = {
    "axk1": _MLA,
    "axk2": _MLA,
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "bailing_hybrid": _MLA,
    "camembert": {"pad_token_id": 1},
    "cpmant": {"prompt_types": 2, "prompt_length": 2, "segment_types": 2, "dim_head": 8, "dim_ff": 48},
    "data2vec-text": {"pad_token_id": 1},
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA,
    "deepseek_v32": _MLA | _INDEXED,
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "glm4_moe_lite": _MLA,
    "glm_moe_dsa": _MLA | _INDEXED,
    "gemma4_text": {"vocab_size_per_layer_input": 300, "hidden_size_per_layer_input": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_state": 16, "mamba_chunk_size": 16},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": _MLA | {"expert_ffn_hidden_size": 16, "zero_expert_num": 2, "moe_topk": 2},
    "mamba2": {"num_heads": 8},
    "minicpm3": _MLA,
    "modernbert-decoder": {"pad_token_id": 1},
    "prophetnet": {"pad_token_id": 1},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "rembert": {"output_embedding_size": 32, "input_embedding_size": 32},
    "roberta": {"pad_token_id": 1},
    "roberta-prelayernorm": {"pad_token_id": 1},
    "roc_bert": {"pronunciation_vocab_size": 20, "shape_vocab_size": 20},
    "xlm": {"pad_token_id": 1},
    "xlm-roberta": {"pad_token_id": 1},
    "xlm-roberta-xl": {"pad_token_id": 1},
    "xmod": {"pad_token_id": 1, "default_language": "en_XX"},
    "youtu": _MLA,
    "zamba2": {"layer_types": ["mamba", "hybrid"] * 2, "num_mem_blocks": 1},
    "zaya": {"num_experts_per_tok": 1},
}
"""Fields that have to fit those above."""


def tiny_config(family: str) -> PretrainedConfig:
    """Make the smallest config of a family that still has everything: layers of every kind, experts."""
    kind = CONFIG_MAPPING[family]
    known = kind().to_dict()
    sizes = {field: value for field, value in _SIZES.items() if field in known}
    if isinstance(known.get("text_config"), dict):
        text = {field: value for field, value in _SIZES.items() if field in known["text_config"]}
        sizes["text_config"] = {"model_type": known["text_config"]["model_type"]} | text
    return kind(**(sizes | _OF_A_FAMILY.get(family, {})))


_LARGEST = 20_000_000
"""Parameters of what is still called tiny."""


def tiny_model(family: str, directory: Path) -> Any:
    """Write a tiny random float32 model of a family, and return it in eval mode."""
    config = tiny_config(family)
    with torch.device("meta"):
        size = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    if size > _LARGEST:
        raise ValueError(f"its smallest has {size:,} parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(directory)
    return model
