"""What a model weighs before anything of it is loaded: arithmetic over headers and config.

Owns the sizes of weights by part, in the file and in memory, and of the KV cache. The memory plan
of loading and `camelid inspect` read the same numbers. Must never read tensor data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from camelid.checkpoint import Checkpoint
from camelid.config import ModelConfig
from camelid.layout import (
    Linear,
    attention_linears,
    dense_linears,
    embedding_name,
    expert_linears,
    head_name,
    is_fused,
    layer_name,
    router_linear,
    shared_linears,
    vision_linears,
)

__all__ = ["KvReport", "Part", "Report", "inspect", "kv_report", "show_bytes"]

PARTS = (
    "embedding",
    "attention",
    "routed experts",
    "shared experts",
    "dense",
    "router",
    "norms",
    "head",
    "vision",
)
KV_ELEMENT_BYTES = {"f32": 4, "bf16": 2, "fp8": 1, "int8": 1}
_KV_SCALE_BYTES = {"fp8": 4, "int8": 4}  # of each token, once for its keys and once for its values
PAGE_TOKENS = 64  # the engine's default page size
_PLAIN_BITS = {"F32": 32, "F16": 16, "BF16": 16}
# Of the packed layout, src/cpu/packed.h: rows in panels of 16, parts aligned to 64 bytes.
_PANEL_ROWS = 16
_ALIGN = 64
# A GPU holds other groups than multiples of these as bf16, and plain weights no wider than that.
_TILE_GROUP = 32


@dataclass
class Part:
    """One part of a model; bytes in the file and, once loaded, in memory."""

    n_parameters: int = 0
    stored_bytes: int = 0
    loaded_bytes: int = 0
    quantised_bytes: int = 0  # of loaded_bytes, held as int4 or int8


@dataclass(frozen=True)
class KvReport:
    """The KV cache with one element type: what grows with every token, and what stops growing."""

    bytes_per_token: int  # of the layers that see everything
    chunk_bytes: int  # of the layers that see one chunk, when it is full
    chunk_tokens: int

    def bytes_for(self, n_tokens: int) -> int:
        """Return the bytes of one sequence of `n_tokens`, in whole pages."""
        n_global = _round_up(n_tokens, PAGE_TOKENS)
        n_local = min(n_global, _round_up(self.chunk_tokens, PAGE_TOKENS))
        local = self.chunk_bytes * n_local // self.chunk_tokens if self.chunk_tokens else 0
        return self.bytes_per_token * n_global + local

    def tokens_in(self, n_bytes: int) -> int:
        """Return the longest sequence that fits into `n_bytes` alone."""
        low, high = 0, 1 << 40
        while low < high:
            middle = (low + high + 1) // 2
            if self.bytes_for(middle * PAGE_TOKENS) <= n_bytes:
                low = middle
            else:
                high = middle - 1
        return low * PAGE_TOKENS


@dataclass
class Report:
    """Everything `camelid inspect` knows."""

    folder: str
    architecture: str
    stored_as: str
    config: dict[str, Any]
    parts: dict[str, Part]
    active_parameters: int
    kv: dict[str, KvReport] = field(default_factory=dict)

    @property
    def n_parameters(self) -> int:
        """All parameters, vision included."""
        return sum(part.n_parameters for part in self.parts.values())

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors in the files."""
        return sum(part.stored_bytes for part in self.parts.values())

    @property
    def loaded_bytes(self) -> int:
        """Bytes of all weights in memory."""
        return sum(part.loaded_bytes for part in self.parts.values())


@dataclass(frozen=True)
class _Held:
    """How a folder holds one linear."""

    name: str  # for people: BF16, INT4
    bits: int  # of one value
    stored_bytes: int
    group_size: int = 0  # of quantised values
    scale_bytes: int = 0
    zero_points: bool = False

    @property
    def quantised(self) -> bool:
        return self.group_size > 0


