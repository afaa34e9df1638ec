"""A GPU for benchmarks that is none: the emulated device with a made-up clock, and small sizes."""

from __future__ import annotations

from typing import Any

import numpy as np

import gpu_parts
from cuda_device import Memory, emulated_device

TINY = gpu_parts.Model(
    dim=128,
    qkv_rows=160,
    ffn_dim=64,
    n_experts=3,
    vocab_size=300,
    moe_tokens=(1, 9),
    prefill_tokens=(7,),
)
US = 10.0


class Emulated(gpu_parts.Gpu):
    """Does each call once, and says that it took 10 us."""

    def __init__(self) -> None:
        self.device = emulated_device()
        self.called: list[str] = []

    def info(self) -> dict[str, Any]:
        return {"gpu": "Emulated, 5 SMs", "multiprocessors": 5, "l2_bytes": 1 << 14,
                "memory_bytes": 1 << 30, "clock_khz": 1, "capability": 80}  # fmt: skip

    def random(self, n_bytes: int, seed: int) -> Memory:
        n_bytes = min(n_bytes, 1 << 20)  # of what the peaks ask for
        return self.device.put(np.random.default_rng(seed).integers(0, 256, n_bytes, np.uint8))

    def times(self, calls: list[gpu_parts.Call], n_runs: int = 7, n_calls: int = 1) -> list[float]:
        for call in calls:
            self.called.append(call[0])
            if call[0] not in ("read_memory", "copy_memory"):
                self.device.submit(*call)
        return [US] * n_runs

    def wall_times(self, call: gpu_parts.Call, n_runs: int = 3) -> list[float]:
        return self.times([call], n_runs)
