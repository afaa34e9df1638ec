"""Weights of experts in the device's layout, and products over them, for tests of kernels."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuda_cases import CHUNK, PLAIN, STORE, Shape, bf16, from_bf16
from cuda_device import Device, Memory

TILE_TOKENS = 128


class Product(ctypes.Structure):
    _fields_ = [
        ("shape", Shape),
        *((name, ctypes.c_int32) for name in ("output", "n_visits", "hopper", "multiprocessors")),
        ("x_stride", ctypes.c_int64),
        ("y_stride", ctypes.c_int64),
    ]


@dataclass
class Weights:
    """Experts' matrices: their values, and where they lie in device memory."""

    shape: Shape
    values: NDArray[np.float64]  # [n_experts, rows, inputs], dequantised
    device: Device
    table: Memory  # pointers
    keep: list[Memory]


def source_rows(rows: int, order: int) -> NDArray[np.int64]:
    """Of each row of the tiles the row of the matrix; -1 where there is none."""
    if order == PLAIN:
        at = np.arange(-(-rows // 16) * 16)
        return np.where(at < rows, at, -1)
    half = rows // 2
    channel = np.arange(-(-half // 8) * 8).reshape(-1, 1, 8)
    at = channel + np.array([0, half]).reshape(1, 2, 1)
    return np.where(channel < half, at, -1).reshape(-1)


def make_weights(
    device: Device,
    rng: np.random.Generator,
    *,
    n_experts: int,
    rows: int,
    inputs: int,
    bits: int = 4,
    group: int = 128,
    zeros: bool = False,
    order: int = PLAIN,
) -> Weights:
    library = device.library
    pairs = zeros or group < CHUNK
    entries = CHUNK // min(group, CHUNK)
    shape = Shape(rows, inputs, entries, bits // 8, int(pairs), order)
    sizes = np.zeros(2, np.int64)
    library.case_sizes(ctypes.byref(shape), ctypes.c_void_p(sizes.ctypes.data))
    low = -(2 ** (bits - 1))
    values = np.zeros((n_experts, rows, inputs))
    table, keep = np.zeros((n_experts, 2), np.uint64), []
    for expert in range(n_experts):
        q = rng.integers(low, -low, (rows, inputs), dtype=np.int32)
        n_chunks = -(-inputs // CHUNK)
        n_groups = n_chunks * CHUNK // min(group, CHUNK)
        scale = from_bf16(bf16(rng.uniform(0.5, 1.5, (rows, n_groups)) / -low))
        if group > CHUNK:  # neighbouring chunks share a scale
            scale = scale[:, np.arange(n_groups) // (group // CHUNK)]
        zero = np.zeros_like(scale)
        if zeros:
            zero = rng.integers(low, -low, scale.shape).astype(np.float32)
        tiles = np.zeros(sizes[0] // 4, np.uint32)
        library.case_pack(
            ctypes.byref(shape), *(ctypes.c_void_p(a.ctypes.data) for a in (q, tiles))
        )
        packed = pack_scales(shape, scale, zero)
        assert packed.nbytes == sizes[1]
        on_device = [device.put(tiles), device.put(packed)]
        keep += on_device
        table[expert] = [memory.address for memory in on_device]
        of_input = np.arange(inputs) // min(group, CHUNK)
        values[expert] = (q - zero[:, of_input].astype(np.float64)) * scale[:, of_input]
    return Weights(shape, values, device, device.put(table), keep)


def pack_scales(
    shape: Shape, scale: NDArray[np.float32], zero: NDArray[np.float32]
) -> NDArray[Any]:
    """[row tile][chunk and entry][16 rows], as layout/tiles.h says."""
    rows = source_rows(shape.rows, shape.order)
    there = (rows >= 0)[:, None]

    def tiled(values: NDArray[np.float32]) -> NDArray[np.float32]:
        of_rows = np.where(there, values[np.maximum(rows, 0)], 0)
        return np.ascontiguousarray(of_rows.reshape(-1, 16, values.shape[1]).swapaxes(1, 2))

    if shape.scales == 0:
        return bf16(tiled(scale))
    return np.stack([tiled(scale), tiled(zero)], axis=-1).astype(np.float32)


def list_tiles(counts: list[int]) -> NDArray[np.int32]:
    """The tiles of groups with these numbers of visits: group, first, n, group_tile, group_n."""
    tiles: list[list[int]] = []
    first = 0
    for group, count in enumerate(counts):
        group_tile, group_n = len(tiles), -(-count // TILE_TOKENS)
        for start in range(0, count, TILE_TOKENS):
            n = min(TILE_TOKENS, count - start)
            tiles.append([group, first + start, n, group_tile, group_n])
        first += count
    return np.array(tiles, np.int32).reshape(-1, 5)


def run_product(
    w: Weights,
    x: NDArray[np.uint16],
    y: NDArray[Any],
    *,
    hopper: bool,
    output: int = STORE,
    n_visits: int = 0,
    x_rows: NDArray[np.int32] | None = None,
    y_rows: NDArray[np.int32] | None = None,
    factors: NDArray[np.float32] | None = None,
    tiles: NDArray[np.int32] | None = None,
    first_tile: int = 0,
    last_tile: int | None = None,
    multiprocessors: int = 3,
    seed: int = 0,
) -> None:
    """Call grouped_many; x and y are [rows, stride]."""
    device = w.device
    device.arrange(seed=seed)
    c = Product(w.shape, output, n_visits, hopper, multiprocessors, x.shape[1], y.shape[1])
    ends: list[Any] = [None, None]
    if tiles is not None:
        last = len(tiles) if last_tile is None else last_tile
        ends = [np.array([first_tile], np.int32), np.array([last], np.int32)]
    given = [x_rows, y_rows, factors, tiles, *ends]
    at = [None if values is None else device.put(values) for values in (x, y, *given)]
    device.call("case_grouped", c, w.table, *at)
    y[...] = at[1].read()


class Route(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("n_tokens", "n_experts", "top_k", "shared")]


class Routes:
    """What route_many found, in device memory."""

    def __init__(
        self,
        device: Device,
        logits: NDArray[np.float32],
        top_k: int,
        *,
        shared: bool,
        seed: int = 0,
    ) -> None:
        self.device, library = device, device.library
        self.shape = Route(*logits.shape, top_k, shared)
        library.case_route_bytes.restype = ctypes.c_int64
        self.memory = device.reserve(library.case_route_bytes(ctypes.byref(self.shape)))
        device.arrange(seed=seed)
        device.call("case_route", self.shape, device.put(logits), self.memory)
        places = np.zeros(5, np.int64)
        library.case_route_places(
            ctypes.byref(self.shape),
            ctypes.c_void_p(self.memory.address),
            ctypes.c_void_p(places.ctypes.data),
        )
        found = self.memory.read()

        def at(place: int, kind: Any, count: int) -> NDArray[Any]:
            n_bytes = count * np.dtype(kind).itemsize
            return found[place : place + n_bytes].view(kind)

        n_tokens = len(logits)
        n_visits = n_tokens * (top_k + int(shared))
        self.token = at(places[0], np.int32, n_visits)
        self.factor = at(places[1], np.float32, n_visits)
        self.visits = at(places[2], np.int32, n_tokens * top_k).reshape(n_tokens, top_k)
        self.tile_ends = at(places[4], np.int32, 3)
        self.tiles = at(places[3], np.int32, 5 * int(self.tile_ends[2])).reshape(-1, 5)

    def combine(self, rows: NDArray[np.float32], y: NDArray[np.float32], dim: int) -> None:
        at = self.device.put(y)
        self.device.call(
            "case_combine",
            self.shape,
            self.memory,
            self.device.put(rows),
            ctypes.c_int64(rows.shape[1]),
            at,
            ctypes.c_int64(y.shape[1]),
            dim,
        )
        y[...] = at.read()
