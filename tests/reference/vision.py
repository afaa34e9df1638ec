"""The vision tower in NumPy and float64, written from transformers' modeling_llama4.py.

features = encode(config, weights, pixels)   # [n_tiles, tokens_per_tile, hidden_size]

What is rounded, if anything, numerics.py says.
"""

from __future__ import annotations

from math import erf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reference.numerics import Numerics

Array = NDArray[np.float64]
_erf = np.vectorize(erf, otypes=[np.float64])


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + _erf(x / np.sqrt(2)))


def layer_norm(x: Array, weights: dict[str, Array], name: str) -> Array:
    off = x - x.mean(axis=-1, keepdims=True)
    scaled = off / np.sqrt((off**2).mean(axis=-1, keepdims=True) + 1e-5)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


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


def attend(
    q: Array, k: Array, v: Array, n_heads: int, turn: NDArray[np.complex128], numerics: Numerics
) -> Array:
    def heads(x: Array) -> Array:  # [tiles, heads, rows, head_dim]
        return x.reshape(*x.shape[:2], n_heads, -1).transpose(0, 2, 1, 3)

    def turned(x: Array) -> Array:
        pairs = heads(x)[..., ::2] + 1j * heads(x)[..., 1::2]
        pairs = pairs * turn
        return np.stack([pairs.real, pairs.imag], axis=-1).reshape(heads(x).shape)

    q, k, v = (numerics.operand(x) for x in (turned(q), turned(k), heads(v)))
    scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(q.shape[-1])
    share = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = numerics.operand(share) @ v / share.sum(axis=-1, keepdims=True)
    return mixed.transpose(0, 2, 1, 3).reshape(*mixed.shape[:1], mixed.shape[2], -1)


def pixel_shuffle(x: Array, ratio: float) -> Array:
    n_tiles, n_patches, dim = x.shape
    side, step = round(np.sqrt(n_patches)), round(1 / ratio)
    squares = x.reshape(n_tiles, side // step, step, side // step, step, dim)
    return squares.transpose(0, 1, 3, 2, 4, 5).reshape(n_tiles, -1, dim * step**2)


def encode(
    config: dict[str, Any],
    stored: dict[str, Any],
    pixels: NDArray[Any],
    numerics: Numerics | None = None,
) -> Array:
    """Return the embeddings of tiles [n_tiles, channels, side, side]."""
    numerics = numerics or Numerics()
    rounded = numerics.operand
    weights = {name: np.asarray(value, np.float64) for name, value in stored.items()}
    vision = config["vision_config"]
    patch, n_heads = vision["patch_size"], vision["num_attention_heads"]

    def linear(x: Array, name: str) -> Array:
        return rounded(x) @ numerics.weight(stored, f"{name}.weight").T

    def with_bias(x: Array, name: str) -> Array:
        return x + weights[f"{name}.bias"]

    x = linear(unfold(pixels.astype(np.float64), patch), "vision_model.patch_embedding.linear")
    last = np.broadcast_to(weights["vision_model.class_embedding"], (len(x), 1, x.shape[2]))
    x = np.concatenate([x, last], axis=1) + weights["vision_model.positional_embedding_vlm"]
    x = layer_norm(x, weights, "vision_model.layernorm_pre")
    theta = vision.get("rope_parameters", vision).get("rope_theta", 10000.0)
    turn = rotation(vision["image_size"] // patch, x.shape[2] // n_heads, theta)
    for layer in range(vision["num_hidden_layers"]):
        base = f"vision_model.model.layers.{layer}"
        h = layer_norm(x, weights, f"{base}.input_layernorm")
        names = [f"{base}.self_attn.{name}_proj" for name in "qkv"]
        q, k, v = (with_bias(linear(h, name), name) for name in names)
        name = f"{base}.self_attn.o_proj"
        x = x + with_bias(linear(attend(q, k, v, n_heads, turn, numerics), name), name)
        h = layer_norm(x, weights, f"{base}.post_attention_layernorm")
        # Operands from one product to the next, each time they are touched.
        name = f"{base}.mlp.fc1"
        h = rounded(with_bias(rounded(linear(h, name)), name))
        name = f"{base}.mlp.fc2"
        x = x + with_bias(linear(gelu(h), name), name)
    x = layer_norm(x, weights, "vision_model.layernorm_post")[:, :-1]
    x = pixel_shuffle(x, vision.get("pixel_shuffle_ratio", 0.5))
    for name in ("fc1", "fc2"):
        x = gelu(rounded(linear(x, f"vision_model.vision_adapter.mlp.{name}")))
    return linear(x, "multi_modal_projector.linear_1")
