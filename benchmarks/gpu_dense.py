"""Dense products on Hopper's tensor cores, and PyTorch's (so cuBLAS's) of the same matrices.

Must never know of packed weights.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import numpy as np

from cuda_cases import ADD, STORE_BF16, CDense, bf16
from gpu_parts import Gpu, Model, Row

BF16, E4M3 = range(2)
N_TORCH_RUNS, N_TORCH_CALLS = 20, 4


def product(gpu: Gpu, kind: int, sizes: tuple[int, int, int], output: int) -> list[float]:
    """Return the microseconds of our product of so many tokens, rows and inputs."""
    n_tokens, rows, inputs = sizes
    rng = np.random.default_rng(kind)
    if kind == BF16:
        values = bf16(rng.standard_normal(1 << 20))
    else:  # bytes of e4m3 below 2, of both signs
        values = (rng.integers(0, 64, 1 << 20) | rng.integers(0, 2, 1 << 20) << 7).astype(np.uint8)
    x, w = (gpu.device.put(np.resize(values, (n, inputs))) for n in (n_tokens, rows))
    scales = [gpu.device.put(np.full(n, 0.5, np.float32)) for n in (n_tokens, rows)]
    y = gpu.device.put(
        np.zeros((n_tokens, rows), np.uint16 if output == STORE_BF16 else np.float32)
    )
    at = [None if kind == BF16 else scale.address for scale in scales]
    c = CDense(x.address, w.address, y.address, *at, kind, *sizes, inputs, inputs, rows, output)
    gpu.device.library.matmul_dense_need.restype = ctypes.c_int64
    need = gpu.device.library.matmul_dense_need(ctypes.byref(c))
    workspace = gpu.device.reserve(max(1, need))
    return gpu.times([("run_matmul_dense", c, workspace)], 20, 4)


def torch_us(kind: int, sizes: tuple[int, int, int], output: int) -> list[float]:
    """Return the microseconds of PyTorch's, none where it is not there or has no such product."""
    try:
        import torch
    except (ImportError, OSError):  # not there, or not its libraries
        return []
    if not torch.cuda.is_available():
        return []
    try:
        return torch_times(torch, torch_call(torch, kind, sizes, output))
    except RuntimeError:  # this PyTorch has no such product for this GPU
        return []
    finally:
        torch.cuda.empty_cache()  # others want it


def torch_call(
    torch: Any, kind: int, sizes: tuple[int, int, int], output: int
) -> Callable[[], object]:
    n_tokens, rows, inputs = sizes
    x, w = (torch.randn(n, inputs, device="cuda", dtype=torch.bfloat16) for n in (n_tokens, rows))
    if kind == BF16:

        def multiply() -> Any:
            return x @ w.T
    else:
        x8, w8 = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
        scales = [torch.full(shape, 0.5, device="cuda") for shape in ((n_tokens, 1), (1, rows))]

        def multiply() -> Any:
            return torch._scaled_mm(x8, w8.T, *scales, out_dtype=torch.bfloat16)

    if output != ADD:
        return multiply
    y = torch.zeros(n_tokens, rows, device="cuda")
    return lambda: y.add_(multiply())


def torch_times(torch: Any, call: Callable[[], object]) -> list[float]:
    times = []
    for run in range(N_TORCH_RUNS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(N_TORCH_CALLS):
            call()
        end.record()
        end.synchronize()
        if run >= 3:  # to warm up
            times.append(1000 * start.elapsed_time(end) / N_TORCH_CALLS)
    return times


def bf16_peak(gpu: Gpu, model: Model, capability: int) -> dict[str, Any]:
    """Return TFLOP/s of a large product on random data: PyTorch's, our own, the larger counts."""
    sizes = (model.big,) * 3
    theirs = torch_us(BF16, sizes, STORE_BF16)
    ours = product(gpu, BF16, sizes, STORE_BF16) if capability == 90 else []
    found = {name: 2 * model.big**3 / median(us) / 1e6 if us else 0.0
             for name, us in (("ours", ours), ("torch", theirs))}  # fmt: skip
    best = max(found, key=found.__getitem__)
    return {
        "bf16_tflop_s": found[best],
        "bf16_measured_by": best if found[best] else "nobody",
        "bf16_ours_tflop_s": found["ours"],
        "bf16_torch_tflop_s": found["torch"],
    }


def dense_rows(gpu: Gpu, model: Model, _l2_bytes: int) -> Iterator[Row]:
    """Measure products with a layer's QKV matrix, if it were not packed, beside PyTorch's."""
    if gpu.info()["capability"] != 90:
        return
    rows, inputs = model.qkv_rows, model.dim
    for kind, name, element in ((BF16, "bf16", 2), (E4M3, "FP8", 1)):
        for output, what, element_y in ((STORE_BF16, "", 2), (ADD, ", added", 8)):
            for n_tokens in model.dense_tokens:
                sizes = (n_tokens, rows, inputs)
                n_bytes = element * (n_tokens + rows) * inputs + element_y * n_tokens * rows
                us = product(gpu, kind, sizes, output)
                row = Row(f"dense {name} {rows} x {inputs}{what}", n_tokens, n_bytes,
                          2 * n_tokens * rows * inputs, us)  # fmt: skip
                row.torch_us = torch_us(kind, sizes, output)
                yield row
