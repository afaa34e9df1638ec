"""Products of bf16 matrices against NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest

from cuda_cases import (
    ADD,
    STORE,
    STORE_BF16,
    assert_sums,
    empty_y,
    from_bf16,
    make_x,
)
from cuda_device import Device, DeviceError


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
    assert_sums(found[:, :rows], values, weights, y[:, :rows] if output == ADD else 0.0)


def test_gated_output_is_refused(device: Device) -> None:
    x = device.put(np.zeros((8, 64), np.uint16))
    with pytest.raises(DeviceError, match=r"\[cuda\] .*plain"):
        device.call("run_matmul_plain", x, x, 8, 8, 64, 64, 64, x, 64, 3)
