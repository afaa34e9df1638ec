"""Prompts with images: logits of transformers, and what they may not depend on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import camelid
from backends import is_gpu, quick
from camelid import LLM, SamplingParams
from camelid.images import tile
from checkpoints import SPECIAL_IDS, Weights, write_checkpoint
from engines import (
    assert_close,
    assert_same_bits,
    encode_images,
    logits_in_pieces,
    open_engine,
    open_greedy,
    open_llm,
)
from judge import Judge, features_of
from variants import digest
from vision_variants import MIXED, PATCH, mixed_prompt, write_mixed

TOLERANCE = 2e-3  # standard deviations of the logits


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Weights]:
    folder = tmp_path_factory.mktemp("mixed")
    return folder, write_mixed(folder)


@pytest.fixture(scope="module")
def llm(model: tuple[Path, Weights]) -> Iterator[LLM]:
    with open_llm(model[0], threads=2) as opened:
        yield opened


def test_logits_of_mixed_prompts_are_those_of_transformers(
    llm: LLM, model: tuple[Path, Weights]
) -> None:
    golden = np.load(MIXED)
    assert digest(model[1]) == str(golden["digest"]), "made with other weights: make it anew"
    ids, images = mixed_prompt()
    got = llm.logits(ids, images=images)
    if is_gpu():
        features = features_of(ids, [llm.encode_image(tiles) for tiles in images], PATCH)
        Judge(*model).check(got, ids, features=features)
    else:
        assert_close(got, golden["logits"], std=float(golden["std"]), tolerance=TOLERANCE)
    blind = llm.logits(ids, images=[np.zeros_like(tiles) for tiles in images])
    assert np.abs(blind - got).max() > 0.1 * golden["std"]  # the images matter


@pytest.mark.parametrize("sizes", quick([[1], [7, 3], [50, 1]], [[7, 3], [50, 1]]), ids=str)
def test_logits_do_not_depend_on_where_an_image_is_cut(
    sizes: list[int], llm: LLM, model: tuple[Path, Weights]
) -> None:
    ids, images = mixed_prompt()
    engine = open_engine(model[0])
    features = encode_images(engine, ids, images, PATCH)
    got = logits_in_pieces(engine, ids, sizes, features)
    if is_gpu():
        encoded = [engine.encode_image(tiles) for tiles in images]
        Judge(*model).check(got, ids, features=features_of(ids, encoded, PATCH))
    else:
        assert_same_bits(got, llm.logits(ids, images=images))


@pytest.mark.slow_emulated
def test_answers_to_images_are_the_same_alone_and_beside_text(llm: LLM) -> None:
    ids, images = mixed_prompt()
    prompt = {"prompt_token_ids": ids, "images": images}
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    (alone,) = llm.generate(prompt, params)
    text = list(range(40))
    together = llm.generate([text, prompt, text[::-1], prompt], params)
    assert together[1].token_ids == together[3].token_ids == alone.token_ids
    streamed = [token for delta in llm.stream(prompt, params) for token in delta.token_ids]
    assert streamed == alone.token_ids


def test_images_must_fit_their_places_in_the_prompt(llm: LLM) -> None:
    ids, images = mixed_prompt()  # of three tiles and of one
    three, one = images
    for given, says in (
        ([one, three], r"images\[0\] needs 4 image tokens, its place in the prompt holds 12"),
        ([], "there are no images"),
    ):
        with pytest.raises(camelid.InvalidRequest, match=says):
            llm.logits(ids, images=given)
        with pytest.raises(camelid.InvalidRequest, match=says):
            llm.generate({"prompt_token_ids": ids, "images": given})
    # As transformers has them: all tiles in one array, and image tokens without any images.
    assert_same_bits(
        llm.logits(ids, images=[np.concatenate(images)]), llm.logits(ids, images=images)
    )
    assert len(llm.logits(ids)) == len(ids)
    # Without marks around all of them only the total counts.
    for drop in (SPECIAL_IDS["<|image_start|>"], SPECIAL_IDS["<|image_end|>"]):
        bare = [token for token in ids if token != drop]
        if drop == SPECIAL_IDS["<|image_start|>"]:
            assert len(llm.logits(bare, images=[one, three])) == len(bare)
        else:  # the next one's beginning ends an image as well
            with pytest.raises(camelid.InvalidRequest, match="its place"):
                llm.logits(bare, images=[one, three])


@pytest.mark.parametrize(
    ("images", "says"),
    [
        ("no list", "list of Pillow images"),
        (np.zeros((1, 3, 56, 56), np.float32), "list of Pillow images"),
        ([np.zeros((1, 3, 56, 56), np.float32)], "image tokens"),
        ([np.zeros((3, 56, 56), np.float32)], r"\[3, 56, 56\]"),
        ([1], r"images\[0\] is \[\], expected float32"),
    ],
    ids=str,
)
def test_images_that_do_not_match_are_refused_by_name(llm: LLM, images: object, says: str) -> None:
    ids, _ = mixed_prompt()
    for call in (
        lambda: llm.logits(ids, images=images),  # type: ignore[arg-type]
        lambda: llm.generate({"prompt_token_ids": ids, "images": images}),
        lambda: next(llm.stream({"prompt_token_ids": ids, "images": images})),
    ):
        with pytest.raises(camelid.InvalidRequest, match=says):
            call()


def test_the_engine_refuses_feature_rows_that_are_none(model: tuple[Path, Weights]) -> None:
    engine = open_engine(model[0])
    sequence = open_greedy(engine)
    dim = 64

    def step(features: np.ndarray, rows: list[int]) -> None:
        engine.step(
            np.array([sequence], np.int64),
            np.array([3], np.int32),
            np.array([1, 2, 3], np.int32),
            np.array([1], np.uint8),
            features=features.astype(np.float32),
            feature_rows=np.array(rows, np.int32),
        )

    for features, rows in (
        (np.zeros((2, dim)), [0, 1, 2]),
        (np.zeros((2, dim)), [0, -2, 1]),
        (np.zeros((2, dim)), [0, 1]),
        (np.zeros((2, dim + 1)), [0, 1, -1]),
        (np.zeros((0, dim)), [0, -1, -1]),
    ):
        with pytest.raises(camelid.InvalidRequest, match="feature"):
            step(features, rows)
    step(np.zeros((2, dim)), [1, -1, 0])


def test_a_model_without_a_tower_takes_no_images(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    with open_llm(tmp_path) as llm, pytest.raises(camelid.Unsupported, match="images"):
        llm.logits([1, 2], images=[np.zeros((1, 3, 56, 56), np.float32)])


def test_pillow_images_are_cut_by_the_folder_that_says_how(
    model: tuple[Path, Weights], llm: LLM
) -> None:
    image = Image.fromarray(
        np.arange(40 * 70 * 3, dtype=np.uint32).astype(np.uint8).reshape(40, 70, 3)
    )
    path = model[0] / "preprocessor_config.json"
    with pytest.raises(camelid.CheckpointError, match=r"preprocessor_config\.json"):
        llm.logits([1, 2], images=[image])
    settings = {"size": {"height": 56, "width": 56}, "max_patches": 4}
    try:
        path.write_text(json.dumps(settings))
        tiles, grid = tile(image, settings)
        assert grid == (1, 2)
        ids = [1, 2] + [270] * (4 * len(tiles)) + [3]
        wanted = llm.logits(ids, images=[tiles])
        assert_same_bits(llm.logits(ids, images=[image]), wanted)
        path.write_text(json.dumps({"size": {"height": 28, "width": 28}}))
        with pytest.raises(camelid.CheckpointError, match="28 pixels"):
            llm.logits(ids, images=[image])
    finally:
        path.unlink()