def inspect(
    checkpoint: Checkpoint, *, weights: str = "auto", head: str = "stored", on_gpu: bool = False
) -> Report:
    """Measure a checkpoint that `account` found complete, loaded with these `weights` and head."""
    config = checkpoint.config
    parts = {name: Part() for name in PARTS}
    for part, linear, held in _linears(checkpoint):
        choice = weights
        if part in ("embedding", "router", "head") and weights in ("int4", "int8"):
            choice = "auto"
        if part == "head" and head == "int8" and not held.quantised:
            choice = "int8"
        n_bytes = _packed_bytes(linear, held, choice, on_gpu=on_gpu)
        parts[part].n_parameters += linear.out_dim * linear.in_dim
        parts[part].stored_bytes += held.stored_bytes
        parts[part].loaded_bytes += n_bytes
        if choice in ("int4", "int8") or (choice == "auto" and held.quantised):
            parts[part].quantised_bytes += n_bytes
    norms = (2 * config.n_layers + 1) * config.dim
    parts["norms"] = Part(norms, _stored_norms(checkpoint), 4 * norms)
    for name, entry in checkpoint.tensors.items():
        if name.startswith(("vision_model.", "multi_modal_projector.")):
            n_values = 1
            for size in entry.shape:
                n_values *= size
            parts["vision"].n_parameters += n_values
            parts["vision"].stored_bytes += entry.nbytes
            is_vector = len(entry.shape) == 1 and not name.endswith("weight_shape")
            if is_vector or name.endswith("positional_embedding_vlm"):
                parts["vision"].loaded_bytes += 4 * n_values  # held as float32
    if config.vision is not None:
        choice = "bf16" if weights == "bf16" else "auto"
        for linear, _ in vision_linears(config.vision, config.dim):
            held = _held(checkpoint, linear)
            n_bytes = _packed_bytes(linear, held, choice, on_gpu=on_gpu)
            parts["vision"].loaded_bytes += n_bytes
            if choice == "auto" and held.quantised:
                parts["vision"].quantised_bytes += n_bytes
    return Report(
        folder=str(checkpoint.folder),
        architecture=config.architecture,
        stored_as=_stored_as(checkpoint),
        config=_config_summary(config),
        parts=parts,
        active_parameters=_active_parameters(config, parts),
        kv={name: kv_report(config, name) for name in KV_ELEMENT_BYTES},
    )


def show_bytes(n_bytes: int) -> str:
    """Show a size for people, with three digits or more."""
    value = float(n_bytes)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} bytes" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:,.1f} TiB"


def kv_report(config: ModelConfig, kv_type: str) -> KvReport:
    """Return the KV cache's sizes: keys and values of all heads, layer by layer."""
    width = max(_round_up(config.head_dim, 4), 16)  # whole lanes, and one vector at least
    of_a_head = width * KV_ELEMENT_BYTES[kv_type] + _KV_SCALE_BYTES.get(kv_type, 0)
    of_a_layer = 2 * config.n_kv_heads * of_a_head
    n_local = sum(config.is_chunked_layer) if config.attention_chunk_size else 0
    chunk = config.attention_chunk_size if n_local else 0
    return KvReport(
        bytes_per_token=(config.n_layers - n_local) * of_a_layer,
        chunk_bytes=n_local * of_a_layer * (chunk or 0),
        chunk_tokens=chunk or 0,
    )


def _linears(checkpoint: Checkpoint) -> Iterator[tuple[str, Linear, _Held]]:
    """Yield every text linear with its part and how it is held."""
    config = checkpoint.config

    def of(part: str, *linears: Linear) -> Iterator[tuple[str, Linear, _Held]]:
        for linear in linears:
            yield part, linear, _held(checkpoint, linear)

    embedding = embedding_name(config).removesuffix(".weight")
    yield from of("embedding", Linear(embedding, config.vocab_size, config.dim))
    for layer in range(config.n_layers):
        yield from of("attention", *attention_linears(config, layer))
        if not config.is_moe_layer[layer]:
            yield from of("dense", *dense_linears(config, layer))
            continue
        yield from of("router", router_linear(config, layer))
        yield from of("shared experts", *shared_linears(config, layer))
        fused = is_fused(config, layer, checkpoint.tensors)
        for expert in range(config.n_experts):
            for linear in expert_linears(config, layer, expert):
                held = _held_fused(checkpoint, layer, linear) if fused else None
                yield "routed experts", linear, held or _held(checkpoint, linear)
    head = Linear(head_name(config), config.vocab_size, config.dim)
    if any(f"{head.name}.{suffix}" in checkpoint.tensors for suffix in ("weight", "weight_packed")):
        yield from of("head", head)


