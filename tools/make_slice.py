"""Write a Scout- or Maverick-shaped model of a few layers with random INT4 weights, for measuring.

Real layer dimensions, so that time and memory per layer are the real model's; the text it writes is
noise. The folder is compressed-tensors pack-quantized, as `camelid quantize` writes it. With --gguf
the same model is written for llama.cpp too, number for number: INT4 codes become Q4_0 blocks of the
same scale, embedding and head (bf16 in the folder) Q8_0. Routers are random as well, so that tokens
spread over the experts.

    python tools/make_slice.py FOLDER --layers 4 --gguf FILE       # about 5 GB each
    python tools/make_slice.py FOLDER --shape maverick --experts 16
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

import gguf_file as gguf
from camelid import layout
from camelid.config import ModelConfig, parse_config
from camelid.errors import Error as CamelidError
from camelid.layout import Linear
from camelid.safetensors import SafetensorsWriter, TensorSpec
from shapes import SHAPES

GROUP_SIZE = 128
PIECE_VALUES = 1 << 23  # of a tensor at once: some 40 MB on the way to a file
# Powers of two, exact in bf16 and f16. Codes are uniform, so an output is about 0.6 times the root
# mean square of a normed input, and logits are about 1.3: finite after any number of layers.
BODY_SCALE, EMBEDDING_SCALE, HEAD_SCALE, ROUTER_SCALE = 2.0**-9, 2.0**-7, 2.0**-12, 2.0**-6

QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head", "re:.*router"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": GROUP_SIZE,
            },
        }
    },
}


def slice_config(
    shape: str, n_layers: int, vocab_size: int, n_experts: int | None = None
) -> dict[str, Any]:
    """Return the config.json of a slice; every fourth layer is global and not rotated."""
    data = SHAPES[shape] | {"num_hidden_layers": n_layers, "vocab_size": vocab_size}
    if n_experts is not None:
        data["num_local_experts"] = n_experts
    # llama.cpp takes this from the number of experts: none of the norms with 128, else all.
    data["use_qk_norm"] = data["num_local_experts"] != 128
    return data | {"quantization_config": QUANTIZATION}


# ---- values: the same for the same name, wherever they are written ----
def pieces(name: str, n_values: int, n_each: int) -> Iterator[tuple[np.random.Generator, int]]:
    """Yield a generator and a number of rows of `n_each` values until `n_values` are asked for."""
    rng = np.random.Generator(np.random.SFC64(crc32(name.encode())))
    left = n_values // n_each
    while left > 0:
        yield rng, min(left, PIECE_VALUES // n_each)
        left -= PIECE_VALUES // n_each


def int4_codes(linear: Linear) -> Iterator[NDArray[np.uint8]]:
    """Yield the codes of a matrix in the order of Q4_0: uint8 [n_blocks, 16]."""
    for rng, n in pieces(linear.name, linear.out_dim * linear.in_dim, gguf.BLOCK_VALUES):
        yield (
            rng.integers(0, 1 << 64, 2 * n, np.uint64, endpoint=False).view(np.uint8).reshape(n, 16)
        )


def int8_codes(linear: Linear) -> Iterator[NDArray[np.int8]]:
    """Yield the codes of an embedding or head: int8 [n_blocks, 32]."""
    for rng, n in pieces(linear.name, linear.out_dim * linear.in_dim, gguf.BLOCK_VALUES):
        yield (
            rng.integers(0, 1 << 64, 4 * n, np.uint64, endpoint=False).view(np.int8).reshape(n, 32)
        )


def router_values(linear: Linear) -> NDArray[np.float32]:
    """Return a router, each value exact in bf16: float32 [n_experts, dim]."""
    rng = np.random.Generator(np.random.SFC64(crc32(linear.name.encode())))
    values = rng.standard_normal((linear.out_dim, linear.in_dim), np.float32) * ROUTER_SCALE
    return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Drop the low half of values that are exact in bf16."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def packed_words(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Reorder Q4_0 bytes to pack-quantized ones: value 2 i low and 2 i + 1 high in byte i."""
    low, high = codes & 15, codes >> 4
    words = np.empty_like(codes)
    words[:, :8] = low[:, 0::2] | low[:, 1::2] << 4
    words[:, 8:] = high[:, 0::2] | high[:, 1::2] << 4
    return words


