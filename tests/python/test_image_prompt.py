"""The special tokens of an image in a prompt: written out by hand, and as Llama4Processor's.

data/layout_goldens.json is written by tools/make_layout_goldens.py.
"""

from __future__ import annotations

import json
from dataclasses import fields
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest

from camelid.config import VisionConfig
from camelid.errors import InvalidRequest
from camelid.image_prompt import image_ids, image_text, n_image_tokens

# Ids of the released tokenizer.
IDS = {
    "<|image_start|>": 200080,
    "<|image_end|>": 200081,
    "<|tile_x_separator|>": 200084,
    "<|tile_y_separator|>": 200085,
    "<|image|>": 200090,
    "<|patch|>": 200092,
}
START, END, X, Y, OVERVIEW, P = IDS.values()
GOLDENS = json.loads(
    (Path(__file__).parents[1] / "data" / "layout_goldens.json").read_text(encoding="utf-8")
)


def test_one_tile_has_no_separators() -> None:
    text = "<|image_start|><|image|><|patch|><|patch|><|image_end|>"
    assert image_text((1, 1), 2) == text
    assert image_ids((1, 1), 2, IDS.__getitem__) == [START, OVERVIEW, P, P, END]


def test_two_rows_of_three_tiles() -> None:
    row = [P, P, X, P, P, X, P, P, Y]
    expected = [START, *row, *row, OVERVIEW, P, P, END]
    assert image_ids((2, 3), 2, IDS.__getitem__) == expected


@pytest.mark.parametrize(
    ("grid", "text"),
    [
        (
            (1, 2),
            "<|image_start|><|patch|><|tile_x_separator|><|patch|><|tile_y_separator|>"
            "<|image|><|patch|><|image_end|>",
        ),
        (
            (2, 1),
            "<|image_start|><|patch|><|tile_y_separator|><|patch|><|tile_y_separator|>"
            "<|image|><|patch|><|image_end|>",
        ),
    ],
)
def test_a_row_is_closed_even_when_it_is_one_tile(grid: tuple[int, int], text: str) -> None:
    assert image_text(grid, 1) == text


def test_seventeen_tiles() -> None:
    tile = [P] * 144
    row = [*tile, X, *tile, X, *tile, X, *tile, Y]
    ids = image_ids((4, 4), 144, IDS.__getitem__)
    assert ids == [START, *row, *row, *row, *row, OVERVIEW, *tile, END]
    assert len(ids) == 2467
    assert ids.count(P) == 17 * 144


def tower(side: int, patch_size: int, ratio: float) -> VisionConfig:
    known = {"image_size": side, "patch_size": patch_size, "pixel_shuffle_ratio": ratio}
    return VisionConfig(**{field.name: known.get(field.name, 1) for field in fields(VisionConfig)})


def names(layout: str) -> list[str]:
    """Spell a golden out: "patch*144" is that many."""
    runs = (run.split("*") for run in layout.split())
    return list(chain.from_iterable(repeat(f"<|{name}|>", int(*n or "1")) for name, *n in runs))


@pytest.mark.parametrize(
    "golden", GOLDENS, ids=lambda g: f"{g['side']}-{g['grid'][0]}x{g['grid'][1]}"
)
def test_layout_is_that_of_transformers(golden: dict[str, Any]) -> None:
    rows, columns = golden["grid"]
    n = tower(golden["side"], golden["patch_size"], golden["ratio"]).tokens_per_tile
    wanted = names(golden["layout"])
    assert image_text((rows, columns), n) == "".join(wanted)
    assert image_ids((rows, columns), n, IDS.__getitem__) == [IDS[name] for name in wanted]
    assert n_image_tokens((rows, columns), n) == len(wanted)


def test_layouts_are_recorded_of_every_canvas() -> None:
    released = {tuple(golden["grid"]) for golden in GOLDENS if golden["side"] == 336}
    assert released == {(r, c) for r in range(1, 17) for c in range(1, 17) if r * c <= 16}


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (3, 1), (2, 3), (4, 4), (1, 16)])
def test_n_image_tokens_counts(grid: tuple[int, int]) -> None:
    assert n_image_tokens(grid, 144) == len(image_ids(grid, 144, IDS.__getitem__))


@pytest.mark.parametrize(("grid", "tokens"), [((0, 1), 144), ((1, -1), 144), ((1, 1), 0)])
def test_nothing_is_refused(grid: tuple[int, int], tokens: int) -> None:
    with pytest.raises(InvalidRequest, match="expected at least one of each"):
        image_text(grid, tokens)
