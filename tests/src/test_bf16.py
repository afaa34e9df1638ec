"""Products of bf16 activations with bf16 weights (src/cpu/bf16.inl), where a processor has them."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from camelid._core import testing
from weight_sources import plain

pytestmark = pytest.mark.skipif("avx512bf16" not in testing.isas(), reason="no AVX512-BF16 here")


def round_to_bf16(x: NDArray[np.float32]) -> NDArray[np.float64]:
    """Round to nearest, ties to even."""
    bits = x.view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.astype(np.uint32).view(np.float32).astype(np.float64)


def multiply(ops: testing.Ops, x: NDArray[np.float32], matrix: testing.Matrix) -> np.ndarray:
    y = np.full((len(x), matrix.out_dim + 3), np.nan, np.float32)
    ops.matmul(y, x, matrix)
    assert np.isnan(y[:, matrix.out_dim :]).all(), "wrote past out_dim"
    return y[:, : matrix.out_dim].copy()


@pytest.mark.parametrize("in_dim", [1, 2, 15, 33, 200, 1000])
def test_products_match_numpy(in_dim: int) -> None:
    rng = np.random.default_rng(in_dim)
    ops = testing.Ops("avx512bf16", fast=True)
    for out_dim in (1, 17, 150):
        source, values = plain(rng.standard_normal((out_dim, in_dim)).astype(np.float32), "BF16")
        matrix = ops.pack([source], "bf16")
        for n_rows in (1, 2, 6, 7, 33):
            x = rng.standard_normal((n_rows, in_dim)).astype(np.float32)
            held = round_to_bf16(x)
            wanted = held @ values.astype(np.float64).T
            # A float32 chain: each of its additions may round by 2^-24 of what is summed.
            size = np.abs(held) @ np.abs(values).astype(np.float64).T
            error = np.abs(multiply(ops, x, matrix) - wanted)
            assert (error <= (in_dim + 3) * 2.0**-23 * size + 1e-30).all()


def test_bits_depend_on_neither_rows_nor_threads() -> None:
    rng = np.random.default_rng(1)
    source, _ = plain(rng.standard_normal((200, 300)).astype(np.float32), "BF16")
    x = rng.standard_normal((77, 300)).astype(np.float32)
    one = testing.Ops("avx512bf16", fast=True)
    matrix = one.pack([source], "bf16")
    whole = multiply(one, x, matrix)
    for n_rows in (1, 2, 5, 6, 7, 13):
        np.testing.assert_array_equal(multiply(one, x[:n_rows], matrix), whole[:n_rows])
    many = testing.Ops("avx512bf16", threads=3, fast=True)
    np.testing.assert_array_equal(multiply(many, x, matrix), whole)


def test_precise_and_exact_products_stay_float() -> None:
    rng = np.random.default_rng(2)
    source, _ = plain(rng.standard_normal((40, 100)).astype(np.float32), "BF16")
    x = rng.standard_normal((5, 100)).astype(np.float32)
    exact, ops = testing.Ops("avx512bf16"), testing.Ops("avx512bf16", fast=True)
    wanted = multiply(exact, x, exact.pack([source], "bf16"))
    assert (multiply(ops, x, ops.pack([source], "bf16")) != wanted).any()
    np.testing.assert_array_equal(
        multiply(ops, x, ops.pack([source], "bf16", precise=True)), wanted
    )


def test_numbers_that_are_not_finite_are_not_hidden() -> None:
    source, _ = plain(np.ones((20, 50), np.float32), "BF16")
    ops = testing.Ops("avx512bf16", fast=True)
    for bad in (np.nan, np.inf):
        x = np.ones((2, 50), np.float32)
        x[1, 7] = bad
        y = multiply(ops, x, ops.pack([source], "bf16"))
        assert np.isfinite(y[0]).all()
        assert not np.isfinite(y[1]).any()
