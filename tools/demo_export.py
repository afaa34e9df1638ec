"""Files of the demo model: its tokenizer, the float32 folder and the INT4 folder.

Owns every file format; knows nothing about training. Both folders load in transformers (float32) or
in camelid (both). Without a vision tower they hold the text model alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, pre_tokenizers
from torch import Tensor

from demo_model import DemoConfig, Llama4Demo, quantise_int4
from demo_vision import IMAGE_CONFIG, DemoVision, vision_sizes

# The split pattern of Llama 4 itself (o200k), so the demo exercises the same text path as the real
# models.
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|header_start|>",
    "<|header_end|>",
    "<|eom|>",
    "<|eot|>",
    "<|finetune_right_pad|>",
    "<|image_start|>",
    "<|image_end|>",
    "<|tile_x_separator|>",
    "<|tile_y_separator|>",
    "<|image|>",
    "<|patch|>",
]
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|header_start|>' + message['role'] + '<|header_end|>\\n\\n' }}"
    "{%- if message['content'] is string %}{{- message['content'] }}"
    "{%- else %}{%- for part in message['content'] %}"
    "{{- '<|image|>' if part['type'] == 'image' else part['text'] }}"
    "{%- endfor %}{%- endif %}"
    "{{- '<|eot|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|header_start|>assistant<|header_end|>\\n\\n' }}{%- endif %}"
)


def build_tokenizer(texts: list[str]) -> dict[str, Any]:
    """Return the content of tokenizer.json: bytes, then every pre-token of `texts`, then specials.

    Merges are all pairs of entries that make an entry, lowest id first: with them a byte-pair
    encoder working from merges and one working from ranks agree on any text, not only on the
    corpus.
    """
    alphabet = _byte_alphabet()
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    vocabulary = {alphabet[byte]: byte for byte in range(256)}
    words = {piece for text in texts for piece, _ in splitter.pre_tokenize_str(text)}
    for word in sorted(words - set(vocabulary), key=lambda w: (len(w), w)):
        vocabulary[word] = len(vocabulary)
    merges = [
        [entry[:cut], entry[cut:]]
        for entry in vocabulary
        for cut in range(1, len(entry))
        if entry[:cut] in vocabulary and entry[cut:] in vocabulary
    ]
    added = [
        {
            "id": len(vocabulary) + i,
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, name in enumerate(SPECIALS)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": PATTERN},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": True,
                    "use_regex": False,
                },
            ],
        },
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def load_tokenizer(content: dict[str, Any]) -> Tokenizer:
    """Return a tokenizer that encodes special tokens written in the text."""
    return Tokenizer.from_str(json.dumps(content))


def stems(content: dict[str, Any]) -> list[str]:
    """Return for each token id its text without leading space and case."""
    tokenizer = load_tokenizer(content)
    ids = range(tokenizer.get_vocab_size())
    words = [tokenizer.decode([i], skip_special_tokens=False).strip(" ").lower() for i in ids]
    # Single bytes that are not text all decode to the same replacement character; keep them apart.
    return [word if i >= 256 else f"byte {i}" for i, word in enumerate(words)]


def export_float(
    model: Llama4Demo, vision: DemoVision | None, tokenizer: dict[str, Any], folder: Path
) -> None:
    """Write the float32 checkpoint in transformers' layout (fused experts)."""
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    _write_folder(folder, model.config, vision, tokenizer, tensors, torch.float32, {})


