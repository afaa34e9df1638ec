"""Attention over pages (src/cpu/attention.inl): every ISA here against NumPy in float64.

Every byte of the pages starts as 0xff, a NaN in either type: a slot that was never written, or a
page of someone else, that reaches a result makes it NaN.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from camelid._core import testing
from weight_sources import from_bf16, to_bf16

LENGTHS = [1, 15, 16, 17, 63, 64, 65, 200]
HEADS = [(1, 1), (10, 2), (8, 8), (5, 1), (6, 3), (7, 7), (8, 1), (9, 3), (10, 5), (2, 1), (4, 4)]
KV_TYPES = ["f32", "bf16", "int8"]
HEAD_DIMS = [2, 8, 24, 64, 80, 128]


# An instruction set; "-fast": queries and weights rounded to bf16 where the cache is bf16.
FAST = [f"{isa}-fast" for isa in testing.isas() if isa == "avx512bf16"]


@pytest.fixture(scope="module", params=[*testing.isas(), *FAST])
def isa(request: pytest.FixtureRequest) -> str:
    return request.param


def make_ops(isa: str, threads: int = 1) -> testing.Ops:
    return testing.Ops(isa.removesuffix("-fast"), threads, fast=isa in FAST)


@dataclass
class Layer:
    """The shape of one attention layer."""

    n_heads: int = 5
    n_kv_heads: int = 1
    head_dim: int = 24
    page_size: int = 16
    type: str = "f32"
    kv_layer: int = 0
    n_layers: int = 1
    qk_norm: bool = False
    eps: float = 1e-5

    @property
    def width(self) -> int:
        return (self.n_heads + 2 * self.n_kv_heads) * self.head_dim

    def split(self, qkv: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """q, k, v [n_tokens, heads, head_dim], keys and values as a page would hold them."""
        heads = qkv.reshape(len(qkv), -1, self.head_dim)
        stored = heads[:, self.n_heads :]
        if self.type == "bf16":
            stored = from_bf16(to_bf16(np.ascontiguousarray(stored)))
        elif self.type == "int8":
            largest = np.abs(stored).max(axis=2, keepdims=True)
            integers = np.rint(stored * (np.float32(127) / largest))
            stored = integers * (largest / np.float32(127))
        return heads[:, : self.n_heads], stored[:, : self.n_kv_heads], stored[:, self.n_kv_heads :]


@dataclass
class Kv:
    """Poisoned pages and the shuffled page tables of several sequences."""

    ops: testing.Ops
    layer: Layer
    lengths: list[int]
    pages: np.ndarray = field(init=False)
    tables: list[np.ndarray] = field(init=False)
    done: list[int] = field(init=False)

    def __post_init__(self) -> None:
        layer = self.layer
        page_bytes = self.ops.page_bytes(
            layer.page_size, layer.n_layers, layer.n_kv_heads, layer.head_dim, layer.type
        )
        needed = [-(-length // layer.page_size) for length in self.lengths]
        n_pages = sum(needed) + 3  # some are nobody's
        self.pages = np.full((n_pages, page_bytes), 0xFF, np.uint8)
        order = np.random.default_rng(n_pages).permutation(n_pages).astype(np.int32)
        ends = np.cumsum(needed)
        self.tables = [order[end - n : end] for end, n in zip(ends, needed, strict=True)]
        self.done = [0] * len(self.lengths)

    def step(self, turns: list[tuple[int, np.ndarray]]) -> list[np.ndarray]:
        """Feed (sequence, qkv rows) pairs as one step; return each pair's result."""
        spans = []
        first_row = 0
        for sequence, rows in turns:
            spans.append((first_row, len(rows), self.done[sequence], self.tables[sequence]))
            self.done[sequence] += len(rows)
            first_row += len(rows)
        qkv = np.concatenate([rows for _, rows in turns])
        y = self.ops.attention(qkv, self.pages, vars(self.layer), spans)
        return np.split(y, np.cumsum([len(rows) for _, rows in turns])[:-1])


def random_qkv(layer: Layer, n_tokens: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n_tokens, layer.width)).astype(np.float32)


def attend(
    ops: testing.Ops, layer: Layer, qkv: np.ndarray, cuts: list[int] | None = None
) -> np.ndarray:
    """Run one sequence, cut into steps of the given numbers of tokens."""
    kv = Kv(ops, layer, [len(qkv)])
    parts = np.split(qkv, np.cumsum(cuts or [len(qkv)])[:-1])
    return np.concatenate([kv.step([(0, part)])[0] for part in parts])


