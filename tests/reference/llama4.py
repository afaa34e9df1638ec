"""Llama 4's language model in NumPy float64: slow, short, and the judge of the engine.

Reads config.json's own keys and transformers' tensor names, and shares no code with camelid, so
that a mistake in its reading of either shows. Positions are absolute: the rotation by the
position within the chunk has to agree. tools/make_goldens.py holds it to transformers. What is
rounded, if anything, numerics.py says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reference.numerics import Numerics

Array = NDArray[np.float64]
Config = Mapping[str, Any]
Tensors = Mapping[str, NDArray[Any]]

# transformers 5.23 Llama4TextConfig, where a key is absent.
_DEFAULTS: dict[str, Any] = {
    "head_dim": 128,
    "num_experts_per_tok": 1,
    "rms_norm_eps": 1e-5,
    "use_qk_norm": True,
    "no_rope_layer_interval": 4,
    "attention_chunk_size": 8192,
    "attn_temperature_tuning": True,
    "floor_scale": 8192,
    "attn_scale": 0.1,
    "interleave_moe_layer_step": 1,
}


def forward(
    config: Config,
    weights: Tensors,
    token_ids: Sequence[int],
    *,
    numerics: Numerics | None = None,
    features: Mapping[int, Array] | None = None,
) -> Array:
    """Return the logits after each token, [n_tokens, vocab_size].

    Args:
        config: config.json, or the `text_config` of one.
        weights: By their names in the checkpoint, with or without `language_model.`; routed experts
            fused, or one linear each.
        token_ids: One sequence from position 0.
        numerics: What is rounded, and which experts are chosen; exact if None.
        features: By position, what takes the place of a token's embedding.
    """
    numerics = numerics or Numerics()
    config = text_config(config)
    weights = {name.removeprefix("language_model."): value for name, value in weights.items()}
    eps = config["rms_norm_eps"]
    x = numerics.weight(weights, "model.embed_tokens.weight")[list(token_ids)]
    for position, values in (features or {}).items():
        x[position] = values

    def norm(name: str) -> Array:
        return numerics.normed(x, inverse_rms(x, eps), _load(weights, f"{name}.weight"))

    for layer in range(config["num_hidden_layers"]):
        base = f"model.layers.{layer}"
        x = x + attention(config, weights, layer, norm(f"{base}.input_layernorm"), numerics)
        h = norm(f"{base}.post_attention_layernorm")
        if is_moe_layer(config, layer):
            x = x + mixture(config, weights, layer, h, numerics)
        else:
            x = x + mlp(weights, f"{base}.feed_forward", h, numerics)
    tied = "lm_head.weight" not in weights
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    return norm("model.norm") @ numerics.weight(weights, head).T


def text_config(config: Config) -> dict[str, Any]:
    """Return the text part of config.json with what it leaves out."""
    return _DEFAULTS | dict(config.get("text_config", config))


def inverse_rms(x: Array, eps: float) -> Array:
    """Return what scales the last axis to unit mean square, [.., 1]."""
    return np.asarray(1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps))


def is_rope_layer(config: Config, layer: int) -> bool:
    """Tell whether a layer rotates; `no_rope_layers` says 1 where it does."""
    flags = config.get("no_rope_layers")
    return bool(flags[layer]) if flags else (layer + 1) % config["no_rope_layer_interval"] != 0


def is_chunked_layer(config: Config, layer: int) -> bool:
    """Tell whether a layer sees its own chunk only; `layer_types` decides where it is given."""
    if config["attention_chunk_size"] is None:
        return False
    types = config.get("layer_types")
    return types[layer] == "chunked_attention" if types else is_rope_layer(config, layer)


def is_moe_layer(config: Config, layer: int) -> bool:
    """Tell whether a layer routes to experts; the others are dense."""
    layers = config.get("moe_layers")
    step = config["interleave_moe_layer_step"]
    return layer % step == step - 1 if layers is None else layer in layers


def rope_frequencies(config: Config) -> Array:
    """Return the radians per token of each pair, [head_dim / 2]."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", 500000.0))
    head_dim = config["head_dim"]
    frequency = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.get("rope_type", rope.get("type", "default")) == "default":
        return frequency
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * frequency / (2 * np.pi)
    slow = frequency / rope["factor"]
    if low == high:  # a hard switch: the formula of the band would be 0 / 0
        return np.where(turns < low, slow, frequency)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - kept) * slow + kept * frequency


