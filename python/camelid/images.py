"""From a picture to the tiles the vision encoder sees, equal to transformers' to the bit.

Owns which canvas an image is given, how large it is drawn there, and the order of the tiles. The
resize is C++ (src/image/); decoding is Pillow's (`image_files.py`). Must never know the model.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from camelid import _core
from camelid.errors import InvalidRequest
from camelid.image_config import ImageConfig
from camelid.image_files import load_image, rgb_pixels

__all__ = ["Fit", "ImageConfig", "fit_image", "load_image", "tile"]


def tile(
    pil_image: Image.Image, config: ImageConfig | Mapping[str, Any] | None = None
) -> tuple[NDArray[np.float32], tuple[int, int]]:
    """Cut an image into normalised tiles.

    The image is drawn at the top left of a black canvas of rows x columns tiles, as large as fits
    without distortion; small images are enlarged to one tile's side at most. Where there is more
    than one tile, an overview comes last: the whole image distorted to one tile. An EXIF
    orientation is applied, and transparency laid onto white.

    Args:
        pil_image: In any mode; `load_image` opens bytes, paths and data URLs.
        config: The checkpoint's, or the object in its `preprocessor_config.json`; None means the
            released models'.

    Returns:
        float32 [n_tiles, 3, height, width], row by row, the overview last; and (rows, columns).

    Raises:
        InvalidRequest: If the image is damaged or beyond the limits in `image_files`.
        CheckpointError: If `config` is an object with a value that is not what it must be.
        Unsupported: If it asks for preprocessing other than Llama 4's.
    """
    if not isinstance(pil_image, Image.Image):
        raise InvalidRequest(
            f"[image] tile() got {type(pil_image).__name__}, expected a Pillow image. Open files, "
            "bytes and data URLs with camelid.images.load_image."
        )
    config = _read_config(config)
    pixels = rgb_pixels(pil_image)
    fit = fit_image(pixels.shape[0], pixels.shape[1], config)
    side, n_tiles = config.tile_side, fit.rows * fit.columns
    has_overview = n_tiles > 1
    tiles = np.empty((n_tiles + has_overview, 3, side, side), np.float32)
    table = _normalised_values(config)
    canvas = np.zeros((fit.rows * side, fit.columns * side, 3), np.uint8)
    _core.resize_image(pixels, canvas[: fit.height, : fit.width])
    _cut(canvas, (fit.rows, fit.columns), table, tiles[:n_tiles])
    if has_overview:
        overview = np.empty((side, side, 3), np.uint8)
        _core.resize_image(pixels, overview)
        _cut(overview, (1, 1), table, tiles[n_tiles:])
    return tiles, (fit.rows, fit.columns)


@dataclass(frozen=True)
class Fit:
    """Where an image goes: a canvas of rows x columns tiles, and the image's size on it."""

    rows: int
    columns: int
    height: int  # pixels
    width: int


def fit_image(height: int, width: int, config: ImageConfig) -> Fit:
    """Choose the canvas for an image of height x width pixels, and how large to draw it there.

    Among canvases that need no shrinking, the one that enlarges least; else the one that shrinks
    least; of several, the smallest. Source: transformers, image_processing_llama4.py; it computes
    the scales as float32, and later some of them in double, and so must we: rounding decides ties.
    """
    side = config.tile_side
    grids = _grids(config.max_tiles)
    canvases = (grids * side).astype(np.float32)
    scales = (canvases / np.array([height, width], np.float32)).min(axis=1)
    enlarging = scales[scales >= 1]
    if len(enlarging) == 0:
        scale = scales.max()
    else:
        scale = enlarging.max() if config.use_max_canvas else enlarging.min()
    equal = grids[scales == scale]
    rows, columns = (int(n) for n in equal[equal.prod(axis=1).argmin()])
    limit = None if config.use_max_canvas else side
    box_height, scale_h = _limited(height, rows * side, limit)
    box_width, scale_w = _limited(width, columns * side, limit)
    if scale_w < scale_h:
        drawn = (min(_scaled(height, scale_w), box_height), box_width)
    else:
        drawn = (box_height, min(_scaled(width, scale_h), box_width))
    return Fit(rows, columns, max(drawn[0], 1), max(drawn[1], 1))


def _limited(size: int, canvas: int, limit: int | None) -> tuple[int, float | np.float32]:
    """Return how long an axis may become and the scale that takes: float32 at the canvas's edge.

    There the reference's number is a tensor, and its quotient a float32 one; elsewhere a double.
    """
    if limit is None or canvas < max(size, limit):
        return canvas, np.float32(canvas) / np.float32(size)
    return max(size, limit), max(size, limit) / size


def _scaled(size: int, scale: float | np.float32) -> int:
    return int(np.float32(size) * scale if isinstance(scale, np.float32) else size * scale)


@functools.lru_cache(maxsize=8)
def _grids(max_tiles: int) -> NDArray[np.int64]:
    """Every rows x columns of at most `max_tiles`, in the reference's order, which breaks ties.

    From many tiles to few, flat before tall, grids of one shape after the first of that shape.
    """
    by_shape: dict[float, list[tuple[int, int]]] = {}
    for n_tiles in range(max_tiles, 0, -1):
        for rows in range(1, n_tiles + 1):
            if n_tiles % rows == 0:
                columns = n_tiles // rows
                by_shape.setdefault(rows / columns, []).append((rows, columns))
    return np.array([grid for grids in by_shape.values() for grid in grids], np.int64)


@functools.lru_cache(maxsize=8)
def _normalised_values(config: ImageConfig) -> NDArray[np.float32]:
    """Return what each pixel value becomes, float32 [3, 256]: every step rounded to bf16."""
    values = np.arange(256, dtype=np.float32) * np.float32(config.rescale_factor)
    mean = _round_to_bf16(np.array(config.mean, np.float32))[:, None]
    std = _round_to_bf16(np.array(config.std, np.float32))[:, None]
    return _round_to_bf16(_round_to_bf16(_round_to_bf16(values) - mean) / std)


def _round_to_bf16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Keep the upper 16 bits, rounding half to even. For finite values."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def _cut(
    canvas: NDArray[np.uint8],
    grid: tuple[int, int],
    table: NDArray[np.float32],
    tiles: NDArray[np.float32],
) -> None:
    """Write a canvas as `tiles`, row by row: float32 [rows * columns, 3, side, side]."""
    rows, columns = grid
    side = tiles.shape[-1]
    parts = canvas.reshape(rows, side, columns, side, 3).transpose(4, 0, 2, 1, 3)
    out = tiles.reshape(rows, columns, 3, side, side)
    for channel in range(3):
        out[:, :, channel] = table[channel][parts[channel]]


def _read_config(config: ImageConfig | Mapping[str, Any] | None) -> ImageConfig:
    if config is None:
        return ImageConfig()
    if isinstance(config, ImageConfig):
        return config
    if isinstance(config, Mapping):
        return ImageConfig.from_json(config)
    raise InvalidRequest(
        f"[image] config is {type(config).__name__}, expected an ImageConfig or the object that "
        "preprocessor_config.json holds."
    )
