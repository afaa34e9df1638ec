"""Measure attention, and what works row by row, on Scout's shapes: as gpu_kernels.py does products.

    python benchmarks/gpu_attention.py --library build/gpu/libcamelid_gpu_check.so

Keys and values lie in shuffled pages of several layers, and calls in a row go to other layers, so
that none finds its own in L2. Decoding is held against the bandwidth, and so are norms, the
writing of keys and values, and the search for the best logits; prefill against the bf16 peak, with
only the pairs counted that see each other.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

import gpu_kernels  # noqa: E402
from attention_cases import ITEM, CAttention, Plan, kv_sizes, plan_spans  # noqa: E402
from attention_many_cases import MANY_QUERIES  # noqa: E402
from cuda_cases import bf16  # noqa: E402
from cuda_device import Memory  # noqa: E402
from gpu_parts import Call, Gpu, Model, Row, n_copies  # noqa: E402
from rows_cases import CKv, CRows  # noqa: E402

FORMATS = ("bf16", "fp8", "int8")
TOP_BYTES = 128 * 8 + 24  # of a row's best logits
FEW = 0


@dataclass(frozen=True)
class Attention:
    """What these kernels need to know of Scout beside gpu_parts.Model, and how much is measured."""

    n_heads: int = 40
    n_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 64
    # Of decoding: sequences, tokens of each, and formats. 64 MB and more of a layer's KV first,
    # then a chunk of a local layer.
    decode: tuple[tuple[int, int, tuple[str, ...]], ...] = (
        (1, 16384, ("bf16",)),
        (1, 32768, FORMATS),
        (1, 131072, FORMATS),
        (1, 8192, FORMATS),
        (8, 8192, FORMATS),
        (64, 8192, FORMATS),
    )
    prompts: tuple[tuple[int, tuple[str, ...]], ...] = ((8192, ("bf16", "fp8")), (16384, FORMATS))
    rows: tuple[int, ...] = (1, 8, 64, 8192)  # of norms and of writing
    logits: tuple[int, ...] = (1, 8, 64)

    @property
    def width(self) -> int:
        return self.n_heads * self.head_dim


# ---- pages ----
def sane_values(form: str, n: int) -> NDArray[np.uint8]:
    """Return random values of size 1 to 2, 8 bits each or 16; of int8 whatever there is."""
    rng = np.random.default_rng(0)
    if form == "bf16":
        return (rng.integers(0, 1 << 16, n, np.uint16) & 0x807F | 0x3F80).view(np.uint8)
    codes = rng.integers(0, 256, n, np.uint8)
    return codes if form == "int8" else codes & 0x87 | 0x38


class Pages:
    """Keys and values of sequences of equal length in several layers, and their page table."""

    def __init__(self, gpu: Gpu, model: Attention, form: str, n_sequences: int, n_keys: int,
                 l2_bytes: int) -> None:  # fmt: skip
        self.n_sequences, self.n_keys = n_sequences, n_keys
        self.c = CAttention(model.page_size, 1, model.n_kv_heads, model.head_dim,
                            FORMATS.index(form), 0, model.n_heads, True,
                            gpu.info()["multiprocessors"], model.width, model.width)  # fmt: skip
        page_bytes, _, side_bytes, _, scales_at, self.part_floats = kv_sizes(gpu.device, self.c)
        self.pages_each = -(-n_keys // model.page_size)
        n_pages = n_sequences * self.pages_each
        self.layer_bytes = n_pages * page_bytes
        self.c.n_layers = n_copies(self.layer_bytes, l2_bytes)
        n_sides = 64  # that differ
        side = np.full((n_sides, side_bytes), 0, np.uint8)
        values = sane_values(form, n_sides * scales_at // (2 if form == "bf16" else 1))
        side[:, :scales_at] = values.reshape(n_sides, scales_at)
        side[:, scales_at:].view(np.float32)[...] = 2.0**-6 if form == "int8" else 1.0
        self.memory = gpu.device.put(np.resize(side, n_pages * page_bytes * self.c.n_layers))
        order = np.random.default_rng(1).permutation(n_pages)
        self.table = gpu.device.put(order.astype(np.int32))
        # Of keys and values that are seen, with their scales.
        self.kv_bytes = n_sequences * n_keys * 2 * model.n_kv_heads * side_bytes // model.page_size

    def layers(self) -> Iterator[CAttention]:
        for layer in range(self.c.n_layers):
            one = CAttention.from_buffer_copy(self.c)
            one.kv_layer = layer
            yield one

    def plan(self, gpu: Gpu) -> Plan:
        """Plan the last token of every sequence."""
        spans = [(i, 1, self.n_keys - 1, i * self.pages_each) for i in range(self.n_sequences)]
        group = self.c.n_heads // self.c.n_kv_heads
        return plan_spans(gpu.device, np.array(spans, np.int32), group, True)


def queries(gpu: Gpu, model: Attention, n_tokens: int) -> tuple[Memory, Memory]:
    """Return random queries, and room for what becomes of them."""
    block = bf16(np.random.default_rng(2).standard_normal((min(n_tokens, 256), model.width)))
    q = gpu.device.put(np.resize(block, (n_tokens, model.width)))
    return q, gpu.device.reserve(q.n_bytes)


def tiles(n_tokens: int, group: int, size: int) -> NDArray[Any]:
    """Return a whole prompt's tiles of `size` queries, those with most keys first."""
    first = np.arange(0, n_tokens * group, size)[::-1]
    items = np.zeros(len(first), ITEM)
    items["first_query"], items["n_parts"] = first, 1
    items["n_queries"] = np.minimum(size, n_tokens * group - first)
    items["last_key"] = (first + items["n_queries"] - 1) // group + 1
    return items


