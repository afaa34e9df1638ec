"""The models and prompts of text and images the engine is held to transformers on.

Towers of several sizes before text models of several kinds; images first, last, adjacent, in a
second turn, of one, several and 17 tiles. What a row leaves out is `_BASE`, then the defaults of
tests/checkpoints.py. The image tokens are laid out here again, so that a mistake in
`python/camelid/image_prompt.py` meets something that does not share it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints import SPECIAL_IDS, VISION_CONFIG, Quantization, Weights, write_checkpoint

N_GREEDY = 8  # tokens after the prompt
GOLDENS = Path(__file__).parent / "data" / "mixed_goldens"
PATCH = SPECIAL_IDS["<|patch|>"]

_BASE: dict[str, Any] = {
    "vocab_size": 271,  # the test tokenizer's
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "head_dim": 16,
    "num_local_experts": 8,
    "rope_scaling": None,
    "floor_scale": 16,
}

# Words, an image as (rows, columns) of tiles, or a special token.
Part = int | tuple[int, int] | str
_TURN = ("<|eot|>", "<|header_start|>", 4, "<|header_end|>", 2)


@dataclass(frozen=True)
class MixedVariant:
    """A checkpoint with a vision tower, and the prompt it is asked."""

    name: str
    parts: tuple[Part, ...]
    text: dict[str, Any] = field(default_factory=dict)  # of the text model, over _BASE
    vision: dict[str, Any] = field(default_factory=dict)
    dtype: str = "F32"
    quantization: Quantization | None = None
    shards: int = 1
    seed: int = 0
    # Of words and pixels: the first whose greedy tokens and expert choices all win by a clear
    # margin. tools/make_vision_goldens.py names it.
    prompt_seed: int = 0

    def write(self, folder: str | Path) -> Weights:
        """Write the checkpoint; return the float32 weights it stands for."""
        return write_checkpoint(
            folder,
            config_overrides={**_BASE, **self.text},
            vision_overrides=self.vision,
            seed=self.seed,
            dtype=self.dtype,
            quantization=self.quantization,
            shards=self.shards,
            vision=True,
        )

    def prompt(self) -> tuple[list[int], list[NDArray[np.float32]]]:
        """Return token ids, and of each image its tiles [n_tiles, channels, side, side]."""
        random = np.random.PCG64(2000 + self.prompt_seed)
        config = {**VISION_CONFIG, **self.vision}
        patches = config["image_size"] // config["patch_size"]
        tile = [PATCH] * round(patches * config["pixel_shuffle_ratio"]) ** 2
        shape = (config["num_channels"], config["image_size"], config["image_size"])
        ids: list[int] = []
        images = []
        for part in self.parts:
            if isinstance(part, int):
                ids += [int(value) for value in random.random_raw(part) >> np.uint64(56)]
            elif isinstance(part, str):
                ids.append(SPECIAL_IDS[part])
            else:
                ids += _layout(part, tile)
                n_tiles = part[0] * part[1] + (part != (1, 1))
                bits = random.random_raw(n_tiles * int(np.prod(shape)))
                pixels = (bits >> np.uint64(40)).astype(np.float64) / 2**23 - 1
                images.append(pixels.astype(np.float32).reshape(n_tiles, *shape))
        return ids, images


def _layout(grid: tuple[int, int], tile: list[int]) -> list[int]:
    """Tiles row by row with what separates and ends them, then the overview."""
    special = SPECIAL_IDS
    ids = [special["<|image_start|>"]]
    if grid != (1, 1):
        for _ in range(grid[0]):
            for column in range(grid[1]):
                last = column == grid[1] - 1
                ids += [*tile, special["<|tile_y_separator|>" if last else "<|tile_x_separator|>"]]
    return [*ids, special["<|image|>"], *tile, special["<|image_end|>"]]


def direction(n: int) -> NDArray[np.float32]:
    """Return a unit vector that every row of logits is projected on: one value speaks for all."""
    signs = np.random.PCG64(5).random_raw(n) >> np.uint64(63)
    return ((signs.astype(np.float64) * 2 - 1) / np.sqrt(n)).astype(np.float32)


def _tower(dim: int, heads: int, shuffle: int = 2, **more: Any) -> dict[str, Any]:
    size = {"hidden_size": dim, "num_attention_heads": heads}
    ratio = {"intermediate_size": dim * shuffle**2, "pixel_shuffle_ratio": 1 / shuffle}
    return {**size, **ratio, **more}


_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
}
_BOS = "<|begin_of_text|>"
# The patch embedding's inputs fall into no groups, in the released tower neither.
_WITH_TOWER = ("re:.*lm_head", "re:.*router", "re:.*patch_embedding.*")

MIXED_VARIANTS: tuple[MixedVariant, ...] = (
    # The released shapes: 17 tiles of 144 tokens. Steps of 512 and chunks of 1000 cut tiles, and
    # temperature tuning begins inside the image.
    MixedVariant(
        "seventeen_tiles",
        (_BOS, 6, (4, 4), 20),
        text={
            "num_local_experts": 16,
            "num_hidden_layers": 5,
            "attention_chunk_size": 1000,
            "floor_scale": 700,
            "rope_scaling": _LLAMA3,
        },
        vision=_tower(16, 2, image_size=336, num_hidden_layers=1),
    ),
    MixedVariant(
        "maverick_like",
        (_BOS, 5, (2, 2), 6, (1, 1), 7, (1, 3), 9),
        text={
            "interleave_moe_layer_step": 2,
            "num_local_experts": 32,
            "num_hidden_layers": 6,
            "use_qk_norm": False,
            "floor_scale": 8192,
        },
        dtype="BF16",
        shards=2,
    ),
    # A tile of 16 tokens is five chunks of 3.
    MixedVariant(
        "chunk_below_a_tile",
        (_BOS, 4, (2, 3), 11),
        text={"attention_chunk_size": 3},
        vision=_tower(32, 4, image_size=112),
    ),
    MixedVariant("image_first", ((1, 2), 30), text={"num_hidden_layers": 3}),
    MixedVariant("image_last", (_BOS, 30, (3, 2)), text={"num_hidden_layers": 3}),
    MixedVariant("images_alone", ((1, 1), (2, 1), (1, 1), (1, 1))),
    MixedVariant(
        "second_turn",
        (
            _BOS,
            "<|header_start|>",
            4,
            "<|header_end|>",
            20,
            *_TURN,
            25,
            *_TURN,
            3,
            (2, 2),
            8,
            *_TURN,
        ),
        dtype="BF16",
        vision=_tower(24, 1, 3, image_size=84),
    ),
    # Also an image in each of two turns.
    MixedVariant(
        "tied",
        (_BOS, 3, (1, 1), 9, *_TURN, 12, *_TURN, (1, 2), 5),
        text={"tie_word_embeddings": True},
        dtype="BF16",
        vision=_tower(32, 2, 1, image_size=28, patch_size=7),
    ),
    MixedVariant(
        "one_row_one_column",
        (_BOS, 2, (1, 16), 4, (16, 1), 6),
        text={"num_experts_per_tok": 2, "attention_chunk_size": 23},
    ),
    MixedVariant(
        "all_nope_warm",
        (_BOS, 8, (3, 5), 8),
        text={"no_rope_layers": [0] * 4, "floor_scale": 4, "attn_scale": 0.3},
        vision={"num_hidden_layers": 0},
    ),
    MixedVariant(
        "all_rope_dense",
        (_BOS, 8, (1, 1), 40, (2, 1)),
        text={"no_rope_layers": [1] * 4, "interleave_moe_layer_step": 9},
        dtype="F16",
        vision=_tower(44, 1, image_size=56, patch_size=14, rope_theta=100.0),
    ),
    MixedVariant(
        "odd_shapes",
        (_BOS, 1, (2, 2), 1),
        text={
            "hidden_size": 42,
            "head_dim": 24,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "intermediate_size": 37,
            "num_local_experts": 3,
            "num_experts_per_tok": 3,
            "attention_chunk_size": None,
        },
        vision=_tower(
            20,
            5,
            image_size=90,
            patch_size=9,
            projector_input_dim=13,
            projector_output_dim=13,
            vision_output_dim=13,
            num_channels=1,
        ),
    ),
    # llm-compressor's usual: experts quantised, the tower left alone.
    MixedVariant(
        "int4_experts",
        (_BOS, 10, (1, 2), 10),
        dtype="BF16",
        quantization=Quantization(group_size=16),
        vision={"image_size": 112},
    ),
    MixedVariant(
        "int4_tower",
        (_BOS, 10, (1, 2), 10),
        text={"hidden_size": 64, "intermediate_size": 64},
        dtype="BF16",
        quantization=Quantization(group_size=32, ignore=_WITH_TOWER),
        vision=_tower(64, 4, projector_input_dim=64, projector_output_dim=64, vision_output_dim=64),
    ),
    MixedVariant(
        "int8_tower",
        (_BOS, 10, (2, 1), 10),
        text={"hidden_size": 64},
        dtype="BF16",
        quantization=Quantization(bits=8, group_size=0, ignore=_WITH_TOWER),
        vision=_tower(32, 2, image_size=112),
    ),
    MixedVariant(
        "int4_tower_asymmetric",
        (_BOS, 10, (1, 1), 10),
        text={"hidden_size": 64, "intermediate_size": 64},
        quantization=Quantization(group_size=16, symmetric=False, ignore=_WITH_TOWER),
        vision=_tower(32, 2, image_size=56),
    ),
    # Groups of 128 and blocks of 128 activations, without routers: what compute="fast" rounds, and
    # no expert that is chosen by a hair.
    MixedVariant(
        "wide_dense",
        (_BOS, 20, (2, 2), 30, (1, 1), 40),
        text={
            "hidden_size": 256,
            "head_dim": 64,
            "num_attention_heads": 4,
            "intermediate_size_mlp": 512,
            "interleave_moe_layer_step": 9,
            "attention_chunk_size": 64,
        },
        dtype="BF16",
        quantization=Quantization(group_size=128, ignore=_WITH_TOWER),
        vision=_tower(
            128,
            4,
            image_size=112,
            num_hidden_layers=3,
            projector_input_dim=128,
            projector_output_dim=128,
            vision_output_dim=128,
        ),
    ),
)
