"""Tiles equal what transformers recorded, to the bit; canvases and limits by hand."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from PIL import Image

from camelid import images
from camelid.errors import InvalidRequest, Unsupported
from camelid.images import Fit, ImageConfig, fit_image, tile
from image_cases import CASES, ImageCase, make_image, read_goldens, record

GREY = 128
# bf16(128 / 255) = 0.50390625 exactly, minus and divided by a half.
NORMALISED_GREY = 0.0078125


@pytest.fixture(scope="module")
def goldens() -> dict[str, Any]:
    return read_goldens()


def test_goldens_are_of_these_cases(goldens: dict[str, Any]) -> None:
    assert list(goldens) == [case.name for case in CASES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tile_equals_transformers(case: ImageCase, goldens: dict[str, Any]) -> None:
    tiles, grid = tile(make_image(case), case.config or None)
    assert tiles.dtype == np.float32
    assert record(tiles, grid) == goldens[case.name]


def test_tile_pads_right_and_below_and_puts_overview_last() -> None:
    tiles, grid = tile(Image.new("L", (500, 300), GREY))
    assert (grid, tiles.shape) == ((1, 2), (3, 3, 336, 336))
    canvas = np.concatenate(tiles[:2], axis=2)  # [3, 336, 672]
    drawn = fit_image(300, 500, ImageConfig())
    assert (drawn.height, drawn.width) == (300, 500)  # 500 is beyond one tile: nothing enlarges it
    inside = canvas[:, : drawn.height, : drawn.width]
    assert (inside == NORMALISED_GREY).all()
    assert (canvas[:, drawn.height :] == -1).all()
    assert (canvas[:, :, drawn.width :] == -1).all()
    assert (tiles[2] == NORMALISED_GREY).all()  # distorted, so without padding


def test_tile_keeps_one_tile_alone() -> None:
    tiles, grid = tile(Image.new("RGB", (336, 336), (0, GREY, 255)))
    assert (grid, tiles.shape) == ((1, 1), (1, 3, 336, 336))
    assert [float(channel[0, 0]) for channel in tiles[0]] == [-1.0, NORMALISED_GREY, 1.0]


def test_tile_orders_tiles_by_rows() -> None:
    image = Image.new("L", (56, 56))
    for place, corner in enumerate([(0, 0), (28, 0), (0, 28), (28, 28)]):
        image.paste(60 * place, (*corner, corner[0] + 28, corner[1] + 28))
    tiles, grid = tile(image, {"size": {"height": 28, "width": 28}})
    assert grid == (2, 2)
    assert list(tiles[:4, 0, 0, 0]) == sorted(set(tiles[:4].ravel()))
    assert len(tiles) == 5


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (1, 1, Fit(1, 1, 336, 336)),
        (336, 337, Fit(1, 2, 336, 337)),
        (672, 672, Fit(2, 2, 672, 672)),
        (3000, 4000, Fit(3, 4, 1008, 1344)),
        (5000, 5000, Fit(4, 4, 1344, 1344)),
        (1, 6000, Fit(1, 16, 1, 5376)),  # would be 0.9 pixels high
        (6000, 1, Fit(16, 1, 5376, 1)),
    ],
)
def test_fit_image_by_hand(height: int, width: int, expected: Fit) -> None:
    assert fit_image(height, width, ImageConfig()) == expected


@pytest.mark.parametrize(
    ("height", "width", "expected", "in_double"),
    [
        (1984, 1488, Fit(4, 3, 1344, 1008), (1344, 1007)),
        (2601, 4590, Fit(3, 5, 952, 1680), (951, 1680)),
        (3040, 1406, Fit(5, 3, 1680, 776), (1680, 777)),
    ],
)
def test_fit_image_scales_in_float32_where_the_canvas_limits(
    height: int, width: int, expected: Fit, in_double: tuple[int, int]
) -> None:
    canvas_height, canvas_width = 336 * expected.rows, 336 * expected.columns
    scale = min(canvas_height / height, canvas_width / width)
    assert in_double in (
        (canvas_height, int(width * scale)),
        (int(height * scale), canvas_width),
    )
    assert fit_image(height, width, ImageConfig()) == expected  # as transformers has it


def test_canvases_are_the_released_fifty() -> None:
    grids = images._grids(16)
    assert len(grids) == 50
    assert grids[:5].tolist() == [[1, 16], [2, 8], [1, 4], [4, 4], [3, 3]]
    assert grids.prod(axis=1).max() == 16


def test_tile_refuses_what_is_no_image() -> None:
    with pytest.raises(InvalidRequest, match=r"tile\(\) got bytes, expected a Pillow image"):
        tile(b"...")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="config is int"):
        tile(Image.new("RGB", (1, 1)), 3)  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match="resample is 3"):
        tile(Image.new("RGB", (1, 1)), {"resample": 3})


def test_tile_leaves_the_image_as_it_was() -> None:
    image = make_image(next(case for case in CASES if case.name == "exif6"))
    before = (image.mode, image.size, image.tobytes(), dict(image.info))
    first, _ = tile(image)
    assert (image.mode, image.size, image.tobytes(), dict(image.info)) == before
    np.testing.assert_array_equal(first, tile(image)[0])


def test_tile_takes_a_photo_in_time() -> None:
    photo = Image.effect_noise((4000, 3000), 64).convert("RGB")
    times = []
    for _ in range(3):
        started = time.perf_counter()
        _, grid = tile(photo)
        times.append(time.perf_counter() - started)
    assert grid == (3, 4)
    # 0.09 s measured on one core; a pass in Python or NumPy would take seconds.
    assert min(times) < 1.5