# ---- attention ----
def decode_rows(gpu: Gpu, model: Attention, l2_bytes: int) -> Iterator[Row]:
    """Measure one query of every head and sequence against all its keys."""
    for n_sequences, n_keys, forms in model.decode:
        for form in forms:
            pages = Pages(gpu, model, form, n_sequences, n_keys, l2_bytes)
            plan = pages.plan(gpu)
            q, y = queries(gpu, model, n_sequences)
            n_floats = plan.n_parts * model.n_kv_heads * pages.part_floats
            counters = np.zeros((max(1, plan.n_counters), model.n_kv_heads), np.uint32)
            rest = (gpu.device.put(plan.few.view(np.int32)),
                    gpu.device.put(np.array([len(plan.few)], np.int32)), pages.table, q, y,
                    gpu.device.reserve(4 * max(1, n_floats)), gpu.device.put(counters))  # fmt: skip
            calls: list[Call] = [
                ("run_attention", FEW, c, pages.memory, *rest) for c in pages.layers()
            ]
            name = f"decode attention, {n_sequences} x {n_keys} keys, {form}"
            n_bytes = pages.kv_bytes + q.n_bytes + y.n_bytes
            flops = 4 * n_sequences * n_keys * model.width
            yield Row(name, n_sequences, n_bytes, flops, gpu.times(calls))


