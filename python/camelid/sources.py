"""What each matrix of a checkpoint is made of: views into the mapped files, for the C++ core.

Owns LinearSource, the twin of src/quant/format.h, and the way from a layer number to all its
matrices, whichever layout the file uses. Copies nothing but norms. Must never quantise or pack.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from camelid.errors import CheckpointError
from camelid.layout import (
    FLOATS,
    Linear,
    attention_linears,
    dense_linears,
    embedding_name,
    expert_linears,
    final_norm_name,
    head_name,
    is_fused,
    layer_name,
    router_linear,
    shared_linears,
)
from camelid.quantization import Scheme
from camelid.safetensors import DTYPE_BYTES

if TYPE_CHECKING:
    from camelid.checkpoint import Checkpoint

__all__ = [
    "LayerSources",
    "LinearSource",
    "embedding_source",
    "final_norm_source",
    "head_source",
    "layer_sources",
    "linear_source",
]


@dataclass(frozen=True)
class LinearSource:
    """One linear [out_dim, in_dim] as the file holds it; the twin of src/quant/format.h.

    Buffers are one-dimensional read-only bytes. Strides count elements.
    """

    name: str
    file: str
    out_dim: int
    in_dim: int
    # Plain: element (row, col) is at data[row * row_stride + col * col_stride].
    dtype: str = "F32"
    data: NDArray[np.uint8] | None = None
    row_stride: int = 0
    col_stride: int = 0
    # Quantised, when bits is 4 or 8.
    bits: int = 0
    group_size: int = 0  # values along in_dim; in_dim when one scale serves the row
    words: NDArray[np.uint8] | None = None  # int32 [out_dim, ceil(in_dim / values_per_word)]
    scales: NDArray[np.uint8] | None = None  # [out_dim, n_groups] of scale_dtype
    scale_dtype: str = "F32"
    zero_points: NDArray[np.uint8] | None = (
        None  # int32 [ceil(out_dim / values_per_word), n_groups]
    )
    tensor_names: tuple[str, ...] = ()  # to release once packed


Mlp = tuple[LinearSource, LinearSource, LinearSource]  # gate, up, down


@dataclass(frozen=True)
class LayerSources:
    """Everything one decoder layer is made of."""

    input_norm: NDArray[np.float32]  # [dim]
    post_norm: NDArray[np.float32]  # [dim]
    q: LinearSource
    k: LinearSource
    v: LinearSource
    o: LinearSource
    router: LinearSource | None  # a MoE layer has router, experts and shared,
    experts: list[Mlp]
    shared: Mlp | None
    dense: Mlp | None  # a dense one this

    def linears(self) -> Iterator[LinearSource]:
        """Yield every matrix of the layer."""
        yield from (self.q, self.k, self.v, self.o)
        if self.router is not None:
            yield self.router
        for mlp in (*self.experts, self.shared, self.dense):
            if mlp is not None:
                yield from mlp

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Every tensor read, each once: release these when the layer is packed."""
        return tuple(dict.fromkeys(n for linear in self.linears() for n in linear.tensor_names))


def layer_sources(checkpoint: Checkpoint, layer: int) -> LayerSources:
    """Return what decoder layer `layer` is made of. Call `account` first.

    Raises:
        CheckpointError: If a tensor is missing, or a weight_shape or norm holds nonsense.
    """
    config = checkpoint.config
    base = layer_name(config, layer)
    q, k, v, o = (linear_source(checkpoint, linear) for linear in attention_linears(config, layer))
    moe = config.is_moe_layer[layer]
    return LayerSources(
        input_norm=norm_source(checkpoint, f"{base}.input_layernorm.weight"),
        post_norm=norm_source(checkpoint, f"{base}.post_attention_layernorm.weight"),
        q=q,
        k=k,
        v=v,
        o=o,
        router=linear_source(checkpoint, router_linear(config, layer)) if moe else None,
        experts=_expert_sources(checkpoint, layer) if moe else [],
        shared=_mlp(checkpoint, shared_linears(config, layer)) if moe else None,
        dense=None if moe else _mlp(checkpoint, dense_linears(config, layer)),
    )


def embedding_source(checkpoint: Checkpoint) -> LinearSource:
    """Return the embedding table, [vocab_size, dim]."""
    config = checkpoint.config
    name = embedding_name(config)
    return _plain(checkpoint, Linear(name.removesuffix(".weight"), config.vocab_size, config.dim))


def final_norm_source(checkpoint: Checkpoint) -> NDArray[np.float32]:
    """Return the gain of the last norm, [dim]."""
    return norm_source(checkpoint, final_norm_name(checkpoint.config))


def head_source(checkpoint: Checkpoint) -> LinearSource | None:
    """Return the output matrix [vocab_size, dim], None when the embedding serves as it.

    A file that holds one is believed over a config that says tied, as transformers does.
    """
    config = checkpoint.config
    linear = Linear(head_name(config), config.vocab_size, config.dim)
    held = any(f"{linear.name}.{s}" in checkpoint.tensors for s in ("weight", "weight_packed"))
    return linear_source(checkpoint, linear) if held or not config.tie_word_embeddings else None


