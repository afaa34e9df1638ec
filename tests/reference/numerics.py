"""Where numbers are rounded: nowhere, or where a GPU rounds them (cuda/host/, cuda/ops/).

The references ask one of these for every rounding and for every router's choice, and know no
format themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Numerics:
    """Exact: float64 from end to end.

    A router's near tie may be decided otherwise by what rounds otherwise, so choices can be told.

    Attributes:
        told: The experts, best first, of (layer, token) instead of the ones with the best logits.
        router_logits: Of each layer that has a router, [n_tokens, n_experts].
        chosen: Of each of them, [n_tokens, top_k].
    """

    def __init__(self) -> None:
        self.told: dict[tuple[int, int], list[int]] = {}
        self.router_logits: dict[int, Array] = {}
        self.chosen: dict[int, NDArray[np.int64]] = {}

    def weight(self, weights: Mapping[str, NDArray[Any]], name: str) -> Array:
        """Return a matrix as it is multiplied."""
        return weights[name].astype(np.float64)

    def operand(self, x: Array) -> Array:
        """Return activations as products take them."""
        return x

    def normed(self, x: Array, factor: Array, gain: Array) -> Array:
        """Return rows x as products take them, of which factor [.., 1] is 1 / rms."""
        return self.operand(x * factor * gain)

    def weighted(self, shares: Array) -> Array:
        """Return what values are added up by, [n_heads, n_queries, n_keys]; the largest is 1.

        Where values have scales, those are in it.
        """
        return self.operand(shares)

    def rotated_as(self, position: NDArray[Any], chunk: int | None) -> NDArray[Any]:
        """Return the positions that queries and keys are turned by."""
        return position

    def stored(self, x: Array) -> tuple[Array, Array]:
        """Return what the KV cache keeps of heads [.., head_dim]: numbers, and scales [.., 1]."""
        return x, np.ones((*x.shape[:-1], 1))

    def choose(self, layer: int, logits: Array, top_k: int) -> NDArray[np.int64]:
        """Return the experts of each token, [n_tokens, top_k]."""
        self.router_logits[layer] = logits
        chosen = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
        for (at, token), experts in self.told.items():
            if at == layer:
                chosen[token] = experts
        self.chosen[layer] = chosen
        return chosen


class Bf16(Numerics):
    """As a GPU: sums in float32 (here float64), all they are made of in bf16.

    Args:
        exact: Names of the matrices that are held as integers and scales, which products take
            without rounding.
        kv: How keys and values are kept: "bf16", "fp8" or "int8".

    Remembers the weights it rounded: one is for one checkpoint.
    """

    def __init__(self, exact: frozenset[str] = frozenset(), kv: str = "bf16") -> None:
        super().__init__()
        self.exact, self.kv = exact, kv
        self._weights: dict[str, Array] = {}

    def weight(self, weights: Mapping[str, NDArray[Any]], name: str) -> Array:
        if name not in self._weights:
            value = super().weight(weights, name)
            self._weights[name] = value if name in self.exact else bf16(value)
        return self._weights[name]

    def operand(self, x: Array) -> Array:
        return bf16(x)

    def rotated_as(self, position: NDArray[Any], chunk: int | None) -> NDArray[Any]:
        # The same scores, of other numbers to be rounded.
        return position if chunk is None else position % chunk

    def stored(self, x: Array) -> tuple[Array, Array]:
        if self.kv == "bf16":
            return bf16(x), np.ones((*x.shape[:-1], 1))
        largest = np.abs(x).max(axis=-1, keepdims=True)
        most = {"fp8": 448.0, "int8": 127.0}[self.kv]
        numbers = x * (most / np.where(largest > 0, largest, 1.0))
        return (e4m3 if self.kv == "fp8" else np.rint)(numbers), largest / most


class OtherSums(Bf16):
    """As right as another: what is not exact in float32 is off by as much as its sums may be.

    Operands near a tie then round otherwise, which moves all behind them. Probabilities are rounded
    beside the largest of the keys that a kernel has seen by then, not of all. Of every second one
    normed rows are divided by their size after they were rounded, as between products of few tokens
    (cuda/layout/split_norm.h).

    Args:
        like: Of which the weights and all choices of experts are taken.
        seed: Of what is off, and how.
    """

    OFF = 1e-7  # of a value: 2^-24, and a little more for adding up
    KEYS = 16  # that a kernel weights at once, at least

    def __init__(self, like: Bf16, seed: int) -> None:
        super().__init__(like.exact, like.kv)
        self._weights = like._weights
        self.chosen = like.chosen
        self.divides_last = seed % 2 == 0
        self.random = np.random.default_rng(seed)

    def _off(self, x: Array) -> Array:
        off = x * (1 + self.OFF * self.random.standard_normal(x.shape))
        return np.where(x.astype(np.float32) == x, x, off)

    def operand(self, x: Array) -> Array:
        return super().operand(self._off(x))

    def normed(self, x: Array, factor: Array, gain: Array) -> Array:
        if self.divides_last:
            return self.operand(x * gain) * factor
        return super().normed(x, factor, gain)

    def weighted(self, shares: Array) -> Array:
        n_heads, n_queries, n_keys = shares.shape
        shape = (n_heads, n_queries, -(-n_keys // self.KEYS))
        beside = np.exp2(self.random.uniform(size=shape)).repeat(self.KEYS, axis=2)[..., :n_keys]
        # A query of one key has no other largest.
        beside[np.count_nonzero(shares, axis=2) == 1] = 1.0
        return bf16(self._off(shares * beside)) / beside

    def stored(self, x: Array) -> tuple[Array, Array]:
        return super().stored(self._off(x))

    def choose(self, layer: int, logits: Array, top_k: int) -> NDArray[np.int64]:
        self.router_logits[layer] = logits
        return self.chosen[layer]


def bf16(x: Array) -> Array:
    """Round to 8 bits of significand, to even on ties."""
    return _round_significand(x, 8, least_exponent=-125)


def e4m3(x: Array) -> Array:
    """Round to 4 bits of significand, multiples of 2^-9 where values are small."""
    return _round_significand(x, 4, least_exponent=-5)


def _round_significand(x: Array, n_bits: int, least_exponent: int) -> Array:
    # frexp's exponent: |x| is in [2^(e - 1), 2^e), whose values lie 2^(e - n_bits) apart.
    _, exponent = np.frexp(x)
    shift = n_bits - np.maximum(exponent, least_exponent)
    return np.ldexp(np.rint(np.ldexp(x, shift)), -shift)
