"""Routing of many tokens against NumPy, and a whole layer of experts."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cuda_cases import ADD, EXP_ERROR, GATE_UP, STORE, SWIGLU, bf16, from_bf16
from cuda_device import Device, DeviceError
from grouped_cases import TILE_TOKENS, Route, Routes, Weights, make_weights, run_product


def choose(logits: NDArray[np.float32], top_k: int) -> NDArray[np.int64]:
    """The top-k experts of each token, ascending; of equal logits the lower index wins."""
    return np.sort(np.argsort(-logits, axis=1, kind="stable")[:, :top_k], axis=1)


def check(
    device: Device, logits: NDArray[np.float32], top_k: int, *, shared: bool, seed: int = 0
) -> None:
    n_tokens, n_experts = logits.shape
    routes = Routes(device, logits, top_k, shared=shared, seed=seed)
    experts = choose(logits, top_k)
    n_shared = n_tokens if shared else 0
    order = np.argsort(experts.reshape(-1), kind="stable")  # by expert, then token
    tokens = order // top_k
    np.testing.assert_array_equal(routes.token[:n_shared], np.arange(n_shared))
    np.testing.assert_array_equal(routes.token[n_shared:], tokens)
    np.testing.assert_array_equal(routes.factor[:n_shared], 1)
    with np.errstate(over="ignore"):
        scores = 1 / (1 + np.exp(-np.take_along_axis(logits, experts, 1).astype(np.float64)))
    factors = scores.reshape(-1)[order]
    np.testing.assert_allclose(routes.factor[n_shared:], factors, rtol=EXP_ERROR)
    visits = np.empty(n_tokens * top_k, np.int64)
    visits[order] = n_shared + np.arange(n_tokens * top_k)
    np.testing.assert_array_equal(routes.visits.reshape(-1), visits)

    counts = np.bincount(experts.reshape(-1), minlength=n_experts).tolist()
    tiles, first = [], 0
    for group, n in enumerate([n_tokens] * shared + counts):
        group_tile, group_n = len(tiles), -(-n // TILE_TOKENS)
        tiles += [
            (group, first + start, min(TILE_TOKENS, n - start), group_tile, group_n)
            for start in range(0, n, TILE_TOKENS)
        ]
        first += n
    assert [tuple(tile) for tile in routes.tiles.tolist()] == tiles
    shared_tiles = -(-n_shared // TILE_TOKENS)
    assert routes.tile_ends.tolist() == [0, shared_tiles, len(tiles)]


@pytest.mark.parametrize("n_tokens", [1, 127, 128, 129, 1000])
@pytest.mark.parametrize(("n_experts", "top_k"), [(1, 1), (16, 1), (16, 2), (128, 1), (256, 8)])
def test_routes_equal_numpy(device: Device, n_tokens: int, n_experts: int, top_k: int) -> None:
    rng = np.random.default_rng(n_tokens)
    logits = rng.standard_normal((n_tokens, n_experts)).astype(np.float32)
    check(device, logits, top_k, shared=n_tokens % 2 == 1, seed=n_tokens % 3)


@pytest.mark.small
@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_ties_go_to_the_lower_expert(device: Device, top_k: int) -> None:
    rng = np.random.default_rng(top_k)
    check(device, rng.integers(0, 3, (200, 48)).astype(np.float32), top_k, shared=False, seed=1)
    check(device, np.zeros((70, 48), np.float32), top_k, shared=True)


@pytest.mark.small
@pytest.mark.parametrize("expert", [0, 7, 15])
def test_all_tokens_on_one_expert(device: Device, expert: int) -> None:
    logits = np.full((700, 16), -np.inf, np.float32)
    logits[:, expert] = 100
    check(device, logits, 1, shared=False)


def test_skewed_experts_and_many_blocks(device: Device) -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((5000, 16)) + np.array([3, 2] + [0] * 14)
    check(device, logits.astype(np.float32), 1, shared=True, seed=2)


def test_nan_logits_still_choose_different_experts(device: Device) -> None:
    logits = np.full((140, 20), np.nan, np.float32)
    logits[::2, ::3] = 1
    routes = Routes(device, logits, 4, shared=False)
    n_of = np.zeros(20, int)
    for group, _, n, _, _ in routes.tiles.tolist():
        n_of[group] += n
    assert n_of.sum() == 140 * 4
    expert = np.repeat(np.arange(20), n_of)[routes.visits]
    assert (np.diff(expert, axis=1) > 0).all()


def test_no_tokens_are_no_work(device: Device) -> None:
    nothing = device.reserve(1)
    for shared in (0, 1):
        shape = Route(0, 4, 1, shared)
        device.call("case_route", shape, None, nothing)
        device.call("case_combine", shape, nothing, None, ctypes.c_int64(8), None,
                    ctypes.c_int64(8), 8)  # fmt: skip


@pytest.mark.parametrize(("strides", "message"), [((4, 8), "overlap"), ((10, 8), "four values")])
def test_rows_that_cannot_be_combined_are_refused(
    device: Device, strides: tuple[int, int], message: str
) -> None:
    routes = Routes(device, np.zeros((2, 4), np.float32), 1, shared=False)
    rows = [np.zeros((2, stride), np.float32) for stride in strides]
    with pytest.raises(DeviceError, match=message):
        routes.combine(*rows, 8)


def test_what_cannot_be_is_refused(device: Device) -> None:
    with pytest.raises(DeviceError, match="1 to 256 experts"):
        Routes(device, np.zeros((1, 257), np.float32), 1, shared=False)
    with pytest.raises(DeviceError, match="1 to 8 experts"):
        Routes(device, np.zeros((1, 4), np.float32), 5, shared=False)


# ---- a layer's experts, from logits to residual ----


def expected_layer(
    x: NDArray[np.uint16], logits: NDArray[np.float32], top_k: int, ws: tuple[Weights, Weights]
) -> NDArray[np.float64]:
    gate_up, down = (w.values for w in ws)  # expert 0 is the shared one
    rows = from_bf16(x).astype(np.float64)
    y = np.zeros((len(x), down.shape[1]))
    for t, chosen in enumerate(choose(logits, top_k)):
        for group, f in [(0, 1.0), *((e + 1, 1 / (1 + np.exp(-logits[t, e]))) for e in chosen)]:
            gate, up = np.split(f * (gate_up[group] @ rows[t]), 2)
            act = gate / (1 + np.exp(-gate)) * up
            y[t] += down[group] @ from_bf16(bf16(act)).astype(np.float64)
    return y


@pytest.mark.small
@pytest.mark.parametrize("hopper", [False, True], ids=["sm80", "sm90"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_layer_of_experts_equals_float64(device: Device, hopper: bool, top_k: int) -> None:
    if hopper and not device.is_hopper():
        pytest.skip("needs a Hopper GPU")
    rng = np.random.default_rng(top_k)
    n_tokens, n_experts, dim, ffn = 150, 4, 136, 72
    n = n_experts + 1
    gate_up = make_weights(device, rng, n_experts=n, rows=2 * ffn, inputs=dim, order=GATE_UP)
    down = make_weights(device, rng, n_experts=n, rows=dim, inputs=ffn)
    x = bf16(rng.standard_normal((n_tokens, dim)) / 8)
    logits = rng.standard_normal((n_tokens, n_experts)).astype(np.float32)
    residual = rng.standard_normal((n_tokens, dim)).astype(np.float32)
    routes = Routes(device, logits, top_k, shared=True)
    tiles = routes.tiles.copy()
    _, shared_end, end = routes.tile_ends.tolist()
    both: dict[str, Any] = {"hopper": hopper, "tiles": tiles}

    act = np.full((len(routes.token), ffn), 0x7FC0, np.uint16)
    tokens, factors = routes.token.copy(), routes.factor.copy()
    run_product(gate_up, x, act, output=SWIGLU, x_rows=tokens, factors=factors, **both)
    y = residual.copy()
    if top_k == 1:  # a token's two visits are added by two launches
        run_product(down, act, y, output=ADD, y_rows=tokens, last_tile=shared_end, **both)
        run_product(down, act, y, output=ADD, y_rows=tokens, first_tile=shared_end, **both)
    else:
        rows = np.full((len(routes.token), dim), np.nan, np.float32)
        run_product(down, act, rows, output=STORE, **both)
        routes.combine(rows, y, dim)
    assert end == len(tiles)
    # The kernel's activations round to bf16 next to where NumPy's do: 2^-9 of some of their terms.
    expected = residual + expected_layer(x, logits, top_k, (gate_up, down))
    scale = abs(expected - residual).max()
    np.testing.assert_allclose(y, expected, atol=1e-3 * scale)