def rotate(x: Array, angles: Array) -> Array:
    """Turn the pairs (2i, 2i + 1) of x [n_tokens, n_heads, head_dim] by angles [n_tokens, n]."""
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None, :]
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def attention(config: Config, weights: Tensors, layer: int, h: Array, numerics: Numerics) -> Array:
    """Attend over h [n_tokens, dim] and project back."""
    base = f"model.layers.{layer}.self_attn"
    n, head_dim = len(h), config["head_dim"]
    position = np.arange(n)
    q, k, v = (
        (h @ numerics.weight(weights, f"{base}.{name}_proj.weight").T).reshape(n, -1, head_dim)
        for name in "qkv"
    )
    if is_rope_layer(config, layer):
        chunk = config["attention_chunk_size"] if is_chunked_layer(config, layer) else None
        turns = numerics.rotated_as(position, chunk)
        angles = turns[:, None] * rope_frequencies(config)
        q, k = rotate(q, angles), rotate(k, angles)
        if config["use_qk_norm"]:
            q, k = (part * inverse_rms(part, config["rms_norm_eps"]) for part in (q, k))
    elif config["attn_temperature_tuning"]:
        chunks = np.floor((position + 1) / config["floor_scale"])
        q = q * (1 + config["attn_scale"] * np.log1p(chunks))[:, None, None]

    visible = position[None, :] <= position[:, None]
    if is_chunked_layer(config, layer):
        chunk = position // config["attention_chunk_size"]
        visible &= chunk[None, :] == chunk[:, None]
    q = numerics.operand(q)
    (k, k_scale), (v, v_scale) = numerics.stored(k), numerics.stored(v)
    group = q.shape[1] // k.shape[1]  # queries that share a key
    k, v, k_scale, v_scale = (np.repeat(x, group, axis=1) for x in (k, v, k_scale, v_scale))
    scores = np.einsum("qhd,khd->hqk", q, k) * k_scale.transpose(1, 2, 0) / np.sqrt(head_dim)
    scores = np.where(visible, scores, -np.inf)
    share = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = np.einsum("hqk,khd->qhd", numerics.weighted(share * v_scale.transpose(1, 2, 0)), v)
    mixed /= share.sum(axis=-1).T[..., None]
    mixed = numerics.operand(mixed.reshape(n, -1))
    return mixed @ numerics.weight(weights, f"{base}.o_proj.weight").T


def mlp(
    weights: Tensors, base: str, h: Array, numerics: Numerics, factor: float | Array = 1.0
) -> Array:
    """Return down(silu(gate h) * up h) for an input of factor * h."""
    gate, up, down = (
        numerics.weight(weights, f"{base}.{name}_proj.weight") for name in ("gate", "up", "down")
    )
    return numerics.operand(silu(factor * (h @ gate.T)) * (factor * (h @ up.T))) @ down.T


def silu(x: Array) -> Array:
    """Return x * sigmoid(x)."""
    return x * sigmoid(x)


def sigmoid(x: Array) -> Array:
    """Return 1 / (1 + exp(-x)), without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * x))


def mixture(config: Config, weights: Tensors, layer: int, h: Array, numerics: Numerics) -> Array:
    """Return the shared expert's output and that of the top-k experts on their scaled input."""
    base = f"model.layers.{layer}.feed_forward"
    out = mlp(weights, f"{base}.shared_expert", h, numerics)
    logits = h @ numerics.weight(weights, f"{base}.router.weight").T
    chosen = numerics.choose(layer, logits, config["num_experts_per_tok"])
    for expert in np.unique(chosen):
        rows, _ = np.nonzero(chosen == expert)
        factor = sigmoid(logits[rows, expert])[:, None]
        one = expert_weights(weights, base, expert)
        out[rows] += mlp(one, f"{base}.experts.{expert}", h[rows], numerics, factor)
    return out


def expert_weights(weights: Tensors, base: str, expert: int) -> dict[str, NDArray[Any]]:
    """Return one expert's three matrices [out, in], from the fused tensors where there are any."""
    fused = weights.get(f"{base}.experts.gate_up_proj")
    one = f"{base}.experts.{expert}"
    if fused is None:
        return {
            f"{one}.{name}_proj.weight": weights[f"{one}.{name}_proj.weight"]
            for name in ("gate", "up", "down")
        }
    gate, up = np.split(fused[expert], 2, axis=-1)  # [dim, ffn_dim] each
    down = weights[f"{base}.experts.down_proj"][expert]  # [ffn_dim, dim]
    return {
        f"{one}.gate_proj.weight": gate.T,
        f"{one}.up_proj.weight": up.T,
        f"{one}.down_proj.weight": down.T,
    }


def _load(weights: Tensors, name: str) -> Array:
    return weights[name].astype(np.float64)
