"""The vision tower against transformers' features, and what its result may not depend on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import camelid
from backends import is_gpu, isas, quick, row_tolerance, takes, use_isa
from camelid.quantize import quantize
from checkpoints import (
    Quantization,
    bf16_bits,
    bf16_values,
    store_quantised,
    write_checkpoint,
)
from engines import assert_close, assert_same_bits, open_engine, open_llm
from judge import Judge, rows_off
from reference.vision import encode
from variants import digest
from vision_variants import GOLDENS, VISION_VARIANTS, VisionVariant

TOLERANCE = 2e-3  # standard deviations of the features; measured: 4e-6 at most


SMALL = [v for v in VISION_VARIANTS if v.name in {"base", "shuffle_1", "remainder", "no_layers"}]


@pytest.mark.parametrize("variant", quick(VISION_VARIANTS, SMALL), ids=lambda v: v.name)
@pytest.mark.parametrize("isa", isas())
def test_features_are_those_of_transformers(
    isa: str, variant: VisionVariant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isa == "scalar" and variant.config.get("image_size", 0) > 100:
        pytest.skip("seconds for what smaller tiles show as well")
    use_isa(monkeypatch, isa)
    golden = np.load(GOLDENS / f"{variant.name}.npz")
    weights = variant.write(tmp_path)
    assert digest(weights) == str(golden["digest"]), "made with other weights: make them anew"
    if not takes(tmp_path):
        with pytest.raises(camelid.Unsupported, match="multiples of 8"):
            open_engine(tmp_path)
        return
    got = open_engine(tmp_path).encode_image(variant.pixels())
    std = float(golden["std"])
    if is_gpu():
        Judge(tmp_path, weights).check_features(got, variant.pixels())
        rows = (-1, got.shape[-1])
        off = rows_off(got.reshape(rows), golden["features"].reshape(rows), std)
        assert off.max() < 0.02  # what bf16 costs; measured: 0.013
        return
    worst = assert_close(got, golden["features"], std=std, tolerance=TOLERANCE, what="features")
    assert worst < 1e-4  # float32 all the way


@pytest.mark.parametrize("seed", quick(range(4), [1]))
def test_features_match_numpy_on_random_towers(seed: int, tmp_path: Path) -> None:
    draw = np.random.default_rng(seed)
    heads, shuffle = int(draw.integers(1, 5)), int(draw.integers(1, 4))
    dim = (8 if is_gpu() else 4) * heads * int(draw.integers(1, 9))
    patch = int(draw.integers(1, 9))
    tower = {
        "hidden_size": dim,
        "num_attention_heads": heads,
        "intermediate_size": dim * shuffle**2,
        "num_hidden_layers": int(draw.integers(1, 4)),
        "pixel_shuffle_ratio": 1 / shuffle,
        "patch_size": patch,
        "image_size": patch * shuffle * int(draw.integers(1, 5)),
        "num_channels": int(draw.integers(1, 4)),
    }
    weights = write_checkpoint(tmp_path, vision=True, vision_overrides=tower, seed=seed)
    side = tower["image_size"]
    pixels = draw.uniform(-1, 1, (2, tower["num_channels"], side, side)).astype(np.float32)
    got = open_engine(tmp_path, threads=2).encode_image(pixels)
    Judge(tmp_path, weights).check_features(got, pixels)


@pytest.mark.cpu_only("heads of 12, and threads")
def test_a_tile_depends_on_neither_company_nor_threads(tmp_path: Path) -> None:
    variant = next(v for v in VISION_VARIANTS if v.name == "image_112_odd_heads")
    variant.write(tmp_path)
    pixels = variant.pixels()
    for fast in (False, True):
        one = open_engine(tmp_path, fast=fast)
        whole = one.encode_image(pixels)
        assert_same_bits(one.encode_image(pixels[1:]), whole[1:])
        many = open_engine(tmp_path, fast=fast, threads=3)
        assert_same_bits(many.encode_image(pixels[::-1].copy()), whole[::-1].copy())


@pytest.mark.slow_emulated
@pytest.mark.parametrize(("bits", "group_size"), [(4, 16), (8, 16), (8, 32)])
def test_a_quantised_tower_is_what_its_numbers_say(
    bits: int, group_size: int, tmp_path: Path
) -> None:
    quantization = Quantization(
        bits=bits, group_size=group_size, ignore=("re:.*lm_head", "re:.*router", "re:.*patch_emb.*")
    )
    weights = write_checkpoint(tmp_path, vision=True, quantization=quantization)
    pixels = VisionVariant("base").pixels()
    got = open_engine(tmp_path).encode_image(pixels)
    Judge(tmp_path, weights).check_features(got, pixels)


@pytest.mark.cpu_only("its formats on a GPU are judged above")
@pytest.mark.parametrize(("weights", "group_size"), [("int4", 32), ("int8", 32), ("int8", 0)])
def test_a_tower_that_camelid_quantised_is_what_its_numbers_say(
    weights: str, group_size: int, tmp_path: Path
) -> None:
    tower = {
        "hidden_size": 96,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        **dict.fromkeys(("projector_input_dim", "projector_output_dim", "vision_output_dim"), 128),
    }
    values = write_checkpoint(
        tmp_path / "plain", vision=True, vision_overrides=tower, dtype="BF16", seed=3
    )
    quantize(
        tmp_path / "plain", tmp_path / "small", weights=weights, group_size=group_size, vision=True
    )
    how = Quantization(bits=int(weights[3:]), group_size=group_size)
    for name, value in values.items():
        in_tower = name.startswith(("vision_model.", "multi_modal_projector."))
        if in_tower and name.endswith("weight") and value.ndim == 2 and "patch_emb" not in name:
            values[name] = store_quantised({}, name, value, how)
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    pixels = VisionVariant("base").pixels()
    wanted = encode(config, values, pixels)
    std = float(wanted.std())
    exact = open_engine(tmp_path / "small").encode_image(pixels)
    assert_close(exact, wanted, std=std, tolerance=1e-4, what="features")
    # int8 activations: steps of 1/127 of a block's largest value, which is three of its standard
    # deviations, leave 0.007 of an output; the residual stream and the three maps in series behind
    # it add up to some twice that. Measured: 0.014 to 0.020, of widths to 512 and depths to 12.
    fast = open_engine(tmp_path / "small", fast=True).encode_image(pixels)
    off = (fast - wanted) / std
    assert 1e-4 < np.sqrt((off**2).mean()) < 0.03
    assert np.abs(off).max() < 0.15


@pytest.mark.slow_emulated
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_weights_never_makes_a_tower_integer(weights: str, fast: bool, tmp_path: Path) -> None:
    VISION_VARIANTS[0].write(tmp_path)
    pixels = VISION_VARIANTS[0].pixels()
    wanted = open_engine(tmp_path, fast=fast).encode_image(pixels)
    got = open_engine(tmp_path, fast=fast, weights=weights).encode_image(pixels)
    assert_same_bits(got, wanted)


@pytest.mark.cpu_only("on a GPU all matrices are bf16 at most")
def test_weights_bf16_rounds_the_matrices_of_a_tower(tmp_path: Path) -> None:
    values = VISION_VARIANTS[0].write(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name, value in values.items():
        if name.endswith("weight") and value.ndim == 2:
            values[name] = bf16_values(bf16_bits(value))
    pixels = VISION_VARIANTS[0].pixels()
    wanted = encode(config, values, pixels)
    got = open_engine(tmp_path, weights="bf16").encode_image(pixels)
    assert_close(got, wanted, std=float(wanted.std()), tolerance=1e-4, what="features")


def test_llm_encodes_images_between_answers(tmp_path: Path) -> None:
    variant = VISION_VARIANTS[0]
    variant.write(tmp_path)
    golden = np.load(GOLDENS / f"{variant.name}.npz")
    with open_llm(tmp_path) as llm:
        got = llm.encode_image(variant.pixels().astype(np.float64))
        tolerance = 4 * row_tolerance() if is_gpu() else TOLERANCE  # of each value
        assert_close(got, golden["features"], std=float(golden["std"]), tolerance=tolerance)
        assert got.dtype == np.float32
    with pytest.raises(camelid.InvalidRequest, match="closed"):
        llm.encode_image(variant.pixels())


@pytest.mark.parametrize(
    ("pixels", "says"),
    [
        (np.zeros((3, 56, 56), np.float32), r"\[3, 56, 56\]"),
        (np.zeros((0, 3, 56, 56), np.float32), "one tile or more"),
        (np.zeros((1, 3, 56, 57), np.float32), r"\[n_tiles, 3, 56, 56\]"),
        (np.zeros((1, 3, 56, 56), np.uint8), "uint8"),
        (np.full((1, 3, 56, 56), np.nan, np.float32), "not finite"),
        ([[1, 2], [3]], "pixel_values"),
        (None, "pixel_values"),
    ],
)
def test_llm_refuses_pixels_by_name(pixels: object, says: str, tmp_path: Path) -> None:
    VISION_VARIANTS[0].write(tmp_path)
    with open_llm(tmp_path) as llm, pytest.raises(camelid.InvalidRequest, match=says):
        llm.encode_image(pixels)  # type: ignore[arg-type]


def test_llm_without_a_tower_says_so(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    with open_llm(tmp_path) as llm, pytest.raises(camelid.Unsupported, match="vision tower"):
        llm.encode_image(np.zeros((1, 3, 56, 56), np.float32))


@pytest.mark.parametrize(
    "overrides",
    [
        {"pixel_shuffle_ratio": 0.4},
        {"image_size": 70},  # 5 x 5 patches do not fall into squares of 2 x 2
        {"num_attention_heads": 16},  # heads of 2: no pairs for the second direction
        {"intermediate_size": 64},
        {"vision_output_dim": 40},
    ],
    ids=str,
)
def test_towers_that_cannot_be_served_are_refused_at_load(
    overrides: dict[str, float], tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, vision=True, vision_overrides=overrides)
    with pytest.raises(camelid.Error, match="vision"):
        open_llm(tmp_path)


@pytest.mark.cpu_only("a GPU keeps rows and pages in bf16")
def test_all_that_a_tile_needs_counts_as_workspace(tmp_path: Path) -> None:
    """Rows, keys and values, and what the host lays out, beside the text model's."""
    write_checkpoint(tmp_path / "text", seed=1)
    write_checkpoint(tmp_path / "vision", seed=1, vision=True)
    text, vision = (
        open_engine(tmp_path / name).memory()["workspace_bytes"] for name in ("text", "vision")
    )
    config = json.loads((tmp_path / "vision" / "config.json").read_text())["vision_config"]
    dim, rows = config["hidden_size"], (config["image_size"] // config["patch_size"]) ** 2 + 1
    of_patch = config["num_channels"] * config["patch_size"] ** 2
    activations = rows * (6 * dim + max(config["intermediate_size"], of_patch))
    keys_and_values = 64 * 2 * dim  # a page of 64 tokens
    on_host = (rows - 1) * of_patch + rows * dim
    assert vision - text > 4 * (activations + keys_and_values + on_host)
