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
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

import records  # noqa: E402
from cuda_cases import (  # noqa: E402
    BF16,
    PLAIN,
    STORE,
    STORE_BF16,
    SWIGLU,
    CDense,
    Shape,
    bf16,
    from_bf16,
)
from gpu_parts import (  # noqa: E402
    Call,
    Gpu,
    Model,
    Row,
    activations,
    n_copies,
    random_layer,
    random_weights,
    shape_bytes,
    workspace,
)
from grouped_cases import Product, list_tiles  # noqa: E402


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
    del a, b
    torch.cuda.empty_cache()  # others want it
    return 2 * n**3 / median(times[3:]) / 1e9


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


NOTE = (
    "runs of a graph of calls in a row, each on another copy of its weights, which together pass "
    "L2 twice. The limit is the larger of bytes over the read bandwidth and products over the bf16 "
    "peak. Weights are random; experts are those that random tokens choose."
)


def markdown(record: dict[str, Any], note: str) -> str:
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
            f"Medians of {len(record['rows'][0]['us'])} {note}",
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
    return records.gpu_head("gpu_kernels", machine) | {"peaks": peaks, "rows": rows}


def parse(argv: list[str] | None, description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--library", type=Path, required=True, help="what tools/gpu_check built")
    parser.add_argument("--note", default="", help="part of the result's name")
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="folder of the result")
    return parser.parse_args(argv)


def publish(record: dict[str, Any], note: str, args: argparse.Namespace) -> None:
    """Print the table, and write the result."""
    print(kernel_table(record))
    name = "-".join(filter(None, (records.slug(record["machine"]["gpu"]), args.note)))
    path = records.write(record, markdown(record, note), args.out, name)
    print(f"[{record['benchmark']}] wrote {path}.json and .md")


def main(argv: list[str] | None = None, gpu: Gpu | None = None, model: Model | None = None) -> None:
    args = parse(argv, __doc__)
    publish(measure(gpu or Gpu(args.library), model or Model()), NOTE, args)


if __name__ == "__main__":
    main()
