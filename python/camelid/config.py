"""What a model folder says about itself: config.json and generation_config.json.

Owns the two dialects of Llama 4 configs, their defaults and the check that every value can be
served. Follows transformers 5.23 `Llama4TextConfig.__post_init__` and `modeling_llama4.py` where a
key is absent or two keys disagree. Must never know of tensors or devices.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from camelid.errors import CheckpointError, Unsupported
from camelid.json_file import Fields, read_json, shorten
from camelid.quantization import QuantizationConfig, parse_quantization

__all__ = [
    "GenerationDefaults",
    "ModelConfig",
    "RopeScaling",
    "VisionConfig",
    "load_config",
    "parse_config",
]

logger = logging.getLogger("camelid")

_ARCHITECTURES = ("Llama4ForConditionalGeneration", "Llama4ForCausalLM")
_ARCHITECTURE_OF_MODEL_TYPE = dict(zip(("llama4", "llama4_text"), _ARCHITECTURES, strict=True))

# Bounds that no Llama 4 comes near (Behemoth included) and that keep every product of two of them
# far below 2^63, where the engine counts bytes.
_MAX_DIM = 1 << 20
_MAX_VOCAB = 1 << 24
_MAX_LAYERS = 4096
_MAX_EXPERTS = 4096
_MAX_TOKENS = 1 << 40
_MAX_ID = (1 << 31) - 1


@dataclass(frozen=True)
class RopeScaling:
    """llama3 scaling: wavelengths above original_max_position / low_freq_factor are stretched."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int  # tokens


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower; `n_patches` tokens leave the encoder, `tokens_per_tile` the adapter."""

    dim: int
    n_layers: int
    n_heads: int
    ffn_dim: int
    image_size: int  # pixels, square tiles
    patch_size: int  # pixels
    n_channels: int
    pixel_shuffle_ratio: float
    projector_input_dim: int
    projector_output_dim: int
    output_dim: int
    norm_eps: float
    rope_theta: float

    @property
    def n_patches(self) -> int:
        """Patches of one tile, without the class token."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def shuffle(self) -> int:
        """The side, in patches, of the square that becomes one embedding."""
        return round(1 / self.pixel_shuffle_ratio)

    @property
    def tokens_per_tile(self) -> int:
        """Embeddings one tile becomes."""
        return self.n_patches // self.shuffle**2


@dataclass(frozen=True)
class GenerationDefaults:
    """What generation_config.json recommends; None where it says nothing."""

    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True)
class ModelConfig:
    """Everything the engine needs to know about a Llama 4 model, checked."""

    architecture: str
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    expert_dim: int  # width of routed and shared experts (intermediate_size)
    dense_dim: int  # width of dense layers (intermediate_size_mlp)
    n_experts: int
    top_k: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    attention_chunk_size: int | None  # tokens; None: no layer is chunked
    is_rope_layer: tuple[bool, ...]
    is_chunked_layer: tuple[bool, ...]
    is_moe_layer: tuple[bool, ...]
    use_qk_norm: bool
    attn_temperature_tuning: bool
    floor_scale: float
    attn_scale: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None
    prefix: str  # of text tensor names: "language_model." or ""
    vision: VisionConfig | None
    image_token_index: int
    quantization: QuantizationConfig | None
    generation: GenerationDefaults = field(default_factory=GenerationDefaults)

    @property
    def has_vision(self) -> bool:
        """Whether a vision tower belongs to the checkpoint."""
        return self.vision is not None


