"""Packed matrices in device memory, the ops over them, and what float64 says of their results.

How good is good enough: what is summed are products of bf16 activations and integers, which are
exact in float32. An op may err twice as much as NumPy does when it sums in float32, one product
after the other, and at least by twice 2^-24 of the sum of magnitudes (of few terms NumPy's error
may be none). Results in bf16 may differ by their rounding as well.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuda_device import Device, Memory

Array = NDArray[Any]
STORE, STORE_BF16, ADD, SWIGLU = range(4)
PLAIN, GATE_UP = range(2)
BF16, PAIRS = range(2)
NAN_BF16 = 0x7FC0
FLOAT32_ROUNDING = 2.0**-24
BF16_ROUNDING = 2.0**-8
EXP_ERROR = 2.0**-19  # of exp_fast, relative: __expf is off by 2 + 1.16 |x| in the last place
CHUNK = 128
DTYPE_BF16 = 2  # as DType counts


def bf16(values: Array) -> NDArray[np.uint16]:
    """Round to bf16, to the nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: Array) -> NDArray[np.float64]:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def rounded(values: Array) -> NDArray[np.float64]:
    return from_bf16(bf16(values))


class Shape(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int) for name in ("rows", "inputs", "entries", "bits", "scales", "order")
    ]

    @property
    def columns(self) -> int:
        return self.rows // 2 if self.order == GATE_UP else self.rows


def entries_of(group: int, inputs: int) -> int:
    """Return how many scales a row has in a chunk: one for a whole row, else down to group 32."""
    if group >= inputs or group % CHUNK == 0:
        return 1
    assert group % 32 == 0, "no layout has scales for such groups"
    return 2 if group % 64 == 0 else 4


@dataclass
class Matrix:
    shape: Shape
    tiles: Memory
    scales: Memory
    w: NDArray[np.float64]  # [rows, inputs], dequantised


@dataclass
class Quantized:
    """A matrix as checkpoints mean it."""

    values: NDArray[np.int32]  # [rows, inputs]
    scales: NDArray[np.float32]  # [rows, n_groups]
    zeros: NDArray[np.float32] | None
    group: int

    def dequantised(self) -> NDArray[np.float64]:
        group = np.arange(self.values.shape[1]) // self.group
        zeros = 0.0 if self.zeros is None else self.zeros.astype(np.float64)[:, group]
        return (self.values - zeros) * self.scales.astype(np.float64)[:, group]


