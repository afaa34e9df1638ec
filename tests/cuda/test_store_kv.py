"""Queries, keys and values on their way to pages, against NumPy in float64.

What is rounded once at the end may be off by that rounding, and before it by float32's: RoPE, a
norm over at most 256 values, and a factor, none of which cancels more than the size of its pair.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cuda_cases import (
    BF16_ROUNDING,
    FLOAT32_ROUNDING,
    assert_within,
    from_bf16,
)
from cuda_device import Device, DeviceError
from kv_cases import BF16, E4M3, EPS, INT8, POISON, Case, make_case, sizes_of

Array = NDArray[Any]


def e4m3_values(device: Device) -> NDArray[np.float32]:
    values = np.empty(256, np.float32)
    device.library.case_from_e4m3(ctypes.c_void_p(values.ctypes.data))
    return values


def to_e4m3(device: Device, values: NDArray[np.float32]) -> NDArray[np.uint8]:
    codes = np.empty(len(values), np.uint8)
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (values, codes)]
    device.library.case_to_e4m3(*pointers, len(values))
    return codes


def stored_kv(device: Device, case: Case) -> tuple[Array, Array]:
    """Return what is stored [n_tokens, 2, n_kv_heads, head_dim], and scales without the last axis.

    What else is in the pages must be what was there before, and what pads a row must be zeros.
    """
    c = case.c
    page_bytes, side_bytes, row_bytes, scales_at = sizes_of(device, c)
    keys_at = device.library.case_kv_keys_at
    keys_at.restype = ctypes.c_int64
    pages = case.pages.read().reshape(-1, page_bytes)
    rows = np.empty((c.n_tokens, 2, c.n_kv_heads, row_bytes), np.uint8)
    scales = np.ones((c.n_tokens, 2, c.n_kv_heads), np.float32)
    for index in np.ndindex(scales.shape):
        token, side, kv_head = index
        page, slot = case.places[token]
        start = keys_at(ctypes.byref(c), c.kv_layer, kv_head) + side * side_bytes
        row = pages[page, start + slot * row_bytes :][:row_bytes]
        rows[index] = row
        row[:] = POISON
        if c.format != BF16:
            scale = pages[page, start + scales_at + slot * 4 :][:4]
            scales[index] = scale.view(np.float32)[0]
            scale[:] = POISON
    assert (pages == POISON).all(), "written beside rows"
    if c.format == BF16:
        return from_bf16(rows.view(np.uint16)), scales
    assert (rows[..., c.head_dim :] == 0).all()
    rows = rows[..., : c.head_dim]
    return (e4m3_values(device)[rows] if c.format == E4M3 else rows.view(np.int8)), scales


def exact_rows(case: Case) -> tuple[Array, Array]:
    """Return what is to be rounded [n_tokens, n, head_dim], and how far it may be off before."""
    c, y = case.c, case.qkv.astype(np.float64)
    n_rotated = c.n_heads + c.n_kv_heads
    x = y[:, :n_rotated]
    if case.rotation is not None:
        complex_ = x[..., ::2] + 1j * x[..., 1::2]
        rotation = case.rotation.astype(np.float64)
        complex_ = complex_ * (rotation[..., 0] + 1j * rotation[..., 1])[:, None]
        x[..., ::2], x[..., 1::2] = complex_.real, complex_.imag
    if c.qk_norm:
        x /= np.sqrt((x**2).mean(axis=-1, keepdims=True) + EPS)
    if case.query_scale is not None:
        x[:, : c.n_heads] *= case.query_scale.astype(np.float64)[:, None, None]
    size = np.abs(y)
    size[..., ::2] += np.abs(y[..., 1::2])  # a rotation moves size from one to the other
    size[..., 1::2] += np.abs(y[..., ::2])
    return y, 16 * FLOAT32_ROUNDING * size


def check(device: Device, case: Case) -> None:
    c = case.c
    device.call("case_store_kv", c)
    exact, allowed = exact_rows(case)
    q, q_off = exact[:, : c.n_heads], allowed[:, : c.n_heads]
    assert_within(case.stored_q(), q, q_off + BF16_ROUNDING * np.abs(q))
    shape = (c.n_tokens, 2, c.n_kv_heads, c.head_dim)
    kv, off = exact[:, c.n_heads :].reshape(shape), allowed[:, c.n_heads :].reshape(shape)
    values, scales = stored_kv(device, case)
    largest = np.abs(kv).max(axis=-1)
    if c.format == BF16:
        assert_within(values, kv, off + BF16_ROUNDING * np.abs(kv))
        return
    most = 448 if c.format == E4M3 else 127
    off = off.max(axis=-1, keepdims=True)
    assert_within(scales, largest / most, off[..., 0] / most + 2.0**-22 * largest / most)
    assert (np.abs(values).max(axis=-1) == most).all(), "the largest takes the largest number"
    # Half a step: of integers half the scale, of e4m3 1/16 of the value or 2^-10 of the scale.
    exact_scales = (largest / most)[..., None]
    step = exact_scales / 2
    if c.format == E4M3:
        step = np.maximum(np.abs(kv) / 16, exact_scales * 2.0**-10)
    assert_within(values * scales[..., None].astype(np.float64), kv, 2 * off + 1.001 * step)


def random_qkv(n_tokens: int, n_all: int, head_dim: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(n_tokens + head_dim)
    sizes = 10.0 ** rng.uniform(-3, 3, (n_tokens, n_all, 1))
    return (rng.standard_normal((n_tokens, n_all, head_dim)) * sizes).astype(np.float32)


@pytest.mark.small
@pytest.mark.parametrize("kind", [BF16, E4M3, INT8])
@pytest.mark.parametrize("head_dim", [8, 16, 72, 128, 136, 256])
def test_every_format_and_width(device: Device, head_dim: int, kind: int) -> None:
    device.arrange(seed=head_dim + kind)
    qkv = random_qkv(5, 7, head_dim)
    check(device, make_case(device, qkv, n_heads=3, kind=kind))
    device.arrange(seed=head_dim + kind + 1)
    check(device, make_case(device, qkv, n_heads=3, kind=kind, rotated=True, qk_norm=True,
                            scaled=True, padding=3))  # fmt: skip


@pytest.mark.small
@pytest.mark.parametrize("option", ["rotated", "qk_norm", "scaled"])
def test_every_step_alone(device: Device, option: str) -> None:
    check(device, make_case(device, random_qkv(3, 5, 64), n_heads=1, **{option: True}))


def test_no_tokens_are_no_work(device: Device) -> None:
    case = make_case(device, np.zeros((0, 6, 64), np.float32), n_heads=2)
    device.call("case_store_kv", case.c)
    assert (case.pages.read() == POISON).all()


@pytest.mark.parametrize("kind", [BF16, E4M3, INT8])
def test_tokens_get_the_same_bits_alone(device: Device, kind: int) -> None:
    qkv = random_qkv(6, 4, 72)
    several = make_case(device, qkv, n_heads=2, kind=kind, qk_norm=True)
    device.call("case_store_kv", several.c)
    alone = make_case(device, qkv[:1], n_heads=2, kind=kind, qk_norm=True, padding=1)
    device.arrange(seed=4)
    device.call("case_store_kv", alone.c)
    np.testing.assert_array_equal(alone.stored_q()[0], several.stored_q()[0])
    for mine, other in zip(stored_kv(device, alone), stored_kv(device, several), strict=True):
        np.testing.assert_array_equal(mine[0], other[0])


# ---- bytes ----
def test_every_byte_of_e4m3_comes_back(device: Device) -> None:
    values = e4m3_values(device)
    assert np.isnan(values[[0x7F, 0xFF]]).all()
    assert values[1] == 2.0**-9
    assert values[0x7E] == 448
    assert values[0x38] == 1
    finite = np.delete(np.arange(256), [0x7F, 0xFF])
    assert (np.diff(values[:0x7F]) > 0).all()
    np.testing.assert_array_equal(values[0x80:0xFF], -values[:0x7F])
    np.testing.assert_array_equal(to_e4m3(device, values[finite]), finite)
    bad = np.array([np.nan, np.inf, -np.inf, 1e30, -1e30, 464, 465], np.float32)
    np.testing.assert_array_equal(to_e4m3(device, bad) & 0xFF, [0x7F, 0x7E, 0xFE, 0x7E, 0xFE,
                                                                0x7E, 0x7E])  # fmt: skip


def roundings(device: Device) -> tuple[NDArray[np.float32], Array]:
    """Return values beside and in the middle of neighbouring bytes, and the byte of each."""
    values = e4m3_values(device)[:0x7F]
    middles = (values[1:] + values[:-1]) / 2
    codes = np.arange(0x7E)
    given = [
        (values[:-1], codes),
        (middles, codes + codes % 2),  # to the even one
        (np.nextafter(middles, np.float32(0)), codes),
        (np.nextafter(middles, np.float32(1e9)), codes + 1),
    ]
    positive = np.concatenate([value for value, _ in given]).astype(np.float32)
    bytes_ = np.concatenate([code for _, code in given])
    return np.concatenate([positive, -positive]), np.concatenate([bytes_, bytes_ + 0x80])


def test_middles_become_even_bytes_of_e4m3(device: Device) -> None:
    values, codes = roundings(device)
    np.testing.assert_array_equal(to_e4m3(device, values), codes)


@pytest.mark.parametrize("exponent", [-40, 0, 17])
def test_kernel_rounds_to_e4m3_as_the_host_does(device: Device, exponent: int) -> None:
    values, codes = roundings(device)
    n_heads = -(-len(values) // 255)
    heads = np.zeros((n_heads, 256), np.float32)
    heads[:, 0] = 448
    expected = np.zeros((n_heads, 255), np.uint8)
    heads[:, 1:].flat[: len(values)] = values  # type: ignore[index]
    expected.flat[: len(values)] = codes
    qkv = np.zeros((n_heads, 3, 256), np.float32)
    qkv[:, 1], qkv[:, 2] = heads * 2.0**exponent, -heads
    case = make_case(device, qkv, n_heads=1, kind=E4M3)
    device.call("case_store_kv", case.c)
    stored, scales = stored_kv(device, case)
    np.testing.assert_array_equal(scales[:, 0, 0], 2.0**exponent)
    np.testing.assert_array_equal(stored[:, 0, 0, 1:], e4m3_values(device)[expected])
    np.testing.assert_array_equal(stored[:, 1, 0, 1:], -e4m3_values(device)[expected])


def test_middles_become_even_integers(device: Device) -> None:
    qkv = np.zeros((1, 3, 256), np.float32)
    qkv[:, 1, 0] = qkv[:, 2, 0] = 127
    qkv[:, 1, 1:] = np.arange(255) - 127
    qkv[:, 2, 1:] = np.arange(255) / 2 - 63.5
    case = make_case(device, qkv, n_heads=1, kind=INT8)
    device.call("case_store_kv", case.c)
    stored, scales = stored_kv(device, case)
    assert (scales == 1).all()
    np.testing.assert_array_equal(stored[0, 0, 0], qkv[0, 1])
    np.testing.assert_array_equal(stored[0, 1, 0], np.rint(qkv[0, 2]))


@pytest.mark.parametrize("kind", [E4M3, INT8])
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e-31, 7.9e-31, 1e-30, 1e30, 3.4e38])
def test_heads_of_any_size(device: Device, kind: int, size: float) -> None:
    qkv = np.full((1, 3, 16), size, np.float32)
    qkv[..., 1] = -qkv[..., 1]
    case = make_case(device, qkv, n_heads=1, kind=kind)
    device.call("case_store_kv", case.c)
    stored, scales = stored_kv(device, case)
    most = 448 if kind == E4M3 else 127
    if size < 2.0**-100:
        assert (scales == 1).all()
        assert (stored == 0).all()
        return
    np.testing.assert_array_equal(np.abs(stored), most)
    np.testing.assert_allclose(scales, np.float32(size) / most, rtol=1e-6)


@pytest.mark.parametrize("kind", [BF16, E4M3, INT8])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_visible_in_its_head(
    device: Device, kind: int, bad: float
) -> None:
    qkv = random_qkv(3, 6, 72)
    for head in (0, 3, 4):  # a query, a key of kv head 1, a value of kv head 0
        qkv[1, head, 70] = bad
    case = make_case(device, qkv, n_heads=2, kind=kind)
    device.call("case_store_kv", case.c)
    values, scales = stored_kv(device, case)
    visible = np.isfinite(values * scales[..., None]).all(axis=-1)
    assert visible[[0, 2]].all()
    np.testing.assert_array_equal(visible[1], [[True, False], [False, True]])
    found = np.isfinite(case.stored_q()).all(axis=-1)
    np.testing.assert_array_equal(found, [[True, True], [False, True], [True, True]])


def test_other_widths_are_refused(device: Device) -> None:
    for head_dim in (12, 264):
        case = make_case(device, np.zeros((1, 3, head_dim), np.float32), n_heads=1)
        with pytest.raises(DeviceError, match=f"heads of {head_dim}"):
            device.call("case_store_kv", case.c)
