"""What the twin of hopper.cuh promises: right kernels are right, and mistakes are caught."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from emulated_build import EmulatorError, build, call

SOURCE = "tests/cuda/emulated/hopper_selftest.cu"
NONE, NO_START, NOT_SHOWN, NO_WAIT, EARLY_FRAGMENT, NO_BARRIER, EARLY_RELEASE = range(7)
SEEDS = range(9)


def products(
    columns: int, *, bug: int = NONE, seed: int = 0, watch: bool = True
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Sums of products of small integers, exact in float32, and NumPy's."""
    rng = np.random.default_rng(columns)
    n_steps, offset = 5, 32
    a = rng.integers(-8, 9, (n_steps, 64, 16)).astype(np.float32)
    b = rng.integers(-8, 9, (n_steps, columns, 64)).astype(np.float32)
    d = np.full((64, columns), np.nan, np.float32)
    bits = [(values.view(np.uint32) >> 16).astype(np.uint16) for values in (a, b)]
    library = build(SOURCE, watch=watch)
    call(library, "test_products", columns, bug, *bits, d, n_steps, offset, seed=seed)
    return d, np.einsum("srk,sck->rc", a, b[:, :, offset : offset + 16])


@pytest.mark.parametrize("columns", [64, 128, 256])
@pytest.mark.parametrize("seed", SEEDS)
def test_products_are_exact_in_every_order(columns: int, seed: int) -> None:
    d, expected = products(columns, seed=seed)
    np.testing.assert_array_equal(d, expected)


@pytest.mark.parametrize("columns", [64, 128, 256])
@pytest.mark.parametrize("n_steps", [1, 4])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_products_by_columns_are_exact(columns: int, n_steps: int, seed: int) -> None:
    rng = np.random.default_rng(columns)
    a = rng.integers(-8, 9, (n_steps, 64, 16)).astype(np.float32)
    b = rng.integers(-8, 9, (n_steps, 16, columns)).astype(np.float32)
    d = np.full((64, columns), np.nan, np.float32)
    bits = [(values.view(np.uint32) >> 16).astype(np.uint16) for values in (a, b)]
    call(build(SOURCE), "test_columns", columns, *bits, d, n_steps, seed=seed)
    np.testing.assert_array_equal(d, np.einsum("srk,skc->rc", a, b))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("bug", "message"),
    [
        (NO_START, "a product without start_products"),
        (NOT_SHOWN, "a product of what show_to_products"),
        # Or phases pass that nobody saw.
        (NO_BARRIER, "nothing orders this and the (read|copy|write)|memory that nobody changes"),
        (EARLY_RELEASE, "nothing orders this and the (read|copy|write)"),
    ],
)
def test_mistakes_are_named(bug: int, message: str, seed: int) -> None:
    if bug == EARLY_RELEASE and seed % 3 == 1:
        pytest.skip("products are executed at once, before the release")
    with pytest.raises(EmulatorError, match=message):
        products(64, bug=bug, seed=seed)


@pytest.mark.parametrize("bug", [NO_WAIT, EARLY_FRAGMENT, EARLY_RELEASE])
def test_mistakes_are_wrong_under_some_seed(bug: int) -> None:
    results = [products(64, bug=bug, seed=seed, watch=False) for seed in SEEDS]
    assert not all(np.array_equal(d, expected) for d, expected in results)


def test_a_phase_that_never_completes_is_named() -> None:
    library = build(SOURCE)
    call(library, "test_barrier", 64, 64, seed=1)
    with pytest.raises(EmulatorError, match="wait for memory that nobody changes"):
        call(library, "test_barrier", 64, 65)
