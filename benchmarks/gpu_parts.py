"""A GPU with a clock, and weights of random values on it: what benchmarks of kernels are made of.

Must never know which kernels are measured.
"""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cuda_cases import BF16, GATE_UP, PLAIN, CExperts, Shape, bf16
from cuda_device import Device, Memory

Call = tuple[Any, ...]  # a name of the library, and arguments
N_RUNS = 50  # of each graph
N_CALLS = 32  # in a graph at least, so that its own start is lost among them
SMALL_SCALES = {4: 0x3C00, 8: 0x3A00}  # bf16, so that weights are near 0.03 as real ones are


@dataclass(frozen=True)
class Model:
    """What kernels need to know of Llama 4 Scout."""

    dim: int = 5120
    qkv_rows: int = 7168
    ffn_dim: int = 8192
    n_experts: int = 16
    vocab_size: int = 202048
    big: int = 8192  # the square matrix product that stands for the peak
    peak_bytes: int = 2 << 30  # what is read and copied for the peaks
    moe_tokens: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    prefill_tokens: tuple[int, ...] = (256, 1024, 4096, 8192)
    dense_tokens: tuple[int, ...] = (128, 1024, 8192)


@dataclass
class Row:
    """A kernel, what it must read and multiply, and its times."""

    name: str
    n_tokens: int
    n_bytes: int
    n_flops: int
    us: list[float] = field(default_factory=list)
    torch_us: list[float] = field(default_factory=list)  # PyTorch's, where it has the same


class Gpu:
    """A GPU and its clock."""

    def __init__(self, library: Path) -> None:
        self.device = Device(ctypes.CDLL(str(library)), emulated=False)

    def info(self) -> dict[str, Any]:
        name, numbers = ctypes.create_string_buffer(256), (ctypes.c_int64 * 7)()
        self.device.submit("gpu_info", name, numbers)
        keys = ("multiprocessors", "l2_bytes", "memory_bytes", "clock_khz", "capability",
                "cuda_of_driver", "cuda_runtime")  # fmt: skip
        return {"gpu": name.value.decode(), **dict(zip(keys, numbers, strict=True))}

    def random(self, n_bytes: int, seed: int) -> Memory:
        memory = self.device.reserve(n_bytes)
        self.device.submit("fill_random", memory, ctypes.c_int64(n_bytes), seed)
        return memory

    def times(self, calls: list[Call], n_runs: int = N_RUNS, n_calls: int = N_CALLS) -> list[float]:
        """Return the microseconds of one call, in each of n_runs of n_calls in a row, or more."""
        calls = calls * -(-n_calls // len(calls))
        self.device.submit("graph_begin")
        for call in calls:
            self.device.submit(*call)
        self.device.submit("graph_end")
        milliseconds = (ctypes.c_float * n_runs)()
        self.device.submit("graph_times", 3, milliseconds)  # to warm up
        self.device.submit("graph_times", n_runs, milliseconds)
        return [1000 * value / len(calls) for value in milliseconds]

    def wall_times(self, call: Call, n_runs: int = 10) -> list[float]:
        """Return the microseconds of a call that copies from the host, which no graph holds."""
        times = []
        for _ in range(n_runs + 2):
            start = time.perf_counter()
            self.device.submit(*call)
            times.append(1e6 * (time.perf_counter() - start))
        return times[2:]


# ---- weights, activations and what blocks share ----
def shape_bytes(gpu: Gpu, shape: Shape) -> tuple[int, int]:
    sizes = (ctypes.c_int64 * 2)()
    gpu.device.library.tile_sizes(ctypes.byref(shape), sizes)
    return sizes[0], sizes[1]


@dataclass
class Weights:
    shape: Shape
    tiles: Memory
    scales: Memory

    @property
    def n_bytes(self) -> int:
        return self.tiles.n_bytes + self.scales.n_bytes


def random_weights(gpu: Gpu, rows: int, inputs: int, bits: int, order: int, seed: int) -> Weights:
    shape = Shape(rows, inputs, 1, bits // 8, BF16, order)
    n_tiles, n_scales = shape_bytes(gpu, shape)
    scales = np.full(n_scales // 2, SMALL_SCALES[bits], np.uint16)
    return Weights(shape, gpu.random(n_tiles, seed), gpu.device.put(scales))


def n_copies(n_bytes: int, l2_bytes: int) -> int:
    """Return how many copies of what a call reads pass L2 twice before one comes again."""
    return max(2, -(-2 * l2_bytes // n_bytes) + 1)


def activations(n_tokens: int, dim: int) -> np.ndarray[Any, Any]:
    return bf16(np.random.default_rng(n_tokens).standard_normal((n_tokens, dim)))


def workspace(gpu: Gpu, sum_bytes: int, n_counters: int) -> list[Any]:
    counters = gpu.device.put(np.zeros(n_counters, np.uint32))
    return [gpu.device.reserve(sum_bytes), ctypes.c_int64(sum_bytes),
            counters, ctypes.c_int64(n_counters)]  # fmt: skip


@dataclass
class Layer:
    """The experts of a layer; the shared pair comes last."""

    pairs: list[tuple[Weights, Weights]]
    router: np.ndarray[Any, Any]  # bf16 [n_experts, dim]
    c: CExperts
    keep: list[Memory]


def random_layer(gpu: Gpu, model: Model, seed: int) -> Layer:
    dim, ffn_dim, n = model.dim, model.ffn_dim, model.n_experts
    pairs = [
        (random_weights(gpu, 2 * ffn_dim, dim, 4, GATE_UP, 100 * seed + 2 * i),
         random_weights(gpu, dim, ffn_dim, 4, PLAIN, 100 * seed + 2 * i + 1))
        for i in range(n + 1)
    ]  # fmt: skip
    router = bf16(np.random.default_rng(seed).standard_normal((n, dim)) * dim**-0.5)
    tables = [
        np.array([(pair[i].tiles.address, pair[i].scales.address) for pair in pairs[:n]], np.uint64)
        for i in (0, 1)
    ]
    keep = [gpu.device.put(values) for values in (router, *tables)]
    shapes = [w.shape for w in (*pairs[0], *pairs[n])]
    shared = [memory.address for w in pairs[n] for memory in (w.tiles, w.scales)]
    c = CExperts(*shapes, *(memory.address for memory in keep), *shared, dim, n, 1)
    return Layer(pairs, router, c, keep)
