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
    ADD,
    BF16,
    DTYPE_BF16,
    PLAIN,
    STORE,
    SWIGLU,
    CSource,
    Shape,
    from_bf16,
)
from gpu_dense import bf16_peak, dense_rows  # noqa: E402
from gpu_parts import (  # noqa: E402
    SMALL_SCALES,
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
from grouped_cases import Product, Route, list_tiles  # noqa: E402


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


# ---- kernels ----
def matmul_rows(
    gpu: Gpu,
    name: str,
    rows: int,
    inputs: int,
    bits: int,
    tokens: tuple[int, ...],
    l2_bytes: int,
    output: int = STORE,
) -> Iterator[Row]:
    """Measure a dense matrix with a few tokens."""
    one = Shape(rows, inputs, 1, bits // 8, BF16, PLAIN)
    copies = [random_weights(gpu, rows, inputs, bits, PLAIN, seed)
              for seed in range(n_copies(sum(shape_bytes(gpu, one)), l2_bytes))]  # fmt: skip
    for n_tokens in tokens:
        x = gpu.device.put(activations(n_tokens, inputs))
        y = gpu.device.put(np.zeros((n_tokens, rows), np.float32))
        need = (ctypes.c_int64 * 2)()
        gpu.device.library.matmul_few_need(ctypes.byref(one), n_tokens, need)
        shared = workspace(gpu, *need)
        calls: list[Call] = [
            ("run_matmul_few", w.shape, w.tiles, w.scales, x, n_tokens, inputs, y, rows, output,
             *shared)
            for w in copies
        ]  # fmt: skip
        n_bytes = copies[0].n_bytes + x.n_bytes + y.n_bytes * (2 if output == ADD else 1)
        flops = 2 * n_tokens * rows * inputs
        added = ", added" if output == ADD else ""
        yield Row(
            f"INT{bits} {name} {rows} x {inputs}{added}", n_tokens, n_bytes, flops, gpu.times(calls)
        )


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
        out = gpu.device.put(np.zeros((2 * n_tokens, model.dim), np.float32))
        at = gpu.device.put(tiles)
        x = gpu.device.put(values)
        products = [
            ("gate, up, SwiGLU", 0, SWIGLU, x, act, x_rows, factors),
            ("down", 1, STORE, act, out, None, None),
            ("down, added", 1, ADD, act, out, None, None),
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
            n_bytes = n_hit * weights[0].n_bytes + source.n_bytes
            n_bytes += target.n_bytes * (2 if output == ADD else 1)
            n_flops = 4 * n_tokens * shape.rows * shape.inputs
            title = f"INT4 experts, grouped: {name}"
            yield Row(title, n_tokens, n_bytes, n_flops, gpu.times([call], 20, 4))


def routing_rows(gpu: Gpu, model: Model, _l2_bytes: int) -> Iterator[Row]:
    """Measure sorting of tokens by expert, and adding up the rows of their visits."""
    library = gpu.device.library
    library.case_route_bytes.restype = ctypes.c_int64
    for n_tokens in model.prefill_tokens:
        for top_k in (1, 2) if model.n_experts > 1 else (1,):
            shape = Route(n_tokens, model.n_experts, top_k, 1)
            memory = gpu.device.reserve(library.case_route_bytes(ctypes.byref(shape)))
            random = np.random.default_rng(n_tokens).standard_normal((n_tokens, model.n_experts))
            logits = gpu.device.put(random.astype(np.float32))
            name = f"routing, top {top_k} of {model.n_experts}"
            n_bytes = logits.n_bytes + memory.n_bytes
            us = gpu.times([("case_route", shape, logits, memory)], 20, 4)
            yield Row(name, n_tokens, n_bytes, 0, us)
            gpu.device.submit("case_route", shape, logits, memory)
            n_visits = n_tokens * (top_k + 1)
            rows = gpu.device.put(np.zeros((n_visits, model.dim), np.float32))
            y = gpu.device.put(np.zeros((n_tokens, model.dim), np.float32))
            stride = ctypes.c_int64(model.dim)
            call = ("case_combine", shape, memory, rows, stride, y, stride, model.dim)
            n_bytes = rows.n_bytes + 2 * y.n_bytes
            us = gpu.times([call], 20, 4)
            yield Row(f"sum of {top_k + 1} visits", n_tokens, n_bytes, 0, us)


def packing_rows(gpu: Gpu, model: Model, _l2_bytes: int) -> Iterator[Row]:
    """Measure packing of a matrix as a checkpoint holds it, from the host's memory on."""
    rows, inputs = model.qkv_rows, model.dim
    for bits in (4, 8):
        rng = np.random.default_rng(bits)
        words = rng.integers(0, 1 << 32, (rows, inputs * bits // 32), np.uint32)
        scales = np.full((rows, inputs // 128), SMALL_SCALES[bits], np.uint16)
        source = CSource(words.ctypes.data, scales.ctypes.data, None, bits, 128, DTYPE_BF16, rows,
                         inputs)  # fmt: skip
        one = Shape(rows, inputs, 1, bits // 8, BF16, PLAIN)
        tiles, packed = (gpu.device.reserve(n_bytes) for n_bytes in shape_bytes(gpu, one))
        call = ("run_pack", source, 1, PLAIN, ctypes.c_int64(64 << 20), tiles, packed, Shape())
        n_bytes = words.nbytes + scales.nbytes
        yield Row(f"INT{bits} packing {rows} x {inputs}", 0, n_bytes, 0, gpu.wall_times(call))


# Each family of kernels; what it reserves goes back before the next begins.
FAMILIES: list[Callable[[Gpu, Model, int], Iterator[Row]]] = [
    lambda gpu, model, l2: matmul_rows(gpu, "QKV", model.qkv_rows, model.dim, 4, (1, 8), l2),
    lambda gpu, model, l2: matmul_rows(gpu, "O", model.dim, model.dim, 4, (1, 8), l2, ADD),
    moe_rows,
    grouped_rows,
    lambda gpu, model, l2: matmul_rows(gpu, "lm_head", model.vocab_size, model.dim, 8, (1, 8), l2),
    dense_rows,
    routing_rows,
    packing_rows,
]


# ---- what is made of it ----
def limit_us(row: dict[str, Any], peaks: dict[str, Any]) -> float:
    """Return what reading the bytes takes, or multiplying where the peak is known and lower."""
    multiplying = peaks["bf16_tflop_s"] and row["n_flops"] / peaks["bf16_tflop_s"] / 1e6
    return max(row["n_bytes"] / peaks["read_gb_s"] / 1e3, multiplying)


def kernel_table(record: dict[str, Any]) -> str:
    """Return a Markdown table of medians beside their limits."""
    columns = ["kernel", "tokens", "MB", "us", "10 % to 90 %", "limit, us", "of limit",
               "GB/s", "of copy", "of torch"]  # fmt: skip
    lines = [columns]
    for row in record["rows"]:
        time, limit = median(row["us"]), limit_us(row, record["peaks"])
        low, high = np.quantile(row["us"], (0.1, 0.9))
        speed = row["n_bytes"] / time / 1e3
        lines.append(
            [row["name"], str(row["n_tokens"]), f"{row['n_bytes'] / 1e6:.1f}", f"{time:.2f}",
             f"{low:.2f} to {high:.2f}", f"{limit:.2f}", f"{limit / time:.0%}", f"{speed:.0f}",
             f"{speed / record['peaks']['copy_gb_s']:.0%}",
             f"{median(row['torch_us']) / time:.2f}" if row.get("torch_us") else ""]
        )  # fmt: skip
    return records.table(lines)


NOTE = (
    "Medians. Products of few tokens: of 50 runs of a graph of at least 32 calls, each on another "
    "copy of its weights, which together pass L2 twice. Grouped and dense products and routing: of "
    "20 runs of a graph of 4 calls on the same data, which is more than L2 holds where tokens are "
    "many. Packing: of 10 calls by the host's clock, copies to the GPU included, so PCIe is its "
    "limit. The limit is the larger of bytes over the read bandwidth and products over the bf16 "
    "peak (twice that for FP8 on paper). Weights are random; experts are those that random tokens "
    "choose. Of torch: its time over ours."
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
            f"{machine['multiprocessors']} multiprocessors, {machine['l2_bytes'] >> 20} MiB L2. "
            f"{records.software(record)}",
            "",
            kernel_table(record),
            "",
            note,
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
    records.add_note(parser)
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