# ---- the folder ----
def embedding_and_head(config: ModelConfig) -> tuple[Linear, Linear]:
    """Return the two matrices of vocabulary size, by module name."""
    embedding = layout.embedding_name(config).removesuffix(".weight")
    return (
        Linear(embedding, config.vocab_size, config.dim),
        Linear(layout.head_name(config), config.vocab_size, config.dim),
    )


def folder_tensors(
    config: ModelConfig,
) -> Iterator[tuple[TensorSpec, Iterable[NDArray[Any] | bytes]]]:
    """Yield every tensor of the folder with its data, lazily."""
    linears = {
        linear.name: linear
        for layer in range(config.n_layers)
        for linear in layout.layer_linears(config, layer, with_experts=True)
    }
    linears |= {linear.name: linear for linear in embedding_and_head(config)}
    for name, expected in layout.iter_expected(config):
        dtype = "BF16" if "BF16" in expected.dtypes else expected.dtypes[0]
        spec = TensorSpec(name, dtype, expected.shape)
        module, _, suffix = name.rpartition(".")
        linear = linears.get(module)
        if linear is None:  # a norm
            yield spec, [bf16(np.ones(expected.shape, np.float32))]
        elif suffix == "weight_packed":
            yield spec, map(packed_words, int4_codes(linear))
        elif suffix == "weight_scale":
            yield spec, [bf16(np.full(expected.shape, BODY_SCALE, np.float32))]
        elif suffix == "weight_shape":
            yield spec, [np.array([linear.out_dim, linear.in_dim], np.int64)]
        elif module.endswith("router"):
            yield spec, [bf16(router_values(linear))]
        else:
            yield spec, int8_as_bf16(linear, config)


def int8_scale(linear: Linear, config: ModelConfig) -> float:
    """Return the scale of an embedding's or head's codes."""
    return HEAD_SCALE if linear.name == layout.head_name(config) else EMBEDDING_SCALE


def int8_as_bf16(linear: Linear, config: ModelConfig) -> Iterator[NDArray[np.uint16]]:
    """Yield an embedding or head as the folder holds it."""
    for codes in int8_codes(linear):
        yield bf16(codes * np.float32(int8_scale(linear, config)))


def write_folder(folder: Path, data: dict[str, Any], progress: Callable[[int], object]) -> None:
    """Write config.json and model.safetensors; `progress` is told bytes."""
    tensors = list(folder_tensors(parse_config(data)))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(data, indent=2))
    writer = SafetensorsWriter(folder / "model.safetensors", [spec for spec, _ in tensors])
    for spec, parts in tensors:
        writer.write(spec.name, parts)
        progress(spec.nbytes)
    writer.finish()


# ---- the GGUF ----
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "feed_forward.gate_proj": "ffn_gate",
    "feed_forward.up_proj": "ffn_up",
    "feed_forward.down_proj": "ffn_down",
    "feed_forward.router": "ffn_gate_inp",
    "feed_forward.shared_expert.gate_proj": "ffn_gate_shexp",
    "feed_forward.shared_expert.up_proj": "ffn_up_shexp",
    "feed_forward.shared_expert.down_proj": "ffn_down_shexp",
}


def gguf_metadata(config: ModelConfig) -> dict[str, gguf.Value]:
    """Return the keys llama.cpp's loader of llama4 asks for, and a vocabulary of nameless tokens.

    It takes chunks of 8192 and a global layer after every three local ones for granted.
    """
    values: dict[str, gguf.Value] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.dim,
        "block_count": config.n_layers,
        "feed_forward_length": config.dense_dim,
        "expert_feed_forward_length": config.expert_dim,
        "expert_count": config.n_experts,
        "expert_used_count": config.top_k,
        "interleave_moe_layer_step": config.is_moe_layer.index(True) + 1,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_theta,
        "vocab_size": config.vocab_size,
    }
    general: dict[str, gguf.Value] = {
        "general.architecture": "llama4",
        "general.name": "a slice of random weights",
        "general.file_type": 2,  # mostly Q4_0
        "tokenizer.ggml.model": "no_vocab",
    }
    return general | {f"llama4.{key}": value for key, value in values.items()}


