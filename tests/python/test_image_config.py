"""preprocessor_config.json: the released file, the newer place for it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from camelid.errors import CheckpointError, Unsupported
from camelid.images import ImageConfig

RELEASED: dict[str, Any] = {
    "crop_size": None,
    "data_format": "channels_first",
    "default_to_square": True,
    "device": None,
    "do_center_crop": None,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "Llama4ImageProcessorFast",
    "image_std": [0.5, 0.5, 0.5],
    "input_data_format": None,
    "max_patches": 16,
    "processor_class": "Llama4Processor",
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "resize_to_max_canvas": False,
    "return_tensors": None,
    "size": {"height": 336, "width": 336},
}


def test_released_file_says_the_defaults() -> None:
    assert ImageConfig.from_json(RELEASED) == ImageConfig() == ImageConfig.from_json({})


def test_null_means_the_default() -> None:
    assert ImageConfig.from_json(dict.fromkeys(RELEASED)) == ImageConfig()


def test_every_field_is_read() -> None:
    config = ImageConfig.from_json(
        {
            "size": {"height": 28, "width": 28},
            "max_patches": 4,
            "resize_to_max_canvas": True,
            "rescale_factor": 0.5,
            "image_mean": [0, 0.25, 0.75],
            "image_std": [1, 2, 3],
        }
    )
    assert config == ImageConfig(28, 4, True, 0.5, (0.0, 0.25, 0.75), (1.0, 2.0, 3.0))


def test_from_folder_reads_the_old_place_and_the_new(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no preprocessor_config"):
        ImageConfig.from_folder(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"max_patches": 3}))
    assert ImageConfig.from_folder(tmp_path).max_tiles == 3
    newer = tmp_path / "processor_config.json"
    newer.write_text(json.dumps({"patch_size": 14}))
    assert ImageConfig.from_folder(tmp_path).max_tiles == 3
    newer.write_text(json.dumps({"image_processor": {"max_patches": 5}}))
    assert ImageConfig.from_folder(tmp_path).max_tiles == 5


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("resample", 3),
        ("do_resize", False),
        ("do_rescale", False),
        ("do_normalize", 0),
        ("do_convert_rgb", False),
        ("do_center_crop", True),
        ("do_pad", True),
        ("data_format", "channels_last"),
        ("image_processor_type", "CLIPImageProcessor"),
    ],
)
def test_other_preprocessing_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(Unsupported, match=rf"\[config\] preprocessor_config: {key} is .*only"):
        ImageConfig.from_json({key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("size", 336),
        ("size", {"shortest_edge": 336}),
        ("size", {"height": 336}),
        ("size", {"height": 336, "width": 335}),
        ("size", {"height": 0, "width": 0}),
        ("size", {"height": 1 << 40, "width": 1 << 40}),
        ("size", {"height": "336", "width": "336"}),
        ("max_patches", 0),
        ("max_patches", 65),
        ("max_patches", True),
        ("resize_to_max_canvas", "no"),
        ("rescale_factor", 0),
        ("rescale_factor", float("nan")),
        ("image_mean", 0.5),
        ("image_mean", [0.5, 0.5]),
        ("image_mean", [0.5, 0.5, None]),
        ("image_std", [0.5, 0, 0.5]),
        ("image_std", [0.5, float("inf"), 0.5]),
        ("image_std", {"0": 1, "1": 1, "2": 1}),
        ("resample", "bilinear"),
        ("data_format", 1),
        ("image_processor_type", []),
    ],
)
def test_wrong_values_are_refused_with_their_place(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"\[config\] preprocessor_config: {key}"):
        ImageConfig.from_json({key: value})


def test_canvas_as_a_whole_is_bounded() -> None:
    size = {"height": 2048, "width": 2048}
    assert ImageConfig.from_json({"size": size, "max_patches": 4}).max_tiles == 4
    with pytest.raises(CheckpointError, match="max_patches is 5, expected 4 or fewer of 2048"):
        ImageConfig.from_json({"size": size, "max_patches": 5})
