"""Packed matrix products (src/cpu/matmul.inl, pack.cpp): every ISA here x format x odd shape.

The judge is NumPy in float64 on the values the packed matrix holds. Tolerance: a float32 chain of n
terms errs by at most about n * 2^-24 of the sum of magnitudes; the tests allow that bound.
"""

from __future__ import annotations

import numpy as np
import pytest

from camelid._core import testing
from weight_sources import FORMATS, Source, from_bf16, plain, quantised

ISAS = testing.isas()
IN_DIMS = [1, 7, 8, 40, 129, 200]
OUT_DIMS = [1, 15, 16, 17, 50]
ROWS = [1, 2, 5, 7, 33]


@pytest.fixture(scope="module", params=ISAS)
def ops(request: pytest.FixtureRequest) -> testing.Ops:
    return testing.Ops(request.param, threads=1)


def multiply(
    ops: testing.Ops,
    x: np.ndarray,
    matrix: testing.Matrix,
    *,
    old: np.ndarray | None = None,
) -> np.ndarray:
    """Return x w^T (+ old), having checked that nothing outside was read or written."""
    n_rows, in_dim = x.shape
    wide_x = np.full((n_rows, in_dim + 5), np.nan, np.float32)
    wide_x[:, :in_dim] = x
    wide_y = np.full((n_rows, matrix.out_dim + 9), np.nan, np.float32)
    if old is not None:
        wide_y[:, : matrix.out_dim] = old
    ops.matmul(wide_y, wide_x, matrix, old is not None)
    assert np.isnan(wide_y[:, matrix.out_dim :]).all(), "wrote past out_dim"
    return wide_y[:, : matrix.out_dim].copy()


def assert_close(got: np.ndarray, x: np.ndarray, values: np.ndarray) -> None:
    """Compare with float64; on failure name the worst element and both bit patterns."""
    expected = x.astype(np.float64) @ values.astype(np.float64).T
    bound = np.abs(x).astype(np.float64) @ np.abs(values).astype(np.float64).T
    allowed = bound * (x.shape[1] + 3) * 2.0**-24 + 1e-30
    excess = np.abs(got - expected) / allowed
    worst = np.unravel_index(np.nanargmax(np.where(np.isnan(excess), np.inf, excess)), got.shape)
    a, b = np.float32(got[worst]), np.float32(expected[worst])
    assert excess[worst] <= 1, (
        f"at {worst}: got {a} ({a.view(np.uint32):08x}), expected {b} ({b.view(np.uint32):08x})"
    )


