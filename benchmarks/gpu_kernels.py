"""Measure GPU kernels on Scout's shapes, beside what the same GPU reads, copies and multiplies.

    python benchmarks/gpu_kernels.py --library build/gpu/libcamelid_gpu_check.so

`tools/gpu_check` builds the library, tests it and calls this. Each kernel is called in a row on as
many copies of its weights as pass L2 twice, recorded as a graph; a time is the graph's, divided by
the calls. The limit is the larger of bytes over the read-only bandwidth and products over the bf16
peak, both measured here before. Prints a table, and writes it with every run to benchmarks/results.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

import records  # noqa: E402
from cuda_cases import (  # noqa: E402
    BF16,
    GATE_UP,
    PLAIN,
    STORE,
    STORE_BF16,
    SWIGLU,
    CExperts,
    Shape,
    bf16,
    from_bf16,
)
from cuda_device import Device, Memory  # noqa: E402
from grouped_cases import Product, list_tiles  # noqa: E402

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


@dataclass
class Row:
    """A kernel, what it must read and multiply, and its times."""

    name: str
    n_tokens: int
    n_bytes: int
    n_flops: int
    us: list[float] = field(default_factory=list)


class Gpu:
    """A GPU and its clock."""

    def __init__(self, library: Path) -> None:
        self.device = Device(ctypes.CDLL(str(library)), emulated=False)

    def info(self) -> dict[str, Any]:
        name, numbers = ctypes.create_string_buffer(256), (ctypes.c_int64 * 5)()
        self.device.submit("gpu_info", name, numbers)
        keys = ("multiprocessors", "l2_bytes", "memory_bytes", "clock_khz", "capability")
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


# ---- what the GPU can do at most ----
def memory_peaks(gpu: Gpu, model: Model) -> dict[str, float]:
    """Return GB/s of reading, and of copying with bytes read and bytes written both counted."""
    n_bytes = ctypes.c_int64(model.peak_bytes)
    source, target = (gpu.random(model.peak_bytes, seed) for seed in (1, 2))
    read = gpu.times([("read_memory", source, n_bytes, target)])
    copy = gpu.times([("copy_memory", target, source, n_bytes)])
    gigabytes = model.peak_bytes / 1e9
    return {
        "read_gb_s": gigabytes / median(read) * 1e6,
        "copy_gb_s": 2 * gigabytes / median(copy) * 1e6,
    }


def bf16_peak(gpu: Gpu, model: Model, capability: int) -> dict[str, Any]:
    """Return TFLOP/s of a large product on random data: PyTorch's, our own, the larger counts."""
    found = {"ours": 0.0, "torch": torch_tflop_s(model.big) or 0.0}
    if capability == 90:
        row = dense_row(gpu, model.big)
        found["ours"] = row.n_flops / median(row.us) / 1e6
    best = max(found, key=found.__getitem__)
    return {"bf16_tflop_s": found[best], "bf16_measured_by": best if found[best] else "nobody"}


def torch_tflop_s(n: int) -> float | None:
    """Return what PyTorch reaches, where it is there and sees the GPU."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(13):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        a @ b
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return 2 * n**3 / median(times[3:]) / 1e9


class CDense(ctypes.Structure):
    """tests/cuda/hopper.cu has its meaning."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "w", "y", "x_scales", "w_scales")),
        *((name, ctypes.c_int) for name in ("type", "n_tokens", "rows", "inputs")),
        *((name, ctypes.c_int) for name in ("x_stride", "w_stride", "y_stride", "output")),
    ]


def dense_row(gpu: Gpu, n: int) -> Row:
    """Return our own bf16 product of n x n matrices."""
    normal = bf16(np.random.default_rng(0).standard_normal(1 << 20))
    x, w = (gpu.device.put(np.resize(normal, (n, n))) for _ in range(2))
    y = gpu.device.reserve(2 * n * n)
    c = CDense(x.address, w.address, y.address, None, None, 0, *[n] * 6, STORE_BF16)
    gpu.device.library.matmul_dense_need.restype = ctypes.c_int64
    need = gpu.device.library.matmul_dense_need(ctypes.byref(c))
    workspace = gpu.device.reserve(max(1, need))
    times = gpu.times([("run_matmul_dense", c, workspace)], 20, 4)
    return Row(f"dense bf16 {n} x {n}", n, 6 * n * n, 2 * n**3, times)


# ---- kernels ----
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


