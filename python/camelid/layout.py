"""Every tensor a Llama 4 checkpoint must hold: names, shapes, dtypes, for each supported layout.

Owns the names. A linear is plain (`.weight`) or pack-quantized (`.weight_packed` and companions);
the routed experts of a layer are fused (two 3-D tensors) or one linear each. Which of them a folder
uses is read from the names it holds. Must never touch data.
Source of names and shapes: transformers 5.23 `modeling_llama4.py`, compressed-tensors 0.20
`pack_quantized`.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass

from camelid.config import ModelConfig, VisionConfig
from camelid.quantization import Scheme

__all__ = ["Expected", "Linear", "expected_tensors", "iter_expected", "layer_linears"]

FLOATS = ("F32", "F16", "BF16")
_SHAPE_TYPES = ("I64", "I32")


@dataclass(frozen=True)
class Expected:
    """What a tensor has to be."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = FLOATS

    def describe(self) -> str:
        """Show it as messages do: dtypes, then shape."""
        return f"{' or '.join(self.dtypes)} {list(self.shape)}"


@dataclass(frozen=True)
class Linear:
    """One matrix by its module name, which is the tensor's without `.weight`."""

    name: str
    out_dim: int
    in_dim: int


def layer_name(config: ModelConfig, layer: int) -> str:
    return f"{config.prefix}model.layers.{layer}"


def embedding_name(config: ModelConfig) -> str:
    return f"{config.prefix}model.embed_tokens.weight"


def final_norm_name(config: ModelConfig) -> str:
    return f"{config.prefix}model.norm.weight"


def head_name(config: ModelConfig) -> str:
    return f"{config.prefix}lm_head"


def is_fused(config: ModelConfig, layer: int, present: Container[str]) -> bool:
    """Tell whether the routed experts of a MoE layer lie in fused 3-D tensors."""
    experts = f"{layer_name(config, layer)}.feed_forward.experts"
    if f"{experts}.gate_up_proj" in present or f"{experts}.down_proj" in present:
        return True
    first = f"{experts}.0.gate_proj"
    if any(f"{first}.{suffix}" in present for suffix in ("weight", "weight_packed")):
        return False
    # Nothing there to go by: quantised files hold one linear per expert, plain ones fuse.
    return config.quantization is None or config.quantization.scheme_for(first) is None


def attention_linears(config: ModelConfig, layer: int) -> tuple[Linear, ...]:
    base = f"{layer_name(config, layer)}.self_attn"
    q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    return (
        Linear(f"{base}.q_proj", q_dim, config.dim),
        Linear(f"{base}.k_proj", kv_dim, config.dim),
        Linear(f"{base}.v_proj", kv_dim, config.dim),
        Linear(f"{base}.o_proj", config.dim, q_dim),
    )


def mlp_linears(base: str, dim: int, ffn_dim: int) -> tuple[Linear, Linear, Linear]:
    """Return gate, up and down."""
    return (
        Linear(f"{base}.gate_proj", ffn_dim, dim),
        Linear(f"{base}.up_proj", ffn_dim, dim),
        Linear(f"{base}.down_proj", dim, ffn_dim),
    )


def router_linear(config: ModelConfig, layer: int) -> Linear:
    name = f"{layer_name(config, layer)}.feed_forward.router"
    return Linear(name, config.n_experts, config.dim)


def expert_linears(config: ModelConfig, layer: int, expert: int) -> tuple[Linear, Linear, Linear]:
    base = f"{layer_name(config, layer)}.feed_forward.experts.{expert}"
    return mlp_linears(base, config.dim, config.expert_dim)


def shared_linears(config: ModelConfig, layer: int) -> tuple[Linear, Linear, Linear]:
    base = f"{layer_name(config, layer)}.feed_forward.shared_expert"
    return mlp_linears(base, config.dim, config.expert_dim)


def dense_linears(config: ModelConfig, layer: int) -> tuple[Linear, Linear, Linear]:
    base = f"{layer_name(config, layer)}.feed_forward"
    return mlp_linears(base, config.dim, config.dense_dim)


def layer_linears(
    config: ModelConfig, layer: int, *, with_experts: bool, with_router: bool = True
) -> Iterator[Linear]:
    """Yield every linear of a layer.

    Args:
        config: The model.
        layer: Its number.
        with_experts: Include the routed experts as one linear each.
        with_router: Include the router.
    """
    yield from attention_linears(config, layer)
    if not config.is_moe_layer[layer]:
        yield from dense_linears(config, layer)
        return
    if with_router:
        yield router_linear(config, layer)
    if with_experts:
        for expert in range(config.n_experts):
            yield from expert_linears(config, layer, expert)
    yield from shared_linears(config, layer)


