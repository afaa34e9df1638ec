"""Weight formats and quantisation (src/quant) against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from camelid._core import testing
from weight_sources import from_bf16, pack_words, plain, quantised, to_bf16


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_read_rows_is_exact_when_plain(dtype: str, transposed: bool) -> None:
    values = np.random.default_rng(0).standard_normal((37, 130)).astype(np.float32)
    values[3, 5] = 1e-6  # a subnormal half
    source, exact = plain(values, dtype, transposed=transposed)
    np.testing.assert_array_equal(testing.read_rows(source, 5, 20), exact[5:25])


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("scale_dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 200), (8, 64), (8, 4)])
def test_read_rows_dequantises(
    bits: int, group_size: int, scale_dtype: str, asymmetric: bool
) -> None:
    rng = np.random.default_rng(1)
    source, exact = quantised(
        rng, 19, 200, bits, group_size, scale_dtype=scale_dtype, asymmetric=asymmetric
    )
    np.testing.assert_array_equal(testing.read_rows(source, 3, 16), exact[3:])


@pytest.mark.parametrize(
    ("bad", "word"), [(np.nan, "a NaN"), (np.inf, "an infinity"), (-np.inf, "an infinity")]
)
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_read_rows_refuses_values_that_are_not_finite(dtype: str, bad: float, word: str) -> None:
    values = np.ones((8, 9), np.float32)
    values[6, 7] = bad
    source, _ = plain(values, dtype)
    message = rf"\[weights\] layers\.7\.wo in model-00001\.safetensors holds {word} at \[6, 7\]"
    with pytest.raises(Exception, match=message):
        testing.read_rows(source, 4, 4)


def test_read_rows_refuses_scale_that_is_not_finite() -> None:
    source, _ = quantised(np.random.default_rng(2), 4, 64, 4, 32, scale_dtype="F32")
    assert source.scales is not None
    scales = source.scales.copy().view(np.float32)
    scales[5] = np.nan
    source.scales = scales.view(np.uint8)
    with pytest.raises(Exception, match=r"holds a NaN scale at \[2, 1\]"):
        testing.read_rows(source, 0, 4)


def _reference_quantise(
    rows: np.ndarray, bits: int, group_size: int
) -> tuple[np.ndarray, np.ndarray]:
    n_groups = -(-rows.shape[1] // group_size)
    half = 1 << (bits - 1)
    group_of = np.arange(rows.shape[1]) // group_size
    largest = np.stack(
        [np.abs(rows[:, group_of == g]).max(axis=1) for g in range(n_groups)], axis=1
    )
    scales = to_bf16((largest / np.float32(half - 0.5)).astype(np.float32))
    scales = np.where(scales == 0, to_bf16(np.ones(1, np.float32)), scales)
    ratio = rows / from_bf16(scales)[:, group_of]
    q = np.clip(np.rint(ratio), -half, half - 1).astype(np.int64) + half
    return q, scales


@pytest.mark.parametrize("in_dim", [1, 7, 8, 129, 200])
@pytest.mark.parametrize("group_size", [32, 128, 200])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantize_rows_follows_the_rule(bits: int, group_size: int, in_dim: int) -> None:
    rows = np.random.default_rng(3).standard_normal((5, in_dim)).astype(np.float32)
    rows[2] = 0
    words, scales = testing.quantize_rows(rows, bits, group_size)
    q, expected_scales = _reference_quantise(rows, bits, group_size)
    tail = -in_dim % (32 // bits)
    padded = np.pad(q, ((0, 0), (0, tail)), constant_values=1 << (bits - 1))
    np.testing.assert_array_equal(scales, expected_scales)
    np.testing.assert_array_equal(words, pack_words(padded, bits))


def test_pack_refuses_unknown_format_by_name() -> None:
    source, _ = plain(np.ones((2, 2), np.float32))
    with pytest.raises(Exception, match="choose one of f32, f16, bf16, int8, int4"):
        testing.Ops("scalar").pack([source], "int3")


def test_pack_refuses_groups_that_cut_a_word() -> None:
    source, _ = quantised(np.random.default_rng(4), 4, 64, 4, 4)
    with pytest.raises(Exception, match="groups of 4 values, expected a multiple of 8"):
        testing.Ops("scalar").pack([source], "int4")


def test_pack_refuses_f16_overflow() -> None:
    source, _ = plain(np.full((2, 2), 1e5, np.float32))
    with pytest.raises(Exception, match="more than f16 can"):
        testing.Ops("scalar").pack([source], "f16")


def test_pack_refuses_nan_in_any_thread() -> None:
    values = np.ones((1000, 8), np.float32)
    values[777, 3] = np.nan
    source, _ = plain(values)
    with pytest.raises(Exception, match=r"at \[777, 3\]"):
        testing.Ops("scalar", threads=3).pack([source], "int4", 0)
