"""Weights of experts in the device's layout, and products over them, for tests of kernels."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuda_cases import BF16, CHUNK, PAIRS, PLAIN, STORE, Quantized, Shape, bf16, from_bf16, pack
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
    low = -(2 ** (bits - 1))
    scales = PAIRS if zeros or group < CHUNK else BF16
    values = np.zeros((n_experts, rows, inputs))
    table, keep = np.zeros((n_experts, 2), np.uint64), []
    for expert in range(n_experts):
        n_groups = -(-inputs // group)
        q = Quantized(
            rng.integers(low, -low, (rows, inputs), dtype=np.int32),
            from_bf16(bf16(rng.uniform(0.5, 1.5, (rows, n_groups)) / -low)).astype(np.float32),
            rng.integers(low, -low, (rows, n_groups)).astype(np.float32) if zeros else None,
            group,
        )
        shape, *packed = pack(device, q, bits=bits, scales=scales, order=order)
        on_device = [device.put(array) for array in packed]
        keep += on_device
        table[expert] = [memory.address for memory in on_device]
        values[expert] = q.dequantised()
    return Weights(shape, values, device, device.put(table), keep)


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
