"""What a step of a Llama 4 must read and multiply, and the least time a GPU needs for that.

    decode    all weights of the layers and the head, experts only those that tokens hit, and the
              keys and values of every sequence: local layers their chunk's, global layers all
    prefill   2 products for each weight a token meets, and for each pair of query and key that
              see each other 4 * n_heads * head_dim; the weights once for each piece of the prompt

A time is the larger of bytes over the read bandwidth and products over the bf16 peak: as if all
that a step does could overlap. Must never measure; works on any camelid.config.ModelConfig.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from camelid.config import ModelConfig

INT4_BYTES = 0.5 + 2 / 128  # of a weight: 16 bits of scale for each 128
INT8_BYTES = 1 + 2 / 128
BF16_BYTES = 2
# What a GPU reads, copies and multiplies at most, where nobody measured it: 0 limits nothing.
NO_PEAKS = {"read_gb_s": 0.0, "copy_gb_s": 0.0, "bf16_tflop_s": 0.0, "bf16_measured_by": "nobody"}
KV_BYTES = {"bf16": (2, 0), "fp8": (1, 4), "int8": (1, 4)}  # of a value, and of a row's scale


@dataclass(frozen=True)
class Work:
    """Bytes that must be read, and products and sums that must be computed."""

    n_bytes: float = 0.0
    n_flops: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.n_bytes + other.n_bytes, self.n_flops + other.n_flops)

    def __mul__(self, times: float) -> Work:
        return Work(self.n_bytes * times, self.n_flops * times)

    def seconds(self, read_gb_s: float, bf16_tflop_s: float) -> float:
        """Return the least time; where a peak is 0 nobody measured it, and it limits nothing."""
        reading = self.n_bytes / read_gb_s / 1e9 if read_gb_s else 0.0
        multiplying = self.n_flops / bf16_tflop_s / 1e12 if bf16_tflop_s else 0.0
        return max(reading, multiplying)


# ---- parts of a model ----
def experts_hit(config: ModelConfig, n_tokens: int) -> float:
    """Return how many routed experts tokens choose, when each is as likely as any other."""
    missed = (1 - config.top_k / config.n_experts) ** n_tokens
    return config.n_experts * (1 - missed)


def matrix(out_dim: int, in_dim: int, n_tokens: int, weight_bytes: float = INT4_BYTES) -> Work:
    return Work(out_dim * in_dim * weight_bytes, 2.0 * out_dim * in_dim * n_tokens)


def qkv(config: ModelConfig, n_tokens: int) -> Work:
    n_heads = config.n_heads + 2 * config.n_kv_heads
    return matrix(n_heads * config.head_dim, config.dim, n_tokens)


def output(config: ModelConfig, n_tokens: int) -> Work:
    return matrix(config.dim, config.n_heads * config.head_dim, n_tokens)


def mlp(config: ModelConfig, ffn_dim: int, n_tokens: int) -> Work:
    return matrix(3 * ffn_dim, config.dim, n_tokens)


def experts(config: ModelConfig, n_tokens: int) -> Work:
    """Router, shared expert, and the routed ones that tokens hit."""
    one = mlp(config, config.expert_dim, n_tokens)
    router = matrix(config.n_experts, config.dim, n_tokens, BF16_BYTES)
    routed = Work(one.n_bytes * experts_hit(config, n_tokens), one.n_flops * config.top_k)
    return one + router + routed


def head(config: ModelConfig, n_rows: int) -> Work:
    return matrix(config.vocab_size, config.dim, n_rows, INT8_BYTES)


def kv_token_bytes(config: ModelConfig, kv: str) -> int:
    """Return the bytes of a token's keys and values in a layer."""
    value_bytes, scale_bytes = KV_BYTES[kv]
    return 2 * config.n_kv_heads * (config.head_dim * value_bytes + scale_bytes)


def chunk_of(config: ModelConfig, layer: int) -> int | None:
    """Return the tokens of a local layer's chunk; a global layer sees everything."""
    return config.attention_chunk_size if config.is_chunked_layer[layer] else None


def n_keys(config: ModelConfig, layer: int, position: int) -> int:
    """Return how many keys the query at a position sees, itself among them."""
    chunk = chunk_of(config, layer)
    return (position % chunk if chunk else position) + 1


def attention(config: ModelConfig, layer: int, position: int, kv: str) -> Work:
    """One query of every head, at a position of its sequence."""
    keys = n_keys(config, layer, position)
    return Work(keys * kv_token_bytes(config, kv), 4.0 * keys * config.n_heads * config.head_dim)


def causal_attention(config: ModelConfig, layer: int, n_tokens: int) -> Work:
    """All tokens of a prompt; what they read beside the weights is too little to count."""
    size = chunk_of(config, layer) or n_tokens
    whole, rest = divmod(n_tokens, size)
    pairs = whole * size * (size + 1) // 2 + rest * (rest + 1) // 2
    return Work(0.0, 4.0 * pairs * config.n_heads * config.head_dim)


def layer_products(config: ModelConfig, layer: int, n_tokens: int) -> Work:
    """All products of a layer but attention's."""
    moe = config.is_moe_layer[layer]
    block = experts(config, n_tokens) if moe else mlp(config, config.dense_dim, n_tokens)
    return qkv(config, n_tokens) + output(config, n_tokens) + block


# ---- steps ----
def decode(config: ModelConfig, n_sequences: int, position: int, kv: str) -> Work:
    """One token of each sequence, all at the same position."""
    total = head(config, n_sequences)
    for layer in range(config.n_layers):
        total += layer_products(config, layer, n_sequences)
        total += attention(config, layer, position, kv) * n_sequences
    return total


def prefill(config: ModelConfig, n_tokens: int, piece: int) -> Work:
    """A prompt of one sequence in pieces, each of which reads the weights again; one row's head."""
    total = head(config, 1)
    for layer in range(config.n_layers):
        for first in range(0, n_tokens, piece):
            total += layer_products(config, layer, min(piece, n_tokens - first))
        total += causal_attention(config, layer, n_tokens)
    return total
