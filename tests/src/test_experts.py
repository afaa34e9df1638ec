"""Dense and routed feed-forward (src/cpu/experts.cpp) against NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest

from camelid._core import testing
from weight_sources import plain

DIM, FFN, N_EXPERTS = 40, 24, 5
# SiLU and two products of at most 40 terms: a few float32 roundings of values of order one.
TOLERANCE = 2e-5


@pytest.fixture(params=testing.isas())
def isa(request: pytest.FixtureRequest) -> str:
    return request.param


def random_mlp(rng: np.random.Generator) -> tuple[tuple, tuple]:
    shapes = [(FFN, DIM), (FFN, DIM), (DIM, FFN)]
    pairs = [plain(rng.standard_normal(s).astype(np.float32) * 0.2) for s in shapes]
    return tuple(p[0] for p in pairs), tuple(p[1].astype(np.float64) for p in pairs)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def run_mlp(x: np.ndarray, mlp: tuple) -> np.ndarray:
    gate, up, down = mlp
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T


def run_experts(
    x: np.ndarray, router: np.ndarray, routed: list[tuple], shared: tuple, top_k: int
) -> np.ndarray:
    out = run_mlp(x, shared)
    logits = x @ router.T
    for t, row in enumerate(logits):
        for e in np.argsort(-row, kind="stable")[:top_k]:  # ties: the lowest index
            score = 1 / (1 + np.exp(-row[e]))
            out[t] += run_mlp(score * x[t : t + 1], routed[e])[0]
    return out


def make(rng: np.random.Generator) -> tuple:
    router_source, router = plain(rng.standard_normal((N_EXPERTS, DIM)).astype(np.float32))
    routed = [random_mlp(rng) for _ in range(N_EXPERTS)]
    return router_source, router.astype(np.float64), routed, random_mlp(rng)


@pytest.mark.parametrize("n_tokens", [1, 2, 6, 33])
def test_mlp_adds_to_the_residual(isa: str, n_tokens: int) -> None:
    rng = np.random.default_rng(n_tokens)
    sources, values = random_mlp(rng)
    x = rng.standard_normal((n_tokens, DIM)).astype(np.float32)
    y = rng.standard_normal((n_tokens, DIM)).astype(np.float32)
    expected = y + run_mlp(x.astype(np.float64), values)
    ops = testing.Ops(isa, threads=2)
    ops.mlp(y, x, ops.make_mlp(*sources))
    np.testing.assert_allclose(y, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("top_k", [1, 2, N_EXPERTS])
@pytest.mark.parametrize("n_tokens", [1, 2, 6, 33])
def test_experts_match_numpy(isa: str, n_tokens: int, top_k: int) -> None:
    rng = np.random.default_rng(n_tokens)
    router_source, router, routed, shared = make(rng)
    x = rng.standard_normal((n_tokens, DIM)).astype(np.float32)
    y = rng.standard_normal((n_tokens, DIM)).astype(np.float32)
    expected = y + run_experts(
        x.astype(np.float64), router, [m[1] for m in routed], shared[1], top_k
    )
    ops = testing.Ops(isa, threads=2)
    weights = ops.make_experts(router_source, [m[0] for m in routed], shared[0], top_k)
    ops.experts(y, x, weights)
    np.testing.assert_allclose(y, expected, atol=TOLERANCE, rtol=0)


def test_experts_break_ties_to_the_lowest_index(isa: str) -> None:
    rng = np.random.default_rng(1)
    _, _, routed, shared = make(rng)
    router_source, router = plain(np.zeros((N_EXPERTS, DIM), np.float32))
    x = rng.standard_normal((3, DIM)).astype(np.float32)
    y = np.zeros((3, DIM), np.float32)
    ops = testing.Ops(isa)
    ops.experts(y, x, ops.make_experts(router_source, [m[0] for m in routed], shared[0], 2))
    expected = run_experts(x.astype(np.float64), router, [m[1] for m in routed], shared[1], 2)
    np.testing.assert_allclose(y, expected, atol=TOLERANCE, rtol=0)


def test_experts_give_a_token_the_same_bits_in_any_batch(isa: str) -> None:
    rng = np.random.default_rng(2)
    router_source, _, routed, shared = make(rng)
    x = rng.standard_normal((40, DIM)).astype(np.float32)
    results = []
    for threads in (1, 4):
        ops = testing.Ops(isa, threads=threads)
        weights = ops.make_experts(router_source, [m[0] for m in routed], shared[0], 2)
        for batch in (40, 7, 1):
            y = np.ones((40, DIM), np.float32)
            for first in range(0, 40, batch):
                ops.experts(y[first : first + batch], x[first : first + batch], weights)
            results.append(y)
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_experts_survive_logits_that_are_not_numbers(isa: str) -> None:
    rng = np.random.default_rng(3)
    router_source, _, routed, shared = make(rng)
    x = np.full((2, DIM), np.nan, np.float32)
    y = np.zeros((2, DIM), np.float32)
    ops = testing.Ops(isa)
    ops.experts(y, x, ops.make_experts(router_source, [m[0] for m in routed], shared[0], 1))
    assert np.isnan(y).all()
