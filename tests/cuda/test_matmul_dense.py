"""Dense products on Hopper's tensor cores against NumPy in float64. No emulated device has them."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from cuda_cases import (
    ADD,
    STORE,
    STORE_BF16,
    CDense,
    assert_sums,
    assert_within,
    bf16,
    empty_y,
    from_bf16,
    sum_error,
)
from cuda_device import Device, gpu_device

pytestmark = pytest.mark.cuda
BF16, E4M3 = range(2)


@pytest.fixture
def hopper() -> Device:
    device = gpu_device()
    if device.library.compute_capability() != 90:
        pytest.skip("needs a Hopper GPU")
    return device


def run_dense(device: Device, kind: int, x: Any, w: Any, y: Any, output: int, *scales: Any) -> Any:
    at = [device.put(values) for values in (x, w, y, *scales)]
    c = CDense(
        *(memory.address for memory in at),
        *[None] * (5 - len(at)),
        kind,
        len(x),
        len(w),
        *(x.shape[1], x.shape[1], w.shape[1], y.shape[1]),
        output,
    )
    device.library.matmul_dense_need.restype = ctypes.c_int64
    n_bytes = device.library.matmul_dense_need(ctypes.byref(c))
    device.call("run_matmul_dense", c, device.put(np.zeros(max(1, n_bytes), np.uint8)))
    return at[2].read()


@pytest.mark.small
@pytest.mark.parametrize("output", [STORE, STORE_BF16, ADD])
@pytest.mark.parametrize(
    ("n_tokens", "rows", "inputs"), [(1, 8, 8), (65, 136, 72), (300, 520, 264), (129, 256, 1024)]
)
def test_bf16(hopper: Device, n_tokens: int, rows: int, inputs: int, output: int) -> None:
    rng = np.random.default_rng(rows)
    x, w = (bf16(rng.standard_normal((n, inputs))) for n in (n_tokens, rows))
    y = empty_y(n_tokens, rows + 5, output)  # 8 more than rows
    if output == ADD:
        y[:, :rows] = rng.standard_normal((n_tokens, rows))
    found = run_dense(hopper, BF16, x, w, y, output)
    np.testing.assert_array_equal(found[:, rows:], y[:, rows:])
    start = y[:, :rows] if output == ADD else 0.0
    assert_sums(found[:, :rows], from_bf16(x), from_bf16(w), start, in_tensor_cores=True)


def e4m3_values() -> Any:
    """Return what each byte means; the two NaNs are zeros."""
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    value = np.where(exponent == 0, mantissa / 512, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    return np.where(byte & 127 == 127, 0.0, np.where(byte >= 128, -value, value))


@pytest.mark.small
@pytest.mark.parametrize("output", [STORE_BF16, ADD])
@pytest.mark.parametrize(("n_tokens", "rows", "inputs"), [(1, 16, 16), (70, 144, 272)])
def test_fp8(hopper: Device, n_tokens: int, rows: int, inputs: int, output: int) -> None:
    rng = np.random.default_rng(rows)
    # Bytes of values below 2: sums of them stay far from where FP8's accumulators lose bits.
    bytes_ = [rng.integers(0, 64, (n, inputs)) | rng.integers(0, 2, (n, inputs)) << 7
              for n in (n_tokens, rows)]  # fmt: skip
    scales = [rng.uniform(0.5, 2, n).astype(np.float32) for n in (n_tokens, rows)]
    y = empty_y(n_tokens, rows + 13, output)
    if output == ADD:
        y[:, :rows] = rng.standard_normal((n_tokens, rows))
    x, w = (b.astype(np.uint8) for b in bytes_)
    found = run_dense(hopper, E4M3, x, w, y, output, *scales)[:, :rows]
    values = [e4m3_values()[b] * s[:, None] for b, s in zip(bytes_, scales, strict=True)]
    exact = values[0] @ values[1].T + (y[:, :rows] if output == ADD else 0.0)
    # Hopper's FP8 products keep 13 bits below the largest of a step; CUTLASS promotes every few.
    allowed = sum_error(*values) * 2**9 + 2.0**-8 * np.abs(exact)
    assert_within(found if output == ADD else from_bf16(found), exact, allowed)
