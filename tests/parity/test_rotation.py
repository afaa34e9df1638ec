"""Rotary angles: by the position in the chunk, so as exact at position 10,485,759 as at 0.

The judge is float64, in which even the absolute angles are exact to 1e-9.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from backends import is_emulated, is_gpu
from camelid._core import testing
from camelid.config import ModelConfig, parse_config
from checkpoints import TEXT_CONFIG, write_checkpoint
from engines import (
    LOGITS,
    NOTHING,
    assert_same_bits,
    logits_in_pieces,
    open_engine,
    open_greedy,
    step,
)
from reference.llama4 import rope_frequencies

SCOUT_SCALING = {
    "rope_type": "llama3",
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}
LAST = 10_485_759  # of Scout's context
POSITIONS = [0, 1, 127, 8191, 8192, 1_048_575, 5_000_000, LAST - 8191, LAST - 1, LAST]
# A layer that sees its chunk alone.
SMALL: dict[str, Any] = {
    "num_hidden_layers": 1, "no_rope_layers": [1], "hidden_size": 16, "head_dim": 8,
    "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 16,
    "num_local_experts": 2, "rope_scaling": None, "vocab_size": 271,
}  # fmt: skip
# cos and sin are rounded to float32 once: half a unit in the last place below 1.
ROUNDING = 2**-25


def scout(**changes: Any) -> tuple[ModelConfig, dict[str, Any]]:
    """Return Scout's shape as camelid reads it, and as the reference does."""
    text = TEXT_CONFIG | {
        "head_dim": 128,
        "rope_theta": 500000.0,
        "rope_scaling": SCOUT_SCALING,
        "attention_chunk_size": 8192,
        "max_position_embeddings": 10_485_760,
        "floor_scale": 8192,
    }
    text |= changes
    return parse_config({"architectures": ["Llama4ForCausalLM"], **text}), text


def turned(config: ModelConfig, position: int) -> NDArray[np.complex128]:
    rotation = testing.rotation(config, position)
    assert rotation.dtype == np.float32
    assert rotation.shape == (config.head_dim // 2, 2)
    return rotation[:, 0].astype(np.float64) + 1j * rotation[:, 1]


def test_scout_frequencies_switch_at_pair_35_without_a_nan() -> None:
    """Equal low and high factors leave no band to blend in; the blend's formula would be 0 / 0."""
    config, _ = scout()
    got = testing.rope_frequencies(config)
    plain = 500000.0 ** -(np.arange(64) / 64)
    divided = np.arange(64) >= 35
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, np.where(divided, plain / 16, plain), rtol=1e-14)
    assert (2 * np.pi / plain[34], 2 * np.pi / plain[35]) == pytest.approx(
        (6699.5, 8224.3), rel=1e-3
    )


@pytest.mark.parametrize(
    ("factor", "low", "high", "original", "theta", "head_dim"),
    [
        (8.0, 1.0, 4.0, 8192, 500000.0, 128),
        (32.0, 1.0, 4.0, 8192, 10000.0, 64),
        (2.0, 1.0, 4.0, 100, 10000.0, 24),
        (16.0, 1.0, 1.0, 64, 10000.0, 16),
        (1.0, 1.0, 4.0, 8192, 500000.0, 128),
    ],
)
def test_frequencies_equal_the_formula(
    factor: float, low: float, high: float, original: int, theta: float, head_dim: int
) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    config, text = scout(rope_scaling=scaling, rope_theta=theta, head_dim=head_dim)
    wanted = rope_frequencies(text)
    np.testing.assert_allclose(testing.rope_frequencies(config), wanted, rtol=1e-12)
    if low < high and factor > 1:
        plain = theta ** -(np.arange(0, head_dim, 2) / head_dim)
        blended = (wanted < plain * (1 - 1e-9)) & (wanted > plain / factor * (1 + 1e-9))
        assert blended.any()


@pytest.mark.parametrize("position", POSITIONS)
def test_rotation_is_exact_at_any_position(position: int) -> None:
    config, text = scout()
    angles = (position % 8192) * rope_frequencies(text)
    assert np.abs(turned(config, position) - np.exp(1j * angles)).max() < 2 * ROUNDING