def norm_source(checkpoint: Checkpoint, name: str) -> NDArray[np.float32]:
    """Return a vector of gains as float32."""
    entry = checkpoint.entry(name)
    values = to_float32(checkpoint.view(name), entry.dtype)
    if not np.isfinite(values).all():
        at = int(np.flatnonzero(~np.isfinite(values))[0])
        raise CheckpointError(
            f"[checkpoint] {name} in {entry.file} holds {values[at]} at {at}, expected finite "
            "numbers. The file is damaged; download it again."
        )
    return values


def to_float32(data: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    """Return a float32 copy of F32, F16 or BF16 bytes."""
    if dtype == "F32":
        return data.view("<f4").astype(np.float32)
    if dtype == "F16":
        return data.view("<f2").astype(np.float32)
    if dtype == "BF16":
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    raise CheckpointError(f"[checkpoint] a tensor is {dtype}, expected {' or '.join(FLOATS)}.")


def linear_source(checkpoint: Checkpoint, linear: Linear) -> LinearSource:
    """Return one linear, quantised or plain as the file holds it."""
    quantization = checkpoint.config.quantization
    scheme = quantization.scheme_for(linear.name) if quantization else None
    if scheme is not None and f"{linear.name}.weight_packed" in checkpoint.tensors:
        return _quantised(checkpoint, linear, scheme)
    return _plain(checkpoint, linear)


def _plain(checkpoint: Checkpoint, linear: Linear) -> LinearSource:
    name = f"{linear.name}.weight"
    entry = checkpoint.entry(name)
    return LinearSource(
        name=name,
        file=entry.file,
        out_dim=linear.out_dim,
        in_dim=linear.in_dim,
        dtype=entry.dtype,
        data=checkpoint.view(name),
        row_stride=linear.in_dim,
        col_stride=1,
        tensor_names=(name,),
    )


def _quantised(checkpoint: Checkpoint, linear: Linear, scheme: Scheme) -> LinearSource:
    packed, scale = f"{linear.name}.weight_packed", f"{linear.name}.weight_scale"
    zero, shape = f"{linear.name}.weight_zero_point", f"{linear.name}.weight_shape"
    entry = checkpoint.entry(shape)
    got = checkpoint.view(shape).view("<i8" if entry.dtype == "I64" else "<i4").tolist()
    if got != [linear.out_dim, linear.in_dim]:
        raise CheckpointError(
            f"[checkpoint] {shape} in {entry.file} holds {got}, expected "
            f"[{linear.out_dim}, {linear.in_dim}]."
        )
    names = (packed, scale, shape) if scheme.symmetric else (packed, scale, shape, zero)
    return LinearSource(
        name=packed,
        file=checkpoint.entry(packed).file,
        out_dim=linear.out_dim,
        in_dim=linear.in_dim,
        bits=scheme.bits,
        group_size=scheme.group_size or linear.in_dim,
        words=_aligned(checkpoint, packed),
        scales=_aligned(checkpoint, scale),
        scale_dtype=checkpoint.entry(scale).dtype,
        zero_points=None if scheme.symmetric else _aligned(checkpoint, zero),
        tensor_names=names,
    )


def _aligned(checkpoint: Checkpoint, name: str) -> NDArray[np.uint8]:
    """Return a tensor aligned to its elements, copied in the rare file where it is not."""
    data = checkpoint.view(name)
    if data.ctypes.data % DTYPE_BYTES[checkpoint.entry(name).dtype]:
        return data.copy()
    return data


def _mlp(checkpoint: Checkpoint, linears: tuple[Linear, Linear, Linear]) -> Mlp:
    gate, up, down = (linear_source(checkpoint, linear) for linear in linears)
    return gate, up, down


def _expert_sources(checkpoint: Checkpoint, layer: int) -> list[Mlp]:
    config = checkpoint.config
    if is_fused(config, layer, checkpoint.tensors):
        return [fused_expert(checkpoint, layer, expert) for expert in range(config.n_experts)]
    return [
        _mlp(checkpoint, expert_linears(config, layer, expert))
        for expert in range(config.n_experts)
    ]


def fused_expert(checkpoint: Checkpoint, layer: int, expert: int) -> Mlp:
    """Return gate, up and down of one expert as transposed views into the fused tensors.

    gate_up_proj[expert] is [dim, 2 * ffn_dim], input-major, gate in the first half of each row;
    down_proj[expert] is [ffn_dim, dim].
    """
    config = checkpoint.config
    base = f"{layer_name(config, layer)}.feed_forward.experts"
    dim, ffn_dim = config.dim, config.expert_dim

    def source(name: str, first: int, n: int, out_dim: int, in_dim: int, row: int) -> LinearSource:
        # Elements [first, first + n) of the tensor; `row` of them separate two inputs.
        entry = checkpoint.entry(name)
        size = DTYPE_BYTES[entry.dtype]
        return LinearSource(
            name=f"{name}[{expert}]",
            file=entry.file,
            out_dim=out_dim,
            in_dim=in_dim,
            dtype=entry.dtype,
            data=checkpoint.view(name)[first * size : (first + n) * size],
            row_stride=1,
            col_stride=row,
            tensor_names=(name,),
        )

    both = 2 * ffn_dim
    begin = expert * dim * both
    last = dim * both - ffn_dim  # elements from the first of a half to its last
    return (
        source(f"{base}.gate_up_proj", begin, last, ffn_dim, dim, both),
        source(f"{base}.gate_up_proj", begin + ffn_dim, last, ffn_dim, dim, both),
        source(f"{base}.down_proj", expert * ffn_dim * dim, ffn_dim * dim, dim, ffn_dim, dim),
    )