def load_config(folder: str | Path) -> ModelConfig:
    """Read config.json, and generation_config.json when there is one.

    Raises:
        CheckpointError: If a file is damaged or a value is impossible.
        Unsupported: If the architecture, a feature or the quantisation is not supported.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not os.path.exists(path):
        raise CheckpointError(
            f"[config] {folder} holds no config.json. Give the folder of a Hugging Face Llama 4 "
            "checkpoint: config.json, tokenizer files and *.safetensors."
        )
    generation_path = folder / "generation_config.json"
    generation = read_json(generation_path) if os.path.exists(generation_path) else {}
    return parse_config(read_json(path), where=str(path), generation=generation)


def parse_config(
    data: dict[str, Any], *, where: str = "config.json", generation: dict[str, Any] | None = None
) -> ModelConfig:
    """Check a parsed config.json (and generation_config.json) and fill in what it leaves out."""
    top = Fields(data, where)
    architecture = _architecture(top)
    multimodal = architecture == _ARCHITECTURES[0]
    nested = multimodal or isinstance(top.get("text_config"), dict)
    text = top.section("text_config") if nested else top
    generation_fields = Fields(generation or {}, f"generation_config.json beside {where}")
    _refuse_unknown_features(text)

    dim = text.integer("hidden_size", 5120, 1, _MAX_DIM)
    n_layers = text.integer("num_hidden_layers", 48, 1, _MAX_LAYERS)
    n_heads = text.integer("num_attention_heads", 40, 1, _MAX_DIM)
    n_kv_heads = text.optional_integer("num_key_value_heads", 8, 1, _MAX_DIM) or n_heads
    if n_heads % n_kv_heads:
        raise text.error("num_key_value_heads", f"a divisor of num_attention_heads = {n_heads}")
    head_dim = _head_dim(text, dim, n_heads)
    is_rope_layer = _rope_layers(text, n_layers)
    chunk = text.optional_integer("attention_chunk_size", 8192, 1, _MAX_TOKENS)
    is_moe_layer = _moe_layers(text, n_layers)
    n_experts = text.integer("num_local_experts", 16, 1, _MAX_EXPERTS)
    max_position = text.integer("max_position_embeddings", 4096 * 32, 1, _MAX_TOKENS)
    theta, scaling = _rope(text, max_position)
    _warn_of_first_scout_release(where, dim, n_layers, n_experts, scaling)
    vision = _vision(top) if multimodal else None
    # transformers ties by the text config; the top level counts only where that says nothing.
    ties = text if "tie_word_embeddings" in text else top
    return ModelConfig(
        architecture=architecture,
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        expert_dim=text.integer("intermediate_size", 8192, 1, _MAX_DIM),
        dense_dim=text.integer("intermediate_size_mlp", 16384, 1, _MAX_DIM),
        n_experts=n_experts,
        top_k=text.integer("num_experts_per_tok", 1, 1, n_experts),
        vocab_size=text.integer("vocab_size", 202048, 1, _MAX_VOCAB),
        rms_norm_eps=text.number("rms_norm_eps", 1e-5, 0.0, 1.0),
        rope_theta=theta,
        rope_scaling=scaling,
        attention_chunk_size=chunk,
        is_rope_layer=is_rope_layer,
        is_chunked_layer=_chunked_layers(text, is_rope_layer, chunk),
        is_moe_layer=is_moe_layer,
        use_qk_norm=text.boolean("use_qk_norm", True),
        attn_temperature_tuning=_temperature_tuning(text),
        floor_scale=text.number("floor_scale", 8192, 1e-6, float(_MAX_TOKENS)),
        attn_scale=text.number("attn_scale", 0.1, -1e6, 1e6),
        tie_word_embeddings=ties.boolean("tie_word_embeddings", False),
        max_position_embeddings=max_position,
        bos_id=_first_id("bos_token_id", generation_fields, text, top),
        eos_ids=_token_ids("eos_token_id", generation_fields, text, top),
        pad_id=_first_id("pad_token_id", generation_fields, text, top),
        prefix="language_model." if multimodal else "",
        vision=vision,
        image_token_index=_image_token_index(top),
        quantization=_quantization(top, text),
        generation=_generation(generation_fields),
    )


def _architecture(top: Fields) -> str:
    names = top.strings("architectures")
    model_type = top.get("model_type")
    for name in names:
        if name in _ARCHITECTURES:
            return name
    if not names and isinstance(model_type, str) and model_type in _ARCHITECTURE_OF_MODEL_TYPE:
        return _ARCHITECTURE_OF_MODEL_TYPE[model_type]
    got = f"architecture {', '.join(map(shorten, names[:4]))}" if names else "no architecture"
    raise Unsupported(
        f"[config] {top.where} names {got}, model_type {shorten(model_type)}. Supported: "
        f"{' and '.join(_ARCHITECTURES)} (model_type llama4 and llama4_text)."
    )


def _refuse_unknown_features(text: Fields) -> None:
    if text.boolean("attention_bias", False):
        raise Unsupported(
            f"[config] {text.where}: attention_bias is true. Llama 4 attention without biases is "
            "supported."
        )
    activation = text.text("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise Unsupported(
            f"[config] {text.where}: hidden_act is {shorten(activation)}. Supported: silu."
        )


def _head_dim(text: Fields, dim: int, n_heads: int) -> int:
    head_dim = text.optional_integer("head_dim", 128, 2, 1 << 14)
    if head_dim is None:
        head_dim = dim // n_heads
    if head_dim < 2 or head_dim % 2:
        raise text.error("head_dim", f"an even number (RoPE rotates pairs), not {head_dim}")
    return head_dim


def _rope_layers(text: Fields, n_layers: int) -> tuple[bool, ...]:
    wanted = f"a list of {n_layers} times 0 (NoPE) or 1 (RoPE), one per layer"
    if text.get("no_rope_layers"):  # absent, null and [] all mean the interval
        flags = text.integers("no_rope_layers", wanted)
        if len(flags) != n_layers or not set(flags) <= {0, 1}:
            raise text.error("no_rope_layers", wanted)
        return tuple(flag == 1 for flag in flags)
    interval = text.integer("no_rope_layer_interval", 4, 1, _MAX_ID)
    return tuple((layer + 1) % interval != 0 for layer in range(n_layers))


def _chunked_layers(
    text: Fields, is_rope_layer: tuple[bool, ...], chunk: int | None
) -> tuple[bool, ...]:
    """Tell which layers mask by chunk: `layer_types` decides, RoPE only where that is absent."""
    kinds = {"chunked_attention": True, "full_attention": False, "attention": False}
    chunked = is_rope_layer
    if text.get("layer_types") is not None:
        names = text.strings("layer_types")
        if len(names) != len(is_rope_layer):
            raise text.error("layer_types", f"{len(is_rope_layer)} entries, one per layer")
        for name in names:
            if name not in kinds:
                raise Unsupported(
                    f"[config] {text.where}: layer_types names {shorten(name)}. Supported: "
                    "chunked_attention and full_attention."
                )
        chunked = tuple(kinds[name] for name in names)
    return chunked if chunk is not None else (False,) * len(chunked)


def _moe_layers(text: Fields, n_layers: int) -> tuple[bool, ...]:
    if text.get("moe_layers") is not None:
        layers = text.integers("moe_layers", "a list of layer numbers")
        if any(layer < 0 for layer in layers):
            raise text.error("moe_layers", "a list of layer numbers from 0")
        # Numbers past the last layer are left from a deeper model; transformers ignores them too.
        return tuple(layer in set(layers) for layer in range(n_layers))
    step = text.integer("interleave_moe_layer_step", 1, 1, _MAX_ID)
    return tuple(layer % step == step - 1 for layer in range(n_layers))


def _temperature_tuning(text: Fields) -> bool:
    value = text.get("attn_temperature_tuning", True)
    if not isinstance(value, (bool, int)):  # early files wrote the integer 4 for "on"
        raise text.error("attn_temperature_tuning", "true, false or an integer")
    return bool(value)


def _rope(text: Fields, max_position: int) -> tuple[float, RopeScaling | None]:
    scaling = text.section("rope_scaling")
    rope = scaling if scaling.data else text.section("rope_parameters")
    for name in ("full_attention", "chunked_attention"):
        if name in rope:
            raise Unsupported(
                f"[config] {rope.where} differs by layer type. Supported: one set of RoPE "
                "parameters for all layers."
            )
    if (
        rope.number("partial_rotary_factor", text.number("partial_rotary_factor", 1, 0, 1), 0, 1)
        < 1
    ):
        raise Unsupported(
            f"[config] {rope.where}: partial_rotary_factor is below 1. Supported: RoPE over the "
            "whole head."
        )
    source = rope if "rope_theta" in rope else text
    theta = source.number("rope_theta", 500000.0, 1.0, 1e15)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise Unsupported(
            f"[config] {rope.where}: rope_type is {shorten(kind)}. Supported: llama3 and default."
        )
    return theta, _llama3(text, rope, max_position)


def _llama3(text: Fields, rope: Fields, max_position: int) -> RopeScaling:
    for key in ("factor", "low_freq_factor", "high_freq_factor"):
        if key not in rope:
            raise rope.error(key, "a number, as rope_type llama3 needs")
    key = "original_max_position_embeddings"
    holder = text if key in text else rope
    low = rope.number("low_freq_factor", 1.0, 1e-6, 1e6)
    return RopeScaling(
        factor=rope.number("factor", 1.0, 1.0, 1e6),
        low_freq_factor=low,
        high_freq_factor=rope.number("high_freq_factor", low, low, 1e6),
        original_max_position=holder.integer(key, max_position, 1, _MAX_TOKENS),
    )


def _warn_of_first_scout_release(
    where: str, dim: int, n_layers: int, n_experts: int, scaling: RopeScaling | None
) -> None:
    scout = (dim, n_layers, n_experts) == (5120, 48, 16)
    if scout and scaling and (scaling.factor, scaling.high_freq_factor) == (8.0, 4.0):
        logger.warning(
            "[config] %s has the RoPE scaling of Scout's first release (factor 8, "
            "high_freq_factor 4), used as written. Meta corrected it to 16 and 1: download the "
            "current config.json.",
            where,
        )


def _vision(top: Fields) -> VisionConfig:
    vision = top.section("vision_config")
    rope = vision.section("rope_parameters")
    theta = rope if "rope_theta" in rope else vision
    config = VisionConfig(
        dim=vision.integer("hidden_size", 768, 1, _MAX_DIM),
        n_layers=vision.integer("num_hidden_layers", 34, 0, _MAX_LAYERS),
        n_heads=vision.integer("num_attention_heads", 16, 1, _MAX_DIM),
        ffn_dim=vision.integer("intermediate_size", 5632, 1, _MAX_DIM),
        image_size=_side(vision, "image_size", 448),
        patch_size=_side(vision, "patch_size", 14),
        n_channels=vision.integer("num_channels", 3, 1, 16),
        pixel_shuffle_ratio=vision.number("pixel_shuffle_ratio", 0.5, 1 / 64, 1.0),
        projector_input_dim=vision.integer("projector_input_dim", 4096, 1, _MAX_DIM),
        projector_output_dim=vision.integer("projector_output_dim", 4096, 1, _MAX_DIM),
        output_dim=vision.integer("vision_output_dim", 7680, 1, _MAX_DIM),
        norm_eps=vision.number("norm_eps", 1e-5, 0.0, 1.0),
        rope_theta=theta.number("rope_theta", 10000.0, 1.0, 1e15),
    )
    if config.dim % config.n_heads:
        raise vision.error("num_attention_heads", f"a divisor of hidden_size = {config.dim}")
    if config.image_size < config.patch_size:
        raise vision.error("image_size", f"at least one patch of {config.patch_size} pixels")
    if abs(1 / config.pixel_shuffle_ratio - config.shuffle) > 1e-6:
        raise Unsupported(
            f"[config] {vision.where}: pixel_shuffle_ratio is {config.pixel_shuffle_ratio}. "
            "Supported: 1, 1/2, 1/3 and so on."
        )
    if vision.boolean("multi_modal_projector_bias", False):
        raise Unsupported(f"[config] {vision.where}: multi_modal_projector_bias is true.")
    return config


def _side(vision: Fields, key: str, default: int) -> int:
    value = vision.get(key)
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        return Fields({key: value[0]}, vision.where).integer(key, default, 1, 1 << 14)
    return vision.integer(key, default, 1, 1 << 14)


def _image_token_index(top: Fields) -> int:
    key = "image_token_index" if "image_token_index" in top else "image_token_id"
    return top.integer(key, 200092, 0, _MAX_ID)


def _token_ids(key: str, *sources: Fields) -> tuple[int, ...]:
    """Return the ids of the first source that names any: a number, a list, or nothing."""
    for source in sources:
        value = source.get(key)
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if len(ids) > 1024 or not all(
            isinstance(item, int) and not isinstance(item, bool) and -1 <= item <= _MAX_ID
            for item in ids
        ):
            raise source.error(key, "a token id or a list of token ids")
        return tuple(item for item in ids if item >= 0)  # -1 means "none" in Meta's own files
    return ()


def _first_id(key: str, *sources: Fields) -> int | None:
    return next(iter(_token_ids(key, *sources)), None)


def _quantization(top: Fields, text: Fields) -> QuantizationConfig | None:
    for fields in (top, text):
        for key in ("quantization_config", "compression_config"):
            section = fields.section(key)
            if section.data:
                return parse_quantization(section.data, where=section.where)
    return None


def _generation(fields: Fields) -> GenerationDefaults:
    do_sample = fields.get("do_sample")
    return GenerationDefaults(
        do_sample=None if do_sample is None else fields.boolean("do_sample", False),
        temperature=fields.optional_number("temperature", 0.0, 1e4),
        top_p=fields.optional_number("top_p", 0.0, 1.0),
        top_k=fields.optional_integer("top_k", None, -1, _MAX_ID),
        min_p=fields.optional_number("min_p", 0.0, 1.0),
        repetition_penalty=fields.optional_number("repetition_penalty", 1e-3, 1e3),
    )