def quantized(
    rng: np.random.Generator,
    rows: int,
    inputs: int,
    *,
    bits: int = 4,
    scales: int = BF16,
    group: int = CHUNK,
) -> Quantized:
    limit = 2 ** (bits - 1)
    n_groups = -(-inputs // group)
    s = rng.uniform(0.5, 1.5, (rows, n_groups)) / (limit * inputs**0.5)
    zeros = rng.integers(-limit, limit, (rows, n_groups)).astype(np.float32)
    return Quantized(
        rng.integers(-limit, limit, (rows, inputs), dtype=np.int32),
        (rounded(s) if scales == BF16 else s).astype(np.float32),
        None if scales == BF16 else zeros,
        group,
    )


def pack(
    device: Device,
    q: Quantized,
    *,
    bits: int = 4,
    scales: int = BF16,
    order: int = PLAIN,
) -> tuple[Shape, Array, Array]:
    """Return the shape, the tiles and the scales as the host packs them."""
    rows, inputs = q.values.shape
    shape = Shape(rows, inputs, entries_of(q.group, inputs), bits // 8, scales, order)
    sizes = (ctypes.c_int64 * 2)()
    device.library.tile_sizes(ctypes.byref(shape), sizes)
    tiles, packed_scales = (np.empty(size, np.uint8) for size in sizes)
    device.library.pack_tiles(
        ctypes.byref(shape),
        *(_pointer(values) for values in (q.values, q.scales, q.zeros)),
        q.group,
        *(_pointer(values) for values in (tiles, packed_scales)),
    )
    return shape, tiles, packed_scales


def _pointer(values: Array | None) -> ctypes.c_void_p:
    if values is None:
        return ctypes.c_void_p(None)
    assert values.flags.c_contiguous
    return ctypes.c_void_p(values.ctypes.data)


def make_matrix(
    device: Device,
    rng: np.random.Generator,
    rows: int,
    inputs: int,
    *,
    bits: int = 4,
    scales: int = BF16,
    group: int = CHUNK,
    order: int = PLAIN,
) -> Matrix:
    q = quantized(rng, rows, inputs, bits=bits, scales=scales, group=group)
    shape, tiles, packed = pack(device, q, bits=bits, scales=scales, order=order)
    return Matrix(shape, device.put(tiles), device.put(packed), q.dequantised())


def poisoned_rows(values: NDArray[np.float64], stride: int) -> NDArray[np.uint16]:
    """Return rows of bf16 with NaNs behind them, which nobody may let into a sum."""
    rows = np.full((len(values), stride), NAN_BF16, np.uint16)
    rows[:, : values.shape[1]] = bf16(values)
    return rows


def make_x(rng: np.random.Generator, n_tokens: int, inputs: int) -> NDArray[np.uint16]:
    return poisoned_rows(rng.standard_normal((n_tokens, inputs)), -(-inputs // 8) * 8 + 8)


# ---- workspaces ----
@dataclass
class Workspace:
    """What blocks share. `counters` must be 0 again after each call."""

    sums: Memory
    counters: Memory

    def arguments(self) -> list[Any]:
        n_counters = self.counters.n_bytes // 4
        sizes = (ctypes.c_int64(self.sums.n_bytes), ctypes.c_int64(n_counters))
        return [self.sums, sizes[0], self.counters, sizes[1]]


def make_workspace(device: Device, sum_bytes: int, n_counters: int) -> Workspace:
    sums = np.full(sum_bytes, 0xFF, np.uint8)
    return Workspace(device.put(sums), device.put(np.zeros(n_counters, np.uint32)))


# ---- ops ----
def run_matmul_few(
    device: Device,
    w: Matrix,
    x: NDArray[np.uint16],
    output: int = STORE,
    *,
    y: Array | None = None,
    workspace: Workspace | None = None,
) -> Array:
    """Return y [n_tokens, stride] with its poison behind each row."""
    n_tokens, stride = x.shape
    y = empty_y(n_tokens, w.shape.columns, output) if y is None else y
    at = device.put(y)
    workspace = workspace or matmul_few_workspace(device, w, n_tokens)
    device.call(
        "run_matmul_few",
        w.shape,
        w.tiles,
        w.scales,
        device.put(x),
        n_tokens,
        stride,
        at,
        y.shape[1],
        output,
        *workspace.arguments(),
    )
    assert not workspace.counters.read().any()
    return at.read()


NORM_PART = 128


@dataclass
class HalfNorm:
    """What layout/split_norm.h has of a norm: of rows that are begun, or to begin."""

    gain: NDArray[np.float32]  # [dim]
    squares: NDArray[np.float32]  # [n_tokens, n_parts]
    eps: float = 1e-5

    @property
    def factors(self) -> NDArray[np.float64]:
        """What products of the rows are multiplied by, [n_tokens]."""
        mean = self.squares.astype(np.float64).sum(axis=1) / len(self.gain)
        return 1 / np.sqrt(mean + self.eps)

    def finish_in_next_call(self, device: Device) -> Memory:
        """Return what has to live until that call."""
        squares = device.put(self.squares)
        device.library.finish_norm_of_x(
            ctypes.c_void_p(squares.address),
            self.squares.shape[1],
            ctypes.c_float(1 / len(self.gain)),
            ctypes.c_float(self.eps),
        )
        return squares

    def begin_in_next_call(self, device: Device, h: Memory, h_stride: int) -> list[Memory]:
        """Return the squares and what has to live as well."""
        memories = [device.put(self.squares), device.put(self.gain)]
        addresses = [ctypes.c_void_p(m.address) for m in (memories[1], h, memories[0])]
        device.library.begin_norm_of_y(
            addresses[0], addresses[1], ctypes.c_int64(h_stride), addresses[2]
        )
        return memories


def make_half_norm(rng: np.random.Generator, n_tokens: int, dim: int) -> HalfNorm:
    """Return a norm with squares as of any rows."""
    squares = rng.uniform(0, 3 * NORM_PART, (n_tokens, -(-dim // NORM_PART)))
    gain = rng.standard_normal(dim)
    return HalfNorm(gain.astype(np.float32), squares.astype(np.float32))


def assert_norm_begun(
    norm: HalfNorm, y: NDArray[np.float32], h: NDArray[np.uint16], squares: NDArray[np.float32]
) -> None:
    """Hold h and squares to the y [n_tokens, dim] that was found."""
    np.testing.assert_array_equal(h, bf16(norm.gain * y))
    edges = range(0, y.shape[1], NORM_PART)
    exact = np.add.reduceat(y.astype(np.float64) ** 2, edges, axis=1)
    assert_within(squares, exact, NORM_PART * FLOAT32_ROUNDING * exact)


def matmul_few_workspace(device: Device, w: Matrix, n_tokens: int) -> Workspace:
    need = (ctypes.c_int64 * 2)()
    device.library.matmul_few_need(ctypes.byref(w.shape), n_tokens, need)
    return make_workspace(device, *need)


def empty_y(n_tokens: int, columns: int, output: int) -> Array:
    if output in (STORE_BF16, SWIGLU):
        return np.full((n_tokens, columns + 3), NAN_BF16, np.uint16)
    return np.full((n_tokens, columns + 3), np.nan, np.float32)


class CSource(ctypes.Structure):
    """A linear as a checkpoint holds it, as tests/cuda/pack.cu takes it."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("words", "scales", "zero_points")),
        *((name, ctypes.c_int) for name in ("bits", "group", "scale_dtype", "rows", "inputs")),
    ]


class CDense(ctypes.Structure):
    """A product on Hopper's tensor cores, as tests/cuda/hopper.cu takes it."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "w", "y", "x_scales", "w_scales")),
        *((name, ctypes.c_int) for name in ("type", "n_tokens", "rows", "inputs")),
        *((name, ctypes.c_int) for name in ("x_stride", "w_stride", "y_stride", "output")),
    ]


# ---- the experts of a layer ----
class CExperts(ctypes.Structure):
    _fields_ = [
        *((name, Shape) for name in ("gate_up", "down", "shared_gate_up", "shared_down")),
        *((name, ctypes.c_void_p) for name in ("router", "gate_up_table", "down_table")),
        *((f"shared_{part}", ctypes.c_void_p)
          for part in ("gate_up_tiles", "gate_up_scales", "down_tiles", "down_scales")),
        *((name, ctypes.c_int) for name in ("router_stride", "n_experts", "top_k")),
    ]  # fmt: skip


@dataclass
class Experts:
    """A router, n_experts pairs of matrices and maybe a shared pair."""

    c: CExperts
    router: NDArray[np.uint16]  # bf16 [n_experts, stride]
    routed: list[tuple[Matrix, Matrix]]
    shared: tuple[Matrix, Matrix] | None
    keep: list[Memory]

    @property
    def dim(self) -> int:
        return self.routed[0][1].shape.rows


def make_experts(
    device: Device,
    rng: np.random.Generator,
    *,
    dim: int,
    ffn_dim: int,
    n_experts: int,
    top_k: int = 1,
    has_shared: bool = True,
    router: NDArray[np.float64] | None = None,
    **kind: Any,
) -> Experts:
    def pair() -> tuple[Matrix, Matrix]:
        gate_up = make_matrix(device, rng, 2 * ffn_dim, dim, order=GATE_UP, **kind)
        return gate_up, make_matrix(device, rng, dim, ffn_dim, **kind)

    routed, shared = [pair() for _ in range(n_experts)], pair() if has_shared else None
    if router is None:
        router = rng.standard_normal((n_experts, dim)) * 3 / dim**0.5
    rows = poisoned_rows(router, -(-dim // 8) * 8 + 8)
    tables = [
        device.put(np.array([(pair[i].tiles.address, pair[i].scales.address) for pair in routed],
                            np.uint64))
        for i in (0, 1)
    ]  # fmt: skip
    keep = [device.put(rows), *tables]
    none = Shape(0, 0, 1, routed[0][0].shape.bits, routed[0][0].shape.scales, GATE_UP)
    parts = [] if shared is None else [m for w in shared for m in (w.tiles, w.scales)]
    c = CExperts(
        *(w.shape for w in routed[0]),
        *((none, none) if shared is None else (w.shape for w in shared)),
        *(memory.address for memory in keep),
        *([None] * 4 if shared is None else [memory.address for memory in parts]),
        rows.shape[1],
        n_experts,
        top_k,
    )
    return Experts(c, rows, routed, shared, keep)


def experts_few_need(device: Device, w: Experts, n_tokens: int) -> list[int]:
    """Return bytes of sums, counters, bytes of scratch, and the most tokens of a call."""
    need = (ctypes.c_int64 * 4)()
    device.library.experts_few_need(ctypes.byref(w.c), n_tokens, need)
    return list(need)


def run_experts_few(
    device: Device,
    w: Experts,
    x: NDArray[np.uint16],
    y: NDArray[np.float32],
    *,
    at: Memory | None = None,
    workspace: Workspace | None = None,
) -> NDArray[np.float32]:
    """Return y plus what the experts give [n_tokens, stride]; x lies `at` a place, or anywhere."""
    n_tokens, stride = x.shape
    sum_bytes, n_counters, scratch_bytes, _ = experts_few_need(device, w, n_tokens)
    workspace = workspace or make_workspace(device, sum_bytes, n_counters)
    sums, scratch = device.put(y), device.put(np.full(scratch_bytes, 0xFF, np.uint8))
    device.call(
        "run_experts_few",
        w.c,
        at or device.put(x),
        n_tokens,
        stride,
        sums,
        y.shape[1],
        scratch,
        *workspace.arguments(),
    )
    # The first is the grid's barrier, whose top bit turns over each time.
    counters = workspace.counters.read()
    assert not counters[1:].any()
    assert counters[0] & 0x7FFFFFFF == 0
    return sums.read()


def exact_experts(
    w: Experts, x_bits: NDArray[np.uint16], y: Array, factors: Array | float = 1.0
) -> tuple[Array, Array]:
    """Return what run_experts_few should give [n_tokens, dim], and how far it may be off.

    Args:
        w: Of one layer.
        x_bits: bf16.
        y: What is added to.
        factors: What each token is multiplied by, [n_tokens, 1].
    """
    x = from_bf16(x_bits)[:, : w.dim] * factors
    router = from_bf16(w.router)[:, : w.dim]
    logits, logit_errors = x @ router.T, sum_error(x, router)
    total = y[:, : w.dim].astype(np.float64)
    allowed = np.zeros_like(total)
    if w.shared is not None:
        part, off = feed_forward(x, w.shared, 1.0, 0.0)
        total, allowed = total + part, allowed + off
    for token, row in enumerate(logits):
        for expert in np.argsort(-row, kind="stable")[: w.c.top_k]:
            factor = 1 / (1 + np.exp(-row[expert]))
            factor_error = logit_errors[token, expert] + EXP_ERROR
            part, off = feed_forward(x[token : token + 1], w.routed[expert], factor, factor_error)
            total[token] += part[0]
            allowed[token] += off[0]
    return total, allowed + 4 * FLOAT32_ROUNDING * np.abs(total)


def feed_forward(x: Array, pair: tuple[Matrix, Matrix], factor: float, factor_error: float) -> Any:
    """Return down(silu(factor gate(x)) * factor up(x)), and how far it may be off.

    An activation that lies beside the middle of two bf16 may become either of them.
    """
    gate_up, down = pair
    value, off = gated(x, gate_up.w, factor, factor_error)
    act, low, high = rounded(value), rounded(value - off), rounded(value + off)
    flipped = np.maximum(np.abs(high - act), np.abs(act - low))
    return act @ down.w.T, sum_error(act, down.w) + flipped @ np.abs(down.w).T


# ---- what is right ----
def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def float32_sums(
    x: Array, w: Array, start: Array | float = 0.0
) -> tuple[NDArray[np.float32], float]:
    """Return start + x w^T, one product after the other in float32, and the largest on the way."""
    x, w = x.astype(np.float32), w.astype(np.float32)
    sums, largest = np.zeros((len(x), len(w)), np.float32), 0.0
    for k in range(x.shape[1]):
        sums += x[:, k, None] * w[None, :, k]
        largest = max(largest, float(np.nanmax(np.abs(sums), initial=0)))
    return sums + np.asarray(start, np.float32), largest


def assert_sums(
    y: Array, x: Array, w: Array, start: Array | float = 0.0, *, in_tensor_cores: bool = False
) -> None:
    """Hold y to start + x w^T: float32, or rounded to bf16.

    Args:
        y: What was computed.
        x: Rows.
        w: Rows.
        start: What was there before.
        in_tensor_cores: All inputs are summed there: each step of 16 products is aligned to the
            largest of them and the sum, and cut off there.
    """
    exact = x @ w.T + start
    size = np.abs(x) @ np.abs(w).T + np.abs(start)
    numpys, largest = float32_sums(x, w, start)
    off = np.abs(numpys - exact)
    allowed = 2 * max(np.nanmax(off, initial=0), FLOAT32_ROUNDING * np.nanmax(size, initial=0))
    if in_tensor_cores:
        allowed += -(-x.shape[1] // 16) * 2 * FLOAT32_ROUNDING * largest
    if y.dtype == np.uint16:
        assert_within(from_bf16(y), exact, allowed + BF16_ROUNDING * np.abs(exact))
    else:
        assert_within(y, exact, np.full_like(exact, allowed))


def sum_error(x: Array, w: Array) -> Array:
    """Return how far each sum may be off, where NumPy's own error is not asked for."""
    return 2 * FLOAT32_ROUNDING * (np.abs(x) @ np.abs(w).T)


def gated(x: Array, w: Array, factor: Array | float, factor_error: Array | float) -> Any:
    """Return silu(factor gate) * factor up before it is rounded, and how far it may be off."""
    h, error = factor * (x @ w.T), factor * sum_error(x, w)
    error = error + np.abs(h) * factor_error
    gate, up = np.split(h, 2, axis=-1)
    gate_error, up_error = np.split(error, 2, axis=-1)
    value = silu(gate) * up
    # |silu'| stays below 1.1.
    off = 1.1 * gate_error * np.abs(up) + np.abs(silu(gate)) * up_error + EXP_ERROR * np.abs(value)
    return value, off


def assert_within(y: Array, exact: Array, allowed: Array) -> None:
    excess = np.where(np.isfinite(y), np.abs(y - exact) - allowed, np.inf)
    if excess.size == 0 or excess.max() <= 0:
        return
    at = np.unravel_index(np.argmax(excess), excess.shape)
    raise AssertionError(
        f"worst at {tuple(map(int, at))}: got {y[at]:.9g}, exact {exact[at]:.9g}, allowed "
        f"{allowed[at]:.3g}; {int((excess > 0).sum())} of {excess.size} are wrong"
    )
