"""Grouped products against NumPy in float64, both kernels, all formats."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cuda_cases import ADD, GATE_UP, STORE_BF16, SWIGLU, bf16, from_bf16
from cuda_device import Device, DeviceError, emulated_device
from grouped_cases import Weights, list_tiles, make_weights, run_product


def pointer(array: NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


POISON = np.float32(np.nan)


@pytest.fixture(params=[False, True], ids=["sm80", "sm90"])
def hopper(request: pytest.FixtureRequest, device: Device) -> bool:
    if request.param and not device.is_hopper():
        pytest.skip("needs a Hopper GPU")
    return bool(request.param)


def make_x(rng: np.random.Generator, n_rows: int, inputs: int, stride: int) -> NDArray[np.uint16]:
    """Rows with NaNs behind them, which nobody may let into a sum."""
    x = np.full((n_rows, stride), 0x7FC0, np.uint16)
    x[:, :inputs] = bf16(rng.standard_normal((n_rows, inputs)))
    return x


def product(w: Weights, x: NDArray[np.uint16], expert: NDArray[Any]) -> tuple[Any, Any]:
    """Of each visit (a row of x and its expert) the product and how large its terms are."""
    inputs = w.shape.inputs
    rows = from_bf16(x)[:, :inputs].astype(np.float64)
    y = np.stack([w.values[e] @ row for e, row in zip(expert, rows, strict=True)])
    size = np.stack([abs(w.values[e]) @ abs(row) for e, row in zip(expert, rows, strict=True)])
    return y, size


def assert_close(y: NDArray[Any], expected: NDArray[Any], size: NDArray[Any], eps: float) -> None:
    error = abs(y - expected) / (size + 1e-30)
    worst = np.unravel_index(np.argmax(np.where(np.isnan(error), np.inf, error)), error.shape)
    assert error[worst] <= eps, f"{worst}: got {y[worst]}, expected {expected[worst]}"


# Sums of a few hundred float32 terms, each exact as a product: a few 2^-24 of their sizes.
EXACT = 1e-6
BF16 = 2.0**-8

FORMATS = [
    pytest.param({"bits": 4}, id="int4"),
    pytest.param({"bits": 8}, id="int8"),
    pytest.param({"bits": 4, "group": 256}, id="int4-256"),
    pytest.param({"bits": 4, "group": 64}, id="int4-64"),
    pytest.param({"bits": 4, "group": 32, "zeros": True}, id="int4-32-zeros"),
    pytest.param({"bits": 4, "zeros": True}, id="int4-zeros"),
    pytest.param({"bits": 8, "group": 32}, id="int8-32"),
    pytest.param({"bits": 8, "group": 64, "zeros": True}, id="int8-64-zeros"),
]


@pytest.mark.small
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_matrix_equals_float64(
    device: Device, hopper: bool, kind: dict[str, Any], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    n_rows, rows, inputs = [(70, 272, 256), (130, 24, 136), (3, 40, 512)][seed]
    w = make_weights(device, rng, n_experts=1, rows=rows, inputs=inputs, **kind)
    x = make_x(rng, n_rows, inputs, inputs + 8)
    y = np.full((n_rows, rows + 3), POISON)
    run_product(w, x, y, hopper=hopper, n_visits=n_rows, seed=seed)
    expected, size = product(w, x, np.zeros(n_rows, int))
    assert_close(y[:, :rows], expected, size, EXACT)
    assert np.isnan(y[:, rows:]).all()


@pytest.mark.parametrize("n_rows", [1, 63, 64, 65, 127, 128, 129, 300])
def test_any_number_of_rows_equals_float64(device: Device, hopper: bool, n_rows: int) -> None:
    rng = np.random.default_rng(n_rows)
    w = make_weights(device, rng, n_experts=1, rows=20, inputs=128)
    x = make_x(rng, n_rows, 128, 128)
    y = np.full((n_rows + 1, 20), POISON)
    run_product(w, x, y, hopper=hopper, n_visits=n_rows, seed=1)
    expected, size = product(w, x, np.zeros(n_rows, int))
    assert_close(y[:n_rows], expected, size, EXACT)
    assert np.isnan(y[n_rows:]).all()


COUNTS = [
    pytest.param([5, 0, 133, 1], id="some-empty"),
    pytest.param([0, 0, 0, 260], id="all-on-one"),
    pytest.param([0, 0, 0, 0], id="none"),
]


@pytest.mark.small
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("seed", "ffn"), [(0, 44), (1, 45), (2, 44)])
def test_experts_gather_and_swiglu(
    device: Device, hopper: bool, counts: list[int], seed: int, ffn: int
) -> None:
    rng = np.random.default_rng(seed)
    inputs, n_visits, n_tokens = 264, sum(counts), 90
    w = make_weights(device, rng, n_experts=4, rows=2 * ffn, inputs=inputs, order=GATE_UP)
    x = make_x(rng, n_tokens, inputs, inputs)
    tokens = rng.integers(0, n_tokens, n_visits).astype(np.int32)
    factors = rng.uniform(0, 1, n_visits).astype(np.float32)
    act = np.full((n_visits + 1, ffn + ffn % 2 + 4), 0x7FC0, np.uint16)
    run_product(
        w,
        x,
        act,
        hopper=hopper,
        output=SWIGLU,
        x_rows=np.append(tokens, -1).astype(np.int32),
        factors=np.append(factors, POISON).astype(np.float32),
        tiles=np.vstack([list_tiles(counts), np.full((1, 5), -1, np.int32)]),
        last_tile=len(list_tiles(counts)),
        seed=seed,
    )
    assert np.isnan(from_bf16(act[n_visits:])).all()
    assert np.isnan(from_bf16(act[:, ffn + ffn % 2 :])).all()  # bf16 is written in pairs
    if n_visits == 0:
        return
    both, _ = product(w, x[tokens], np.repeat(np.arange(4), counts))
    gate, up = np.split(both * factors[:, None].astype(np.float64), 2, axis=1)
    expected = gate / (1 + np.exp(-gate)) * up
    assert_close(from_bf16(act[:n_visits, :ffn]), expected, abs(expected) + 1e-3, BF16)


@pytest.mark.small
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_down_adds_each_visit_to_its_token(device: Device, hopper: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts, rows, inputs, n_tokens = [40, 0, 131, 64], 280, 128, 300
    w = make_weights(device, rng, n_experts=4, rows=rows, inputs=inputs, bits=8)
    x = make_x(rng, sum(counts), inputs, inputs)
    tokens = rng.permutation(n_tokens)[: sum(counts)].astype(np.int32)
    residual = rng.standard_normal((n_tokens, rows + 1)).astype(np.float32)
    y = residual.copy()
    run_product(
        w, x, y, hopper=hopper, output=ADD, y_rows=tokens, tiles=list_tiles(counts), seed=seed
    )
    added, size = product(w, x, np.repeat(np.arange(4), counts))
    expected, sizes = residual.astype(np.float64), abs(residual).astype(np.float64)
    expected[tokens, :rows] += added
    sizes[tokens, :rows] += size
    assert_close(y, expected, sizes, EXACT)
    untouched = np.setdiff1d(np.arange(n_tokens), tokens)
    np.testing.assert_array_equal(y[untouched], residual[untouched])


def test_part_of_the_tiles_is_computed(device: Device, hopper: bool) -> None:
    rng = np.random.default_rng(0)
    counts = [130, 7, 140]
    w = make_weights(device, rng, n_experts=3, rows=280, inputs=128)
    x = make_x(rng, sum(counts), 128, 128)
    y = np.full((sum(counts), 280), 0x7FC0, np.uint16)
    tiles = list_tiles(counts)
    run_product(w, x, y, hopper=hopper, output=STORE_BF16, tiles=tiles, first_tile=2, last_tile=5)
    expected, size = product(w, x, np.repeat(np.arange(3), counts))
    assert np.isnan(from_bf16(y[:130])).all()
    assert_close(from_bf16(y[130:]), expected[130:], abs(expected[130:]) + 1e-2 * size[130:], BF16)


def test_rows_do_not_depend_on_company(device: Device, hopper: bool) -> None:
    rng = np.random.default_rng(3)
    w = make_weights(device, rng, n_experts=1, rows=32, inputs=384)
    x = make_x(rng, 200, 384, 384)
    together, alone = np.zeros((200, 32), np.float32), np.zeros((200, 32), np.float32)
    run_product(w, x, together, hopper=hopper, n_visits=200)
    for row in (0, 64, 130, 199):
        run_product(w, x[row : row + 1].copy(), alone[row : row + 1], hopper=hopper, n_visits=1)
        np.testing.assert_array_equal(alone[row], together[row])


@pytest.mark.parametrize("n_row_blocks", [1, 15, 16, 17, 40])
def test_every_job_comes_once(n_row_blocks: int) -> None:
    tiles = list_tiles([300, 0, 1, 128, 1000])
    library, found = emulated_device().library, np.zeros(2, np.int32)
    jobs, number = [], 0
    while library.case_job(pointer(tiles), len(tiles), number, n_row_blocks, pointer(found)):
        jobs.append(tuple(found.tolist()))
        number += 1
    assert len(set(jobs)) == len(jobs) == len(tiles) * n_row_blocks
    assert {first for first, _ in jobs} == set(tiles[:, 1].tolist())
    assert {block for _, block in jobs} == set(range(n_row_blocks))


def test_what_cannot_be_is_refused(device: Device, hopper: bool) -> None:
    rng = np.random.default_rng(0)
    w = make_weights(device, rng, n_experts=1, rows=16, inputs=128)
    y = np.zeros((1, 16), np.float32)
    x = make_x(rng, 1, 128, 128)
    one: dict[str, Any] = {"hopper": hopper, "n_visits": 1}
    with pytest.raises(DeviceError, match=r"rows of x every 132 values; .* aligned"):
        run_product(w, make_x(rng, 1, 128, 132), y, **one)
    with pytest.raises(DeviceError, match="rows of y every 15 values"):
        run_product(w, x, y[:, :15].copy(), **one)
    with pytest.raises(DeviceError, match="SwiGLU"):
        run_product(w, x, y, output=SWIGLU, **one)
    with pytest.raises(DeviceError, match="an output that nobody knows"):
        run_product(w, x, y, output=4, **one)
    run_product(w, x, y, hopper=hopper, n_visits=0, output=4)  # nothing to do, nothing to refuse
    w.shape.entries = 0
    with pytest.raises(DeviceError, match="with 0 scales for 128 inputs"):
        run_product(w, x, y, **one)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("bits", [4, 8])
def test_ring_goes_round_many_times(device: Device, bits: int, seed: int) -> None:
    if not device.is_hopper():
        pytest.skip("needs a Hopper GPU")
    rng = np.random.default_rng(seed)
    counts, rows, inputs = [129, 64, 0, 10], 520, 1160
    w = make_weights(device, rng, n_experts=4, rows=rows, inputs=inputs, bits=bits)
    x = make_x(rng, sum(counts), inputs, inputs)
    y = np.full((sum(counts), rows), POISON)
    run_product(w, x, y, hopper=True, tiles=list_tiles(counts), multiprocessors=1, seed=seed)
    expected, size = product(w, x, np.repeat(np.arange(4), counts))
    assert_close(y, expected, size, EXACT)
