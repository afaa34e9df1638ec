"""Products of int8 activations (src/cpu/integer.inl, Workspace): every ISA x format x odd shape.

The judge quantises the activations by the same rule in NumPy and multiplies in float64; what is
left are the float32 roundings of one fold for each block.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from camelid._core import testing
from weight_sources import plain, quantised

ISAS = testing.isas()
FUSED = [isa for isa in ISAS if isa != "scalar"]  # these agree to the bit
# (bits, group size, inputs): one group per row, groups below, above and beside 128, odd tails.
SHAPES = [
    (4, 128, 520),
    (4, 32, 200),
    (4, 520, 520),
    (4, 96, 960),
    (4, 64, 129),
    (8, 128, 520),
    (8, 4, 30),
    (8, 300, 300),
    (8, 256, 1000),
]


def block_of(group_size: int, in_dim: int) -> int:
    return 128 if group_size >= in_dim or group_size % 128 == 0 else group_size


def rounded(x: NDArray[np.float32], block: int) -> NDArray[np.float64]:
    """Return what int8 activations hold of x: 127 steps up to the largest of each block."""
    out = np.zeros(x.shape)
    for first in range(0, x.shape[1], block):
        part = x[:, first : first + block]
        largest = np.abs(part).max(axis=1, keepdims=True)
        inverse = np.divide(np.float32(127), largest, where=largest > 0, out=np.zeros_like(largest))
        scale = (largest / np.float32(127)).astype(np.float64)
        out[:, first : first + block] = np.rint(part * inverse) * scale
    return out


def multiply(ops: testing.Ops, x: NDArray[np.float32], matrix: testing.Matrix) -> np.ndarray:
    y = np.full((len(x), matrix.out_dim + 3), np.nan, np.float32)
    ops.matmul(y, x, matrix)
    assert np.isnan(y[:, matrix.out_dim :]).all(), "wrote past out_dim"
    return y[:, : matrix.out_dim].copy()


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("bits", "group_size", "in_dim"), SHAPES)
@pytest.mark.parametrize("isa", ISAS)
def test_products_match_numpy(
    isa: str, bits: int, group_size: int, in_dim: int, asymmetric: bool
) -> None:
    rng = np.random.default_rng(in_dim)
    ops = testing.Ops(isa, fast=True)
    for out_dim in (1, 17, 150):
        source, values = quantised(rng, out_dim, in_dim, bits, group_size, asymmetric=asymmetric)
        matrix = ops.pack([source], f"int{bits}", 128)
        for n_rows in (1, 2, 7, 33):
            x = rng.standard_normal((n_rows, in_dim)).astype(np.float32)
            x[0, : in_dim // 3] = 0.0  # whole blocks without a largest value
            held = rounded(x, block_of(group_size, in_dim))
            wanted = held @ values.astype(np.float64).T
            # A handful of roundings of 2^-24 for each block, of sums of this size.
            allowed = 1e-6 * (np.abs(held) @ np.abs(values).astype(np.float64).T) + 1e-30
            assert (np.abs(multiply(ops, x, matrix) - wanted) <= allowed).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_bits_depend_on_neither_rows_nor_threads_nor_fused_isa(bits: int) -> None:
    rng = np.random.default_rng(bits)
    source, _ = quantised(rng, 200, 300, bits, 32)
    x = rng.standard_normal((77, 300)).astype(np.float32)
    of_isa = {}
    for isa in ISAS:
        one = testing.Ops(isa, fast=True)
        matrix = one.pack([source], f"int{bits}")
        whole = of_isa[isa] = multiply(one, x, matrix)
        for n_rows in (1, 2, 3, 5, 6, 7, 12, 13, 31):
            np.testing.assert_array_equal(multiply(one, x[:n_rows], matrix), whole[:n_rows])
        np.testing.assert_array_equal(multiply(one, x[76:], matrix), whole[76:])
        for threads in (2, 5):
            many = testing.Ops(isa, threads=threads, fast=True)
            np.testing.assert_array_equal(multiply(many, x, matrix), whole)
            np.testing.assert_array_equal(multiply(many, x[:1], matrix), whole[:1])
    for isa in FUSED[1:]:
        np.testing.assert_array_equal(of_isa[isa], of_isa[FUSED[0]])


@pytest.mark.parametrize("isa", ISAS)
def test_extreme_bytes_do_not_saturate(isa: str) -> None:
    """All products of one sign and full size: where 16-bit sums of byte products would overflow."""
    ops = testing.Ops(isa, fast=True)
    for bits in (4, 8):
        source, _ = quantised(np.random.default_rng(0), 16, 256, bits, 128)
        source.words[:] = 255  # the largest code everywhere
        matrix = ops.pack([source], f"int{bits}")
        held = ops.embed(list(range(16)), matrix)
        np.testing.assert_array_equal(np.sign(held), 1.0)
        for sign in (1.0, -1.0):
            x = np.full((6, 256), sign, np.float32)
            wanted = x.astype(np.float64) @ held.astype(np.float64).T
            np.testing.assert_allclose(multiply(ops, x, matrix), wanted, rtol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_not_hidden(isa: str, bad: float) -> None:
    rng = np.random.default_rng(4)
    source, _ = quantised(rng, 20, 256, 4, 128)
    ops = testing.Ops(isa, fast=True)
    x = rng.standard_normal((3, 256)).astype(np.float32)
    clean = multiply(ops, x, ops.pack([source], "int4"))
    x[1, 200] = bad
    y = multiply(ops, x, ops.pack([source], "int4"))
    assert np.isnan(y[1]).all()
    np.testing.assert_array_equal(y[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("isa", ISAS)
def test_two_terms_are_nearly_exact(isa: str) -> None:
    rng = np.random.default_rng(5)
    source, values = quantised(rng, 150, 512, 4, 128)
    x = rng.standard_normal((9, 512)).astype(np.float32)
    wanted = x.astype(np.float64) @ values.astype(np.float64).T
    ops = testing.Ops(isa, threads=2, fast=True)
    errors = [
        np.abs(multiply(ops, x, ops.pack([source], "int4", precise=precise)) - wanted).max()
        for precise in (False, True)
    ]
    # A second term of 127 steps within half a step of the first: 254 times finer.
    assert errors[1] < errors[0] / 100
    assert errors[0] > 1e-3 * np.abs(wanted).max() * 0.1


@pytest.mark.parametrize("isa", ISAS)
def test_plain_and_mixed_stacks_stay_float(isa: str) -> None:
    rng = np.random.default_rng(6)
    first, a = quantised(rng, 20, 256, 4, 128)
    second, b = quantised(rng, 20, 256, 4, 32)
    third, c = plain(rng.standard_normal((20, 256)).astype(np.float32))
    x = rng.standard_normal((4, 256)).astype(np.float32)
    ops, exact = testing.Ops(isa, fast=True), testing.Ops(isa)
    for stack, fmt, values in (([first, second], "int4", [a, b]), ([third], "f32", [c])):
        got = multiply(ops, x, ops.pack(stack, fmt))
        np.testing.assert_array_equal(got, multiply(exact, x, exact.pack(stack, fmt)))
        wanted = x.astype(np.float64) @ np.vstack(values).astype(np.float64).T
        np.testing.assert_allclose(got, wanted, atol=1e-4)
