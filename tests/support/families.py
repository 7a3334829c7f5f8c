"""Configs of tiny models of many families, which several tests build with random weights."""

from __future__ import annotations

import transformers as hf

VOCAB, POSITIONS = 300, 64
IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
SMALL = IDS | {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
OLD = IDS | {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}

FAMILIES = {
    "gpt2": lambda: hf.GPT2Config(**OLD),
    "openai-gpt": lambda: hf.OpenAIGPTConfig(**OLD),
    "gpt_bigcode": lambda: hf.GPTBigCodeConfig(**OLD),
    "opt": lambda: hf.OPTConfig(**{k: v for k, v in SMALL.items() if k != "intermediate_size"}, ffn_dim=48,
                                word_embed_proj_dim=32),
    "gpt_neo": lambda: hf.GPTNeoConfig(**IDS, vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=4,
                                       attention_types=[[["global", "local"], 1]], window_size=8,
                                       max_position_embeddings=POSITIONS),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**SMALL),
    "bloom": lambda: hf.BloomConfig(**IDS, vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4),
    "mpt": lambda: hf.MptConfig(vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=4, max_seq_len=POSITIONS),
    "mamba": lambda: hf.MambaConfig(**IDS, vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2),
    "rwkv": lambda: hf.RwkvConfig(**IDS, vocab_size=VOCAB, hidden_size=32, num_hidden_layers=7,
                                  attention_hidden_size=32, context_length=POSITIONS),
    "gpt_oss": lambda: hf.GptOssConfig(**GROUPED, head_dim=8, num_local_experts=4, num_experts_per_tok=2,
                                       sliding_window=16,
                                       rope_parameters={"rope_type": "default", "rope_theta": 150000.0}),
    "gemma": lambda: hf.GemmaConfig(**GROUPED, head_dim=8),
    "gemma2": lambda: hf.Gemma2Config(**GROUPED, head_dim=8, sliding_window=16),
    "gemma3_text": lambda: hf.Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=16),
    "llama": lambda: hf.LlamaConfig(**GROUPED),
    "llama4_text": lambda: hf.Llama4TextConfig(**GROUPED, head_dim=8, intermediate_size_mlp=48,
                                               num_local_experts=2, interleave_moe_layer_step=1),
    "mistral": lambda: hf.MistralConfig(**GROUPED),
    "mixtral": lambda: hf.MixtralConfig(**GROUPED, num_local_experts=4),
    "qwen2": lambda: hf.Qwen2Config(**GROUPED),
    "qwen3": lambda: hf.Qwen3Config(**GROUPED, head_dim=8),
    "falcon": lambda: hf.FalconConfig(**{k: v for k, v in SMALL.items() if k != "intermediate_size"},
                                      alibi=True),
    "stablelm": lambda: hf.StableLmConfig(**GROUPED),
    "starcoder2": lambda: hf.Starcoder2Config(**GROUPED),
    "cohere": lambda: hf.CohereConfig(**SMALL),
    "granite": lambda: hf.GraniteConfig(**GROUPED),
    "olmo2": lambda: hf.Olmo2Config(**SMALL),
    "smollm3": lambda: hf.SmolLM3Config(**GROUPED),
    "xglm": lambda: hf.XGLMConfig(vocab_size=VOCAB, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4,
                                  max_position_embeddings=POSITIONS),
}  # fmt: skip
