"""Keys and values in shuffled pages, tiles of queries over them, and what float64 says of both."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuda_cases import BF16_ROUNDING, NAN_BF16, bf16, from_bf16
from cuda_device import Device

Array = NDArray[Any]
BF16, E4M3, INT8 = range(3)
ITEM_FIELDS = 12  # of an AttentionItem
N_LAYERS, LAYER = 2, 1


class Many(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32)
          for name in ("page_size", "n_layers", "n_kv_heads", "head_dim", "format", "n_heads",
                       "kv_layer", "causal", "hopper", "n_items", "multiprocessors", "padding")),
        ("q_stride", ctypes.c_int64),
        ("y_stride", ctypes.c_int64),
    ]  # fmt: skip


@dataclass(frozen=True)
class Span:
    """Tokens of one sequence in a step, behind `before` that are in the cache already."""

    n_rows: int
    before: int = 0
    first_query: int = 0  # tiles begin here

    @property
    def n_keys(self) -> int:
        return self.before + self.n_rows


def e4m3_values() -> NDArray[np.float64]:
    """The values of the codes 0 to 0x7e, which rise."""
    codes = np.arange(0x7F)
    exponent, mantissa = codes >> 3, codes & 7
    return np.where(
        exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0)
    )


def encode(values: Array, kind: int) -> tuple[Array, Array | None, NDArray[np.float64]]:
    """Return rows as bytes, their scales if any, and the values they stand for."""
    if kind == BF16:
        bits = bf16(values)
        return bits.view(np.uint8), None, from_bf16(bits)
    most = np.abs(values).max(axis=-1, keepdims=True)
    scale = (most / (448 if kind == E4M3 else 127)).astype(np.float32)
    scaled = values / scale.astype(np.float64)
    if kind == INT8:
        codes = np.rint(scaled).astype(np.int8)
        return codes.view(np.uint8), scale, codes * scale.astype(np.float64)
    table = e4m3_values()
    middle = (table[1:] + table[:-1]) / 2
    code = np.searchsorted(middle, np.abs(scaled))
    signed = np.sign(scaled) * table[code]
    bits = (code | np.where(scaled < 0, 0x80, 0)).astype(np.uint8)
    return bits, scale, signed * scale.astype(np.float64)


@dataclass
class Case:
    """Spans of a step with their queries, keys and values."""

    spans: list[Span]
    n_kv_heads: int = 2
    group: int = 5
    head_dim: int = 128
    page_size: int = 64
    kind: int = BF16
    causal: bool = True
    tile: int = 64  # queries of an item
    key_scale: float = 1.0
    seed: int = 0
    q: NDArray[np.uint16] = field(init=False)  # [n_tokens, stride]
    keys: list[NDArray[np.float64]] = field(init=False)  # of each span [n_keys, heads, head_dim]
    values: list[NDArray[np.float64]] = field(init=False)
    pool: NDArray[np.uint8] = field(init=False)  # [n_pages, bytes]
    page_table: NDArray[np.int32] = field(init=False)
    page_lists: list[int] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        n_tokens, width = sum(span.n_rows for span in self.spans), self.n_heads * self.head_dim
        self.q = np.full((n_tokens, width + 8), NAN_BF16, np.uint16)
        self.q[:, :width] = bf16(rng.standard_normal((n_tokens, width)))
        self._place_pages(rng)
        self.keys, self.values = [], []
        for i, span in enumerate(self.spans):
            shape = (span.n_keys, self.n_kv_heads, self.head_dim)
            self.keys.append(self.write(i, 0, rng.standard_normal(shape) * self.key_scale))
            self.values.append(self.write(i, 1, rng.standard_normal(shape)))

    @property
    def n_heads(self) -> int:
        return self.n_kv_heads * self.group

    @property
    def row_bytes(self) -> int:
        return -(-self.head_dim * (2 if self.kind == BF16 else 1) // 16) * 16

    @property
    def side_bytes(self) -> int:
        return self.page_size * (self.row_bytes + (0 if self.kind == BF16 else 4))

    def _place_pages(self, rng: np.random.Generator) -> None:
        """Give each span its pages, in no order, with nothing but NaNs in them."""
        counts = [-(-span.n_keys // self.page_size) for span in self.spans]
        self.page_lists = [int(sum(counts[:i])) + 1 for i in range(len(counts))]
        n_pages = sum(counts) + 1
        self.page_table = np.full(sum(counts) + 2, 1 << 30, np.int32)
        self.page_table[1:-1] = rng.permutation(n_pages)[: sum(counts)]
        page_bytes = N_LAYERS * self.n_kv_heads * 2 * self.side_bytes
        self.pool = np.full((n_pages, page_bytes), 0xFF, np.uint8)

    def write(self, span: int, side: int, values: Array) -> NDArray[np.float64]:
        """Write keys (side 0) or values of a span; return what was stored."""
        rows, scales, stored = encode(values, self.kind)
        sides = self.pool.reshape(len(self.pool), N_LAYERS, self.n_kv_heads, 2, self.side_bytes)
        for key in range(len(values)):
            page = self.page_table[self.page_lists[span] + key // self.page_size]
            slot = key % self.page_size
            to = sides[page, LAYER, :, side]
            to[:, slot * self.row_bytes : slot * self.row_bytes + rows.shape[-1]] = rows[key]
            if scales is not None:
                at = self.page_size * self.row_bytes + slot * 4
                to[:, at : at + 4] = scales[key].view(np.uint8)
        return stored

    def items(self) -> NDArray[np.int32]:
        """Return tiles of queries, those with most keys first."""
        items: list[list[int]] = []
        first_row = 0
        for span, page_list in zip(self.spans, self.page_lists, strict=True):
            n_queries = span.n_rows * self.group
            for first in range(span.first_query, n_queries, self.tile):
                n = min(self.tile, n_queries - first)
                last_key = span.before + (first + n - 1) // self.group + 1
                last_key = last_key if self.causal else span.n_keys
                items.append([first_row, span.before, page_list, first, n, 0, last_key,
                              0, 1, 0, 0, 0])  # fmt: skip
            first_row += span.n_rows
        items.sort(key=lambda item: -item[6])
        return np.array(items, np.int32).reshape(-1, ITEM_FIELDS)

    def run(
        self, device: Device, *, hopper: bool = False, seed: int = 0, multiprocessors: int = 3
    ) -> NDArray[np.uint16]:
        """Return y with its poison, [n_tokens, stride]."""
        device.arrange(seed=seed)
        items = self.items()
        y = np.full(self.q.shape, NAN_BF16, np.uint16)
        c = Many(self.page_size, N_LAYERS, self.n_kv_heads, self.head_dim, self.kind, self.n_heads,
                 LAYER, self.causal, hopper, len(items), multiprocessors, 0, y.shape[1],
                 y.shape[1])  # fmt: skip
        memory = device.put(y)
        arrays = (self.pool, items, self.page_table, self.q)
        device.call("case_attend_many", c, *map(device.put, arrays), memory)
        return memory.read()

    def expected(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return y [n_tokens, n_heads * head_dim], and how far each value may be off.

        Weights are rounded to bf16 before they meet the values, and so is the result. An error of
        the scores in float32 changes weights by as much.
        """
        heads = from_bf16(self.q[:, :-8]).reshape(-1, self.n_kv_heads, self.group, self.head_dim)
        y, allowed = np.empty(heads.shape), np.empty(heads.shape)
        first = 0
        for span, keys, values in zip(self.spans, self.keys, self.values, strict=True):
            q = heads[first : first + span.n_rows]
            scores = np.einsum("rhgd,khd->rhgk", q, keys) / self.head_dim**0.5
            sizes = np.einsum("rhgd,khd->rhgk", abs(q), abs(keys)) / self.head_dim**0.5
            if self.causal:
                own = span.before + np.arange(span.n_rows)
                hidden = np.arange(span.n_keys) > own[:, None]
                scores[np.broadcast_to(hidden[:, None, None], scores.shape)] = -np.inf
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            rows = slice(first, first + span.n_rows)
            y[rows] = np.einsum("rhgk,khd->rhgd", weights, values)
            size = np.einsum("rhgk,khd->rhgd", weights, abs(values))
            rounding = (size + abs(y[rows])) * BF16_ROUNDING
            allowed[rows] = rounding + size * sizes.max() * 2.0**-20 + 1e-30
            first += span.n_rows
        return y.reshape(first, -1), allowed.reshape(first, -1)

    def check(self, y: NDArray[np.uint16]) -> None:
        """Compare with float64; what no query owns must be untouched."""
        assert np.all(y[:, -8:] == NAN_BF16)
        expected, allowed = self.expected()
        got = from_bf16(y[:, :-8])
        mine = np.ones(got.shape, bool)
        first = 0
        for span in self.spans:
            queries = mine[first : first + span.n_rows].reshape(
                span.n_rows, self.n_kv_heads, self.group, self.head_dim
            )
            for query in range(span.first_query):
                queries[query // self.group, :, query % self.group] = False
            first += span.n_rows
        assert np.isnan(got[~mine]).all()
        error = np.where(mine, abs(got - expected) / allowed, 0.0)
        worst = np.unravel_index(np.argmax(np.where(np.isnan(error), np.inf, error)), error.shape)
        assert error[worst] <= 1, (
            f"{worst}: got {got[worst]}, expected {expected[worst]} +- {allowed[worst]}"
        )
