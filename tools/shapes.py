"""The text configs of the released models, for slices and models of random weights. No imports."""

from __future__ import annotations

from typing import Any

SCOUT: dict[str, Any] = {
    "architectures": ["Llama4ForCausalLM"],
    "model_type": "llama4_text",
    "hidden_size": 5120,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_local_experts": 16,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
    "use_qk_norm": True,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "attention_chunk_size": 8192,
    "max_position_embeddings": 1048576,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
MAVERICK = SCOUT | {
    "num_local_experts": 128,
    "interleave_moe_layer_step": 2,
    "use_qk_norm": False,
}
SHAPES = {"scout": SCOUT, "maverick": MAVERICK}
