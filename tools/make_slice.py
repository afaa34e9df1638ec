"""Write a Scout-shaped checkpoint of a few layers with random INT4 weights, for measuring.

Real layer dimensions, so that time and memory per layer are the real model's; the text it writes is
noise. The folder is compressed-tensors pack-quantized, as `camelid quantize` writes it.

    python tools/make_slice.py FOLDER --layers 4          # about 5 GB
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from camelid.config import parse_config
from camelid.layout import iter_expected
from camelid.safetensors import SafetensorsWriter, TensorSpec

BLOCK = np.random.default_rng(0).bytes(1 << 24)
GROUP_SIZE = 128


def scout_config(n_layers: int, vocab_size: int) -> dict[str, object]:
    """Return a Llama4ForCausalLM config with Scout's dimensions and `n_layers` layers."""
    return {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "hidden_size": 5120,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "vocab_size": vocab_size,
        "use_qk_norm": True,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "attention_chunk_size": 8192,
        "max_position_embeddings": 1048576,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "quantization_config": {
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
        },
    }


def pieces(spec: TensorSpec, shape: tuple[int, int] | None) -> Iterator[bytes]:
    """Yield the bytes of one tensor: random words, and small constants for numbers.

    `shape` is what a weight_shape tensor says.
    """
    if shape is not None:
        yield np.array(shape, np.int64).tobytes()
        return
    if spec.name.endswith("weight_packed"):
        block = BLOCK
    else:  # bf16: norms of one; scales and plain weights small enough that activations stay finite
        value = 0x3F80 if "norm" in spec.name else 0x3B00 if "scale" in spec.name else 0x3C00
        block = np.full(1 << 23, value, np.uint16).tobytes()
    left = spec.nbytes
    while left > 0:
        yield block[:left]
        left -= len(block)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=32768)
    args = parser.parse_args()

    data = scout_config(args.layers, args.vocab)
    specs = [
        TensorSpec(name, "BF16" if "BF16" in e.dtypes else e.dtypes[0], e.shape)
        for name, e in iter_expected(parse_config(data))
    ]
    # [out, in / 8] words hold a matrix [out, in].
    shapes = {
        spec.name.replace("weight_packed", "weight_shape"): (spec.shape[0], spec.shape[1] * 8)
        for spec in specs
        if spec.name.endswith("weight_packed")
    }
    args.folder.mkdir(parents=True)
    (args.folder / "config.json").write_text(json.dumps(data, indent=2))
    writer = SafetensorsWriter(args.folder / "model.safetensors", specs)
    for spec in tqdm(specs, unit="tensor"):
        writer.write(spec.name, pieces(spec, shapes.get(spec.name)))
    writer.finish()


if __name__ == "__main__":
    main()
