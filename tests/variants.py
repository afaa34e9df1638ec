"""The models the engine is held to transformers on: one row for everything the family allows.

Small enough to be written in milliseconds, and scaled so that attention and routing matter. What a
row leaves out is `_BASE`, then the defaults of tests/checkpoints.py.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints import REMOVE, Quantization, Weights, write_checkpoint

N_GREEDY = 40  # tokens after the prompt
GOLDENS = Path(__file__).parent / "data" / "goldens"

_BASE: dict[str, Any] = {
    "vocab_size": 271,  # the test tokenizer's
    "hidden_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "intermediate_size_mlp": 96,
    "num_local_experts": 8,
    "attention_chunk_size": 32,
    "floor_scale": 16,
    "rope_scaling": None,
}


@dataclass(frozen=True)
class Variant:
    """A checkpoint, and the prompt it is asked."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)  # of the text model, over _BASE
    dtype: str = "F32"
    quantization: Quantization | None = None
    fused: bool | None = None
    shards: int = 1
    vision: bool = False
    n_prompt: int = 80  # tokens
    seed: int = 0
    # Of the prompt: the first whose greedy tokens and expert choices all win by a margin far above
    # what float32 rounding moves. tools/make_goldens.py names it.
    prompt_seed: int = 0

    def write(self, folder: str | Path) -> Weights:
        """Write the checkpoint; return the float32 weights it stands for."""
        return write_checkpoint(
            folder,
            config_overrides={**_BASE, **self.config},
            seed=self.seed,
            dtype=self.dtype,
            quantization=self.quantization,
            fused=self.fused,
            shards=self.shards,
            vision=self.vision,
        )

    def prompt(self) -> list[int]:
        """Return bytes, never special tokens."""
        bits = np.random.PCG64(1000 + self.prompt_seed).random_raw(self.n_prompt)
        return [int(value) for value in bits >> np.uint64(56)]


def digest(weights: Weights) -> str:
    """Return what changes when the writer draws other weights than a golden was made with."""
    hasher = hashlib.sha256()
    for name in sorted(weights):
        hasher.update(name.encode())
        hasher.update(np.ascontiguousarray(weights[name]).astype("<f4").tobytes())
    return hasher.hexdigest()[:16]


def _llama3(factor: float, low: float, high: float, original: int) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


_WITH_ATTENTION = ("re:.*lm_head", "re:.*router", "re:.*vision_model.*")

VARIANTS: tuple[Variant, ...] = (
    Variant(
        "scout_like",
        {
            "num_local_experts": 16,
            "rope_scaling": _llama3(16.0, 1.0, 1.0, 8192),
            "floor_scale": 8192,
            "max_position_embeddings": 10485760,
        },
        n_prompt=100,
        prompt_seed=1,
    ),
    # The switch between kept and stretched pairs, where a short prompt can see it.
    Variant("scout_short_rope", {"rope_scaling": _llama3(16.0, 1.0, 1.0, 64), "rope_theta": 1e4}),
    Variant(
        "maverick_like",
        {
            "num_hidden_layers": 8,
            "hidden_size": 48,
            "intermediate_size": 24,
            "num_local_experts": 128,
            "interleave_moe_layer_step": 2,
            "use_qk_norm": False,
            "floor_scale": 8192,
        },
        n_prompt=100,
    ),
    Variant("behemoth_like", {"num_hidden_layers": 12, "num_local_experts": 16, "hidden_size": 48}),
    Variant("top2", {"num_experts_per_tok": 2}, prompt_seed=2),
    Variant("top3_of_3", {"num_experts_per_tok": 3, "num_local_experts": 3}),
    Variant("tied", {"tie_word_embeddings": True}),
    Variant("custom_nope", {"no_rope_layers": [1, 1, 1, 0, 0]}),
    Variant("all_rope", {"no_rope_layers": [1] * 4, "num_hidden_layers": 4}),
    Variant("all_nope", {"no_rope_layers": [0] * 4, "num_hidden_layers": 4}),
    Variant("no_chunk", {"attention_chunk_size": None}, prompt_seed=1),
    Variant("chunk16", {"attention_chunk_size": 16}, n_prompt=120),
    Variant("chunk1", {"attention_chunk_size": 1}, n_prompt=40),
    Variant("floor_scale8", {"floor_scale": 8, "attn_scale": 0.3}),
    Variant(
        "odd_shapes",
        {
            "hidden_size": 42,
            "head_dim": 24,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "intermediate_size": 37,
            "intermediate_size_mlp": 51,
            "interleave_moe_layer_step": 2,
            "num_local_experts": 3,
            "attention_chunk_size": 23,
        },
    ),
    Variant("gqa5", {"num_attention_heads": 10, "num_key_value_heads": 2, "head_dim": 8}),
    Variant("smooth_band", {"rope_scaling": _llama3(8.0, 1.0, 4.0, 128), "rope_theta": 1e4}),
    # What transformers 5 writes: theta inside.
    Variant(
        "rope_parameters",
        {
            "rope_theta": REMOVE,
            "rope_scaling": REMOVE,
            "rope_parameters": _llama3(4.0, 1.0, 4.0, 256) | {"rope_theta": 2e4},
        },
        prompt_seed=1,
    ),
    Variant("no_temperature", {"attn_temperature_tuning": False}),
    # layer_types decides the mask and no_rope_layers the rotation; nothing makes them agree.
    Variant(
        "layer_types",
        {
            "num_hidden_layers": 4,
            "no_rope_layers": [1, 0, 1, 0],
            "layer_types": ["full_attention", "chunked_attention"] * 2,
        },
    ),
    Variant("moe_layers", {"moe_layers": [0, 3]}),
    Variant("dense", {"interleave_moe_layer_step": 9, "num_hidden_layers": 4}),
    Variant("nulls", {"layer_types": None, "moe_layers": None, "no_rope_layers": None}),
    Variant("vision", {"num_local_experts": 4}, vision=True, prompt_seed=1),
    Variant("f16", dtype="F16", shards=2),
    Variant("bf16", dtype="BF16", shards=3),
    Variant("unfused", dtype="BF16", fused=False),
    Variant(
        "int4_g32", {"intermediate_size": 96}, quantization=Quantization(ignore=_WITH_ATTENTION)
    ),
    Variant(
        "int4_g128_asymmetric",
        {"hidden_size": 256, "intermediate_size": 128, "num_local_experts": 4},
        quantization=Quantization(group_size=128, symmetric=False, ignore=_WITH_ATTENTION),
        n_prompt=60,
    ),
    Variant(
        "int4_channel",
        {"head_dim": 24},
        quantization=Quantization(group_size=0, ignore=_WITH_ATTENTION, scale_dtype="F32"),
        prompt_seed=1,
    ),
    Variant(
        "int8",
        {"interleave_moe_layer_step": 2},
        quantization=Quantization(bits=8, group_size=16, ignore=_WITH_ATTENTION),
    ),
    Variant(
        "int4_experts_only",
        {"num_local_experts": 16},
        dtype="BF16",
        quantization=Quantization(group_size=16),
        vision=True,
        prompt_seed=2,
    ),
)
