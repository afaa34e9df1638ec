"""Work on single rows (src/cpu/rows.inl) against NumPy in float64, on every ISA here."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from camelid._core import testing
from weight_sources import from_bf16, plain, to_bf16

# Around the 16 lanes of a vector and the four vectors of an unrolled loop.
DIMS = [1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 80, 100, 200]
EPS = 1e-5


@pytest.fixture(params=testing.isas())
def isa(request: pytest.FixtureRequest) -> str:
    return request.param


def rms_norm(x: np.ndarray, eps: float = EPS) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


@pytest.mark.parametrize("dim", DIMS)
def test_norm_matches_numpy(isa: str, dim: int) -> None:
    rng = np.random.default_rng(dim)
    x = rng.standard_normal((9, dim)).astype(np.float32)
    x[:3] *= np.array([[1e-3], [1e3], [1e15]], np.float32)
    x[3] = 0
    x[5] = np.nan  # its neighbours must not notice
    gain = rng.standard_normal(dim).astype(np.float32)
    with np.errstate(invalid="ignore"):
        expected = rms_norm(x) * gain
    got = testing.Ops(isa).norm(x, gain, EPS)
    # The sum's error is halved by the root; then four roundings.
    np.testing.assert_allclose(got, expected, rtol=(dim / 2 + 6) * 2**-24, atol=0)
    assert not got[3].any()


@pytest.mark.parametrize("dim", DIMS)
def test_layer_norm_matches_numpy(isa: str, dim: int) -> None:
    rng = np.random.default_rng(dim)
    x = rng.standard_normal((9, dim)).astype(np.float32)
    x[:3] = x[:3] * np.array([[1e-3], [1e3], [1]], np.float32) + np.array([[0], [0], [100]])
    x[3] = 0
    x[5] = np.nan  # its neighbours must not notice
    gain, bias = rng.standard_normal((2, dim)).astype(np.float32)
    wide = x.astype(np.float64)
    off = wide - wide.mean(axis=1, keepdims=True)
    expected = off / np.sqrt((off**2).mean(axis=1, keepdims=True) + EPS) * gain + bias
    got = testing.Ops(isa).layer_norm(x, gain, bias, EPS)
    # The mean errs by dim / 16 + 4 half-ulps of the largest value; dividing by a small deviation
    # magnifies that.
    deviation = np.sqrt((off**2).mean(axis=1, keepdims=True) + EPS)
    error = (dim / 16 + 16) * 2.0**-24 * (np.abs(wide).max(axis=1, keepdims=True) / deviation + 1)
    allowed = error * (np.abs(gain) + np.abs(expected)) + 2.0**-23 * np.abs(bias)
    assert np.isnan(got[5]).all()
    fine = np.arange(9) != 5
    assert (np.abs(got - expected)[fine] <= allowed[fine]).all()
    np.testing.assert_array_equal(got[3], bias)


@pytest.mark.parametrize("dim", [1, 15, 16, 17, 200])
def test_gelu_matches_erf(isa: str, dim: int) -> None:
    rng = np.random.default_rng(dim)
    x = np.concatenate([rng.standard_normal((40, dim)) * 3, np.full((1, dim), 30.0)])
    x = np.concatenate([x, np.full((1, dim), -30.0), np.zeros((1, dim))]).astype(np.float32)
    bias = rng.standard_normal(dim).astype(np.float32)
    z = (x + bias).astype(np.float64)
    expected = z / 2 * (1 + np.vectorize(math.erf)(z / np.sqrt(2)))
    got = testing.Ops(isa).gelu(x, bias)
    # erf within 1.5e-7, then some roundings of values up to |z|.
    np.testing.assert_allclose(got, expected, rtol=0, atol=3e-7 * (1 + np.abs(z).max()) / 4 + 1e-7)


def test_norm_reads_eps(isa: str) -> None:
    x = np.full((1, 20), 1e-3, np.float32)
    got = testing.Ops(isa).norm(x, np.ones(20, np.float32), 3e-6)
    np.testing.assert_allclose(got, 0.5, rtol=1e-6)


def silu(ops: testing.Ops, x: np.ndarray) -> np.ndarray:
    """silu of every value of a vector: an MLP whose gate copies the input and whose up is 1."""
    n = len(x)
    gate = np.eye(n, n + 1, dtype=np.float32)
    up = np.zeros((n, n + 1), np.float32)
    up[:, n] = 1
    down = np.eye(n + 1, n, dtype=np.float32)
    y = np.zeros((1, n + 1), np.float32)
    ops.mlp(
        y, np.append(x, np.float32(1))[None], ops.make_mlp(*(plain(m)[0] for m in (gate, up, down)))
    )
    assert y[0, n] == 0
    return y[0, :n]


@pytest.mark.parametrize("dim", DIMS)
def test_silu_matches_numpy(isa: str, dim: int) -> None:
    x = (np.random.default_rng(dim).standard_normal(dim) * 10).astype(np.float32)
    exact = x.astype(np.float64) / (1 + np.exp(-x.astype(np.float64)))
    # e^x within 2 ulp, an addition, a division, a product by one.
    np.testing.assert_allclose(silu(testing.Ops(isa), x), exact, rtol=6 * 2**-23, atol=0)


def test_silu_of_large_values_neither_overflows_nor_vanishes(isa: str) -> None:
    sizes = [0, 1e-30, 1e-4, 20, 80, 86, 87.3, 87.4, 88, 88.4, 88.7, 88.8, 89, 100, 1e4, 1e30, 3e38]
    x = np.array(sizes + [-s for s in sizes], np.float32)
    with np.errstate(over="ignore"):
        exact = x.astype(np.float64) / (1 + np.exp(-x.astype(np.float64)))
    # Below -87 the exact value is less than 1e-35: any value that small will do.
    np.testing.assert_allclose(silu(testing.Ops(isa), x), exact, rtol=6 * 2**-23, atol=1e-35)


N_HEADS, N_KV_HEADS = 4, 2


def finish(
    ops: testing.Ops,
    qkv: np.ndarray,
    *,
    rotation: np.ndarray | None = None,
    scale: np.ndarray | None = None,
    qk_norm: bool = False,
    kv_type: str = "f32",
) -> tuple[np.ndarray, np.ndarray]:
    """Store rows as the first tokens of a sequence; return them finished, and the attention."""
    head_dim = qkv.shape[1] // (N_HEADS + 2 * N_KV_HEADS)
    layer = {
        "kv_layer": 0, "n_heads": N_HEADS, "n_kv_heads": N_KV_HEADS, "head_dim": head_dim,
        "page_size": 16, "n_layers": 1, "type": kv_type, "qk_norm": qk_norm, "eps": EPS,
    }  # fmt: skip
    n_pages = -(-len(qkv) // 16)
    page_bytes = ops.page_bytes(16, 1, N_KV_HEADS, head_dim, kv_type)
    pages = np.full((n_pages, page_bytes), 0xFF, np.uint8)
    spans = [(0, len(qkv), 0, np.arange(n_pages, dtype=np.int32))]
    finished = qkv.copy()
    y = ops.attention(finished, pages, layer, spans, rotation, scale)
    return finished, y


@pytest.mark.parametrize("head_dim", [2, 8, 24, 80, 128])
@pytest.mark.parametrize(
    ("rotate", "qk_norm", "scaled"), list(itertools.product([False, True], repeat=3))
)
def test_store_rotates_then_normalises_then_scales(
    isa: str, rotate: bool, qk_norm: bool, scaled: bool, head_dim: int
) -> None:
    rng = np.random.default_rng(head_dim)
    n_tokens, n_keyed = 20, N_HEADS + N_KV_HEADS
    qkv = rng.standard_normal((n_tokens, (n_keyed + N_KV_HEADS) * head_dim)).astype(np.float32)
    # Not of length one, so that the order of steps shows.
    rotation = rng.standard_normal((n_tokens, head_dim // 2, 2)).astype(np.float32)
    scale = rng.uniform(1, 3, n_tokens).astype(np.float32)
    got, _ = finish(
        testing.Ops(isa, threads=2), qkv, rotation=rotation if rotate else None,
        scale=scale if scaled else None, qk_norm=qk_norm,
    )  # fmt: skip

    x = qkv.reshape(n_tokens, -1, head_dim)[:, :n_keyed].astype(np.float64)
    if rotate:
        pairs = x[..., 0::2] + 1j * x[..., 1::2]
        pairs *= (rotation[..., 0] + 1j * rotation[..., 1])[:, None]
        x = np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)
    if qk_norm:
        x = rms_norm(x)
    if scaled:
        x[:, :N_HEADS] *= scale[:, None, None]
    keyed = n_keyed * head_dim
    # Values of order ten at most after a handful of roundings and one sum over head_dim.
    np.testing.assert_allclose(got[:, :keyed], x.reshape(n_tokens, -1), rtol=2e-5, atol=3e-6)
    np.testing.assert_array_equal(got[:, keyed:], qkv[:, keyed:])


def test_store_rounds_to_bf16_as_ieee_754(isa: str) -> None:
    ties = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF], np.uint32).view(np.float32)
    special = np.array([0.0, -0.0, 1e-40, -3e-39, 3.4e38, -3.4028235e38, np.inf, -np.inf, np.nan])
    values = np.concatenate([ties, -ties, special.astype(np.float32)])
    head_dim = len(values) + len(values) % 2
    qkv = np.zeros((1, N_HEADS + 2 * N_KV_HEADS, head_dim), np.float32)
    qkv[0, -N_KV_HEADS:, : len(values)] = values
    # A single key has all the weight, so the result is the value as stored.
    _, y = finish(testing.Ops(isa), qkv.reshape(1, -1), kv_type="bf16")
    for head in y.reshape(N_HEADS, head_dim):
        np.testing.assert_array_equal(head[: len(values)], from_bf16(to_bf16(values)))


def test_rows_give_the_same_bits_whatever_the_threads(isa: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 200)).astype(np.float32)
    gain = rng.standard_normal(200).astype(np.float32)
    one = testing.Ops(isa, threads=1).norm(x, gain, EPS)
    np.testing.assert_array_equal(testing.Ops(isa, threads=5).norm(x, gain, EPS), one)
    np.testing.assert_array_equal(testing.Ops(isa).norm(x[77:78].copy(), gain, EPS), one[77:78])
