"""Synthetic images whose tiles are recorded in data/image_goldens.json, the same on every machine.

Shared by the tests and by tools/make_image_goldens.py, which asks transformers. Made of raw PCG64
words and integer arithmetic alone: both are promised never to change.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

GOLDENS = Path(__file__).parent / "data" / "image_goldens.json"
ORIENTATION = 0x0112  # the EXIF tag

# Channels of the modes that Pillow reads from bytes, one byte each.
_CHANNELS = {"L": 1, "P": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}


@dataclass(frozen=True)
class ImageCase:
    """One image, and the preprocessor_config.json it is cut with."""

    name: str
    width: int
    height: int
    mode: str = "RGB"  # of Pillow
    pattern: str = "noise"  # noise | edges | gradient
    transparency: Any = None  # what a PNG's tRNS chunk leaves in Image.info
    orientation: int = 0  # EXIF, 0 for none
    config: dict[str, Any] = field(default_factory=dict)


def _sizes() -> list[ImageCase]:
    """Every kind of canvas, extreme shapes, and sizes at and around the edges of tiles."""
    sizes = [
        (1, 1), (2, 1), (1, 2), (7, 5), (335, 336), (336, 336), (337, 336), (336, 337), (672, 672),
        (673, 671), (500, 300), (300, 500), (1, 6000), (6000, 1), (3, 4001), (4001, 2),
        (5376, 336), (336, 5376), (5377, 100), (100, 5377), (1344, 1344), (1345, 1343),
        (1920, 1080), (1080, 1920), (999, 1777), (640, 480), (2048, 300), (1000, 101), (3300, 190),
        (2500, 2400), (1488, 1984),
    ]  # fmt: skip
    patterns = ["noise", "edges", "gradient"]
    return [
        ImageCase(f"{width}x{height}", width, height, pattern=patterns[place % 3])
        for place, (width, height) in enumerate(sizes)
    ]


def _modes() -> list[ImageCase]:
    some = tuple((37 * i) % 256 for i in range(256))
    return [
        ImageCase("grey", 401, 299, "L"),
        ImageCase("grey_transparent", 401, 299, "L", "gradient", transparency=90),
        ImageCase("grey_alpha", 350, 700, "LA"),
        ImageCase("palette", 401, 299, "P"),
        ImageCase("palette_transparent", 401, 299, "P", transparency=17),
        ImageCase("palette_alpha", 401, 299, "P", transparency=bytes(some)),
        ImageCase("rgb_transparent", 64, 64, "RGB", "edges", transparency=(0, 255, 0)),
        ImageCase("rgba", 1200, 900, "RGBA"),
        ImageCase("rgba_gradient", 260, 410, "RGBA", "gradient"),
        ImageCase("cmyk", 401, 299, "CMYK"),
        ImageCase("sixteen_bit", 401, 299, "I;16"),
        ImageCase("one_bit", 401, 299, "1"),
        *(ImageCase(f"exif{n}", 500, 340, "RGB", "gradient", orientation=n) for n in range(1, 9)),
        ImageCase("exif_rgba", 90, 40, "RGBA", orientation=6),
    ]


def _configs() -> list[ImageCase]:
    small = {"size": {"height": 28, "width": 28}}
    other = {
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "rescale_factor": 1 / 256,
    }
    return [
        ImageCase("max_canvas", 100, 90, config={"resize_to_max_canvas": True}),
        ImageCase("small_tiles", 123, 77, config=small),
        ImageCase("one_tile", 500, 400, config={**small, "max_patches": 1}),
        ImageCase("many_tiles", 400, 300, "RGB", "edges", config={**small, "max_patches": 30}),
        ImageCase("other_values", 200, 100, config={**small, **other}),
    ]


CASES = [*_sizes(), *_modes(), *_configs()]


def make_image(case: ImageCase) -> Image.Image:
    """Return the case's picture."""
    size = (case.width, case.height)
    if case.mode == "I;16":  # some values above 255, which Pillow cuts off
        values = _bytes(case, 2).astype(np.uint16)
        image = Image.fromarray(values[..., 0] + (values[..., 1] > 200) * np.uint16(256))
    elif case.mode == "1":
        row_bytes = -(-case.width // 8)
        image = Image.frombytes("1", size, _noise(case, row_bytes * case.height).tobytes())
    else:
        pixels = _bytes(case, _CHANNELS[case.mode])
        image = Image.frombytes(case.mode, size, pixels.tobytes())
    if case.mode == "P":
        image.putpalette(_noise(case, 768).tobytes())
    if case.transparency is not None:
        image.info["transparency"] = case.transparency
    if case.orientation:
        exif = Image.Exif()
        exif[ORIENTATION] = case.orientation
        image.info["exif"] = exif.tobytes()
    return image


def _noise(case: ImageCase, n: int) -> NDArray[np.uint8]:
    words = np.random.PCG64(zlib.crc32(case.name.encode())).random_raw(-(-n // 8))
    return np.asarray(words, "<u8").view(np.uint8)[:n]


def _bytes(case: ImageCase, channels: int) -> NDArray[np.uint8]:
    """Return uint8 [height, width, channels] in the case's pattern."""
    shape = (case.height, case.width, channels)
    if case.pattern == "gradient":
        y, x, c = np.ogrid[: case.height, : case.width, :channels]
        return ((x * (3 + c) + y * (5 - c) + x * y // (7 + c)) % 256).astype(np.uint8)
    noise = _noise(case, case.height * case.width * channels).reshape(shape)
    return noise if case.pattern == "noise" else (noise >> 7) * np.uint8(255)


def record(tiles: NDArray[np.float32], grid: tuple[int, int]) -> dict[str, Any]:
    """Return what is stored of an answer. Every value is a bf16, so half of the bytes say all."""
    upper = (np.ascontiguousarray(tiles, "<f4").view("<u4") >> 16).astype("<u2")
    assert not (np.ascontiguousarray(tiles, "<f4").view("<u4") & 0xFFFF).any(), "not bf16 values"
    digest = hashlib.sha256(upper.tobytes()).hexdigest()
    return {"grid": list(grid), "shape": list(tiles.shape), "sha256": digest}


def read_goldens() -> dict[str, Any]:
    """Return every case's record, by name."""
    goldens: dict[str, Any] = json.loads(GOLDENS.read_text())
    return goldens
