"""What the host knows of a step, in one launch to where each piece of it belongs."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from numpy.typing import NDArray

from cuda_device import Device, DeviceError, Memory

WORD = 16  # bytes
MOST = 20  # pieces


def run(
    device: Device, n_words: list[int], *, times: int = 1
) -> tuple[list[NDArray[np.uint8]], list[NDArray[np.uint8]]]:
    """Return what was sent, and what lies where it belongs and one word behind it."""
    rng = np.random.default_rng(sum(n_words))
    places: list[Memory] = [device.put(np.full((n + 1) * WORD, 0xEE, np.uint8)) for n in n_words]
    to = (ctypes.c_void_p * max(1, len(n_words)))(*(place.address for place in places))
    sizes = np.array([*n_words, 0], np.int32)
    sent: list[NDArray[np.uint8]] = []
    for _ in range(times):
        sent = [rng.integers(0, 256, n * WORD).astype(np.uint8) for n in n_words]
        values = np.concatenate([*sent, np.zeros(1, np.uint8)])
        device.call("case_scatter", ctypes.c_void_p(values.ctypes.data), to,
                    ctypes.c_void_p(sizes.ctypes.data), len(n_words))  # fmt: skip
    return sent, [place.read() for place in places]


@pytest.mark.small
@pytest.mark.parametrize(
    "n_words", [[1], [3, 1, 2], [0, 5, 0, 0, 7], [256], [255, 2, 255, 513], [1] * MOST, [0], []]
)
@pytest.mark.parametrize("seed", range(3))
def test_pieces_come_where_they_belong(device: Device, n_words: list[int], seed: int) -> None:
    device.arrange(seed=seed)
    sent, found = run(device, n_words, times=2)
    for values, place in zip(sent, found, strict=True):
        np.testing.assert_array_equal(place[:-WORD], values)
        assert (place[-WORD:] == 0xEE).all()


def test_more_pieces_than_it_takes(device: Device) -> None:
    with pytest.raises(DeviceError, match=f"{MOST + 1} pieces of .* are too many"):
        run(device, [1] * (MOST + 1))
