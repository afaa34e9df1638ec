"""What the emulator of CUDA promises the tests of kernels, mistakes it must catch included."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from emulated_build import EmulatorError, build, call

SELFTEST = "tests/cuda/emulated/selftest.cu"
SEEDS = range(12)
NO_BUG, NO_WAIT, NO_SYNC_BEFORE, NO_SYNC_AFTER = range(4)


@pytest.fixture
def emulated() -> Iterator[ctypes.CDLL]:
    library = build(SELFTEST)
    yield library
    library.emulated_multiprocessors(5)
    assert library.check_guards() == 0, library.emulated_error()


def pointer(array: np.ndarray[Any, Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def error_of(library: ctypes.CDLL, name: str, *arguments: Any, seed: int = 0) -> str:
    with pytest.raises(EmulatorError) as caught:
        call(library, name, *arguments, seed=seed)
    return str(caught.value)


def bf16(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The upper halves of float32 values, aligned to 16 bytes as copies need it."""
    halves = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return aligned(halves)


def aligned(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    room = np.zeros(array.nbytes + 16, np.uint8)
    start = -room.ctypes.data % 16
    placed = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    placed[...] = array
    return placed


# ---- a whole kernel ----


def product(library: ctypes.CDLL, bug: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The kernel's product of small integers, which is exact in float32, and NumPy's."""
    rng = np.random.default_rng(0)
    m, n, k = 128, 256, 64
    x = rng.integers(-8, 9, (m, k)).astype(np.float32)
    w = rng.integers(-8, 9, (n, k)).astype(np.float32)
    y = np.full((m, n), np.nan, np.float32)
    x_bits, w_bits = bf16(x), bf16(w)
    call(
        library,
        "test_matmul",
        bug,
        pointer(y),
        pointer(x_bits),
        pointer(w_bits),
        m,
        n,
        k,
        seed=seed,
    )
    return y, x @ w.T


@pytest.mark.parametrize("seed", SEEDS)
def test_matmul_is_exact_in_every_order(emulated: ctypes.CDLL, seed: int) -> None:
    y, expected = product(emulated, NO_BUG, seed)
    np.testing.assert_array_equal(y, expected)


def test_matmul_is_quick(emulated: ctypes.CDLL) -> None:
    start = time.process_time()
    product(emulated, NO_BUG, 0)
    assert time.process_time() - start < 1


@pytest.mark.parametrize("bug", [NO_WAIT, NO_SYNC_BEFORE, NO_SYNC_AFTER])
def test_matmul_with_a_bug_is_wrong_under_some_seed(emulated: ctypes.CDLL, bug: int) -> None:
    wrong = []
    for seed in SEEDS:
        y, expected = product(emulated, bug, seed)
        wrong.append(not np.array_equal(y, expected))
    print(wrong)
    assert any(wrong)
