"""Reads preprocessor_config.json: how a checkpoint wants its images cut and scaled.

Owns ImageConfig and the refusal, by name, of everything a config may ask for that is not done here.
Must never touch a pixel.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from camelid.errors import CheckpointError, Unsupported
from camelid.json_file import Fields, read_json, shorten

__all__ = ["ImageConfig"]

_BILINEAR = 2  # Pillow's number, which the files use
# Bounds of what a file may ask for; the released models ask for 16 tiles of 336 pixels.
_MAX_SIDE = 2048
_MAX_TILES = 64
_MAX_CANVAS_PIXELS = 1 << 24  # 9 times the released models' largest canvas; 200 MB in float32
_PROCESSORS = ("Llama4ImageProcessor", "Llama4ImageProcessorFast")
# What the reference always does, and what it never does.
_ALWAYS = ("do_convert_rgb", "do_resize", "do_rescale", "do_normalize")
_NEVER = ("do_center_crop", "do_pad")


@dataclass(frozen=True)
class ImageConfig:
    """How images become tiles. The defaults are transformers', and the released models'."""

    tile_side: int = 336  # pixels; tiles are square
    max_tiles: int = 16  # of one canvas, the overview not counted
    use_max_canvas: bool = False  # enlarge as much as the canvases allow
    rescale_factor: float = 1 / 255
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # red, green, blue, after rescaling
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> ImageConfig:
        """Read a model folder's `processor_config.json` or `preprocessor_config.json`.

        The first counts only where it has a section `image_processor`, as newer folders do.

        Raises:
            CheckpointError: If there is no such file, or a value is not what it must be.
            Unsupported: If it asks for preprocessing other than Llama 4's.
        """
        newer = Path(folder) / "processor_config.json"
        if newer.exists():
            fields = Fields(read_json(newer), str(newer))
            if fields.get("image_processor") is not None:
                return cls._parse(fields.section("image_processor"))
        path = Path(folder) / "preprocessor_config.json"
        if not path.exists():
            raise CheckpointError(
                f"[config] {folder} has no preprocessor_config.json, expected one in the folder of "
                "a model that sees images. Download it again."
            )
        return cls._parse(Fields(read_json(path), str(path)))

    @classmethod
    def from_json(
        cls, data: Mapping[str, Any], *, where: str = "preprocessor_config"
    ) -> ImageConfig:
        """Check the object that a `preprocessor_config.json` holds; null means the default."""
        return cls._parse(Fields(dict(data), where))

    @classmethod
    def _parse(cls, fields: Fields) -> ImageConfig:
        given = {key: value for key, value in fields.data.items() if value is not None}
        fields = Fields(given, fields.where)
        _check_supported(fields)
        side = _side(fields)
        config = cls(
            tile_side=side,
            max_tiles=fields.integer("max_patches", cls.max_tiles, 1, _MAX_TILES),
            use_max_canvas=fields.boolean("resize_to_max_canvas", False),
            rescale_factor=fields.number("rescale_factor", cls.rescale_factor, 1e-6, 1.0),
            mean=_three_numbers(fields, "image_mean", cls.mean, -1e3, 1e3),
            std=_three_numbers(fields, "image_std", cls.std, 1e-3, 1e3),
        )
        if config.max_tiles * side * side > _MAX_CANVAS_PIXELS:
            raise fields.error("max_patches", f"{_MAX_CANVAS_PIXELS // side**2} or fewer of {side}")
        return config


def _check_supported(fields: Fields) -> None:
    kind = fields.text("image_processor_type", _PROCESSORS[0])
    if kind not in _PROCESSORS:
        raise _unsupported(fields, "image_processor_type", " or ".join(_PROCESSORS))
    if fields.text("data_format", "channels_first") != "channels_first":
        raise _unsupported(fields, "data_format", "channels_first")
    if fields.integer("resample", _BILINEAR, 0, 1 << 31) != _BILINEAR:
        raise _unsupported(fields, "resample", f"{_BILINEAR} (bilinear)")
    for key in _ALWAYS:
        if not fields.boolean(key, True):
            raise _unsupported(fields, key, "true")
    for key in _NEVER:
        if fields.boolean(key, False):
            raise _unsupported(fields, key, "false")


def _unsupported(fields: Fields, key: str, wanted: str) -> Unsupported:
    return Unsupported(
        f"[config] {fields.where}: {key} is {shorten(fields.get(key))}, only {wanted} is "
        "supported. This is not Llama 4's preprocessing."
    )


def _side(fields: Fields) -> int:
    default = ImageConfig.tile_side
    if "size" not in fields:
        return default
    size = fields.section("size")
    if "height" not in size or "width" not in size:
        raise fields.error("size", 'an object such as {"height": 336, "width": 336}')
    height = size.integer("height", default, 1, _MAX_SIDE)
    if size.integer("width", default, 1, _MAX_SIDE) != height:
        raise size.error("width", f"the height, {height}: tiles are square")
    return height


def _three_numbers(
    fields: Fields, key: str, default: tuple[float, float, float], low: float, high: float
) -> tuple[float, float, float]:
    values = fields.get(key, list(default))
    if not isinstance(values, list | tuple) or len(values) != 3:
        raise fields.error(key, "a list of three numbers")
    channels = Fields(dict(zip("012", values, strict=True)), f"{fields.where}: {key}")
    red, green, blue = (channels.number(place, 0.0, low, high) for place in "012")
    return red, green, blue
