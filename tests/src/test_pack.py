"""Packed panels (src/cpu/pack.cpp, pack.inl): every ISA writes the bytes packed.h promises."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from camelid._core import testing
from camelid.errors import CheckpointError
from weight_sources import Source, plain, quantised

ISAS = testing.isas()
OUT_DIMS = [1, 15, 16, 17, 100]


def part(values: NDArray[np.generic]) -> bytes:
    """Return rows [out_dim, n] as panels [n_panels][n][16], missing rows zero, 64-byte aligned."""
    out_dim, n = values.shape
    rows = np.zeros((-(-out_dim // 16) * 16, n), values.dtype)
    rows[:out_dim] = values
    data = rows.reshape(-1, 16, n).transpose(0, 2, 1).tobytes()
    return data + bytes(-len(data) % 64)


def words_of(source: Source) -> NDArray[np.uint32]:
    """Return the 32-bit words of each row; int4 with four inputs in the low halves of the bytes."""
    if source.bits == 0:
        size = {"F32": 4, "F16": 2, "BF16": 2}[source.dtype]
        rows = np.zeros((source.out_dim, -(-source.in_dim * size // 4) * 4), np.uint8)
        rows[:, : source.in_dim * size] = source.data.reshape(source.out_dim, -1)
        return rows.view("<u4")
    words = np.ascontiguousarray(source.words).copy().view("<u4").reshape(source.out_dim, -1)
    if source.bits == 8:
        return words
    out = np.zeros_like(words)
    for i in range(8):
        out |= (words >> np.uint32(4 * i) & np.uint32(15)) << np.uint32(i % 4 * 8 + i // 4 * 4)
    return out


def zeros_of(source: Source) -> NDArray[np.uint8]:
    """Return the zero points [out_dim, n_groups], packed along out_dim in the file."""
    per_word = 32 // source.bits
    n_groups = -(-source.in_dim // source.group_size)
    words = source.zero_points.copy().view("<u4").reshape(-1, n_groups)
    shifts = np.arange(per_word, dtype=np.uint32)[None, :, None] * np.uint32(source.bits)
    values = words[:, None, :] >> shifts & np.uint32((1 << source.bits) - 1)
    return values.reshape(-1, n_groups)[: source.out_dim].astype(np.uint8)


def pack(isa: str, source: Source, fmt: str) -> bytes:
    return testing.packed_bytes(testing.Ops(isa, threads=2).pack([source], fmt, 0)).tobytes()


@pytest.mark.parametrize("out_dim", OUT_DIMS)
@pytest.mark.parametrize("in_dim", [1, 2, 31, 32, 33, 200])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("isa", ISAS)
def test_plain_rows_are_transposed(isa: str, dtype: str, in_dim: int, out_dim: int) -> None:
    rng = np.random.default_rng(in_dim)
    source, _ = plain(rng.standard_normal((out_dim, in_dim)).astype(np.float32), dtype)
    assert pack(isa, source, dtype.lower()) == part(words_of(source))


@pytest.mark.parametrize("out_dim", OUT_DIMS)
@pytest.mark.parametrize("groups", [(8, 8), (120, 40), (129, 129), (520, 8), (1056, 32)], ids=str)
@pytest.mark.parametrize("scale_dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("isa", ISAS)
def test_quantised_rows_keep_words_scales_and_zero_points(
    isa: str, bits: int, scale_dtype: str, groups: tuple[int, int], out_dim: int
) -> None:
    in_dim, group_size = groups
    rng = np.random.default_rng(in_dim)
    source, _ = quantised(
        rng, out_dim, in_dim, bits, group_size, scale_dtype=scale_dtype, asymmetric=True
    )
    scales = source.scales.copy().view("<u4" if scale_dtype == "F32" else "<u2")
    expected = part(words_of(source)) + part(scales.reshape(out_dim, -1)) + part(zeros_of(source))
    assert pack(isa, source, f"int{bits}") == expected


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [(0, 0), (3, 16), (18, 38)], ids=str)
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("isa", ISAS)
def test_values_that_are_not_finite_are_named(
    isa: str, dtype: str, at: tuple[int, int], bad: float
) -> None:
    # The largest finite numbers beside it must not be taken for one.
    values = np.full((19, 39), {"F32": 3e38, "F16": 65504, "BF16": 3e38}[dtype], np.float32)
    values[:, ::2] *= -1
    fine, _ = plain(values, dtype)
    assert pack(isa, fine, dtype.lower()) == part(words_of(fine))
    values[at] = bad
    source, _ = plain(values, dtype)
    with pytest.raises(CheckpointError, match=rf"at \[{at[0]}, {at[1]}\]"):
        pack(isa, source, dtype.lower())


@pytest.mark.parametrize("scale_dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("isa", ISAS)
def test_scales_that_are_not_finite_are_named(isa: str, scale_dtype: str) -> None:
    source, _ = quantised(np.random.default_rng(0), 19, 320, 4, 16, scale_dtype=scale_dtype)
    wide = scale_dtype == "F32"
    raw = source.scales.copy().view("<u4" if wide else "<u2")
    raw[18 * 20 + 17] = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}[scale_dtype]
    source.scales = raw.view(np.uint8)
    with pytest.raises(CheckpointError, match=r"an infinity scale at \[18, 17\]"):
        pack(isa, source, "int4")
