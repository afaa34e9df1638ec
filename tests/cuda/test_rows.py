"""What works row by row: embeddings, norms, biases, GELU and copies, against NumPy in float64.

Sums are float32, of at most dim / 1024 + 16 terms one after the other (a thread's), and then of
threads two by two: so the relative error of a sum of positive terms stays below `depth_of`
roundings. Results in bf16 may differ by their rounding as well.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cuda_cases import (
    BF16,
    BF16_ROUNDING,
    FLOAT32_ROUNDING,
    GATE_UP,
    NAN_BF16,
    PAIRS,
    assert_within,
    bf16,
    from_bf16,
    make_matrix,
)
from cuda_device import Device, DeviceError, Memory
from rows_cases import CRows

Array = NDArray[Any]
F32, BF16_ROWS = 0, 1
DIMS = [1, 7, 8, 63, 1000, 5120, 20000]
EPS = 1e-5


@dataclass
class Rows:
    """Rows in device memory, NaNs before, between and behind them."""

    c: CRows
    memory: Memory
    offset: int  # values in front of the first row

    def read(self) -> Array:
        """Return the values, after a look at what lies around them."""
        flat = self.memory.read()
        values = from_bf16(flat) if self.c.bf16 else flat.astype(np.float64)
        assert np.isnan(values[: self.offset]).all()
        table = values[self.offset :].reshape(self.c.n_rows, self.c.stride)
        assert np.isnan(table[:, self.c.dim :]).all(), "written beside a row"
        return table[:, : self.c.dim]


def put_rows(
    device: Device, values: Array, element: int = F32, *, padding: int = 4, offset: int = 0
) -> Rows:
    n_rows, dim = values.shape
    stride = dim + padding
    flat = np.full(offset + n_rows * stride, np.nan, np.float32)
    flat[offset:].reshape(n_rows, stride)[:, :dim] = values
    bits = np.where(np.isnan(flat), np.uint16(NAN_BF16), bf16(flat))
    memory = device.put(bits if element == BF16_ROWS else flat)
    size = 2 if element == BF16_ROWS else 4
    c = CRows(memory.address + offset * size, n_rows, dim, stride, element)
    return Rows(c, memory, offset)


def empty_rows(
    device: Device, n_rows: int, dim: int, element: int = F32, *, padding: int = 4, offset: int = 0
) -> Rows:
    nans = np.full((n_rows, dim), np.nan, np.float32)
    return put_rows(device, nans, element, padding=padding, offset=offset)


def depth_of(dim: int) -> float:
    return (dim / 1024 + 32) * FLOAT32_ROUNDING


def rounding_of(rows: Rows, exact: Array) -> Array:
    """Return what the last rounding may change; the smallest bf16 are 2^-133 apart."""
    return BF16_ROUNDING * np.abs(exact) + 2.0**-133 if rows.c.bf16 else np.zeros_like(exact)


def floats(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return rng.standard_normal(shape).astype(np.float32)


# ---- norms ----
def exact_rms(x: Array, gain: Array) -> tuple[Array, Array]:
    """Return what an RMS norm gives, and how far float32 may be off."""
    y = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + EPS) * gain
    return y, depth_of(x.shape[1]) * np.abs(y)


def exact_layer_norm(x: Array, gain: Array, bias: Array) -> tuple[Array, Array]:
    """Return what a layer norm gives, and how far float32 may be off.

    An error of the mean moves all values, and each difference from the mean is rounded.
    """
    off = x - x.mean(axis=1, keepdims=True)
    inverse = 1 / np.sqrt((off**2).mean(axis=1, keepdims=True) + EPS)
    y = off * inverse * gain
    mean_error = depth_of(x.shape[1]) * np.abs(x).mean(axis=1, keepdims=True)
    allowed = depth_of(x.shape[1]) * np.abs(y) + 2 * mean_error * inverse * np.abs(gain)
    return y + bias, allowed + FLOAT32_ROUNDING * np.abs(y + bias)


@pytest.mark.small
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("element", [F32, BF16_ROWS])
def test_rms_norm(device: Device, dim: int, element: int) -> None:
    device.arrange(seed=dim)
    rng = np.random.default_rng(dim)
    x, gain = floats(rng, 3, dim) * [[1], [1e-4], [1e4]], floats(rng, dim)
    at, y = put_rows(device, x), empty_rows(device, 3, dim, element)
    device.call("case_rms_norm", y.c, at.c, None, device.put(gain), ctypes.c_float(EPS))
    exact, allowed = exact_rms(x, gain)
    assert_within(y.read(), exact, allowed + rounding_of(y, exact))


@pytest.mark.small
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("element", [F32, BF16_ROWS])
def test_layer_norm(device: Device, dim: int, element: int) -> None:
    device.arrange(seed=dim + 1)
    rng = np.random.default_rng(dim)
    gain, bias = floats(rng, dim), floats(rng, dim)
    x = floats(rng, 3, dim) + np.float32([[0], [30], [-0.1]])
    at, y = put_rows(device, x), empty_rows(device, 3, dim, element)
    device.call(
        "case_layer_norm", y.c, at.c, device.put(gain), device.put(bias), ctypes.c_float(EPS)
    )
    exact, allowed = exact_layer_norm(x.astype(np.float64), gain, bias)
    assert_within(y.read(), exact, allowed + rounding_of(y, exact))


@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm"])
@pytest.mark.parametrize("dim", [63, 5120, 20000])
def test_norm_in_place_alone_and_where_rows_lie_askew_gives_the_same_bits(
    device: Device, kind: str, dim: int
) -> None:
    rng = np.random.default_rng(dim)
    x, gain, bias = floats(rng, 2, dim), floats(rng, dim), floats(rng, dim)
    places: list[Any] = [device.put(gain), device.put(bias)]
    weights = places if kind == "layer_norm" else [None, places[0]]
    results = []
    for seed, padding, offset in [(0, 4, 0), (1, 4, 0), (2, 3, 0), (5, 4, 1)]:
        device.arrange(seed=seed)
        rows = put_rows(device, x, padding=padding, offset=offset)
        device.call(f"case_{kind}", rows.c, rows.c, *weights, ctypes.c_float(EPS))
        results.append(rows.read())
    alone = put_rows(device, x[1:])
    device.call(f"case_{kind}", alone.c, alone.c, *weights, ctypes.c_float(EPS))
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])
    np.testing.assert_array_equal(alone.read()[0], results[0][1])


@pytest.mark.small
def test_rms_norm_of_some_rows(device: Device) -> None:
    rng = np.random.default_rng(1)
    x, gain = floats(rng, 5, 136), floats(rng, 136)
    rows = np.array([4, 0, 0, 2], np.int32)
    at, y = put_rows(device, x), empty_rows(device, len(rows), 136, BF16_ROWS)
    places = device.put(rows)
    device.call("case_rms_norm", y.c, at.c, places, device.put(gain), ctypes.c_float(EPS))
    exact, allowed = exact_rms(x[rows], gain)
    assert_within(y.read(), exact, allowed + rounding_of(y, exact))


def test_norm_of_bf16_rows(device: Device) -> None:
    rng = np.random.default_rng(0)
    x, gain = floats(rng, 2, 72), floats(rng, 72)
    for padding in (4, 3):
        at, y = put_rows(device, x, BF16_ROWS, padding=padding), empty_rows(device, 2, 72)
        device.call("case_rms_norm", y.c, at.c, None, device.put(gain), ctypes.c_float(EPS))
        exact, allowed = exact_rms(from_bf16(bf16(x)), gain)
        assert_within(y.read(), exact, allowed)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_norm_keeps_what_is_not_finite_in_its_row(device: Device, bad: float) -> None:
    x = np.ones((3, 100), np.float32)
    x[1, 77] = bad
    gain = device.put(np.ones(100, np.float32))
    for kind, weights in (("rms_norm", [None, gain]), ("layer_norm", [gain, gain])):
        at, y = put_rows(device, x), empty_rows(device, 3, 100)
        device.call(f"case_{kind}", y.c, at.c, *weights, ctypes.c_float(EPS))
        found = y.read()
        assert np.isfinite(found[[0, 2]]).all()
        assert np.isnan(found[1, 77])


# ---- value by value ----
@pytest.mark.small
@pytest.mark.parametrize("dim", [1, 7, 63, 1408, 5121])
@pytest.mark.parametrize("element", [F32, BF16_ROWS])
def test_bias_and_gelu(device: Device, dim: int, element: int) -> None:
    device.arrange(seed=dim)
    rng = np.random.default_rng(dim)
    x, bias = floats(rng, 4, dim) * 3, floats(rng, dim)
    y = put_rows(device, x, element)
    before = y.read()
    device.call("case_add_bias", y.c, device.put(bias))
    exact = before + bias
    assert_within(y.read(), exact, FLOAT32_ROUNDING * np.abs(exact) + rounding_of(y, exact))
    before = y.read()
    device.call("case_gelu", y.c)
    exact = before / 2 * (1 + np.vectorize(math.erf)(before / math.sqrt(2)))
    assert_within(y.read(), exact, 4 * FLOAT32_ROUNDING * np.abs(before) + rounding_of(y, exact))


def test_gelu_of_large_and_bad_values(device: Device) -> None:
    x = np.float32([[-1e30, -20, 0, 20, 1e30, np.inf, np.nan, 1]])
    y = put_rows(device, x)
    device.call("case_gelu", y.c)
    found = y.read()[0]
    np.testing.assert_array_equal(found[:6], [0, 0, 0, 20, np.float32(1e30), np.inf])
    assert np.isnan(found[6])
    assert abs(found[7] - 0.8413447460685429) < 1e-6


@pytest.mark.small
@pytest.mark.parametrize("dim", [1, 7, 1024, 1032])
@pytest.mark.parametrize("from_", [F32, BF16_ROWS])
@pytest.mark.parametrize("to", [F32, BF16_ROWS])
def test_copy_rows(device: Device, dim: int, from_: int, to: int) -> None:
    device.arrange(seed=dim)
    x = floats(np.random.default_rng(dim), 5, dim)
    at = put_rows(device, x, from_, padding=8)
    values = at.read()
    rows = np.array([4, 0, 0, 2], np.int32)
    for padding, offset in ((4, 0), (5, 1)):
        y = empty_rows(device, 4, dim, to, padding=padding, offset=offset)
        device.call("case_copy_rows", y.c, at.c, device.put(rows))
        expected = values[rows]
        np.testing.assert_array_equal(
            y.read(), from_bf16(bf16(expected)) if to == BF16_ROWS else expected
        )
    y = empty_rows(device, 5, dim, from_)
    device.call("case_copy_rows", y.c, at.c, None)
    np.testing.assert_array_equal(y.read(), values)


# ---- embeddings ----
@pytest.mark.small
@pytest.mark.parametrize("dim", [5, 64, 1100])
@pytest.mark.parametrize("element", [F32, BF16_ROWS])
def test_embedding_from_a_plain_table(device: Device, dim: int, element: int) -> None:
    table = bf16(floats(np.random.default_rng(dim), 9, dim + 3))
    tokens = np.array([8, 0, 3, 8], np.int32)
    y = empty_rows(device, 4, dim, element)
    device.call(
        "case_embed_plain", y.c, device.put(tokens), device.put(table), ctypes.c_int64(dim + 3)
    )
    np.testing.assert_array_equal(y.read(), from_bf16(table)[tokens, :dim])


@pytest.mark.small
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("scales", "group"), [(BF16, 128), (PAIRS, 128), (PAIRS, 64), (PAIRS, 32), (PAIRS, 256)]
)
def test_embedding_from_tiles(device: Device, bits: int, scales: int, group: int) -> None:
    device.arrange(seed=group)
    rng = np.random.default_rng(bits + group)
    for dim in (200, 327):
        w = make_matrix(device, rng, 37, dim, bits=bits, scales=scales, group=group)
        tokens = np.array([36, 0, 17, 8, 9, 36], np.int32)
        y = empty_rows(device, 6, dim)
        device.call("case_embed_tiled", y.c, device.put(tokens), w.shape, w.tiles, w.scales)
        exact = w.w[tokens]
        assert_within(y.read(), exact, FLOAT32_ROUNDING * np.abs(exact))


def test_embedding_from_gates_and_ups_is_refused(device: Device) -> None:
    w = make_matrix(device, np.random.default_rng(0), 32, 64, order=GATE_UP)
    y, tokens = empty_rows(device, 1, 64), device.put(np.zeros(1, np.int32))
    with pytest.raises(DeviceError, match=r"\[cuda\] rows"):
        device.call("case_embed_tiled", y.c, tokens, w.shape, w.tiles, w.scales)


# ---- no rows ----
def test_no_rows_are_no_work(device: Device) -> None:
    none, gain = empty_rows(device, 0, 16), device.put(np.ones(16, np.float32))
    device.call("case_rms_norm", none.c, none.c, None, gain, ctypes.c_float(EPS))
    device.call("case_layer_norm", none.c, none.c, gain, gain, ctypes.c_float(EPS))
    device.call("case_add_bias", none.c, gain)
    device.call("case_gelu", none.c)
    device.call("case_copy_rows", none.c, none.c, None)
    device.call("case_embed_plain", none.c, None, gain, ctypes.c_int64(16))


def test_norm_of_another_width_is_refused(device: Device) -> None:
    x, y = empty_rows(device, 2, 16), empty_rows(device, 2, 8)
    gain = device.put(np.ones(16, np.float32))
    with pytest.raises(DeviceError, match="as many values as it takes"):
        device.call("case_rms_norm", y.c, x.c, None, gain, ctypes.c_float(EPS))
