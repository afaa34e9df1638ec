"""Writes tests/data/layout_goldens.json: the tokens Llama4Processor puts where an image stands.

    python tools/make_layout_goldens.py

Needs torch and transformers; nothing that ships or is tested does. Every canvas of up to 16 tiles
of the released size, and some of other towers. Names are without their <| |>; runs are counted.
"""

from __future__ import annotations

import json
import re
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import Llama4Processor

GOLDENS = Path(__file__).parents[1] / "tests" / "data" / "layout_goldens.json"
_MAX_TILES = 16
_OTHERS = ((56, 14, 0.5), (112, 14, 0.5), (84, 14, 1 / 3), (70, 14, 1.0), (60, 14, 0.5))


class _Processor(Llama4Processor):
    """Lays out images without a tokenizer, which it does not ask."""

    def __init__(self, patch_size: int, ratio: float) -> None:
        no_tokenizer = SimpleNamespace(convert_tokens_to_ids=lambda _: 0)
        self.check_argument_for_proper_class = lambda *_: object  # it wants a real tokenizer
        super().__init__(None, no_tokenizer, patch_size=patch_size, pixel_shuffle_ratio=ratio)


def layout(side: int, patch_size: int, ratio: float, grid: tuple[int, int]) -> str:
    """Return the layout of an image of `grid` tiles, such as "image_start image patch*144 ..."."""
    n_tiles = grid[0] * grid[1] + (grid != (1, 1))
    inputs: dict[str, Any] = {
        "pixel_values": [torch.zeros(n_tiles, 3, side, side)],
        "aspect_ratios": torch.tensor([grid]),
    }
    text = _Processor(patch_size, ratio).replace_image_token(inputs, 0)
    names = re.findall(r"<\|(\w+)\|>", text)
    assert "".join(f"<|{name}|>" for name in names) == text
    runs = [(name, len(list(run))) for name, run in groupby(names)]
    return " ".join(name if n == 1 else f"{name}*{n}" for name, n in runs)


def main() -> None:
    grids = [
        (rows, columns)
        for rows in range(1, _MAX_TILES + 1)
        for columns in range(1, _MAX_TILES // rows + 1)
    ]
    cases = [(336, 14, 0.5, grid) for grid in grids]
    cases += [(*tower, grid) for tower in _OTHERS for grid in ((1, 1), (2, 1), (3, 5))]
    records = [
        {"side": s, "patch_size": p, "ratio": r, "grid": g, "layout": layout(s, p, r, g)}
        for s, p, r, g in cases
    ]
    GOLDENS.write_text("[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n")
    print(f"{len(records)} layouts, {GOLDENS.stat().st_size} bytes")


if __name__ == "__main__":
    main()