def quantised_tensors(linear: Linear, scheme: Scheme) -> Iterator[tuple[str, Expected]]:
    """Yield the tensors of a pack-quantized linear."""
    n_groups = scheme.n_groups(linear.in_dim)
    n_words = -(-linear.in_dim // scheme.values_per_word)
    yield f"{linear.name}.weight_packed", Expected((linear.out_dim, n_words), ("I32",))
    yield f"{linear.name}.weight_scale", Expected((linear.out_dim, n_groups))
    yield f"{linear.name}.weight_shape", Expected((2,), _SHAPE_TYPES)
    if not scheme.symmetric:
        n_rows = -(-linear.out_dim // scheme.values_per_word)
        yield f"{linear.name}.weight_zero_point", Expected((n_rows, n_groups), ("I32",))


def linear_tensors(
    config: ModelConfig, linear: Linear, present: Container[str]
) -> Iterator[tuple[str, Expected]]:
    """Yield the tensors of a linear: quantised where the config says so, unless it lies plain."""
    plain = f"{linear.name}.weight"
    scheme = config.quantization.scheme_for(linear.name) if config.quantization else None
    if scheme is None or (plain in present and f"{linear.name}.weight_packed" not in present):
        yield plain, Expected((linear.out_dim, linear.in_dim))
    else:
        yield from quantised_tensors(linear, scheme)


def vision_linears(vision: VisionConfig, dim: int) -> Iterator[tuple[Linear, bool]]:
    """Yield the linears of the tower and projector, and whether each has a bias."""
    patch = vision.n_channels * vision.patch_size**2
    yield Linear("vision_model.patch_embedding.linear", vision.dim, patch), False
    for layer in range(vision.n_layers):
        base = f"vision_model.model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield Linear(f"{base}.self_attn.{name}", vision.dim, vision.dim), True
        yield Linear(f"{base}.mlp.fc1", vision.ffn_dim, vision.dim), True
        yield Linear(f"{base}.mlp.fc2", vision.dim, vision.ffn_dim), True
    adapter = "vision_model.vision_adapter.mlp"
    yield Linear(f"{adapter}.fc1", vision.projector_input_dim, vision.ffn_dim), False
    yield Linear(f"{adapter}.fc2", vision.projector_output_dim, vision.projector_output_dim), False
    yield Linear("multi_modal_projector.linear_1", dim, vision.output_dim), False


def _vision_tensors(config: ModelConfig, present: Container[str]) -> Iterator[tuple[str, Expected]]:
    vision = config.vision
    if vision is None:
        return
    yield "vision_model.class_embedding", Expected((vision.dim,))
    yield "vision_model.positional_embedding_vlm", Expected((vision.n_patches + 1, vision.dim))
    norms = ["vision_model.layernorm_pre", "vision_model.layernorm_post"]
    for layer in range(vision.n_layers):
        base = f"vision_model.model.layers.{layer}"
        norms += [f"{base}.input_layernorm", f"{base}.post_attention_layernorm"]
    for norm in norms:
        yield f"{norm}.weight", Expected((vision.dim,))
        yield f"{norm}.bias", Expected((vision.dim,))
    for linear, has_bias in vision_linears(vision, config.dim):
        yield from linear_tensors(config, linear, present)
        if has_bias:
            yield f"{linear.name}.bias", Expected((linear.out_dim,))


def iter_expected(
    config: ModelConfig, present: Container[str] = ()
) -> Iterator[tuple[str, Expected]]:
    """Yield every tensor lazily: a hostile config may promise more names than memory holds."""
    yield embedding_name(config), Expected((config.vocab_size, config.dim))
    for layer in range(config.n_layers):
        base = layer_name(config, layer)
        yield f"{base}.input_layernorm.weight", Expected((config.dim,))
        yield f"{base}.post_attention_layernorm.weight", Expected((config.dim,))
        fused = config.is_moe_layer[layer] and is_fused(config, layer, present)
        if fused:
            experts = f"{base}.feed_forward.experts"
            n_experts, dim, ffn_dim = config.n_experts, config.dim, config.expert_dim
            yield f"{experts}.gate_up_proj", Expected((n_experts, dim, 2 * ffn_dim))
            yield f"{experts}.down_proj", Expected((n_experts, ffn_dim, dim))
        for linear in layer_linears(config, layer, with_experts=not fused):
            yield from linear_tensors(config, linear, present)
    yield final_norm_name(config), Expected((config.dim,))
    head = Linear(head_name(config), config.vocab_size, config.dim)
    held = any(f"{head.name}.{suffix}" in present for suffix in ("weight", "weight_packed"))
    if held or not config.tie_word_embeddings:
        yield from linear_tensors(config, head, present)
    yield from _vision_tensors(config, present)


def expected_tensors(config: ModelConfig, present: Container[str] = ()) -> dict[str, Expected]:
    """Return every tensor a checkpoint of this config must hold.

    Args:
        config: The model.
        present: The names a folder holds; they choose between layouts that a config leaves open.
    """
    return dict(iter_expected(config, present))
