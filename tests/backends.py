"""The device that tests of whole models run on, and how close to the truth it must come.

    python -m pytest tests/parity --device emulated

tests/conftest.py chooses it before anything imports camelid's core. It knows no test.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import math
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

NAMES = ("cpu", "emulated", "cuda")

# What one row of logits may differ from the reference that rounds where the device does, as the
# root of the mean square, in standard deviations of all logits. In float32 nothing rounds twice:
# the exactness bar. A sum in another order moves a float32 by 1e-7 of itself; one operand in a
# thousand then falls on the other side of a tie of bf16, and moves all behind it, so that after
# some layers as many operands differ as if they had been rounded at random. In 8 bits one key or
# value that falls otherwise is off by a sixteenth (e4m3) or by a 127th of its head's largest.
#
# Worst rows of random models with 1 to 13 layers, by sqrt(n_layers); 138 models on the emulated GPU
# and four references for each that are as right as any (reference.numerics.OtherSums):
#                 median    9 of 10    99 of 100
#   bf16  GPU      0.004      0.008
#         others   0.006      0.010        0.015
#   fp8   GPU      0.005      0.015
#         others   0.011      0.019        0.037
#   int8  GPU      0.004      0.008
#         others   0.006      0.012        0.020
# So these are what most models keep to. For one that does not, tests/judge.py measures its others.
EXACT = 2e-3
BF16_ROW = {"bf16": 0.01, "fp8": 0.015, "int8": 0.015}

_name = "cpu"
_core: Path | None = None


def select(name: str) -> None:
    """Make `name` the device of this process."""
    global _name, _core
    if "camelid._core" in sys.modules:
        raise RuntimeError("camelid's core was imported before its device was chosen")
    _name = name
    if name == "emulated":
        from emulated_build import build_core

        _core = build_core()
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Imports the core that has an emulated GPU in place of the installed one."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "camelid._core":
            return None
        return importlib.util.spec_from_file_location(name, _core)


def is_gpu() -> bool:
    return _name != "cpu"


def is_emulated() -> bool:
    return _name == "emulated"


def device() -> str:
    """Return what camelid calls it."""
    return "cuda" if is_gpu() else "cpu"


def engine_options() -> dict[str, Any]:
    """Return the options of `_core.Engine` on this device where a test asks for none."""
    kv_cache = "bf16" if is_gpu() else "f32"
    return {"device": device(), "kv_cache": kv_cache, "memory_bytes": 1 << 28}


def llm_options() -> dict[str, Any]:
    """Return the options of `camelid.LLM` on this device where a test asks for none."""
    options: dict[str, Any] = {"device": device(), "threads": 1}
    if is_gpu():
        options["head"] = "stored"  # "auto" would be int8 beside INT4
    return options


def row_tolerance(kv_cache: str = "bf16", n_layers: int = 4) -> float:
    """Return what a row of logits may be off by, in standard deviations; see BF16_ROW."""
    return BF16_ROW[kv_cache] * math.sqrt(n_layers)


def takes(folder: Path) -> bool:
    """Tell whether the device takes a model's heads: a GPU wants multiples of 8 values."""
    config = json.loads((folder / "config.json").read_text())
    sizes = [config.get("text_config", config)["head_dim"]]
    if vision := config.get("vision_config"):
        sizes.append(vision["hidden_size"] // vision["num_attention_heads"])
    return not is_gpu() or all(size % 8 == 0 for size in sizes)


def kv_caches() -> list[str]:
    """Return the formats of the KV cache, the one that loses least first."""
    return ["bf16", "fp8", "int8"] if is_gpu() else ["f32", "bf16", "int8"]


def isas() -> list[str]:
    """Return the instruction sets to test; a GPU has none of its own."""
    from camelid._core import testing

    return ["gpu"] if is_gpu() else testing.isas()


def quick(values: Sequence[Any], chosen: Sequence[Any]) -> list[Any]:
    """Return a test's parameters, tuples of them where it has several.

    An emulated GPU is quick enough for `chosen` alone; there all others are slow tests.
    """
    import pytest

    parameters = []
    for value in values:
        slow = is_emulated() and value not in chosen
        one_test = value if isinstance(value, tuple) else (value,)
        parameters.append(pytest.param(*one_test, marks=[pytest.mark.slow] if slow else []))
    return parameters


def use_isa(monkeypatch: pytest.MonkeyPatch, isa: str) -> None:
    """Hold what is loaded from now on to one of isas()."""
    if not is_gpu():
        monkeypatch.setenv("CAMELID_CPU_ISA", isa)


def capabilities() -> list[int]:
    """Return the kinds of GPU to test, 90 for Hopper; 0 for the one that is there."""
    return [90, 80] if is_emulated() else [0]


@contextlib.contextmanager
def emulate(*, capability: int) -> Iterator[None]:
    """Let the emulated GPU be one of capabilities()."""
    if not is_emulated():
        yield
        return
    library = _emulator()
    library.emulated_compute_capability(capability)
    try:
        yield
    finally:
        library.emulated_compute_capability(90)


def arrange(seed: int) -> None:
    """Choose whether copies and work of an emulated GPU come early, late or mixed.

    Threads go in order: tests/cuda/ has kernels go in others.
    """
    if is_emulated():
        library = _emulator()
        library.emulated_in_order(1)
        library.emulated_seed(seed)


@contextlib.contextmanager
def without_recordings() -> Iterator[None]:
    """Let the emulated GPU's driver fail to repeat what it recorded."""
    library = _emulator()
    library.emulated_recording(0)
    try:
        yield
    finally:
        library.emulated_recording(1)


@contextlib.contextmanager
def gpu_memory(n_bytes: int) -> Iterator[None]:
    """Let the emulated GPU have so much memory, what is taken already included."""
    library = _emulator()
    before = library.emulated_memory_bytes()
    library.emulated_memory(n_bytes)
    try:
        yield
    finally:
        library.emulated_memory(before)


def taken_bytes() -> int:
    """Return how much of the emulated GPU's memory is taken."""
    return _emulator().emulated_taken_bytes()


def n_downloads() -> int:
    """Return how often something was copied from the emulated GPU to the host."""
    return _emulator().emulated_downloads()


def n_launches() -> int:
    """Return how many kernels were launched on the emulated GPU, or recorded."""
    return _emulator().emulated_launches()


def _emulator() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_core))
    library.emulated_seed.argtypes = [ctypes.c_uint64]
    library.emulated_memory.argtypes = [ctypes.c_size_t]
    library.emulated_memory_bytes.restype = ctypes.c_size_t
    library.emulated_taken_bytes.restype = ctypes.c_size_t
    library.emulated_downloads.restype = ctypes.c_size_t
    library.emulated_launches.restype = ctypes.c_size_t
    return library