def random_source(
    rng: np.random.Generator, out_dim: int, in_dim: int, fmt: str
) -> tuple[Source, np.ndarray]:
    """A source that is packed in `fmt` without loss, and its values."""
    if fmt in ("int8", "int4"):
        return quantised(rng, out_dim, in_dim, 32 // FORMATS[fmt], 32)
    values = rng.standard_normal((out_dim, in_dim)).astype(np.float32)
    return plain(values, fmt.upper(), transposed=bool(rng.integers(2)))


@pytest.mark.parametrize("in_dim", IN_DIMS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_matmul_matches_numpy(ops: testing.Ops, fmt: str, in_dim: int) -> None:
    rng = np.random.default_rng(in_dim)
    for out_dim in OUT_DIMS:
        source, values = random_source(rng, out_dim, in_dim, fmt)
        matrix = ops.pack([source], fmt, 32)
        np.testing.assert_array_equal(ops.embed(list(range(out_dim)), matrix), values)
        for n_rows in ROWS:
            x = rng.standard_normal((n_rows, in_dim)).astype(np.float32)
            assert_close(multiply(ops, x, matrix), x, values)


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [32, 64, 96, 128, 520])
@pytest.mark.parametrize("bits", [4, 8])
def test_matmul_with_groups(ops: testing.Ops, bits: int, group_size: int, asymmetric: bool) -> None:
    rng = np.random.default_rng(group_size)
    for scale_dtype in ("BF16", "F16", "F32"):
        source, values = quantised(
            rng, 50, 520, bits, group_size, scale_dtype=scale_dtype, asymmetric=asymmetric
        )
        matrix = ops.pack([source], f"int{bits}", 128)
        np.testing.assert_array_equal(ops.embed([0, 17, 49], matrix), values[[0, 17, 49]])
        for n_rows in (1, 3, 13):
            x = rng.standard_normal((n_rows, 520)).astype(np.float32)
            assert_close(multiply(ops, x, matrix), x, values)


@pytest.mark.parametrize("fmt", FORMATS)
def test_matmul_bits_do_not_depend_on_rows_or_threads(fmt: str) -> None:
    for isa in ISAS:
        rng = np.random.default_rng(5)
        source, _ = random_source(rng, 200, 300, fmt)
        x = rng.standard_normal((200, 300)).astype(np.float32)
        old = rng.standard_normal((200, 200)).astype(np.float32)
        one = testing.Ops(isa, threads=1)
        matrix = one.pack([source], fmt, 32)
        whole = multiply(one, x, matrix)
        added = multiply(one, x, matrix, old=old)
        np.testing.assert_array_equal(added, old + whole)
        for n_rows in (1, 2, 3, 4, 5, 6, 7, 12, 64):
            np.testing.assert_array_equal(multiply(one, x[:n_rows], matrix), whole[:n_rows])
        np.testing.assert_array_equal(multiply(one, x[199:], matrix), whole[199:])
        for threads in (2, 5):
            many = testing.Ops(isa, threads=threads)
            np.testing.assert_array_equal(multiply(many, x, matrix), whole)
            np.testing.assert_array_equal(multiply(many, x[:1], matrix), whole[:1])


@pytest.mark.skipif(not {"avx2", "avx512"} <= set(ISAS), reason="needs both")
@pytest.mark.parametrize("fmt", FORMATS)
def test_matmul_bits_agree_between_avx2_and_avx512(fmt: str) -> None:
    rng = np.random.default_rng(6)
    source, _ = random_source(rng, 70, 300, fmt)
    for n_rows in (1, 9):
        x = rng.standard_normal((n_rows, 300)).astype(np.float32)
        results = []
        for isa in ("avx2", "avx512"):
            ops = testing.Ops(isa)
            results.append(multiply(ops, x, ops.pack([source], fmt, 32)))
        np.testing.assert_array_equal(*results)


def test_matmul_with_a_stack_of_formats(ops: testing.Ops) -> None:
    rng = np.random.default_rng(7)
    first, first_values = plain(rng.standard_normal((20, 64)).astype(np.float32), "F32")
    second, second_values = plain(rng.standard_normal((33, 64)).astype(np.float32), "F32")
    matrix = ops.pack([first, second], "f32")
    x = rng.standard_normal((6, 64)).astype(np.float32)
    for rows in (x, x[:1]):
        assert_close(multiply(ops, rows, matrix), rows, np.vstack([first_values, second_values]))


@pytest.mark.parametrize("group_size", [0, 32, 128])
@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_pack_quantises_plain_sources_by_the_rule(fmt: str, group_size: int) -> None:
    rng = np.random.default_rng(8)
    values = rng.standard_normal((21, 200)).astype(np.float32)
    source, exact = plain(values, "BF16", transposed=True)
    ops = testing.Ops("scalar")
    bits = 32 // FORMATS[fmt]
    words, scales = testing.quantize_rows(exact, bits, group_size or 200)
    same = Source(out_dim=21, in_dim=200, bits=bits, group_size=group_size or 200)
    same.words, same.scales = words.view(np.uint8).ravel(), scales.view(np.uint8).ravel()
    same.scale_dtype = "BF16"
    rows = list(range(21))
    np.testing.assert_array_equal(
        ops.embed(rows, ops.pack([source], fmt, group_size)), testing.read_rows(same, 0, 21)
    )
    # Half a step of rounding, and a scale that bf16 may have made too small for the largest value.
    step = from_bf16(scales)[:, np.arange(200) // (group_size or 200)]
    error = np.abs(ops.embed(rows, ops.pack([source], fmt, group_size)) - exact)
    assert (error <= step * 0.5 + np.abs(exact) * 2**-7).all()


@pytest.mark.parametrize("fmt", FORMATS)
def test_pack_converts_between_formats(fmt: str) -> None:
    rng = np.random.default_rng(9)
    source, exact = quantised(rng, 18, 96, 4 if fmt != "int4" else 8, 32, asymmetric=True)
    got = testing.Ops("scalar").embed(
        list(range(18)), testing.Ops("scalar").pack([source], fmt, 32)
    )
    # Relative to the largest value of a group: half a step of the target format.
    allowed = {"f32": 0.0, "f16": 2**-11, "bf16": 2**-8, "int8": 0.009, "int4": 0.08}[fmt]
    groups = np.abs(exact).reshape(18, 3, 32).max(axis=2).repeat(32, axis=1)
    assert (np.abs(got - exact) <= allowed * groups).all()


def test_isa_is_refused_by_name() -> None:
    with pytest.raises(Exception, match=r"CAMELID_CPU_ISA may be .*scalar"):
        testing.Ops("sse9")


def test_isa_is_forced_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for isa in ISAS:
        monkeypatch.setenv("CAMELID_CPU_ISA", isa)
        assert testing.Ops(threads=2).describe() == f"cpu: {isa}, 2 threads"
