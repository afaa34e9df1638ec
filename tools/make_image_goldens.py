"""Writes tests/data/image_goldens.json: what transformers makes of each image of image_cases.py.

    python tools/make_image_goldens.py
    python tools/make_image_goldens.py --fuzz 300 --seed 1

The second compares camelid with transformers on random sizes and modes instead, and needs camelid
beside them. Both need torch, torchvision and transformers, on a processor with AVX2 or AVX-512:
torchvision resizes through float32 elsewhere, and gives other pixels.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from transformers import Llama4ImageProcessor
from transformers.models.llama4 import image_processing_llama4

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from image_cases import CASES, GOLDENS, ImageCase, make_image, record

_FUZZ_MODES = ("RGB", "RGB", "RGB", "L", "LA", "P", "RGBA", "CMYK", "I;16", "1")
_MAX_SIDE = 6000


def reference(image: Image.Image, config: dict[str, Any]) -> tuple[NDArray[Any], tuple[int, int]]:
    """Return transformers' tiles, as its own loader would prepare the image, and the grid."""
    image_processing_llama4.find_supported_resolutions.cache_clear()  # its key cannot be trusted
    processor = Llama4ImageProcessor(**config)
    answer = processor(ImageOps.exif_transpose(image), return_tensors="pt")
    tiles = answer["pixel_values"].float().numpy()
    rows, columns = (int(n) for n in answer["aspect_ratios"][0])
    return tiles.reshape(-1, *tiles.shape[-3:]), (rows, columns)  # one tile comes in a batch


def fuzz(n: int, seed: int) -> int:
    """Return how many of `n` random images differ in any bit."""
    from camelid.images import tile

    rng = np.random.default_rng(seed)
    n_different = n_values = 0
    for place in range(n):
        # Even over sizes, or even over their magnitudes, which finds the extreme shapes.
        width, height = rng.integers(1, _MAX_SIDE + 1, 2)
        if place % 2:
            width, height = np.exp(rng.uniform(0, np.log(_MAX_SIDE), 2))
        mode = _FUZZ_MODES[place % len(_FUZZ_MODES)]
        pattern = ("noise", "edges", "gradient")[place % 3]
        case = ImageCase(f"{seed}.{place}", int(width), int(height), mode, pattern)
        image = make_image(case)
        expected, grid = reference(image, {})
        tiles, got_grid = tile(image)
        n_values += tiles.size
        if grid != got_grid or not np.array_equal(tiles, expected):
            n_different += 1
            print(f"different: {case}, grid {got_grid}, expected {grid}")
    print(f"{n_different} of {n} images differ, {n_values} values compared")
    return n_different


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fuzz", type=int, default=0, metavar="IMAGES")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if (capability := torch.backends.cpu.get_cpu_capability()) not in ("AVX2", "AVX512"):
        sys.exit(f"this machine resizes with {capability}, expected AVX2 or AVX512")
    if options.fuzz:
        return 1 if fuzz(options.fuzz, options.seed) else 0
    records = {case.name: record(*reference(make_image(case), case.config)) for case in CASES}
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in records.items()]
    GOLDENS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{len(records)} records in {GOLDENS.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