def prefill_rows(gpu: Gpu, model: Attention, l2_bytes: int) -> Iterator[Row]:
    """Measure a whole prompt's attention to itself."""
    for n_tokens, forms in model.prompts:
        for form in forms:
            pages = Pages(gpu, model, form, 1, n_tokens, l2_bytes)
            # As the engine chooses: sm90/attention_many.h reads no larger heads.
            hopper = gpu.info()["capability"] == 90 and model.head_dim <= 128
            items = tiles(n_tokens, model.n_heads // model.n_kv_heads, MANY_QUERIES[hopper])
            q, y = queries(gpu, model, n_tokens)
            rest = (gpu.device.put(items.view(np.int32)), pages.table, q, y)
            calls: list[Call] = [
                ("case_attend_many", c, int(hopper), len(items), pages.memory, *rest)
                for c in pages.layers()
            ]
            flops = 4 * model.width * (n_tokens * (n_tokens + 1) // 2)
            name = f"prefill attention, causal, {n_tokens} tokens, {form}"
            n_bytes = pages.kv_bytes + q.n_bytes + y.n_bytes
            yield Row(name, n_tokens, n_bytes, flops, gpu.times(calls, 20, 4))


# ---- row by row ----
def store_rows(gpu: Gpu, model: Attention, l2_bytes: int) -> Iterator[Row]:
    """Measure RoPE, norms and rounding of queries, keys and values on their way to pages."""
    n_all = model.width + 2 * model.n_kv_heads * model.head_dim
    for n_tokens in model.rows:
        for form in FORMATS[:2]:
            pages = Pages(gpu, model, form, 1, max(n_tokens, model.page_size), l2_bytes)
            n_arrays = n_copies(4 * n_tokens * n_all, l2_bytes) if n_tokens > 64 else 1
            block = np.random.default_rng(3).standard_normal((min(n_tokens, 256), n_all))
            values = np.resize(block.astype(np.float32), (n_tokens, n_all))
            arrays = [gpu.device.put(values) for _ in range(n_arrays)]
            places = np.stack([np.arange(n_tokens) // model.page_size,
                               np.arange(n_tokens) % model.page_size], axis=1)  # fmt: skip
            angles = np.arange(n_tokens * model.head_dim // 2, dtype=np.float32)
            rotation = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
            keep = [gpu.device.put(places.astype(np.int32)), gpu.device.put(rotation)]
            q = gpu.device.reserve(2 * n_tokens * model.width)
            calls: list[Call] = [
                ("case_store_kv",
                 CKv(pages.memory.address, model.page_size, pages.c.n_layers, model.n_kv_heads,
                     model.head_dim, FORMATS.index(form), i % pages.c.n_layers, model.n_heads,
                     n_tokens, 1, 1e-5, array.address, n_all, q.address, model.width,
                     keep[0].address, keep[1].address, None))
                for i, array in enumerate(arrays)
            ]  # fmt: skip
            kv_bytes = n_tokens * pages.kv_bytes // pages.n_keys
            n_bytes = arrays[0].n_bytes + q.n_bytes + kv_bytes
            yield Row(f"store_kv, {form}", n_tokens, n_bytes, 0, gpu.times(calls))


def norm_rows(gpu: Gpu, model: Attention, l2_bytes: int) -> Iterator[Row]:
    """Measure an RMS norm from float32 to bf16; of few rows all is in L2, as in the engine."""
    dim = model.width
    gain = gpu.device.put(np.ones(dim, np.float32))
    for n_tokens in model.rows:
        n_arrays = n_copies(6 * n_tokens * dim, l2_bytes) if n_tokens > 64 else 1
        block = np.random.default_rng(4).standard_normal((min(n_tokens, 256), dim))
        values = np.resize(block.astype(np.float32), (n_tokens, dim))
        x = [gpu.device.put(values) for _ in range(n_arrays)]
        y = [gpu.device.reserve(2 * n_tokens * dim) for _ in range(n_arrays)]
        calls: list[Call] = [
            ("case_rms_norm", CRows(b.address, n_tokens, dim, dim, 1),
             CRows(a.address, n_tokens, dim, dim, 0), None, gain, ctypes.c_float(1e-5))
            for a, b in zip(x, y, strict=True)
        ]  # fmt: skip
        n_bytes = x[0].n_bytes + y[0].n_bytes
        yield Row(f"rms_norm of {dim}", n_tokens, n_bytes, 0, gpu.times(calls))


def logits_rows(gpu: Gpu, model: Attention, l2_bytes: int, vocab: int = 202048) -> Iterator[Row]:
    """Measure the search for the best logits; they come from a product, and so out of L2."""
    library = gpu.device.library
    library.case_top_logits_bytes.restype = ctypes.c_int64
    for n_rows in model.logits:
        block = np.random.default_rng(5).standard_normal(vocab).astype(np.float32)
        logits = gpu.device.put(np.resize(4 * block, (n_rows, vocab)))
        out = gpu.device.reserve(n_rows * TOP_BYTES)
        scratch = gpu.device.reserve(library.case_top_logits_bytes(n_rows, vocab))
        counters = gpu.device.put(np.zeros(n_rows, np.uint32))
        factors = gpu.device.put(np.ones(n_rows, np.float32))
        uniforms = gpu.device.put(np.full(n_rows, 0.5, np.float32))
        call = ("case_draw", out, logits, ctypes.c_int64(vocab), factors, uniforms, n_rows, vocab,
                scratch, counters)  # fmt: skip
        yield Row(f"top_logits of {vocab}", n_rows, logits.n_bytes, 0, gpu.times([call]))


NOTE = (
    "Medians of runs of a graph of calls in a row, to other layers' pages each; few rows stay in "
    "L2, as in the engine. The limit is the larger of bytes over the read bandwidth and products "
    "over the bf16 peak; of prefill only pairs count that see each other."
)

FAMILIES: dict[str, Callable[[Gpu, Attention, int], Iterator[Row]]] = {
    "decode": decode_rows,
    "prefill": prefill_rows,
    "store": store_rows,
    "norm": norm_rows,
    "logits": logits_rows,
}


def main(
    argv: list[str] | None = None,
    gpu: Gpu | None = None,
    model: Attention | None = None,
    sizes: Model | None = None,
) -> None:
    args = gpu_kernels.parse(argv, "gpu_attention", __doc__)
    gpu, model = gpu or Gpu(args.library), model or Attention()
    families = {name: partial(family, gpu, model) for name, family in FAMILIES.items()}
    gpu_kernels.measure(gpu, sizes or Model(), families, NOTE, args)


if __name__ == "__main__":
    main()