def gguf_tensors(
    config: ModelConfig,
) -> Iterator[tuple[gguf.TensorInfo, Iterable[NDArray[Any]]]]:
    """Yield every tensor of the GGUF with its data, lazily."""
    norm = np.ones(config.dim, np.float32)
    for linear, name in zip(embedding_and_head(config), ("token_embd", "output"), strict=True):
        info = gguf.TensorInfo(f"{name}.weight", (linear.out_dim, linear.in_dim), gguf.Q8_0)
        yield info, q8_0(linear, config)
    yield gguf.TensorInfo("output_norm.weight", (config.dim,), gguf.F32), [norm]
    for layer in range(config.n_layers):
        for name in ("attn_norm", "ffn_norm"):
            yield gguf.TensorInfo(f"blk.{layer}.{name}.weight", (config.dim,), gguf.F32), [norm]
        prefix = layout.layer_name(config, layer) + "."
        for linear in layout.layer_linears(config, layer, with_experts=False):
            name = f"blk.{layer}.{NAMES[linear.name.removeprefix(prefix)]}.weight"
            shape = (linear.out_dim, linear.in_dim)
            if linear.name.endswith("router"):
                yield gguf.TensorInfo(name, shape, gguf.F32), [router_values(linear)]
            else:
                yield gguf.TensorInfo(name, shape, gguf.Q4_0), q4_0([linear])
        if config.is_moe_layer[layer]:
            experts = [layout.expert_linears(config, layer, e) for e in range(config.n_experts)]
            for name, matrices in zip(
                ("gate", "up", "down"), zip(*experts, strict=True), strict=True
            ):
                shape3 = (config.n_experts, matrices[0].out_dim, matrices[0].in_dim)
                info = gguf.TensorInfo(f"blk.{layer}.ffn_{name}_exps.weight", shape3, gguf.Q4_0)
                yield info, q4_0(matrices)


def q8_0(linear: Linear, config: ModelConfig) -> Iterator[NDArray[np.uint8]]:
    """Yield the blocks of an embedding or head."""
    for codes in int8_codes(linear):
        yield gguf.q8_0_blocks(codes, int8_scale(linear, config))


def q4_0(linears: Iterable[Linear]) -> Iterator[NDArray[np.uint8]]:
    """Yield the blocks of matrices that lie one behind the other."""
    for linear in linears:
        for codes in int4_codes(linear):
            yield gguf.q4_0_blocks(codes, BODY_SCALE)


def write_gguf(path: Path, data: dict[str, Any], progress: Callable[[int], object]) -> None:
    """Write the same model for llama.cpp."""
    config = parse_config(data)
    tensors = list(gguf_tensors(config))
    path.parent.mkdir(parents=True, exist_ok=True)
    with gguf.GgufWriter(path, gguf_metadata(config), [info for info, _ in tensors]) as writer:
        for info, parts in tensors:
            writer.write(info.name, parts)
            progress(info.nbytes)


def sizes(data: dict[str, Any]) -> tuple[int, int]:
    """Return the bytes of the folder and of the GGUF."""
    config = parse_config(data)
    return (
        sum(spec.nbytes for spec, _ in folder_tensors(config)),
        sum(info.nbytes for info, _ in gguf_tensors(config)),
    )


def check_space(path: Path, n_bytes: int) -> None:
    """Stop with a sentence when a disk is too full."""
    folder = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        sys.exit(f"[slice] {path} needs {n_bytes:,} bytes, {folder} has {free:,}. Free some.")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="scout")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--experts", type=int, help="fewer (or more) than the shape's own")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="write it for llama.cpp too")
    args = parser.parse_args()

    if args.folder.exists():
        sys.exit(f"[slice] {args.folder} exists. Name a folder that does not, or remove it.")
    data = slice_config(args.shape, args.layers, args.vocab, args.experts)
    try:
        n_folder, n_gguf = sizes(data)
    except CamelidError as error:
        sys.exit(f"[slice] {error}")
    n_gguf = n_gguf if args.gguf else 0
    check_space(args.folder, n_folder + n_gguf)
    with tqdm(total=n_folder + n_gguf, unit="B", unit_scale=True) as bar:
        write_folder(args.folder, data, bar.update)
        if args.gguf:
            write_gguf(args.gguf, data, bar.update)


if __name__ == "__main__":
    main()