def reference(layer: Layer, qkv: np.ndarray, isa: str = "") -> tuple[np.ndarray, np.ndarray]:
    """The result in float64 and the error float32 may make of it.

    A score is a float32 chain of head_dim terms: it errs by head_dim + 2 half-ulps of the sum of
    magnitudes. An error e of the scores changes a weight by the factor 1 + 2 e, the sums over keys
    and the merging of strips add a half-ulp each. Pages of bf16 allow no more: the reference
    rounds keys and values as they do. So it does for int8, whose scores and weights are integers
    up to 32639: half a unit of each query element, and of each weight beside the largest of its
    strip, which is no more than the sum of all. Rounding to bf16 changes an element of a query or a
    weight by 2^-8 of it at most.
    """
    q, k, v = (x.astype(np.float64) for x in layer.split(qkv))
    group = layer.n_heads // layer.n_kv_heads
    k, v = k.repeat(group, axis=1), v.repeat(group, axis=1)
    scale = layer.head_dim**-0.5
    scores = np.einsum("qhd,khd->hqk", q, k) * scale
    magnitudes = np.einsum("qhd,khd->hqk", np.abs(q), np.abs(k)) * scale
    masked = np.triu(np.ones((len(qkv), len(qkv)), bool), 1)
    scores[:, masked] = -np.inf
    magnitudes[:, masked] = 0
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    weights /= weights.sum(axis=2, keepdims=True)
    half_ulps = 2 * (layer.head_dim + 2) * magnitudes.max(axis=2) + np.arange(len(qkv)) + 8
    error = half_ulps.T * 2.0**-24 * np.abs(v).max()
    if layer.type == "int8":
        unit = np.abs(q).max(axis=2) / 32639
        of_scores = scale * unit / 2 * np.abs(k).sum(axis=2).max()
        of_weights = len(qkv) / 32639 / 2
        error = error + (2 * of_scores + of_weights) * np.abs(v).max()
    elif layer.type == "bf16" and isa in FAST:
        of_scores = 2.0**-8 * magnitudes.max(axis=2).T
        error = error + (2 * of_scores + 2 * 2.0**-8) * np.abs(v).max()
    y = np.einsum("hqk,khd->qhd", weights, v)
    return y.reshape(len(qkv), -1), np.repeat(error, layer.head_dim, axis=1)


def assert_close(got: np.ndarray, layer: Layer, qkv: np.ndarray, isa: str) -> None:
    """Compare with the reference; on failure name the worst element and both bit patterns."""
    expected, allowed = reference(layer, qkv, isa)
    excess = np.abs(got - expected) / allowed
    worst = np.unravel_index(np.argmax(np.where(np.isnan(excess), np.inf, excess)), got.shape)
    a, b = np.float32(got[worst]), np.float32(expected[worst])
    assert excess[worst] <= 1, (
        f"{layer} at {worst}: got {a} ({a.view(np.uint32):08x}), "
        f"expected {b} ({b.view(np.uint32):08x})"
    )


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_attend_matches_numpy(isa: str, kv_type: str, head_dim: int) -> None:
    ops = make_ops(isa)
    # Heads and page sizes go round at different speeds, so that most pairs with a length occur.
    turn = HEAD_DIMS.index(head_dim) + len(HEAD_DIMS) * KV_TYPES.index(kv_type)
    for i, length in enumerate(LENGTHS):
        n_heads, n_kv_heads = HEADS[(turn + i) % len(HEADS)]
        page_size = (16, 32, 64)[(turn + i) % 3]
        layer = Layer(n_heads, n_kv_heads, head_dim, page_size, kv_type)
        qkv = random_qkv(layer, length, seed=length)
        assert_close(attend(ops, layer, qkv), layer, qkv, isa)


