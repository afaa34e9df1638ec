"""Writes small random Llama 4 folders, every layout camelid reads, with NumPy alone.

Written apart from the package on purpose: names, shapes, packing and the file format are spelled
out again here, so that a mistake in `python/camelid/` meets something that does not share it.

    weights = write_checkpoint(tmp_path, seed=3, quantization=Quantization(bits=4, group_size=32))

returns the float32 values a model must behave as if it had, under the names of transformers' state
dict (routed experts always fused), so they can be fed to any reference.
"""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Weights = dict[str, NDArray[np.float32]]
Stored = dict[str, tuple[str, tuple[int, ...], bytes]]  # name -> dtype, shape, data

REMOVE = object()  # as a value of overrides: leave the key out
SPECIALS = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|header_start|>", "<|header_end|>", "<|eom|>",
    "<|eot|>", "<|python_start|>", "<|python_end|>", "<|finetune_right_pad|>", "<|image_start|>",
    "<|image_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>", "<|image|>", "<|patch|>",
)  # fmt: skip
SPECIAL_IDS = {name: 256 + index for index, name in enumerate(SPECIALS)}

TEXT_CONFIG: dict[str, Any] = {
    "model_type": "llama4_text",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 32,
    "intermediate_size_mlp": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
        "original_max_position_embeddings": 64,
    },
    "attention_chunk_size": 16,
    "no_rope_layers": [],
    "no_rope_layer_interval": 4,
    "attn_temperature_tuning": True,
    "floor_scale": 8,
    "attn_scale": 0.1,
    "use_qk_norm": True,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "bos_token_id": SPECIAL_IDS["<|begin_of_text|>"],
    "eos_token_id": [SPECIAL_IDS[n] for n in ("<|end_of_text|>", "<|eom|>", "<|eot|>")],
    "pad_token_id": SPECIAL_IDS["<|finetune_right_pad|>"],
    "torch_dtype": "bfloat16",
}
VISION_CONFIG: dict[str, Any] = {
    "model_type": "llama4_vision_model",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,  # hidden / pixel_shuffle_ratio^2
    "num_channels": 3,
    "image_size": 56,
    "patch_size": 14,
    "pixel_shuffle_ratio": 0.5,
    "projector_input_dim": 48,
    "projector_output_dim": 48,
    "vision_output_dim": 48,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "gelu",
}
CHAT_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|header_start|>' + message['role'] + '<|header_end|>\\n\\n' }}"
    "{%- if message['content'] is string %}{{- message['content'] }}{%- else %}"
    "{%- for part in message['content'] %}{%- if part['type'] == 'image' %}{{- '<|image|>' }}"
    "{%- elif part['type'] == 'text' %}{{- part['text'] }}{%- endif %}{%- endfor %}{%- endif %}"
    "{{- '<|eot|>' }}{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|header_start|>assistant<|header_end|>\\n\\n' }}{%- endif %}"
)
LLAMA4_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Quantization:
    """How linears are stored: compressed-tensors pack-quantized."""

    bits: int = 4
    group_size: int = 32  # 0: one scale per row
    symmetric: bool = True
    ignore: tuple[str, ...] = (
        "re:.*lm_head", "re:.*self_attn", "re:.*router", "re:.*vision_model.*",
        "re:.*multi_modal_projector.*",
    )  # fmt: skip
    scale_dtype: str = "BF16"

    def ignores(self, module: str) -> bool:
        return any(
            re.match(entry[3:], module) if entry.startswith("re:") else entry == module
            for entry in self.ignore
        )

    def config(self) -> dict[str, Any]:
        grouped = self.group_size > 0
        weights = {
            "num_bits": self.bits, "type": "int", "symmetric": self.symmetric,
            "strategy": "group" if grouped else "channel",
            "group_size": self.group_size if grouped else None,
            "dynamic": False, "actorder": None, "block_structure": None, "observer": "minmax",
            "observer_kwargs": {},
        }  # fmt: skip
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"], "weights": weights,
                    "input_activations": None, "output_activations": None,
                }
            },
            "ignore": list(self.ignore),
            "kv_cache_scheme": None,
        }  # fmt: skip