@pytest.mark.parametrize("distance", [1, 100, 8191])
def test_scores_at_the_end_of_the_context_depend_on_the_distance_alone(distance: int) -> None:
    """Beside it, what angles computed from the absolute position in float32 give."""
    config, text = scout()
    frequencies = rope_frequencies(text)
    wanted = np.exp(1j * distance * frequencies)
    here = turned(config, LAST) * turned(config, LAST - distance).conj()
    assert np.abs(here - wanted).max() < 4 * ROUNDING

    def absolute(position: int) -> NDArray[np.complex128]:
        angles = np.float32(position) * frequencies.astype(np.float32)
        assert angles.dtype == np.float32
        return np.exp(1j * angles.astype(np.float64))

    naive = absolute(LAST) * absolute(LAST - distance).conj()
    naive_error = np.abs(np.angle(naive / wanted)).max()
    print(f"distance {distance}: float32 angles off by {naive_error:.3f} rad")
    assert naive_error > 0.1  # radians


def test_scores_are_as_exact_at_the_last_chunk_as_at_the_first() -> None:
    """Whole queries and keys: every score in the last chunk equals the first chunk's to the bit."""
    config, text = scout()
    draw = np.random.default_rng(0)
    q, k = draw.standard_normal((2, 64)) + 1j * draw.standard_normal((2, 64))
    exact = np.exp(1j * 8191 * rope_frequencies(text))
    for last_of_chunk in (8191, LAST):
        first_of_chunk = last_of_chunk - 8191
        score = (
            q * turned(config, last_of_chunk) * (k * turned(config, first_of_chunk)).conj()
        ).sum()
        assert score.real == pytest.approx((q * exact * k.conj()).sum().real, abs=1e-5)
    assert_same_bits(testing.rotation(config, 8191), testing.rotation(config, LAST))


@pytest.mark.parametrize("position", [0, 8190, 8191, 16383, 100_000, LAST])
def test_query_temperature_equals_the_formula(position: int) -> None:
    config, _ = scout()
    wanted = 1 + 0.1 * np.log1p(np.floor((position + 1) / 8192))
    assert testing.query_temperature(config, position) == pytest.approx(wanted, rel=2**-24)


def test_a_chunk_answers_the_same_at_any_position(tmp_path: Path) -> None:
    """A model of chunked layers alone, run far: each repetition of a chunk gives the same bits."""
    chunk, n_chunks = 64, 4 if is_emulated() else 200
    small = SMALL | {"attention_chunk_size": chunk}
    write_checkpoint(tmp_path, config_overrides=small)
    engine = open_engine(tmp_path)
    once = [int(v) for v in np.random.default_rng(1).integers(0, 256, chunk)]
    # A GPU takes other kernels for the few tokens of a chunk that a step leaves.
    logits = logits_in_pieces(engine, once * n_chunks, [16 * chunk if is_gpu() else 1000])
    assert_same_bits(logits, np.tile(logits[:chunk], (n_chunks, 1)))


@pytest.mark.slow
@pytest.mark.gpu_only("on a CPU it takes an hour")
@pytest.mark.skipif(is_emulated(), reason="emulated it would take a month")
def test_the_last_chunk_of_ten_million_tokens_answers_as_the_first(tmp_path: Path) -> None:
    chunk = 8192
    small = SMALL | {"attention_chunk_size": chunk, "max_position_embeddings": LAST + 1}
    write_checkpoint(tmp_path, config_overrides=small)
    engine = open_engine(tmp_path)
    once = [int(v) for v in np.random.default_rng(1).integers(0, 256, chunk)]
    sequence = open_greedy(engine)
    first = step(engine, [(sequence, once)]).logits
    n_chunks = (LAST + 1) // chunk
    for _ in range(n_chunks - 2):
        step(engine, [(sequence, once)], NOTHING)
    assert_same_bits(step(engine, [(sequence, once)], LOGITS).logits, first)