@pytest.mark.parametrize("page_size", [16, 48, 80, 128])
def test_attend_decodes_one_token_after_any_length(isa: str, page_size: int) -> None:
    layer = Layer(6, 2, 40, page_size)
    qkv = random_qkv(layer, 131)
    kv = Kv(make_ops(isa), layer, [131])
    rows = [kv.step([(0, row)])[0] for row in np.split(qkv, len(qkv))]
    assert_close(np.concatenate(rows), layer, qkv, isa)


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("head_dim", [2, 40, 128])
@pytest.mark.parametrize("page_size", [16, 64, 96])
def test_attend_bits_do_not_depend_on_cuts(
    isa: str, page_size: int, head_dim: int, kv_type: str
) -> None:
    layer = Layer(10, 2, head_dim, page_size, kv_type)
    n_tokens = 150
    qkv = random_qkv(layer, n_tokens)
    whole = attend(make_ops(isa), layer, qkv)
    for cuts in ([1] * n_tokens, [7] * 21 + [3], [17, 16, 15, 1, 64, 37], [149, 1], [1, 149]):
        for threads in (1, 3):
            np.testing.assert_array_equal(attend(make_ops(isa, threads), layer, qkv, cuts), whole)


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("page_size", [48, 64])
def test_attend_merges_pieces_of_keys_alike_however_they_are_shared_out(
    isa: str, page_size: int, kv_type: str
) -> None:
    layer = Layer(2, 1, 8, page_size, kv_type)
    qkv = random_qkv(layer, 2100)  # pieces of 1024 keys: two whole ones and a part
    whole = attend(make_ops(isa), layer, qkv)
    assert_close(whole, layer, qkv, isa)
    for cuts in ([2099, 1], [1023, 1, 1, 1023, 1, 50, 1], [1000, 1030, 69, 1]):
        for threads in (1, 2, 5):  # few rows on many threads: pieces are tasks of their own
            got = attend(make_ops(isa, threads), layer, qkv, cuts)
            np.testing.assert_array_equal(got, whole)