def export_int4(
    model: Llama4Demo,
    vision: DemoVision | None,
    tokenizer: dict[str, Any],
    folder: Path,
    *,
    group: int,
) -> None:
    """Write the INT4 checkpoint: compressed-tensors pack-quantized, per-expert linears.

    Embedding, norms, router and vision tower stay bf16.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        for linear, weight in _linears(name, tensor.detach()):
            if weight is None:
                tensors[linear] = tensor.detach().bfloat16()
                continue
            q, scale = quantise_int4(weight, group)
            tensors[f"{linear}.weight_packed"] = _pack(q.reshape(weight.shape))
            tensors[f"{linear}.weight_scale"] = scale.squeeze(-1).bfloat16()
            tensors[f"{linear}.weight_shape"] = torch.tensor(weight.shape, dtype=torch.int64)
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group,
    }
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights | {"dynamic": False, "actorder": None},
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": [
            "re:.*lm_head",
            "re:.*router",
            "re:vision_model.*",
            "re:multi_modal_projector.*",
        ],
        "kv_cache_scheme": None,
    }
    extra = {"quantization_config": quantization}
    _write_folder(folder, model.config, vision, tokenizer, tensors, torch.bfloat16, extra)


@torch.no_grad()
def round_to_checkpoint(model: Llama4Demo, vision: DemoVision, *, group: int) -> None:
    """Replace every weight by the value the INT4 checkpoint stores."""
    for tensor in vision.state_dict().values():
        tensor.copy_(tensor.bfloat16().float())
    for name, tensor in model.state_dict().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            q, scale = quantise_int4(tensor.transpose(1, 2), group)
            tensor.copy_((q * scale).reshape(tensor.transpose(1, 2).shape).transpose(1, 2))
        elif name.endswith("_proj.weight"):
            q, scale = quantise_int4(tensor, group)
            tensor.copy_((q * scale).reshape(tensor.shape))
        else:
            tensor.copy_(tensor.bfloat16().float())


def _linears(name: str, tensor: Tensor) -> list[tuple[str, Tensor | None]]:
    """Return (linear name, weight [out, in]) pairs, or (name, None) for what stays exact."""
    base = name.rsplit(".", 1)[0]
    if name.endswith("experts.gate_up_proj"):
        # Fused experts are [n_experts, in, 2 * width], gate first.
        gate, up = tensor.transpose(1, 2).chunk(2, 1)
        pairs = [(gate[e], up[e]) for e in range(tensor.shape[0])]
        return [
            (f"{base}.{e}.{part}", weight)
            for e, pair in enumerate(pairs)
            for part, weight in zip(("gate_proj", "up_proj"), pair, strict=True)
        ]
    if name.endswith("experts.down_proj"):
        return [(f"{base}.{e}.down_proj", tensor[e].T) for e in range(tensor.shape[0])]
    if name.endswith("_proj.weight"):
        return [(base, tensor)]
    return [(name, None)]


def _pack(q: Tensor) -> Tensor:
    """Return int32 [out, in / 8]: eight codes per word, stored + 8, the first lowest."""
    nibbles = (q.long() + 8).reshape(q.shape[0], -1, 8)
    words = (nibbles << (4 * torch.arange(8))).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int().contiguous()


def _write_folder(
    folder: Path,
    config: DemoConfig,
    vision: DemoVision | None,
    tokenizer: dict[str, Any],
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    extra: dict[str, Any],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    stops = [ids["<|end_of_text|>"], ids["<|eom|>"], ids["<|eot|>"]]
    special = {
        "bos_token_id": ids["<|begin_of_text|>"],
        "eos_token_id": stops,
        "pad_token_id": ids["<|finetune_right_pad|>"],
    }
    extra = {"torch_dtype": str(dtype).removeprefix("torch."), **extra}
    text = _text_config(config) | special
    if vision is None:
        model_config = {"architectures": ["Llama4ForCausalLM"], **text, **extra}
    else:
        model_config = {
            "architectures": ["Llama4ForConditionalGeneration"],
            "model_type": "llama4",
            "tie_word_embeddings": True,
            "boi_token_index": ids["<|image_start|>"],
            "eoi_token_index": ids["<|image_end|>"],
            "image_token_index": ids["<|patch|>"],
            "text_config": text,
            "vision_config": vision_sizes(),
            **extra,
        }
        tensors = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
        for name, tensor in vision.state_dict().items():
            tensors[name] = tensor.detach().to(dtype)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot|>",
        "pad_token": "<|finetune_right_pad|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_position_embeddings,
        "chat_template": CHAT_TEMPLATE,
    }
    files = {
        "config.json": model_config,
        "generation_config.json": {"do_sample": False, **special},
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": tokenizer_config,
    }
    if vision is not None:
        files["preprocessor_config.json"] = _image_config()
        files["processor_config.json"] = {
            "processor_class": "Llama4Processor",
            "patch_size": vision_sizes()["patch_size"],
            "pixel_shuffle_ratio": vision_sizes()["pixel_shuffle_ratio"],
            "fake_image_token": "<|image|>",
        }
    for name, content in files.items():
        indent = None if name == "tokenizer.json" else 2
        written = json.dumps(content, indent=indent, ensure_ascii=False)
        (folder / name).write_text(written + "\n", encoding="utf-8")
    weights = folder / "model.safetensors"
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, str(weights), metadata={"format": "pt"})
    weights.chmod(0o644)  # save_file leaves it readable by its writer alone


def _text_config(config: DemoConfig) -> dict[str, Any]:
    return {
        "model_type": "llama4_text",
        **vars(config),
        "intermediate_size_mlp": config.intermediate_size,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "no_rope_layer_interval": 3,
        "use_qk_norm": True,
        "attn_temperature_tuning": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "rope_scaling": None,
        "tie_word_embeddings": True,
    }


def _image_config() -> dict[str, Any]:
    side = IMAGE_CONFIG.tile_side
    return {
        "image_processor_type": "Llama4ImageProcessor",
        "size": {"height": side, "width": side},
        "max_patches": IMAGE_CONFIG.max_tiles,
        "resize_to_max_canvas": IMAGE_CONFIG.use_max_canvas,
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": IMAGE_CONFIG.rescale_factor,
        "do_normalize": True,
        "image_mean": list(IMAGE_CONFIG.mean),
        "image_std": list(IMAGE_CONFIG.std),
    }


def _byte_alphabet() -> list[str]:
    """Return the printable character that byte-level BPE writes for each byte (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table, extra = [""] * 256, 0
    for byte in range(256):
        if byte in printable:
            table[byte] = chr(byte)
        else:
            table[byte] = chr(256 + extra)
            extra += 1
    return table
