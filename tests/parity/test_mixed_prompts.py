"""Prompts of text and images on many models against transformers, and what may not change them.

The variants are those of tests/mixed_variants.py, their goldens tools/make_mixed_goldens.py's.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import camelid
from backends import is_gpu, isas, quick, takes, use_isa
from camelid import SamplingParams
from checkpoints import Weights
from engines import (
    assert_close,
    assert_same_bits,
    encode_images,
    logits_in_pieces,
    open_engine,
    open_llm,
)
from judge import Judge, assert_likeliest, features_of
from mixed_variants import GOLDENS, MIXED_VARIANTS, N_GREEDY, PATCH, MixedVariant, direction
from variants import digest

Array = NDArray[np.float32]
TOLERANCE = 2e-3  # standard deviations of the logits; measured: 2e-4 at most of 420 random models
ALL = [variant.name for variant in MIXED_VARIANTS]
# The other instruction sets differ in kernels; these meet all of them.
FOR_EACH_ISA = ["maverick_like", "odd_shapes", "int4_tower", "int8_tower"]
CASES = [(name, isas()[0]) for name in ALL] + [
    (name, isa) for isa in isas()[1:] for name in FOR_EACH_ISA
]
GREEDY = SamplingParams(max_tokens=N_GREEDY, temperature=0.0, ignore_eos=True, logprobs=2)


def variant_of(name: str) -> MixedVariant:
    return next(variant for variant in MIXED_VARIANTS if variant.name == name)


def golden(name: str, weights: Weights) -> dict[str, Any]:
    with np.load(GOLDENS / f"{name}.npz") as file:
        wanted = dict(file)
    assert digest(weights) == str(wanted["digest"]), "run tools/make_mixed_goldens.py"
    return wanted


@pytest.mark.parametrize(("name", "isa"), quick(CASES, [("int4_tower", "gpu")]))
def test_logits_and_greedy_tokens_equal_transformers(
    name: str, isa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_isa(monkeypatch, isa)
    variant = variant_of(name)
    weights = variant.write(tmp_path)
    wanted = golden(name, weights)
    if not takes(tmp_path):
        with pytest.raises(camelid.Unsupported, match="multiples of 8"):
            open_llm(tmp_path)
        return
    ids, images = variant.prompt()
    with open_llm(tmp_path, threads=2) as llm:
        logits = llm.logits(ids, images=images)
        (answer,) = llm.generate({"prompt_token_ids": ids, "images": images}, GREEDY)
        if is_gpu():
            encoded = [llm.encode_image(tiles) for tiles in images]
            judge = Judge(tmp_path, weights)
            for got, pixels in zip(encoded, images, strict=True):
                judge.check_features(got, pixels)
            judged = judge.check(logits, ids, features=features_of(ids, encoded, PATCH))
            assert_likeliest(answer.token_ids[:1], judged[-1:])
            return
    std = float(wanted["std"])
    some = logits[np.ix_(wanted["rows"], wanted["columns"])]
    assert_close(some, wanted["logits"], std=std, tolerance=TOLERANCE)
    assert_close(logits[-1], wanted["last"], std=std, tolerance=TOLERANCE, what="last logits")
    projected = logits @ direction(logits.shape[1])
    assert_close(projected, wanted["projected"], std=std, tolerance=TOLERANCE, what="projections")
    assert answer.token_ids == wanted["greedy"].tolist()


def fast_errors(name: str, folder: Path, **options: str) -> Array:
    """Return how far "fast" is from transformers, in standard deviations of the logits."""
    variant = variant_of(name)
    wanted = golden(name, variant.write(folder))
    ids, images = variant.prompt()
    with open_llm(folder, threads=2, compute="fast", **options) as llm:
        logits = llm.logits(ids, images=images)
    # A unit vector leaves errors of any direction but one their size.
    of_rows = logits @ direction(logits.shape[1]) - wanted["projected"]
    some = logits[np.ix_(wanted["rows"], wanted["columns"])] - wanted["logits"]
    last = logits[-1] - wanted["last"]
    return np.abs(np.concatenate([of_rows, some.ravel(), last])) / wanted["std"]


@pytest.mark.cpu_only("a GPU has one way to compute")
@pytest.mark.parametrize(
    "options",
    [{"head": "stored", "kv_cache": "f32"}, {"head": "int8", "kv_cache": "bf16"}],
    ids=["stored", "int8_head_bf16_kv"],
)
def test_fast_is_close_to_transformers(options: dict[str, str], tmp_path: Path) -> None:
    off = fast_errors("wide_dense", tmp_path, **options)
    # int8 activations leave 0.007 of each product's output (three deviations of a block in 127
    # steps). Features pass some eight products in a row, so do the text's layers, and roots of sums
    # of squares make that 0.02. Also measured: 0.02 on models of 8 layers of 512, worst row 0.06.
    assert 1e-3 < np.sqrt((off**2).mean()) < 0.04
    assert off.max() < 0.3


@pytest.mark.cpu_only("a GPU has one way to compute")
@pytest.mark.parametrize("name", ["int4_experts", "int4_tower", "int8_tower"])
def test_fast_with_routers_is_mostly_close_to_transformers(name: str, tmp_path: Path) -> None:
    # A row whose expert was chosen by a hair may choose another, and then differs by a whole
    # deviation: on random models of 8 layers one row in ten. Hence the median.
    off = fast_errors(name, tmp_path)
    assert 1e-4 < np.median(off) < 0.06


@pytest.mark.cpu_only("a GPU takes other kernels in company")
@pytest.mark.parametrize("compute", ["exact", "fast"])
@pytest.mark.parametrize("name", ["chunk_below_a_tile", "int4_tower"])
def test_answers_are_the_same_alone_and_in_company(name: str, compute: str, tmp_path: Path) -> None:
    """More requests of text and images than a step holds, so that steps cut images anywhere."""
    variant = variant_of(name)
    variant.write(tmp_path)
    prompts: list[dict[str, Any]] = []
    for seed in range(12):
        parts = (seed, *variant.parts, (1, 1 + seed % 4), 7)
        ids, images = replace(variant, parts=parts, prompt_seed=seed).prompt()
        prompts.append({"prompt_token_ids": ids, "images": images})
        prompts.append({"prompt_token_ids": ids[-2 - seed // 2 :]})  # words alone
    assert sum(len(prompt["prompt_token_ids"]) for prompt in prompts) > 700  # a step takes 512
    with open_llm(tmp_path, threads=2, compute=compute) as llm:
        together = llm.generate(prompts, GREEDY)
        for prompt, answer in zip(prompts, together, strict=True):
            (alone,) = llm.generate(prompt, GREEDY)
            assert alone.token_ids == answer.token_ids
            assert answer.logprobs
            assert alone.logprobs == answer.logprobs  # to the bit


@pytest.mark.slow_emulated
@pytest.mark.parametrize("fast", [False] if is_gpu() else [False, True])
@pytest.mark.parametrize("name", ["one_row_one_column", "second_turn", "int4_tower"])
def test_logits_are_the_same_wherever_images_are_cut(name: str, fast: bool, tmp_path: Path) -> None:
    variant = variant_of(name)
    weights = variant.write(tmp_path)
    ids, images = variant.prompt()
    engine = open_engine(tmp_path, fast=fast)
    features = encode_images(engine, ids, images, PATCH)
    whole = logits_in_pieces(engine, ids, [len(ids)], features)
    for sizes in ([1], [5, 2, 11], [64, 3]):
        got = logits_in_pieces(engine, ids, sizes, features)
        if is_gpu():
            encoded = [engine.encode_image(tiles) for tiles in images]
            Judge(tmp_path, weights).check(got, ids, features=features_of(ids, encoded, PATCH))
        else:
            assert_same_bits(got, whole)


@pytest.mark.cpu_only("a GPU takes other kernels in company")
def test_logits_of_a_long_image_are_the_same_beside_answers(tmp_path: Path) -> None:
    """17 tiles of 144 tokens take five steps, which share their tokens with what else runs."""
    variant = variant_of("seventeen_tiles")
    variant.write(tmp_path)
    ids, images = variant.prompt()
    with open_llm(tmp_path, threads=2) as llm:
        wanted = llm.logits(ids, images=images)
        params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
        answers = llm.stream(list(range(37)), params)
        next(iter(answers))
        assert_same_bits(llm.logits(ids, images=images), wanted)
        assert sum(len(delta.token_ids) for delta in answers) == 39
