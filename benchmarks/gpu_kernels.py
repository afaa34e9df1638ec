"""Measure GPU kernels on Scout's shapes, beside what the same GPU reads, copies and multiplies.

    python benchmarks/gpu_kernels.py --library build/gpu/libcamelid_gpu_check.so

`tools/gpu_check` builds the library, tests it and calls this. Each kernel is called in a row on as
many copies of its weights as pass L2 twice, recorded as a graph; a time is the graph's, divided by
the calls. The limit is the larger of bytes over the read-only bandwidth and products over the bf16
peak, both measured here before. Prints a table, and writes it with every run to benchmarks/results:
anew after each row, so that what comes later can lose nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

import limits  # noqa: E402
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
FAMILIES: dict[str, Callable[[Gpu, Model, int], Iterator[Row]]] = {
    "QKV": lambda gpu, m, l2: matmul_rows(gpu, "QKV", m.qkv_rows, m.dim, 4, (1, 8), l2),
    "O": lambda gpu, m, l2: matmul_rows(gpu, "O", m.dim, m.dim, 4, (1, 8), l2, ADD),
    "experts": moe_rows,
    "grouped": grouped_rows,
    "lm_head": lambda gpu, m, l2: matmul_rows(gpu, "lm_head", m.vocab_size, m.dim, 8, (1, 8), l2),
    "dense": dense_rows,
    "routing": routing_rows,
    "packing": packing_rows,
}


# ---- what is made of it ----
def limit_us(row: dict[str, Any], peaks: dict[str, Any]) -> float:
    """Return what reading the bytes takes, or multiplying: the longer, of what has a known peak."""
    work = limits.Work(row["n_bytes"], row["n_flops"])
    return 1e6 * work.seconds(peaks["read_gb_s"], peaks["bf16_tflop_s"])


def kernel_table(record: dict[str, Any]) -> str:
    """Return a Markdown table of medians beside their limits."""
    columns = ["kernel", "tokens", "MB", "us", "10 % to 90 %", "limit, us", "of limit",
               "GB/s", "of copy", "of torch"]  # fmt: skip
    lines, copy = [columns], record["peaks"]["copy_gb_s"]
    for row in record["rows"]:
        time, limit = median(row["us"]), limit_us(row, record["peaks"])
        low, high = np.quantile(row["us"], (0.1, 0.9))
        speed = row["n_bytes"] / time / 1e3
        lines.append(
            [row["name"], str(row["n_tokens"]), f"{row['n_bytes'] / 1e6:.1f}", f"{time:.2f}",
             f"{low:.2f} to {high:.2f}", f"{limit:.2f}", f"{limit / time:.0%}" if limit else "",
             f"{speed:.0f}", f"{speed / copy:.0%}" if copy else "",
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
            *(["", failures] if (failures := records.failures(record)) else []),
        ]
    )


def measure(
    gpu: Gpu,
    sizes: Model,
    families: Mapping[str, Callable[[int], Iterator[Row]]],
    note: str,
    args: argparse.Namespace,
) -> None:
    """Measure the peaks and families of kernels, and write all down row by row.

    Args:
        gpu: Where.
        sizes: Of what the peaks are measured with.
        families: By their names; each is told the bytes of L2.
        note: Of the report.
        args: Of parse().
    """
    machine, benchmark = gpu.info(), args.benchmark
    record = records.gpu_head(benchmark, machine) | {"peaks": dict(limits.NO_PEAKS), "rows": []}
    name = "-".join(filter(None, (records.slug(machine["gpu"]), args.note)))
    path = records.new_path(record, args.out, name)
    with records.kept_error(record, "peaks of memory"):
        record["peaks"] |= memory_peaks(gpu, sizes)
    with records.kept_error(record, "peak of products"):
        record["peaks"] |= bf16_peak(gpu, sizes, machine["capability"])
    for family, rows in families.items():
        if not args.only.search(family):
            continue
        with records.kept_error(record, family):
            for row in rows(machine["l2_bytes"]):
                print(f"[{benchmark}] {row.name}, {row.n_tokens} tokens: {median(row.us):.2f} us",
                      flush=True)  # fmt: skip
                record["rows"].append(asdict(row))
                records.rewrite(record, markdown(record, note), path)
    records.rewrite(record, markdown(record, note), path)
    print(kernel_table(record))
    print(f"[{benchmark}] wrote {path}.json and .md")
    records.exit_if_failed(record)


def parse(argv: list[str] | None, benchmark: str, description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(benchmark=benchmark)
    parser.add_argument("--library", type=Path, required=True, help="what tools/gpu_check built")
    parser.add_argument("--only", type=re.compile, default="", metavar="REGEX",
                        help="families of kernels whose names match")  # fmt: skip
    records.add_note(parser)
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="folder of the result")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None, gpu: Gpu | None = None, model: Model | None = None) -> None:
    args = parse(argv, "gpu_kernels", __doc__)
    gpu, model = gpu or Gpu(args.library), model or Model()
    families = {name: partial(family, gpu, model) for name, family in FAMILIES.items()}
    measure(gpu, model, families, NOTE, args)


if __name__ == "__main__":
    main()
