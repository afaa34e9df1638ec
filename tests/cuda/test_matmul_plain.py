"""Products of bf16 matrices against NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest

from cuda_cases import (
    ADD,
    STORE,
    STORE_BF16,
    SWIGLU,
    assert_sums,
    empty_y,
    from_bf16,
    make_x,
)
from cuda_device import Device, DeviceError


@pytest.mark.small
@pytest.mark.parametrize("output", [STORE, STORE_BF16, ADD])
@pytest.mark.parametrize(
    ("n_tokens", "rows", "inputs"),
    [(1, 1, 1), (5, 300, 70), (129, 128, 256), (200, 130, 333), (260, 16, 64)],
)
def test_every_size(device: Device, n_tokens: int, rows: int, inputs: int, output: int) -> None:
    device.arrange(seed=rows + output)
    rng = np.random.default_rng(rows)
    x, w = make_x(rng, n_tokens, inputs), make_x(rng, rows, inputs)
    y = empty_y(n_tokens, rows, output)
    if output == ADD:
        y[:, :rows] = rng.standard_normal((n_tokens, rows))
    at = device.put(y)
    device.call(
        "run_matmul_plain", device.put(x), device.put(w), n_tokens, rows, inputs,
        x.shape[1], w.shape[1], at, y.shape[1], output,
    )  # fmt: skip
    found = at.read()
    np.testing.assert_array_equal(found[:, rows:], y[:, rows:])
    values, weights = (from_bf16(bits)[:, :inputs] for bits in (x, w))
    start = y[:, :rows] if output == ADD else 0.0
    assert_sums(found[:, :rows], values, weights, start, in_tensor_cores=not device.emulated)


# n_tokens, rows, inputs, strides of x and w, whether there is a y, its stride, output.
FINE = (8, 16, 64, 64, 64, True, 16, STORE)
WRONG = [
    ((1, 0), "wanted are sizes above 0"),
    ((3, 56), "rows of x every 56 values; wanted are rows of 64"),
    ((3, 68), "rows of x every 68 values; .* aligned"),
    ((4, 56), "rows of w every 56 values"),
    ((5, False), "rows of y every 16 values of no memory"),
    ((6, 15), "rows of y every 15 values; wanted are rows of 16"),
    ((7, 4), "an output that nobody knows"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_what_cannot_be_is_refused(device: Device, change: tuple[int, int], message: str) -> None:
    x = device.put(np.zeros((16, 64), np.uint16))
    call = list(FINE)
    call[change[0]] = change[1]
    *sizes, there, stride, output = call
    with pytest.raises(DeviceError, match=rf"\[cuda\] plain matmul: .*{message}"):
        device.call("run_matmul_plain", x, x, *sizes, x if there else None, stride, output)


def test_gates_without_ups_are_refused(device: Device) -> None:
    x = device.put(np.zeros((16, 64), np.uint16))
    with pytest.raises(DeviceError, match="as many gates as ups"):
        device.call("run_matmul_plain", x, x, 8, 15, 64, 64, 64, x, 64, SWIGLU)


def test_no_tokens_are_no_work(device: Device) -> None:
    device.call("run_matmul_plain", None, None, 0, 16, 64, 64, 64, None, 16, STORE)
