"""Models on the device under test: `camelid.LLM`, or the compiled engine and steps over it.

What backends.py says of the device is what a test gets that asks for nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import backends
from camelid import LLM, _core
from camelid.checkpoint import Checkpoint, account
from camelid.features import Features, PromptFeatures, feature_rows, join_features
from camelid.sources import (
    embedding_source,
    final_norm_source,
    head_source,
    layer_sources,
)
from camelid.vision_sources import frame_sources, vision_layer_sources

NOTHING, SAMPLE, LOGITS = 0, 1, 2


def open_llm(folder: str | Path, **options: Any) -> LLM:
    """Load a folder; `options` are those of `camelid.LLM`."""
    return LLM(folder, **(backends.llm_options() | options))


def open_engine(folder: str | Path, **options: Any) -> _core.Engine:
    """Load a folder; `options` are those of `_core.Engine`."""
    with Checkpoint.open(folder) as checkpoint:
        account(checkpoint)
        options = {"threads": 1} | backends.engine_options() | options
        engine = _core.Engine(checkpoint.config, **options)
        engine.load_embedding(embedding_source(checkpoint))
        for layer in range(checkpoint.config.n_layers):
            engine.load_layer(layer_sources(checkpoint, layer))
        engine.load_head(final_norm_source(checkpoint), head_source(checkpoint))
        if (vision := checkpoint.config.vision) is not None:
            engine.load_vision_frame(frame_sources(checkpoint, vision))
            for layer in range(vision.n_layers):
                engine.load_vision_layer(vision_layer_sources(checkpoint, vision, layer))
        engine.finish_loading()
    return engine


def open_greedy(engine: _core.Engine) -> int:
    """Open a sequence that samples the likeliest token."""
    return engine.open_sequence(_core.SamplerParams(temperature=0.0))


def step(
    engine: _core.Engine,
    parts: Sequence[tuple[int, Sequence[int]]],
    output: int | Sequence[int] = LOGITS,
    features: Features | None = None,
) -> _core.StepResult:
    """Run (sequence, tokens) pairs in one step; `features` are those of all its tokens."""
    outputs = [output] * len(parts) if isinstance(output, int) else output
    return engine.step(
        np.array([sequence for sequence, _ in parts], np.int64),
        np.array([len(tokens) for _, tokens in parts], np.int32),
        np.array([token for _, tokens in parts for token in tokens], np.int32),
        np.array(outputs, np.uint8),
        features=None if features is None else features.values,
        feature_rows=None if features is None else features.rows,
    )


def encode_images(
    engine: _core.Engine, ids: Sequence[int], images: Sequence[NDArray[np.float32]], patch_id: int
) -> PromptFeatures:
    """Return the features of a prompt's images, each encoded in one call."""
    encoded = [engine.encode_image(image) for image in images]
    n_features = [image.shape[0] * image.shape[1] for image in encoded]
    rows = feature_rows(np.array(ids, np.int32), n_features, patch_id)
    return PromptFeatures([tile for image in encoded for tile in image], rows)


def logits_in_pieces(
    engine: _core.Engine,
    tokens: Sequence[int],
    sizes: Sequence[int],
    features: PromptFeatures | None = None,
) -> NDArray[np.float32]:
    """Return the logits of a fresh sequence that runs `sizes` tokens at a time, cycling."""
    sequence = open_greedy(engine)
    rows = []
    first = turn = 0
    while first < len(tokens):
        n = sizes[turn % len(sizes)]
        part = tokens[first : first + n]
        held = features and join_features([features.part(first, n)], [len(part)])
        rows.append(step(engine, [(sequence, part)], features=held).logits)
        first += n
        turn += 1
    engine.check_invariants()
    engine.close_sequence(sequence)
    return np.concatenate(rows)


def assert_same_bits(got: NDArray[np.float32], wanted: NDArray[np.float32]) -> None:
    """Fail with the first value that differs, and both bit patterns."""
    assert got.shape == wanted.shape
    differs = np.argwhere(got.view(np.uint32) != wanted.view(np.uint32))
    if len(differs):
        at = tuple(differs[0])
        a, b = got[at], wanted[at]
        raise AssertionError(
            f"{len(differs)} of {got.size} values differ, first at {[int(i) for i in at]}: got {a} "
            f"({a.view(np.uint32):08x}), wanted {b} ({b.view(np.uint32):08x})"
        )


def assert_close(
    got: NDArray[np.floating[Any]],
    wanted: NDArray[np.floating[Any]],
    *,
    std: float,
    tolerance: float,
    what: str = "logits",
) -> float:
    """Fail with the worst index where |got - wanted| > tolerance * std; return the worst ratio."""
    assert got.shape == wanted.shape
    ratio = np.abs(got.astype(np.float64) - wanted) / std
    at = np.unravel_index(np.argmax(np.where(np.isnan(ratio), np.inf, ratio)), ratio.shape)
    worst = float(ratio[at])
    assert worst <= tolerance, (
        f"{what} differ by {worst:.3g} standard deviations ({tolerance:g} allowed) at "
        f"{[int(i) for i in at]}: got {got[at]!r}, wanted {wanted[at]!r}"
    )
    return worst
