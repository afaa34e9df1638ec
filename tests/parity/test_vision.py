"""The vision tower against transformers' features, and what its result may not depend on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import camelid
from camelid import LLM
from camelid._core import testing
from checkpoints import Quantization, write_checkpoint
from engines import assert_close, assert_same_bits, open_engine
from reference.vision import encode
from variants import digest
from vision_variants import GOLDENS, VISION_VARIANTS, VisionVariant

TOLERANCE = 2e-3  # standard deviations of the features; measured: 4e-6 at most


@pytest.mark.parametrize("variant", VISION_VARIANTS, ids=lambda variant: variant.name)
@pytest.mark.parametrize("isa", testing.isas())
def test_features_are_those_of_transformers(
    isa: str, variant: VisionVariant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isa == "scalar" and variant.config.get("image_size", 0) > 100:
        pytest.skip("seconds for what smaller tiles show as well")
    monkeypatch.setenv("CAMELID_CPU_ISA", isa)
    golden = np.load(GOLDENS / f"{variant.name}.npz")
    weights = variant.write(tmp_path)
    assert digest(weights) == str(golden["digest"]), "made with other weights: make them anew"
    got = open_engine(tmp_path).encode_image(variant.pixels())
    std = float(golden["std"])
    worst = assert_close(got, golden["features"], std=std, tolerance=TOLERANCE, what="features")
    assert worst < 1e-4  # float32 all the way


@pytest.mark.parametrize("seed", range(4))
def test_features_match_numpy_on_random_towers(seed: int, tmp_path: Path) -> None:
    draw = np.random.default_rng(seed)
    heads, shuffle = int(draw.integers(1, 5)), int(draw.integers(1, 4))
    dim = 4 * heads * int(draw.integers(1, 9))
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
    config = json.loads((tmp_path / "config.json").read_text())
    side = tower["image_size"]
    pixels = draw.uniform(-1, 1, (2, tower["num_channels"], side, side)).astype(np.float32)
    wanted = encode(config, weights, pixels)
    got = open_engine(tmp_path, threads=2).encode_image(pixels)
    assert_close(got, wanted, std=float(wanted.std()), tolerance=1e-4, what="features")


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


@pytest.mark.parametrize(("bits", "group_size"), [(4, 16), (8, 16)])
def test_a_quantised_tower_is_what_its_numbers_say(
    bits: int, group_size: int, tmp_path: Path
) -> None:
    quantization = Quantization(
        bits=bits, group_size=group_size, ignore=("re:.*lm_head", "re:.*router", "re:.*patch_emb.*")
    )
    weights = write_checkpoint(tmp_path, vision=True, quantization=quantization)
    config = json.loads((tmp_path / "config.json").read_text())
    pixels = VisionVariant("base").pixels()
    wanted = encode(config, weights, pixels)
    got = open_engine(tmp_path).encode_image(pixels)
    assert_close(got, wanted, std=float(wanted.std()), tolerance=1e-3, what="features")


def test_llm_encodes_images_between_answers(tmp_path: Path) -> None:
    variant = VISION_VARIANTS[0]
    variant.write(tmp_path)
    golden = np.load(GOLDENS / f"{variant.name}.npz")
    with LLM(tmp_path, threads=1) as llm:
        got = llm.encode_image(variant.pixels().astype(np.float64))
        assert_close(got, golden["features"], std=float(golden["std"]), tolerance=TOLERANCE)
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
    with LLM(tmp_path, threads=1) as llm, pytest.raises(camelid.InvalidRequest, match=says):
        llm.encode_image(pixels)  # type: ignore[arg-type]


def test_llm_without_a_tower_says_so(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    with LLM(tmp_path, threads=1) as llm, pytest.raises(camelid.Unsupported, match="vision tower"):
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
        LLM(tmp_path, threads=1)