def _held(checkpoint: Checkpoint, linear: Linear) -> _Held:
    plain = checkpoint.tensors.get(f"{linear.name}.weight")
    if plain is not None:
        return _Held(plain.dtype, _PLAIN_BITS[plain.dtype], plain.nbytes)
    suffixes = ("packed", "scale", "zero_point", "shape")
    names = [f"{linear.name}.weight_{suffix}" for suffix in suffixes]
    stored = sum(checkpoint.tensors[n].nbytes for n in names if n in checkpoint.tensors)
    quantization = checkpoint.config.quantization
    scheme = quantization.scheme_for(linear.name) if quantization else None
    assert scheme is not None, "account() lets no packed tensor through without a scheme"
    return _Held(
        f"INT{scheme.bits}",
        scheme.bits,
        stored,
        group_size=scheme.group_size or linear.in_dim,
        scale_bytes=_PLAIN_BITS[checkpoint.entry(names[1]).dtype] // 8,
        zero_points=names[2] in checkpoint.tensors,
    )


def _held_fused(checkpoint: Checkpoint, layer: int, linear: Linear) -> _Held:
    kind = "down_proj" if linear.name.endswith("down_proj") else "gate_up_proj"
    base = f"{layer_name(checkpoint.config, layer)}.feed_forward.experts"
    dtype = checkpoint.entry(f"{base}.{kind}").dtype
    bits = _PLAIN_BITS[dtype]
    return _Held(dtype, bits, linear.out_dim * linear.in_dim * bits // 8)


def _packed_bytes(linear: Linear, held: _Held, weights: str, *, on_gpu: bool) -> int:
    """Return a linear's bytes in memory.

    Source: src/model/weights.cpp, src/cpu/pack.cpp, cuda/host/matrix.cu.
    """
    bits, group_size, scale_bytes, zero_points = (
        held.bits,
        held.group_size,
        held.scale_bytes,
        held.zero_points,
    )
    wanted = {"bf16": 16, "int8": 8, "int4": 4}.get(weights)
    if wanted == 16:
        bits, group_size, zero_points = 16, 0, False
    elif wanted is not None and not (held.quantised and held.bits == wanted):
        bits, scale_bytes, zero_points = wanted, 2, False
        group_size = next((size for size in (128, 64, 32) if linear.in_dim % size == 0), 0)
        group_size = group_size or linear.in_dim
    if on_gpu and (bits > 16 or (group_size % _TILE_GROUP and group_size < linear.in_dim)):
        bits, group_size, zero_points = 16, 0, False
    n_rows = _round_up(linear.out_dim, _PANEL_ROWS)
    n_words = -(-linear.in_dim * bits // 32)
    total = _round_up(n_rows * n_words * 4, _ALIGN)
    if group_size:
        n_groups = -(-linear.in_dim // group_size)
        total += _round_up(n_rows * n_groups * scale_bytes, _ALIGN)
        total += _round_up(n_rows * n_groups, _ALIGN) if zero_points else 0
    return total


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _stored_norms(checkpoint: Checkpoint) -> int:
    names = ("input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight")
    return sum(
        entry.nbytes
        for name, entry in checkpoint.tensors.items()
        if name.endswith(names) and not name.startswith("vision_model.")
    )


def _stored_as(checkpoint: Checkpoint) -> str:
    """Return the dtypes of the folder's weights, the largest share first, such as "INT4, BF16"."""
    shares: dict[str, int] = {}
    for _, _, held in _linears(checkpoint):
        shares[held.name] = shares.get(held.name, 0) + held.stored_bytes
    return ", ".join(sorted(shares, key=lambda name: -shares[name]))


def _active_parameters(config: ModelConfig, parts: dict[str, Part]) -> int:
    """Return the parameters one token meets: all but vision and the experts it is not routed to."""
    total = sum(part.n_parameters for name, part in parts.items() if name != "vision")
    routed = parts["routed experts"].n_parameters
    return total - routed + routed * config.top_k // config.n_experts


def _config_summary(config: ModelConfig) -> dict[str, Any]:
    return {
        "n_layers": config.n_layers,
        "n_moe_layers": sum(config.is_moe_layer),
        "dim": config.dim,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "n_experts": config.n_experts,
        "top_k": config.top_k,
        "vocab_size": config.vocab_size,
        "attention_chunk_size": config.attention_chunk_size,
        "n_growing_layers": config.n_layers - sum(config.is_chunked_layer),
        "max_position_embeddings": config.max_position_embeddings,
        "vision": config.has_vision,
    }
