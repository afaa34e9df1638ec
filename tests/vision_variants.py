"""The vision towers the engine is held to transformers on: small ones of several tiles and shapes.

What a row leaves out is VISION_CONFIG of tests/checkpoints.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints import SPECIAL_IDS, VISION_CONFIG, Weights, write_checkpoint

GOLDENS = Path(__file__).parent / "data" / "vision_goldens"


@dataclass(frozen=True)
class VisionVariant:
    """A checkpoint with a vision tower, and the tiles it is shown."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)  # of the vision model
    dtype: str = "F32"
    n_tiles: int = 2
    hidden_size: int = 24  # of the text model
    seed: int = 0

    def write(self, folder: str | Path) -> Weights:
        """Write the checkpoint; return the float32 weights it stands for."""
        text = {"hidden_size": self.hidden_size, "num_hidden_layers": 1, "intermediate_size": 16}
        return write_checkpoint(
            folder,
            config_overrides=text,
            vision_overrides=self.config,
            seed=self.seed,
            dtype=self.dtype,
            vision=True,
            tokenizer=False,
        )

    def pixels(self) -> NDArray[np.float32]:
        """Return tiles [n_tiles, channels, side, side] in [-1, 1), the same everywhere."""
        config = {**VISION_CONFIG, **self.config}
        side, n_channels = config["image_size"], config["num_channels"]
        bits = np.random.PCG64(7).random_raw(self.n_tiles * n_channels * side * side)
        values = (bits >> np.uint64(40)).astype(np.float64) / 2**23 - 1
        return values.astype(np.float32).reshape(self.n_tiles, n_channels, side, side)


def _tower(dim: int, heads: int, ratio: float = 0.5, **more: Any) -> dict[str, Any]:
    shuffled = dim * round(1 / ratio) ** 2
    size = {"hidden_size": dim, "num_attention_heads": heads, "intermediate_size": shuffled}
    return {**size, "pixel_shuffle_ratio": ratio, **more}


VISION_VARIANTS = (
    VisionVariant("base"),
    VisionVariant("bf16", dtype="BF16"),
    VisionVariant("image_336", {"image_size": 336, "num_hidden_layers": 3}, n_tiles=1),
    VisionVariant("image_112_odd_heads", _tower(60, 5, image_size=112)),  # head_dim 12
    VisionVariant("head_dim_88", _tower(88, 1, image_size=84)),  # the real tower's
    VisionVariant("shuffle_1", _tower(32, 4, 1.0, image_size=70)),  # head_dim 8, 5 x 5 patches
    VisionVariant("shuffle_3", _tower(16, 1, 1 / 3, image_size=84), n_tiles=3),
    VisionVariant("remainder", {"image_size": 60}),  # pixels beyond the last patch are not seen
    VisionVariant("grey", {"num_channels": 1, "patch_size": 7, "image_size": 28}, n_tiles=17),
    VisionVariant("theta", {"rope_theta": 100.0, "num_hidden_layers": 5}, seed=5),
    VisionVariant("no_layers", {"num_hidden_layers": 0}),
)


# ---- a prompt of text and two images ----
MIXED = Path(__file__).parent / "data" / "vision_goldens" / "mixed_prompt.npz"
PATCH = SPECIAL_IDS["<|patch|>"]


def write_mixed(folder: str | Path) -> Weights:
    """Write the checkpoint whose logits of mixed_prompt() are in MIXED."""
    text = {"attention_chunk_size": 16, "num_hidden_layers": 4}
    return write_checkpoint(folder, vision=True, config_overrides=text, seed=11)


def mixed_prompt() -> tuple[list[int], list[NDArray[np.float32]]]:
    """Return token ids and the tiles of their images: two tiles and an overview, then one tile.

    Text, the images' layout and more text; both images cross an edge of the chunks of 16.
    """
    special = SPECIAL_IDS
    per_tile = [PATCH] * 4  # 4 x 4 patches shuffled into 2 x 2
    row = [*per_tile, special["<|tile_x_separator|>"], *per_tile, special["<|tile_y_separator|>"]]
    overview = [special["<|image|>"], *per_tile, special["<|image_end|>"]]
    begin = special["<|image_start|>"]
    bits = np.random.PCG64(3).random_raw(30) >> np.uint64(56)
    words = [int(value) for value in bits]
    ids = [
        special["<|begin_of_text|>"], *words[:9], begin, *row, *overview, *words[9:17],
        begin, *overview, *words[17:],
    ]  # fmt: skip
    pixels = VisionVariant("mixed", n_tiles=4).pixels()
    return ids, [pixels[:3], pixels[3:]]
