"""Paged keys and values in device memory, attention over them, and what float64 says of it.

How good is good enough: queries, keys and values are exact in both. What a kernel may err by:

    score       its float32 sum, as many roundings as there are dims that count; its factors
    weight      what its score errs by, exp2 and the rescaling between maxima; for the product with
                values also its rounding to bf16
    result      the sums over keys in float32, the division, and the rounding to bf16
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuda_cases import BF16_ROUNDING, FLOAT32_ROUNDING, NAN_BF16, assert_within, bf16, from_bf16
from cuda_device import Device, DeviceError

Array = NDArray[Any]
BF16, E4M3, INT8 = range(3)
FEW, MANY = range(2)
ITEM = np.dtype([(name, np.int32) for name in (
    "first_row", "first_index", "page_list", "first_query", "n_queries", "first_key", "last_key",
    "part", "n_parts", "first_part", "counter", "padding")])  # fmt: skip
NO_PAGE = 0x3FFFFFFF  # nobody may look there
# exp2 and the rescaling of sums, relative: a few roundings of float32 and 2^-22 of ex2.approx.
WEIGHT_ERROR = 2.0**-20


class CAttention(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in (
            "page_size", "n_layers", "n_kv_heads", "head_dim", "format",
            "kv_layer", "n_heads", "causal", "multiprocessors")),
        ("q_stride", ctypes.c_int64),
        ("y_stride", ctypes.c_int64),
    ]  # fmt: skip


def e4m3_values() -> NDArray[np.float64]:
    """What the 256 bytes mean; NaN for 0x7f and 0xff."""
    bits = np.arange(256)
    exponent, mantissa = bits >> 3 & 15, bits & 7
    value = np.where(exponent == 0, mantissa / 8 * 2.0**-6,
                     (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))  # fmt: skip
    value[(bits & 127) == 127] = np.nan
    return np.where(bits < 128, value, -value)


def stored(rows: NDArray[np.float64], form: int) -> tuple[Array, Array | None, Array]:
    """What a format keeps of rows [..., head_dim]: bytes, a scale for each row, what both mean."""
    if form == BF16:
        bits = bf16(rows)
        return bits.view(np.uint8), None, from_bf16(bits)
    largest = np.abs(rows).max(-1, keepdims=True)
    scales = np.maximum(largest / (448 if form == E4M3 else 127), 1e-30).astype(np.float32)
    if form == INT8:
        whole = np.clip(np.rint(rows / scales), -127, 127)
        return whole.astype(np.int8).view(np.uint8), scales[..., 0], whole * scales.astype(float)
    values = e4m3_values()
    order = np.argsort(np.where(np.isnan(values), np.inf, values), kind="stable")[:254]
    places = np.searchsorted(values[order][:-1] + np.diff(values[order]) / 2, rows / scales)
    codes = order[places].astype(np.uint8)
    return codes, scales[..., 0], values[codes] * scales.astype(float)


@dataclass
class Span:
    """n_rows tokens of a sequence, behind first_index others."""

    first_index: int
    n_rows: int = 1
    keys: Array = field(default_factory=lambda: np.zeros(0))  # [n_keys, n_kv_heads, head_dim]
    values: Array = field(default_factory=lambda: np.zeros(0))
    first_row: int = 0
    page_list: int = 0

    @property
    def n_keys(self) -> int:
        return self.first_index + self.n_rows


@dataclass
class Case:
    c: CAttention
    spans: list[Span]
    q: NDArray[np.uint16]  # bf16 [n_tokens, q_stride]
    pool: NDArray[np.uint8]  # [n_pages, page_bytes]
    page_table: NDArray[np.int32]
    part_floats: int

    @property
    def group(self) -> int:
        return int(self.c.n_heads // self.c.n_kv_heads)

    def queries(self, span: Span) -> Array:
        """[n_rows, n_kv_heads, group, head_dim] of float64"""
        rows = self.q[span.first_row : span.first_row + span.n_rows]
        rows = rows[:, : self.c.n_heads * self.c.head_dim]
        return from_bf16(rows).reshape(span.n_rows, self.c.n_kv_heads, self.group, self.c.head_dim)


def make_case(
    device: Device,
    rng: np.random.Generator,
    spans: list[tuple[int, int]],
    *,
    form: int = BF16,
    head_dim: int = 64,
    n_kv_heads: int = 2,
    group: int = 5,
    page_size: int = 64,
    causal: bool = True,
    multiprocessors: int = 5,
    size: float = 1.0,
) -> Case:
    """Return spans (first_index, n_rows), their pages in random order, NaNs wherever nothing is.

    Args:
        size: Of the queries' values, beside keys and values of size 1.
    """
    n_heads = n_kv_heads * group
    n_tokens = sum(n_rows for _, n_rows in spans)
    stride = n_heads * head_dim + 8
    c = CAttention(page_size, 2, n_kv_heads, head_dim, form, 1, n_heads, causal, multiprocessors,
                   stride, stride + 8)  # fmt: skip
    q = np.full((n_tokens, stride), NAN_BF16, np.uint16)
    q[:, :-8] = bf16(size * rng.standard_normal((n_tokens, stride - 8)))
    sizes = kv_sizes(device, c)
    lists = [-(-(first + n) // page_size) for first, n in spans]
    places = rng.permutation(sum(lists) + 3)
    pool = np.full((len(places), sizes[0]), 0xFF, np.uint8)
    page_table, made, first_row = [NO_PAGE], [], 0
    for (first_index, n_rows), n_pages in zip(spans, lists, strict=True):
        pages, places = places[:n_pages], places[n_pages:]
        sides = [rng.standard_normal((first_index + n_rows, n_kv_heads, head_dim)) for _ in "kv"]
        meant = [write_pages(c, sizes, pool, pages, side, i) for i, side in enumerate(sides)]
        made.append(Span(first_index, n_rows, *meant, first_row, len(page_table)))
        page_table += [*pages, NO_PAGE]
        first_row += n_rows
    return Case(c, made, q, pool, np.array(page_table, np.int32), sizes[5])


def kv_sizes(device: Device, c: CAttention) -> list[int]:
    """Bytes of a page, of a row, of a side; where keys and scales begin; floats of a part."""
    sizes = (ctypes.c_int64 * 6)()
    device.library.case_kv_sizes(ctypes.byref(c), sizes)
    return list(sizes)


def write_pages(
    c: CAttention, sizes: list[int], pool: Array, pages: Array, rows: Array, side: int
) -> Array:
    """Store keys (0) or values (1) [n_keys, n_kv_heads, head_dim]; return what they mean there."""
    _, row_bytes, side_bytes, keys_at, scales_at, _ = sizes
    kept, scales, meant = stored(rows, c.format)
    for i, page in enumerate(pages):
        part = slice(i * c.page_size, (i + 1) * c.page_size)
        for head in range(c.n_kv_heads):
            start = keys_at + (2 * head + side) * side_bytes
            slots = pool[page, start : start + scales_at].reshape(c.page_size, row_bytes)
            some = kept[part, head]
            slots[: len(some), : some.shape[-1]] = some
            if scales is not None:
                n = 4 * len(some)
                at = start + scales_at
                pool[page, at : at + n] = np.ascontiguousarray(scales[part, head]).view(np.uint8)
    return meant


# ---- plans ----
@dataclass
class Plan:
    few: Array  # of ITEM
    many: Array
    n_parts: int
    n_counters: int


def plan_spans(device: Device, spans: Array, group: int, causal: bool) -> Plan:
    """Args: spans: int32 [n, 4] of first_row, n_rows, first_index, page_list."""
    numbers = (ctypes.c_int64 * 4)()
    rows = np.ascontiguousarray(spans, np.int32)

    def call(few: Any, many: Any) -> None:
        status = device.library.case_plan_attention(
            rows.ctypes.data_as(ctypes.c_void_p), len(rows), group, causal, numbers, few, many
        )
        if status != 0:
            raise DeviceError(device.library.device_error().decode())

    call(None, None)
    few, many = (np.zeros(n, ITEM) for n in numbers[:2])
    call(few.ctypes.data_as(ctypes.c_void_p), many.ctypes.data_as(ctypes.c_void_p))
    return Plan(few, many, numbers[2], numbers[3])


def plan_case(device: Device, case: Case) -> Plan:
    rows = [(s.first_row, s.n_rows, s.first_index, s.page_list) for s in case.spans]
    spans = np.array(rows, np.int32).reshape(-1, 4)
    return plan_spans(device, spans, case.group, bool(case.c.causal))


# ---- running ----
def run_attention(
    device: Device, case: Case, which: int = FEW, *, items: Array | None = None
) -> NDArray[np.uint16]:
    """Return y [n_tokens, n_heads * head_dim], NaN where no item has the token.

    Args:
        items: In place of those of the plan; their parts and counters are the plan's.
    """
    plan = plan_case(device, case)
    if items is None:
        items = plan.few if which == FEW else plan.many
    n_tokens, columns = len(case.q), case.c.n_heads * case.c.head_dim
    y = device.put(np.full((n_tokens, case.c.y_stride), NAN_BF16, np.uint16))
    counters = device.put(np.zeros((plan.n_counters, case.c.n_kv_heads), np.uint32))
    device.call(
        "run_attention",
        which,
        case.c,
        device.put(case.pool),
        device.put(np.ascontiguousarray(items).view(np.int32)),
        device.put(np.array([len(items)], np.int32)),
        device.put(case.page_table),
        device.put(case.q),
        y,
        device.reserve(4 * plan.n_parts * case.c.n_kv_heads * case.part_floats),
        counters,
    )
    assert not counters.read().any()
    found = y.read()
    assert (found[:, columns:] == NAN_BF16).all()
    return found[:, :columns]


# ---- what is right ----
def exact_attention(case: Case, span: Span) -> tuple[Array, Array]:
    """Return the rows of a span [n_rows, n_heads * head_dim], and how far each may be off."""
    q, k, v = case.queries(span), span.keys, span.values
    factor = case.c.head_dim**-0.5
    scores = factor * np.einsum("rhgd,khd->rhgk", q, k)
    terms = (q != 0).sum(-1)[..., None] + 4
    off = 2 * FLOAT32_ROUNDING * terms * factor * np.einsum("rhgd,khd->rhgk", np.abs(q), np.abs(k))
    if case.c.causal:
        own = span.first_index + np.arange(span.n_rows)[:, None, None, None]
        scores = np.where(np.arange(span.n_keys) > own, -np.inf, scores)
    depth = scores.max(-1, keepdims=True) - scores
    weights = np.exp(-depth)
    weights /= weights.sum(-1, keepdims=True)
    seen = np.where(np.isfinite(depth), depth, 0)
    weight_off = weights * (np.expm1(off) + 4 * FLOAT32_ROUNDING * seen + WEIGHT_ERROR)
    y = np.einsum("rhgk,khd->rhgd", weights, v)
    size = np.einsum("rhgk,khd->rhgd", weights, np.abs(v))
    sums = 2 * FLOAT32_ROUNDING * span.n_keys
    allowed = np.einsum("rhgk,khd->rhgd", weight_off, np.abs(v)) + size * (BF16_ROUNDING + sums)
    allowed += np.abs(y) * (weight_off.sum(-1)[..., None] + sums + BF16_ROUNDING)
    return y.reshape(span.n_rows, -1), allowed.reshape(span.n_rows, -1) + 1e-30


def check_attention(
    device: Device, case: Case, which: int = FEW, spans: list[Span] | None = None
) -> NDArray[np.uint16]:
    """Run, compare the rows of `spans` (all of them), and return y."""
    y = run_attention(device, case, which)
    for span in case.spans if spans is None else spans:
        exact, allowed = exact_attention(case, span)
        rows = slice(span.first_row, span.first_row + span.n_rows)
        assert_within(from_bf16(y[rows]), exact, allowed)
    return y
