"""The vision tower's tensors as the engine takes them: twins of the structs in src/model/vision.h.

Names come from layout.py. Must never know of devices or images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from camelid.checkpoint import Checkpoint
from camelid.config import VisionConfig
from camelid.errors import Unsupported
from camelid.layout import Linear, vision_linears
from camelid.sources import LinearSource, linear_source, norm_source

__all__ = ["VisionFrameSources", "VisionLayerSources", "frame_sources", "vision_layer_sources"]

Floats = NDArray[np.float32]
Norm = tuple[Floats, Floats]  # gain, bias: [dim]


class _Sources:
    """What has matrices among its fields."""

    def linears(self) -> Iterator[LinearSource]:
        """Yield every matrix."""
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, LinearSource):
                yield value


@dataclass(frozen=True)
class VisionFrameSources(_Sources):
    """What lies before and after the encoder layers."""

    patch: LinearSource
    class_row: Floats  # [dim]
    positions: Floats  # [n_patches + 1, dim], the class token's last
    norm_pre: Norm
    norm_post: Norm
    adapter_fc1: LinearSource
    adapter_fc2: LinearSource
    projector: LinearSource


@dataclass(frozen=True)
class VisionLayerSources(_Sources):
    """One encoder layer."""

    norm1: Norm
    norm2: Norm
    q: LinearSource
    k: LinearSource
    v: LinearSource
    o: LinearSource
    fc1: LinearSource
    fc2: LinearSource
    qkv_bias: Floats  # [3 * dim], q over k over v
    o_bias: Floats
    fc1_bias: Floats
    fc2_bias: Floats


def frame_sources(checkpoint: Checkpoint, vision: VisionConfig) -> VisionFrameSources:
    """Return everything of the tower but its encoder layers.

    Raises:
        CheckpointError: If a tensor is missing or holds nonsense.
        Unsupported: If the adapter's widths do not follow each other.
    """
    widths = {vision.projector_input_dim, vision.projector_output_dim, vision.output_dim}
    if len(widths) > 1:
        raise Unsupported(
            "[config] vision_config: projector_input_dim, projector_output_dim and "
            f"vision_output_dim are {sorted(widths)}. Supported: the same width for all three."
        )
    linears = {linear.name: linear for linear, _ in vision_linears(vision, checkpoint.config.dim)}
    adapter = "vision_model.vision_adapter.mlp"
    return VisionFrameSources(
        patch=linear_source(checkpoint, linears["vision_model.patch_embedding.linear"]),
        class_row=norm_source(checkpoint, "vision_model.class_embedding"),
        positions=norm_source(checkpoint, "vision_model.positional_embedding_vlm"),
        norm_pre=_norm(checkpoint, "vision_model.layernorm_pre"),
        norm_post=_norm(checkpoint, "vision_model.layernorm_post"),
        adapter_fc1=linear_source(checkpoint, linears[f"{adapter}.fc1"]),
        adapter_fc2=linear_source(checkpoint, linears[f"{adapter}.fc2"]),
        projector=linear_source(checkpoint, linears["multi_modal_projector.linear_1"]),
    )


def vision_layer_sources(
    checkpoint: Checkpoint, vision: VisionConfig, layer: int
) -> VisionLayerSources:
    """Return encoder layer `layer`.

    Raises:
        CheckpointError: If a tensor is missing or holds nonsense.
    """
    base = f"vision_model.model.layers.{layer}"
    dim, ffn_dim = vision.dim, vision.ffn_dim

    def linear(name: str, out_dim: int, in_dim: int) -> LinearSource:
        return linear_source(checkpoint, Linear(f"{base}.{name}", out_dim, in_dim))

    def bias(name: str) -> Floats:
        return norm_source(checkpoint, f"{base}.{name}.bias")

    q, k, v = (f"self_attn.{name}_proj" for name in "qkv")
    return VisionLayerSources(
        norm1=_norm(checkpoint, f"{base}.input_layernorm"),
        norm2=_norm(checkpoint, f"{base}.post_attention_layernorm"),
        q=linear(q, dim, dim),
        k=linear(k, dim, dim),
        v=linear(v, dim, dim),
        o=linear("self_attn.o_proj", dim, dim),
        fc1=linear("mlp.fc1", ffn_dim, dim),
        fc2=linear("mlp.fc2", dim, ffn_dim),
        qkv_bias=np.concatenate([bias(q), bias(k), bias(v)]),
        o_bias=bias("self_attn.o_proj"),
        fc1_bias=bias("mlp.fc1"),
        fc2_bias=bias("mlp.fc2"),
    )


def _norm(checkpoint: Checkpoint, name: str) -> Norm:
    return norm_source(checkpoint, f"{name}.weight"), norm_source(checkpoint, f"{name}.bias")
