"""The best logits of each row, and the sum of all, against NumPy."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cuda_device import Device, DeviceError

Array = NDArray[Any]
MOST = 128
LLAMA = 202_048
TOP = np.dtype(
    [("logits", np.float32, MOST), ("tokens", np.int32, MOST), ("sum", np.float32),
     ("scaled_sum", np.float32), ("n", np.int32), ("not_finite", np.int32),
     ("drawn", np.int32), ("drawn_logit", np.float32)]
)  # fmt: skip
# Of exp, twice for each term; those far below the best, where exp_fast is worse, count for little.
SUM_ERROR = 2.0**-17


def run(
    device: Device,
    logits: Array,
    *,
    padding: int = 0,
    times: int = 1,
    uniforms: NDArray[np.float32] | None = None,
) -> Array:
    """Return what is found of each row; NaNs and bytes of ones lie where nothing may be read."""
    n_rows, vocab = logits.shape
    rows = np.full((n_rows, vocab + padding), np.nan, np.float32)
    rows[:, :vocab] = logits
    scratch_bytes = device.library.case_top_logits_bytes
    scratch_bytes.restype = ctypes.c_int64
    out = device.put(np.full(n_rows * TOP.itemsize, 0xFF, np.uint8))
    scratch = device.put(np.full(scratch_bytes(n_rows, vocab), 0xFF, np.uint8))
    counters = device.put(np.zeros(n_rows, np.uint32))
    at = device.put(rows)
    factors = device.put(factors_of(logits))
    name, sampling = "case_top_logits", [factors]
    if uniforms is not None:
        name, sampling = "case_draw", [factors, device.put(uniforms)]
    for _ in range(times):
        device.call(name, out, at, ctypes.c_int64(vocab + padding), *sampling,
                    n_rows, vocab, scratch, counters)  # fmt: skip
        assert not counters.read().any()
    return out.read().view(TOP)


def factors_of(logits: Array) -> NDArray[np.float32]:
    """Return what the differences of each row's logits are multiplied by: 0.5 to 2, by the row."""
    bits = np.ascontiguousarray(logits, np.float32).view(np.uint32)
    return (0.5 + 0.25 * (bits.sum(axis=1, dtype=np.uint64) % 7)).astype(np.float32)


def check(found: Array, logits: Array) -> None:
    assert len(found) == len(logits)
    for one, row, factor in zip(found, logits, factors_of(logits), strict=True):
        n = min(MOST, len(row))
        order = np.argsort(-row, kind="stable")[:n]
        assert one["not_finite"] == -1
        assert one["n"] == n
        np.testing.assert_array_equal(one["tokens"][:n], order)
        np.testing.assert_array_equal(one["logits"][:n], row[order])
        exact = np.exp(row.astype(np.float64) - row.max()).sum()
        assert abs(one["sum"] - exact) <= SUM_ERROR * exact
        scaled = np.exp((row.astype(np.float64) - row.max()) * factor).sum()
        assert abs(one["scaled_sum"] - scaled) <= SUM_ERROR * max(1, factor) * scaled
        assert one["drawn"] >= 0 or one["drawn_logit"] == 0


def random_logits(seed: int, n_rows: int, vocab: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n_rows, vocab)) * 4 + 1).astype(np.float32)


@pytest.mark.parametrize(
    "vocab", [1, 2, 5, 63, 64, 65, 127, 128, 129, 500, 2047, 2048, 2049, 8193, 20_001]
)
def test_every_size(device: Device, vocab: int) -> None:
    device.arrange(seed=vocab)
    logits = random_logits(vocab, 2, vocab)
    check(run(device, logits), logits)


def test_llama_4(device: Device) -> None:
    logits = random_logits(0, 1, LLAMA)
    logits[:, 100_000:100_200] += 9  # neighbours are often alike
    logits[:, -2000:] = -80  # what was never trained
    check(run(device, logits), logits)


def test_vocabulary_of_larger_groups(device: Device) -> None:
    logits = random_logits(1, 1, 262_144 + 4095)
    logits[:, -3000:] += np.arange(3000) % 700 / 50
    check(run(device, logits), logits)


# ---- a token drawn from the whole row ----
def check_drawn(found: Array, logits: Array, uniforms: Array) -> None:
    """Hold each token to the running sums at its sides, but for what float32 sums are off by."""
    for one, row, factor, u in zip(found, logits, factors_of(logits), uniforms, strict=True):
        if u < 0:
            assert one["drawn"] == -1
            continue
        weights = np.exp((row.astype(np.float64) - row.max()) * factor)
        sums = np.cumsum(weights) / weights.sum()
        token = one["drawn"]
        assert one["drawn_logit"] == row[token]
        slack = 2.0**-16
        assert (sums[token - 1] if token > 0 else 0.0) <= u + slack
        assert sums[token] > u - slack
        assert weights[token] > 0


@pytest.mark.parametrize("vocab", [1, 5, 127, 128, 129, 2047, 2049, 20_001])
def test_draws_of_every_size(device: Device, vocab: int) -> None:
    device.arrange(seed=vocab)
    logits = np.repeat(random_logits(vocab, 1, vocab) / 4, 7, axis=0)
    uniforms = np.array([0, 0.1, 0.5, -1, 0.9, 0.99999, 1], np.float32)
    found = run(device, logits, uniforms=uniforms, padding=3)
    check_drawn(found, logits, uniforms)
    check(found, logits)