@pytest.mark.parametrize("first_index", [65_535, 65_536, 67_583, 140_000])
def test_attend_reads_every_key_once_where_pieces_grow(isa: str, first_index: int) -> None:
    # All entries of the page table but the last are one page, so many keys cost little.
    layer = Layer(1, 1, 16, 64)
    kv = Kv(make_ops(isa, threads=2), layer, [64, 64])
    qkv = random_qkv(layer, 64)
    kv.step([(0, qkv)])
    kv.tables[1] = np.append(kv.tables[0].repeat(first_index // 64), kv.tables[1])
    n_last = first_index % 64
    kv.done[1] = first_index - n_last
    last = random_qkv(layer, n_last + 1, seed=1)
    got = kv.step([(1, last)])[0][-1]
    q, k, v = (x[:, 0].astype(np.float64) for x in layer.split(np.concatenate([qkv, last])))
    counts = np.append(np.full(64, first_index // 64), np.ones(n_last + 1))
    weights = counts * np.exp(k @ q[-1] / 4)
    np.testing.assert_allclose(got, weights @ v / weights.sum(), atol=3e-6, rtol=0)


def test_attend_bits_do_not_depend_on_other_sequences(isa: str) -> None:
    layer = Layer(4, 2, 24, 16)
    lengths = [70, 5, 33, 1]
    sequences = [random_qkv(layer, n, seed=n) for n in lengths]
    alone = [attend(make_ops(isa), layer, qkv) for qkv in sequences]
    kv = Kv(make_ops(isa, threads=2), layer, lengths)
    got: list[list[np.ndarray]] = [[] for _ in lengths]
    for turn in ([(2, 20), (0, 19)], [(1, 5), (0, 1), (2, 1)], [(0, 50), (3, 1), (2, 12)]):
        rows = [(s, sequences[s][kv.done[s] : kv.done[s] + n]) for s, n in turn]
        for (s, _), y in zip(rows, kv.step(rows), strict=True):
            got[s].append(y)
    for parts, expected in zip(got, alone, strict=True):
        np.testing.assert_array_equal(np.concatenate(parts), expected)


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_attend_keeps_layers_of_a_page_apart(isa: str, kv_type: str) -> None:
    layers = [Layer(3, 3, 24, 16, kv_type, kv_layer=i, n_layers=3) for i in range(3)]
    inputs = [random_qkv(layer, 40, seed=i) for i, layer in enumerate(layers)]
    kv = Kv(make_ops(isa), layers[0], [40])
    for first, end in ((0, 33), (33, 40)):
        for layer, qkv in zip(layers, inputs, strict=True):
            kv.layer, kv.done = layer, [first]
            (y,) = kv.step([(0, qkv[first:end])])
            alone = attend(kv.ops, Layer(3, 3, 24, 16, kv_type), qkv)
            np.testing.assert_array_equal(y, alone[first:end])


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("head_dim", [2, 24, 128])
def test_attend_is_causal_even_for_keys_that_are_not_numbers(
    isa: str, head_dim: int, kv_type: str
) -> None:
    layer = Layer(6, 2, head_dim, 32, kv_type)
    qkv = random_qkv(layer, 70)
    expected = attend(make_ops(isa), layer, qkv)
    for bad in (np.nan, np.inf, -np.inf):
        poisoned = qkv.copy()
        poisoned[41:, layer.n_heads * head_dim :] = bad
        np.testing.assert_array_equal(attend(make_ops(isa), layer, poisoned)[:41], expected[:41])


def test_attend_keeps_values_that_are_not_numbers_in_their_sequence(isa: str) -> None:
    layer = Layer(2, 1, 24, 16)
    healthy = random_qkv(layer, 20)
    expected = attend(make_ops(isa), layer, healthy)
    kv = Kv(make_ops(isa), layer, [20, 20])
    sick, well = kv.step([(0, np.full_like(healthy, np.nan)), (1, healthy)])
    assert np.isnan(sick).all()
    np.testing.assert_array_equal(well, expected)


@pytest.mark.parametrize("head_dim", [2, 64])
@pytest.mark.parametrize("score", [1e4, -1e4, 3e4])
def test_attend_survives_huge_scores(isa: str, score: float, head_dim: int) -> None:
    layer = Layer(4, 2, head_dim, 16)
    size = np.sqrt(abs(score) * head_dim**-0.5)
    qkv = random_qkv(layer, 100)
    assert_close(
        attend(make_ops(isa), layer, qkv * np.float32(50)), layer, qkv * np.float32(50), isa
    )
    qkv[:, : 4 * head_dim] = size
    qkv[:, 4 * head_dim : 6 * head_dim] = np.copysign(size, score)
    got = attend(make_ops(isa), layer, qkv)  # all scores alike: the mean of the values
    _, _, v = layer.split(qkv)
    means = np.cumsum(v.astype(np.float64), axis=0) / np.arange(1, 101)[:, None, None]
    np.testing.assert_allclose(got, means.repeat(2, axis=1).reshape(100, -1), atol=2e-6, rtol=0)


def test_attend_follows_a_maximum_that_moves(isa: str) -> None:
    # Each key beats all before it by far, then the order is reversed: the sums are rescaled to
    # nothing by every page, or by none.
    layer = Layer(1, 1, 16, 16)
    rising = np.linspace(-300, 300, 120, dtype=np.float32)
    for scores in (rising, rising[::-1], np.abs(rising)):
        qkv = random_qkv(layer, 120)
        qkv[:, :32] = 0
        qkv[:, 0] = 4  # times head_dim^-0.5: one
        qkv[:, 16] = scores
        assert_close(attend(make_ops(isa), layer, qkv), layer, qkv, isa)


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_attend_forgives_a_large_value_that_gets_no_weight(isa: str, kv_type: str) -> None:
    layer = Layer(4, 2, 64, 64, kv_type)
    qkv = random_qkv(layer, 60)
    n_queried = layer.n_heads * layer.head_dim
    n_keyed = (layer.n_heads + layer.n_kv_heads) * layer.head_dim
    qkv[:, :n_queried] = np.abs(qkv[:, :n_queried])
    qkv[20, n_queried:n_keyed] = -30  # scores of minus hundreds
    qkv[20, n_keyed:] *= 1000
    expected, _ = reference(layer, qkv)
    got = attend(make_ops(isa), layer, qkv)
    others = np.arange(60) != 20
    # Of the others' values, of size one: an int8 one is off by 1/254 of its largest, bf16 by 2^-8.
    np.testing.assert_allclose(got[others], expected[others], atol=0.02, rtol=0)


@pytest.mark.parametrize("head_dim", [2, 8, 24, 128])
def test_attend_returns_the_value_of_a_single_token(isa: str, head_dim: int) -> None:
    for kv_type in KV_TYPES:
        layer = Layer(2, 2, head_dim, 16, kv_type)
        qkv = random_qkv(layer, 1)
        _, _, v = layer.split(qkv)
        ulps = 2 * 2.0**-23 if kv_type == "int8" else 0  # of the product of two scales
        np.testing.assert_allclose(
            attend(make_ops(isa), layer, qkv), v.reshape(1, -1), rtol=ulps, atol=0
        )