def matmul_rows(
    gpu: Gpu, name: str, rows: int, inputs: int, bits: int, tokens: tuple[int, ...], l2_bytes: int
) -> Iterator[Row]:
    """Measure a dense matrix with a few tokens."""
    one = Shape(rows, inputs, 1, bits // 8, BF16, PLAIN)
    copies = [random_weights(gpu, rows, inputs, bits, PLAIN, seed)
              for seed in range(n_copies(sum(shape_bytes(gpu, one)), l2_bytes))]  # fmt: skip
    for n_tokens in tokens:
        x = gpu.device.put(activations(n_tokens, inputs))
        y = gpu.device.reserve(4 * n_tokens * rows)
        need = (ctypes.c_int64 * 2)()
        gpu.device.library.matmul_few_need(ctypes.byref(one), n_tokens, need)
        shared = workspace(gpu, *need)
        calls: list[Call] = [
            ("run_matmul_few", w.shape, w.tiles, w.scales, x, n_tokens, inputs, y, rows, STORE,
             *shared)
            for w in copies
        ]  # fmt: skip
        n_bytes = copies[0].n_bytes + x.n_bytes + y.n_bytes
        flops = 2 * n_tokens * rows * inputs
        yield Row(f"INT{bits} {name} {rows} x {inputs}", n_tokens, n_bytes, flops, gpu.times(calls))


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


def moe_rows(gpu: Gpu, model: Model, l2_bytes: int) -> Iterator[Row]:
    """Measure router, shared and routed experts of a layer, with experts as tokens choose them."""
    one = random_layer(gpu, model, 0)
    pair_bytes = sum(w.n_bytes for w in one.pairs[0])
    layers = [one, *(random_layer(gpu, model, seed)
                     for seed in range(1, n_copies(2 * pair_bytes, l2_bytes)))]  # fmt: skip
    for n_tokens in model.moe_tokens:
        values = activations(n_tokens, model.dim)
        x, y = gpu.device.put(values), gpu.device.put(np.zeros((n_tokens, model.dim), np.float32))
        need = (ctypes.c_int64 * 4)()
        gpu.device.library.experts_few_need(ctypes.byref(one.c), n_tokens, need)
        shared, scratch = workspace(gpu, need[0], need[1]), gpu.device.reserve(need[2])
        calls: list[Call] = [
            ("run_experts_few", layer.c, x, n_tokens, model.dim, y, model.dim, scratch, *shared)
            for layer in layers
        ]
        hit = [len(set(np.argmax(from_bf16(values) @ from_bf16(layer.router).T, axis=1)))
               for layer in layers]  # fmt: skip
        fixed = pair_bytes + one.router.nbytes + x.n_bytes + 2 * y.n_bytes
        n_bytes = round(fixed + pair_bytes * sum(hit) / len(hit))
        flops = 2 * 2 * n_tokens * 3 * model.dim * model.ffn_dim  # shared and one routed
        name = f"INT4 experts of a layer, {sum(hit) / len(hit):g} hit"
        yield Row(name, n_tokens, n_bytes, flops, gpu.times(calls))


def grouped_rows(gpu: Gpu, model: Model, l2_bytes: int) -> Iterator[Row]:
    """Measure the products of a layer's experts, the shared one among them, with many tokens.

    All of them are read in a call, which is far more than L2 holds.
    """
    hopper = gpu.info()["capability"] == 90
    layer = random_layer(gpu, model, 0)
    pairs = [layer.pairs[-1], *layer.pairs[:-1]]  # group 0 is the shared expert
    for n_tokens in model.prefill_tokens:
        values = activations(n_tokens, model.dim)
        expert = np.argmax(from_bf16(values) @ from_bf16(layer.router).T, axis=1)
        counts = [n_tokens, *np.bincount(expert, minlength=model.n_experts).tolist()]
        tiles = list_tiles(counts)
        order = np.concatenate([np.arange(n_tokens), np.argsort(expert, kind="stable")])
        x_rows = gpu.device.put(order.astype(np.int32))
        factors = gpu.device.put(np.full(2 * n_tokens, 0.5, np.float32))
        ends = [gpu.device.put(np.array([end], np.int32)) for end in (0, len(tiles))]
        act = gpu.device.put(activations(2 * n_tokens, model.ffn_dim))
        out = gpu.device.reserve(2 * n_tokens * model.dim * 4)
        at = gpu.device.put(tiles)
        x = gpu.device.put(values)
        products = [
            ("gate, up, SwiGLU", 0, SWIGLU, x, act, x_rows, factors),
            ("down", 1, STORE, act, out, None, None),
        ]
        for name, which, output, source, target, rows, scale in products:
            weights = [pair[which] for pair in pairs]
            shape = weights[0].shape
            table = gpu.device.put(
                np.array([(w.tiles.address, w.scales.address) for w in weights], np.uint64)
            )
            stride = shape.rows // 2 if output == SWIGLU else shape.rows
            multiprocessors = gpu.info()["multiprocessors"]
            c = Product(shape, output, 0, hopper, multiprocessors, shape.inputs, stride)
            call = ("case_grouped", c, table, source, target, rows, None, scale, at, *ends)
            n_hit = sum(count > 0 for count in counts)
            n_bytes = n_hit * weights[0].n_bytes + source.n_bytes + target.n_bytes
            n_flops = 4 * n_tokens * shape.rows * shape.inputs
            title = f"INT4 experts, grouped: {name}"
            yield Row(title, n_tokens, n_bytes, n_flops, gpu.times([call], 20, 4))


# Each family of kernels; what it reserves goes back before the next begins.
FAMILIES: list[Callable[[Gpu, Model, int], Iterator[Row]]] = [
    lambda gpu, model, l2: matmul_rows(gpu, "QKV", model.qkv_rows, model.dim, 4, (1, 8), l2),
    lambda gpu, model, l2: matmul_rows(gpu, "O", model.dim, model.dim, 4, (1, 8), l2),
    moe_rows,
    grouped_rows,
    lambda gpu, model, l2: matmul_rows(gpu, "lm_head", model.vocab_size, model.dim, 8, (1, 8), l2),
]


# ---- what is made of it ----
def limit_us(row: dict[str, Any], peaks: dict[str, Any]) -> float:
    """Return what reading the bytes takes, or multiplying where the peak is known and lower."""
    multiplying = peaks["bf16_tflop_s"] and row["n_flops"] / peaks["bf16_tflop_s"] / 1e6
    return max(row["n_bytes"] / peaks["read_gb_s"] / 1e3, multiplying)


def kernel_table(record: dict[str, Any]) -> str:
    """Return a Markdown table of medians beside their limits."""
    columns = ["kernel", "tokens", "MB", "us", "10 % to 90 %", "limit, us", "of limit",
               "GB/s", "of copy"]  # fmt: skip
    lines = [columns]
    for row in record["rows"]:
        time, limit = median(row["us"]), limit_us(row, record["peaks"])
        low, high = np.quantile(row["us"], (0.1, 0.9))
        speed = row["n_bytes"] / time / 1e3
        lines.append(
            [row["name"], str(row["n_tokens"]), f"{row['n_bytes'] / 1e6:.1f}", f"{time:.2f}",
             f"{low:.2f} to {high:.2f}", f"{limit:.2f}", f"{limit / time:.0%}", f"{speed:.0f}",
             f"{speed / record['peaks']['copy_gb_s']:.0%}"]
        )  # fmt: skip
    return records.table(lines)


def markdown(record: dict[str, Any]) -> str:
    """Return the report."""
    machine, peaks = record["machine"], record["peaks"]
    return "\n".join(
        [
            f"# {record['date']}: kernels on {machine['gpu']}, camelid {record['version']}",
            "",
            f"Measured in the same run: reading {peaks['read_gb_s']:.0f} GB/s, copying "
            f"{peaks['copy_gb_s']:.0f} GB/s (read plus written), a bf16 product of large matrices "
            f"{peaks['bf16_tflop_s']:.0f} TFLOP/s (by {peaks['bf16_measured_by']}). "
            f"{machine['multiprocessors']} multiprocessors, {machine['l2_bytes'] >> 20} MiB L2.",
            "",
            kernel_table(record),
            "",
            f"Medians of {len(record['rows'][0]['us'])} runs of a graph of calls in a row, each on "
            "another copy of its weights, which together pass L2 twice. The limit is the larger "
            "of bytes over the read bandwidth and products over the bf16 peak. Weights are random; "
            "experts are those that random tokens choose.",
        ]
    )


def measure(gpu: Gpu, model: Model) -> dict[str, Any]:
    """Return the record of everything."""
    machine = gpu.info()
    peaks = memory_peaks(gpu, model) | bf16_peak(gpu, model, machine["capability"])
    rows = []
    for family in FAMILIES:
        for row in family(gpu, model, machine["l2_bytes"]):
            print(f"[gpu_kernels] {row.name}, {row.n_tokens} tokens: {median(row.us):.2f} us")
            rows.append(asdict(row))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {
        "benchmark": "gpu_kernels",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "version": project["version"],
        "machine": machine,
        "peaks": peaks,
        "rows": rows,
    }


def main(argv: list[str] | None = None, gpu: Gpu | None = None, model: Model | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--library", type=Path, required=True, help="what tools/gpu_check built")
    parser.add_argument("--note", default="", help="part of the result's name")
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="folder of the result")
    args = parser.parse_args(argv)
    record = measure(gpu or Gpu(args.library), model or Model())
    print(kernel_table(record))
    name = re.sub(r"[^a-z0-9]+", "-", record["machine"]["gpu"].lower()).strip("-")
    note = "-".join(filter(None, (name, args.note)))
    path = records.write(record, markdown(record), args.out, note)
    print(f"[gpu_kernels] wrote {path}.json and .md")


if __name__ == "__main__":
    main()