def bf16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round finite float32 to bf16, to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def bf16_values(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def encode(values: NDArray[np.float32], dtype: str) -> tuple[bytes, NDArray[np.float32]]:
    """Return the stored bytes, and the values they stand for."""
    if dtype == "F32":
        return values.astype("<f4").tobytes(), values.astype(np.float32)
    if dtype == "F16":
        half = values.astype("<f2")
        return half.tobytes(), half.astype(np.float32)
    bits = bf16_bits(values)
    return bits.astype("<u2").tobytes(), bf16_values(bits)


def pack(values: NDArray[np.int64], bits: int) -> NDArray[np.int32]:
    """Pack signed values along the last axis, lowest bits first, offset binary, tail zero."""
    per_word = 32 // bits
    padded = -values.shape[-1] % per_word
    offset = np.pad(values + (1 << (bits - 1)), ((0, 0), (0, padded))).astype(np.uint64)
    offset = offset.reshape(values.shape[0], -1, per_word)
    shifts = np.arange(per_word, dtype=np.uint64) * np.uint64(bits)
    return (offset << shifts).sum(-1).astype(np.uint32).view(np.int32)


def unpack(words: NDArray[np.int32], bits: int, n: int) -> NDArray[np.int64]:
    """Return the first `n` signed values of each row."""
    per_word = 32 // bits
    shifts = np.arange(per_word, dtype=np.uint32) * np.uint32(bits)
    values = (words.view(np.uint32)[..., None] >> shifts) & np.uint32((1 << bits) - 1)
    return values.reshape(words.shape[0], -1)[:, :n].astype(np.int64) - (1 << (bits - 1))


def quantize(
    values: NDArray[np.float32], how: Quantization
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
    """Return q [out, in], scales and zero points [out, groups], by compressed-tensors' rule."""
    n_out, n_in = values.shape
    group = how.group_size or n_in
    n_groups = -(-n_in // group)
    low, high = -(1 << (how.bits - 1)), (1 << (how.bits - 1)) - 1
    padded = np.pad(values, ((0, 0), (0, n_groups * group - n_in))).reshape(n_out, n_groups, group)
    least, most = np.minimum(padded.min(-1), 0), np.maximum(padded.max(-1), 0)
    if how.symmetric:
        scales = np.maximum(-least, most) / np.float32((high - low) / 2)
    else:
        scales = (most - least) / np.float32(high - low)
    _, scales = encode(np.where(scales == 0, 1, scales).astype(np.float32), how.scale_dtype)
    zeros = np.zeros_like(scales, np.int64)
    if not how.symmetric:
        zeros = np.clip(np.rint(low - least / scales), low, high).astype(np.int64)
    q = np.rint(padded / scales[..., None]) + zeros[..., None]
    q = np.clip(q, low, high).astype(np.int64).reshape(n_out, -1)[:, :n_in]
    return q, scales, zeros


def store_quantised(
    stored: Stored, module: str, values: NDArray[np.float32], how: Quantization
) -> NDArray[np.float32]:
    """Add the tensors of one quantised linear; return what it stands for."""
    q, scales, zeros = quantize(values, how)
    words = pack(q, how.bits)
    stored[f"{module}.weight_packed"] = ("I32", words.shape, words.tobytes())
    stored[f"{module}.weight_scale"] = (
        how.scale_dtype, scales.shape, encode(scales, how.scale_dtype)[0],
    )  # fmt: skip
    shape = np.array(values.shape, "<i8")
    stored[f"{module}.weight_shape"] = ("I64", (2,), shape.tobytes())
    if not how.symmetric:
        packed = np.ascontiguousarray(pack(np.ascontiguousarray(zeros.T), how.bits).T)
        stored[f"{module}.weight_zero_point"] = ("I32", packed.shape, packed.tobytes())
    group = how.group_size or values.shape[1]
    columns = np.arange(values.shape[1]) // group
    return ((q - zeros[:, columns]) * scales[:, columns]).astype(np.float32)


def write_file(path: Path, stored: Stored, metadata: dict[str, str] | None = None) -> None:
    """Write one safetensors file."""
    header: dict[str, Any] = {"__metadata__": metadata or {"format": "pt"}}
    at = 0
    for name, (dtype, shape, data) in stored.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, _, data in stored.values():
            file.write(data)


def write_shards(folder: Path, stored: Stored, n_shards: int) -> None:
    """Write model.safetensors, or that many shards and their index."""
    if n_shards == 1:
        write_file(folder / "model.safetensors", stored)
        return
    names = list(stored)
    per_shard = -(-len(names) // n_shards)
    weight_map = {}
    for shard in range(n_shards):
        file = f"model-{shard + 1:05d}-of-{n_shards:05d}.safetensors"
        chosen = names[shard * per_shard : (shard + 1) * per_shard]
        write_file(folder / file, {name: stored[name] for name in chosen})
        weight_map.update(dict.fromkeys(chosen, file))
    total = sum(len(data) for _, _, data in stored.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def merged(base: dict[str, Any], overrides: dict[str, Any] | None) -> dict[str, Any]:
    result = {**base, **(overrides or {})}
    return {key: value for key, value in result.items() if value is not REMOVE}


class _Builder:
    """Draws weights in a fixed order and stores each as asked."""

    def __init__(
        self, seed: int, dtype: str, quantization: Quantization | None, prefix: str, fused: bool
    ) -> None:
        self.random = np.random.PCG64(seed)
        self.dtype = dtype
        self.quantization = quantization
        self.prefix = prefix
        self.fused = fused
        self.stored: Stored = {}
        self.weights: Weights = {}

    def draw(self, *shape: int, scale: float = 1.0) -> NDArray[np.float32]:
        # Goldens are stored for these values: raw bits are the one stream NumPy promises never to
        # change. The sum of four uniforms has a bell's shape, and integers round nowhere.
        fields = self.random.random_raw(int(np.prod(shape))).view(np.uint16).reshape(*shape, 4)
        total = fields.sum(axis=-1, dtype=np.int64) - 2 * 65535
        return (total * (scale / np.sqrt((65536**2 - 1) / 3))).astype(np.float32)

    def plain(self, name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
        data, rounded = encode(values, self.dtype)
        self.stored[name] = (self.dtype, values.shape, data)
        return rounded.reshape(values.shape)

    def vector(self, name: str, n: int, *, mean: float = 1.0) -> None:
        self.weights[name] = self.plain(name, mean + self.draw(n, scale=0.1))

    def stored_linear(self, module: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
        if self.quantization is None or self.quantization.ignores(module):
            return self.plain(f"{module}.weight", values)
        return store_quantised(self.stored, module, values, self.quantization)

    def linear(self, module: str, n_out: int, n_in: int, scale: float = 1.0) -> None:
        values = self.draw(n_out, n_in, scale=scale / np.sqrt(n_in))
        self.weights[f"{module}.weight"] = self.stored_linear(module, values)

    def mlp(self, base: str, dim: int, ffn_dim: int) -> None:
        self.linear(f"{base}.gate_proj", ffn_dim, dim)
        self.linear(f"{base}.up_proj", ffn_dim, dim)
        self.linear(f"{base}.down_proj", dim, ffn_dim)

    def experts(self, base: str, n_experts: int, dim: int, ffn_dim: int) -> None:
        gate_up = self.draw(n_experts, dim, 2 * ffn_dim, scale=dim**-0.5)
        down = self.draw(n_experts, ffn_dim, dim, scale=ffn_dim**-0.5)
        if self.fused:
            gate_up = self.plain(f"{base}.gate_up_proj", gate_up)
            down = self.plain(f"{base}.down_proj", down)
        else:
            for e in range(n_experts):
                halves = (("gate_proj", slice(0, ffn_dim)), ("up_proj", slice(ffn_dim, None)))
                for name, columns in halves:
                    values = np.ascontiguousarray(gate_up[e][:, columns].T)
                    gate_up[e][:, columns] = self.stored_linear(f"{base}.{e}.{name}", values).T
                values = np.ascontiguousarray(down[e].T)
                down[e] = self.stored_linear(f"{base}.{e}.down_proj", values).T
        self.weights[f"{base}.gate_up_proj"] = gate_up
        self.weights[f"{base}.down_proj"] = down

    def text(self, config: dict[str, Any]) -> None:
        dim, head_dim = config["hidden_size"], config["head_dim"]
        n_layers = config["num_hidden_layers"]
        step = config.get("interleave_moe_layer_step", 1)
        moe_layers = config.get("moe_layers")
        if moe_layers is None:
            moe_layers = range(step - 1, n_layers, step)
        embedding = f"{self.prefix}model.embed_tokens.weight"
        # As the head too, an embedding of ones would always answer with the token it was given.
        scale = dim**-0.5 if config.get("tie_word_embeddings") else 1.0
        values = self.draw(config["vocab_size"], dim, scale=scale)
        self.weights[embedding] = self.plain(embedding, values)
        for layer in range(n_layers):
            base = f"{self.prefix}model.layers.{layer}"
            self.vector(f"{base}.input_layernorm.weight", dim)
            self.vector(f"{base}.post_attention_layernorm.weight", dim)
            for name, heads in (
                ("q", config["num_attention_heads"]),
                ("k", config["num_key_value_heads"]),
                ("v", config["num_key_value_heads"]),
            ):
                self.linear(f"{base}.self_attn.{name}_proj", heads * head_dim, dim)
            n_in = config["num_attention_heads"] * head_dim
            self.linear(f"{base}.self_attn.o_proj", dim, n_in)
            base += ".feed_forward"
            if layer not in moe_layers:
                self.mlp(base, dim, config["intermediate_size_mlp"])
                continue
            self.linear(f"{base}.router", config["num_local_experts"], dim, scale=2.0)
            self.experts(
                f"{base}.experts", config["num_local_experts"], dim, config["intermediate_size"]
            )
            self.mlp(f"{base}.shared_expert", dim, config["intermediate_size"])
        self.vector(f"{self.prefix}model.norm.weight", dim)
        if not config.get("tie_word_embeddings"):
            self.linear(f"{self.prefix}lm_head", config["vocab_size"], dim)

    def vision(self, config: dict[str, Any], dim: int) -> None:
        width, ffn_dim = config["hidden_size"], config["intermediate_size"]
        n_patches = (config["image_size"] // config["patch_size"]) ** 2
        for name, shape in (
            ("class_embedding", (width,)),
            ("positional_embedding_vlm", (n_patches + 1, width)),
        ):
            values = self.draw(*shape, scale=0.5)
            self.weights[f"vision_model.{name}"] = self.plain(f"vision_model.{name}", values)
        n_in = config["num_channels"] * config["patch_size"] ** 2
        self.linear("vision_model.patch_embedding.linear", width, n_in)
        self.norm("vision_model.layernorm_pre", width)
        for layer in range(config["num_hidden_layers"]):
            base = f"vision_model.model.layers.{layer}"
            self.norm(f"{base}.input_layernorm", width)
            self.norm(f"{base}.post_attention_layernorm", width)
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                self.linear(f"{base}.self_attn.{name}", width, width)
                self.vector(f"{base}.self_attn.{name}.bias", width, mean=0.0)
            self.linear(f"{base}.mlp.fc1", ffn_dim, width)
            self.vector(f"{base}.mlp.fc1.bias", ffn_dim, mean=0.0)
            self.linear(f"{base}.mlp.fc2", width, ffn_dim)
            self.vector(f"{base}.mlp.fc2.bias", width, mean=0.0)
        self.norm("vision_model.layernorm_post", width)
        inner, outer = config["projector_input_dim"], config["projector_output_dim"]
        self.linear("vision_model.vision_adapter.mlp.fc1", inner, ffn_dim)
        self.linear("vision_model.vision_adapter.mlp.fc2", outer, outer)
        self.linear("multi_modal_projector.linear_1", dim, config["vision_output_dim"])

    def norm(self, name: str, n: int) -> None:
        self.vector(f"{name}.weight", n)
        self.vector(f"{name}.bias", n, mean=0.0)


def write_checkpoint(
    folder: str | Path,
    *,
    config_overrides: dict[str, Any] | None = None,
    vision_overrides: dict[str, Any] | None = None,
    top_overrides: dict[str, Any] | None = None,
    seed: int = 0,
    dtype: str = "F32",
    quantization: Quantization | None = None,
    fused: bool | None = None,
    shards: int = 1,
    vision: bool = False,
    tokenizer: bool = True,
) -> Weights:
    """Write a folder; return the float32 weights it stands for.

    `config_overrides` go into the text config (REMOVE leaves a key out, None writes null),
    `vision_overrides` into the vision config, `top_overrides` into the outermost object.
    Experts are fused unless quantised, or as `fused` says. `vision` makes it
    Llama4ForConditionalGeneration with its prefix.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = {
        **TEXT_CONFIG,
        "torch_dtype": {"F32": "float32", "F16": "float16"}.get(dtype, "bfloat16"),
    }
    written = merged(text, config_overrides)
    filled = {**TEXT_CONFIG, **{k: v for k, v in written.items() if v is not None}}
    prefix = "language_model." if vision else ""
    builder = _Builder(
        seed, dtype, quantization, prefix, quantization is None if fused is None else fused
    )
    builder.text(filled)
    if vision:
        vision_config = merged(VISION_CONFIG, vision_overrides)
        builder.vision({**VISION_CONFIG, **vision_config}, filled["hidden_size"])
        config: dict[str, Any] = {
            "architectures": ["Llama4ForConditionalGeneration"],
            "model_type": "llama4",
            "boi_token_index": SPECIAL_IDS["<|image_start|>"],
            "eoi_token_index": SPECIAL_IDS["<|image_end|>"],
            "image_token_index": SPECIAL_IDS["<|patch|>"],
            "text_config": written,
            "vision_config": vision_config,
            "torch_dtype": written.get("torch_dtype"),
        }
    else:
        config = {"architectures": ["Llama4ForCausalLM"], **written}
    if quantization is not None:
        config["quantization_config"] = quantization.config()
    (folder / "config.json").write_text(json.dumps(merged(config, top_overrides), indent=1))
    write_shards(folder, builder.stored, shards)
    if tokenizer:
        write_tokenizer(folder)
    return builder.weights


def byte_alphabet() -> list[str]:
    """Return the printable character that stands for each byte. Source: OpenAI gpt-2 encoder.py."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def write_tokenizer(folder: str | Path) -> None:
    """Write a tokenizer of 256 bytes and the special tokens, its template and defaults."""
    folder = Path(folder)
    added = [
        {
            "id": token_id, "content": name, "single_word": False, "lstrip": False,
            "rstrip": False, "normalized": False, "special": True,
        }
        for name, token_id in SPECIAL_IDS.items()
    ]  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split = {
        "type": "Split",
        "pattern": {"Regex": LLAMA4_PATTERN},
        "behavior": "Isolated",
        "invert": False,
    }
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, {**byte_level, "use_regex": False}],
        },
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {character: byte for byte, character in enumerate(byte_alphabet())},
            "merges": [],
        },
    }  # fmt: skip
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot|>",
        "pad_token": "<|finetune_right_pad|>",
        "chat_template": CHAT_TEMPLATE,
    }
    generation = {
        "bos_token_id": TEXT_CONFIG["bos_token_id"],
        "eos_token_id": TEXT_CONFIG["eos_token_id"],
        "pad_token_id": TEXT_CONFIG["pad_token_id"],
    }
    (folder / "tokenizer.json").write_text(json.dumps(document))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (folder / "generation_config.json").write_text(json.dumps(generation))


def source_values(source: Any) -> NDArray[np.float32]:
    """Read a source as src/quant/format.h says it is to be read."""
    if source.bits == 0:
        assert source.data is not None
        data = decode(source.data, source.dtype)
        rows = np.arange(source.out_dim)[:, None] * source.row_stride
        return data[rows + np.arange(source.in_dim) * source.col_stride]
    assert source.words is not None
    assert source.scales is not None
    n_groups = math.ceil(source.in_dim / source.group_size)
    words = source.words.view(np.int32).reshape(source.out_dim, -1)
    q = unpack(words, source.bits, source.in_dim)
    scales = decode(source.scales, source.scale_dtype).reshape(source.out_dim, n_groups)
    zeros = np.zeros((source.out_dim, n_groups), np.int64)
    if source.zero_points is not None:
        packed = source.zero_points.view(np.int32).reshape(-1, n_groups)
        zeros = unpack(np.ascontiguousarray(packed.T), source.bits, source.out_dim).T
    group = np.arange(source.in_dim) // source.group_size
    return ((q - zeros[:, group]) * scales[:, group]).astype(np.float32)


def decode(data: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    if dtype == "BF16":
        return bf16_values(data.view(np.uint16))
    return data.view({"F32": np.float32, "F16": np.float16}[dtype]).astype(np.float32)
