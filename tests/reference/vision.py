"""The vision tower in NumPy and float64, written from transformers' modeling_llama4.py.

features = encode(config, weights, pixels)   # [n_tiles, tokens_per_tile, hidden_size]
"""

from __future__ import annotations

from math import erf
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_erf = np.vectorize(erf, otypes=[np.float64])


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + _erf(x / np.sqrt(2)))


def layer_norm(x: Array, weights: dict[str, Array], name: str) -> Array:
    off = x - x.mean(axis=-1, keepdims=True)
    scaled = off / np.sqrt((off**2).mean(axis=-1, keepdims=True) + 1e-5)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x: Array, weights: dict[str, Array], name: str) -> Array:
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)


def unfold(pixels: Array, patch: int) -> Array:
    """[n_tiles, c, s, s] -> [n_tiles, patches, c * patch^2], as torch.nn.Unfold."""
    n_tiles, n_channels, side, _ = pixels.shape
    n = side // patch
    cut = pixels[:, :, : n * patch, : n * patch].reshape(n_tiles, n_channels, n, patch, n, patch)
    return cut.transpose(0, 2, 4, 1, 3, 5).reshape(n_tiles, n * n, -1)


def rotation(n: int, head_dim: int, theta: float) -> NDArray[np.complex128]:
    """[n * n + 1, head_dim / 2]: columns turn the first half of the pairs, rows the second."""
    half = head_dim // 2
    frequencies = theta ** -(np.arange(0, half, 2)[: half // 2] / half)
    at = np.arange(n * n)
    angles = np.concatenate(
        [np.outer(at % n + 1, frequencies), np.outer(at // n + 1, frequencies)], axis=1
    )
    return np.exp(1j * np.concatenate([angles, np.zeros((1, half))]))


def attend(q: Array, k: Array, v: Array, n_heads: int, turn: NDArray[np.complex128]) -> Array:
    def heads(x: Array) -> Array:  # [tiles, heads, rows, head_dim]
        return x.reshape(*x.shape[:2], n_heads, -1).transpose(0, 2, 1, 3)

    def turned(x: Array) -> Array:
        pairs = heads(x)[..., ::2] + 1j * heads(x)[..., 1::2]
        pairs = pairs * turn
        return np.stack([pairs.real, pairs.imag], axis=-1).reshape(heads(x).shape)

    scores = turned(q) @ turned(k).transpose(0, 1, 3, 2) / np.sqrt(q.shape[-1] // n_heads)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return (weights @ heads(v)).transpose(0, 2, 1, 3).reshape(q.shape)


def pixel_shuffle(x: Array, ratio: float) -> Array:
    n_tiles, n_patches, dim = x.shape
    side, step = round(np.sqrt(n_patches)), round(1 / ratio)
    squares = x.reshape(n_tiles, side // step, step, side // step, step, dim)
    return squares.transpose(0, 1, 3, 2, 4, 5).reshape(n_tiles, -1, dim * step**2)


def encode(config: dict[str, Any], stored: dict[str, Any], pixels: NDArray[Any]) -> Array:
    """Return the embeddings of tiles [n_tiles, channels, side, side]."""
    weights = {name: np.asarray(value, np.float64) for name, value in stored.items()}
    vision = config["vision_config"]
    patch, n_heads = vision["patch_size"], vision["num_attention_heads"]
    x = linear(
        unfold(pixels.astype(np.float64), patch), weights, "vision_model.patch_embedding.linear"
    )
    last = np.broadcast_to(weights["vision_model.class_embedding"], (len(x), 1, x.shape[2]))
    x = np.concatenate([x, last], axis=1) + weights["vision_model.positional_embedding_vlm"]
    x = layer_norm(x, weights, "vision_model.layernorm_pre")
    theta = vision.get("rope_parameters", vision).get("rope_theta", 10000.0)
    turn = rotation(vision["image_size"] // patch, x.shape[2] // n_heads, theta)
    for layer in range(vision["num_hidden_layers"]):
        base = f"vision_model.model.layers.{layer}"
        h = layer_norm(x, weights, f"{base}.input_layernorm")
        q, k, v = (linear(h, weights, f"{base}.self_attn.{name}_proj") for name in "qkv")
        x = x + linear(attend(q, k, v, n_heads, turn), weights, f"{base}.self_attn.o_proj")
        h = layer_norm(x, weights, f"{base}.post_attention_layernorm")
        x = x + linear(gelu(linear(h, weights, f"{base}.mlp.fc1")), weights, f"{base}.mlp.fc2")
    x = layer_norm(x, weights, "vision_model.layernorm_post")[:, :-1]
    x = pixel_shuffle(x, vision.get("pixel_shuffle_ratio", 0.5))
    for name in ("fc1", "fc2"):
        x = gelu(linear(x, weights, f"vision_model.vision_adapter.mlp.{name}"))
    return linear(x, weights, "multi_modal_projector.linear_1")