def test_draws_of_llama_4(device: Device) -> None:
    logits = np.repeat(random_logits(3, 1, LLAMA) / 8, 3, axis=0)
    uniforms = np.array([0.3, 0.77, -1], np.float32)
    check_drawn(run(device, logits, uniforms=uniforms), logits, uniforms)


def test_draws_of_larger_groups(device: Device) -> None:
    logits = random_logits(4, 1, 262_144 + 4095) / 8
    uniforms = np.array([0.61], np.float32)
    check_drawn(run(device, logits, uniforms=uniforms), logits, uniforms)


def test_draws_where_few_tokens_weigh_anything(device: Device) -> None:
    """All of a part but one token weigh nothing, and so do most parts."""
    logits = np.full((6, 3000), -1e4, np.float32)
    logits[:, [7, 1500, 2999]] = [1.0, 2.0, 1.5]
    uniforms = np.linspace(0, 1, 6, dtype=np.float32)
    found = run(device, logits, uniforms=uniforms)
    check_drawn(found, logits, uniforms)
    assert set(found["drawn"]) == {7, 1500, 2999}


# ---- logits of all kinds ----
def _levels(rng: np.random.Generator, n: int) -> Array:
    return rng.integers(-3, 3, n) * 1.5


KINDS: dict[str, Callable[[np.random.Generator, int], Array]] = {
    "ascending": lambda _, n: np.arange(n) / 16,
    "descending": lambda _, n: -np.arange(n) / 16,
    "all equal": lambda _, n: np.full(n, -7.25),
    "few levels": _levels,
    "zeros of both signs": lambda rng, n: np.where(rng.random(n) < 0.5, 0.0, -0.0),
    "one apart in the last place": lambda rng, n: (
        rng.permutation(n).astype(np.uint32) + 0x41000000
    ).view(np.float32),
    "far below 0": lambda rng, n: rng.standard_normal(n) - 3000,
    "all sizes": lambda rng, n: rng.choice([-1, 1], n) * 10.0 ** rng.uniform(-44, 38, n),
    "the largest there are": lambda rng, n: rng.choice([-1, 1], n) * 3.4028235e38,
    "one above all": lambda rng, n: np.where(np.arange(n) == n // 3, 1e30, rng.random(n)),
    "129 good ones": lambda rng, n: np.where(rng.permutation(n) < 129, 50.0, -1e30),
    "127 good ones": lambda rng, n: np.where(rng.permutation(n) < 127, 50.0, 0.0),
    "best in one group": lambda rng, n: rng.random(n) + 5.0 * (np.arange(n) // 64 == 7),
    "equal at the ends of groups": lambda rng, n: np.where(
        np.arange(n) % 64 == 63, 1, rng.random(n)
    ),
    "best in one thread's groups": lambda rng, n: rng.random(n) + 5.0 * (np.arange(n) < 256),
}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_every_kind(device: Device, kind: str) -> None:
    device.arrange(seed=len(kind))
    rng = np.random.default_rng(len(kind))
    for vocab in (9000, 40_000):  # less and more groups than are looked at
        logits = KINDS[kind](rng, vocab).astype(np.float32)[None]
        check(run(device, logits), logits)


# ---- the same every time ----
def test_row_gets_the_same_bits_in_any_company_and_order(device: Device) -> None:
    logits = random_logits(3, 6, 9001)
    logits[1] = np.round(logits[1])
    alone = [run(device, logits[i : i + 1])[0] for i in range(6)]
    for seed, padding in ((1, 0), (2, 3), (5, 7)):
        device.arrange(seed=seed, multiprocessors=1 if seed > 1 else 5)
        for one, other in zip(run(device, logits, padding=padding), alone, strict=True):
            assert one.tobytes() == other.tobytes()


@pytest.mark.small
def test_blocks_of_several_slices(device: Device) -> None:
    device.arrange(seed=2, multiprocessors=1)
    for n_rows in (2, 3):
        logits = random_logits(4, n_rows, 11_003)
        check(run(device, logits, times=2), logits)


# ---- what is not finite ----
@pytest.mark.small
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_first_logit_that_is_not_finite_is_named(device: Device, bad: float) -> None:
    device.arrange(seed=7)
    logits = random_logits(5, 4, 4500)
    firsts = {0: 0, 1: 4499, 3: 2111}
    for row, first in firsts.items():
        logits[row, first] = bad
        logits[row, first + 1 :: 50] = bad
    found = run(device, logits, times=2)
    for row, first in firsts.items():
        assert found[row]["not_finite"] == first
        assert found[row]["n"] == MOST
    check(found[2:3], logits[2:3])


def test_nothing_but_what_is_not_finite(device: Device) -> None:
    for bad in (np.nan, np.inf, -np.inf):
        for vocab in (3, 3000):
            found = run(device, np.full((1, vocab), bad, np.float32))
            assert found["not_finite"] == 0


# ---- calls ----
def test_no_rows_are_no_work(device: Device) -> None:
    assert len(run(device, np.zeros((0, 100), np.float32))) == 0


def test_other_vocabularies_are_refused(device: Device) -> None:
    memory = device.put(np.zeros(4096, np.float32))
    for vocab in (0, 2**30 + 1):
        with pytest.raises(DeviceError, match=r"1 to 2\^30 tokens"):
            device.call("case_top_logits", memory, memory, ctypes.c_int64(vocab), memory, 1, vocab,
                        memory, memory)  # fmt: skip
