"""Builds CUDA sources for the CPU and calls what they export, without any GPU.

    library = build("tests/cuda/matmul_case.cu", "cuda/ops/matmul.cu")
    call(library, "run_matmul", pointer, 5, seed=3)  # raises what a launch threw

Sources are compiled as they are; tests/cuda/emulated/ gives the names of cuda/device/ a meaning.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
EMULATOR = ROOT / "tests" / "cuda" / "emulated"
CACHE = ROOT / "build" / "emulated"
# The twins of cuda/device/ come first, so that kernels find them under the same names.
FOLDERS = ["src", "tests/cuda/emulated", "cuda"]
FLAGS = ["-std=c++20", "-O2", "-g", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]


class EmulatorError(Exception):
    """What a launch threw."""


@functools.cache
def build(*sources: str, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """Return the library of `sources`, paths from the root of the repository, and the emulator.

    Each source is compiled once for each content of itself and of all headers.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("kernels are emulated by compiling them for the CPU: no C++ compiler (g++)")
    CACHE.mkdir(parents=True, exist_ok=True)
    command = [compiler, *FLAGS, *flags, *(f"-I{ROOT / folder}" for folder in FOLDERS)]
    headers = b"".join(path.read_bytes() for path in _headers())
    objects = []
    for source in [ROOT / name for name in sources] + sorted(EMULATOR.glob("*.cpp")):
        key = _key(" ".join(command).encode(), headers, bytes(source), source.read_bytes())
        target = CACHE / f"{source.stem}-{key}.o"
        _make(target, [*command, "-x", "c++", "-c", str(source)])
        objects.append(target)
    library = CACHE / f"{_key(*(path.name.encode() for path in objects))}.so"
    _make(library, [compiler, "-shared", *map(str, objects)])
    loaded = ctypes.CDLL(str(library))
    loaded.emulated_error.restype = ctypes.c_char_p
    loaded.emulated_seed.argtypes = [ctypes.c_uint64]
    loaded.device_alloc.restype = ctypes.c_void_p
    loaded.device_alloc.argtypes = [ctypes.c_size_t]
    loaded.device_free.argtypes = [ctypes.c_void_p]
    return loaded


def call(library: ctypes.CDLL, name: str, *arguments: Any, seed: int = 0) -> None:
    """Call an exported function that returns 0, or 1 after an error, under a seed.

    Args:
        library: What `build` returned.
        name: Of the function.
        arguments: NumPy arrays become pointers, whole numbers C's int, the rest is ctypes'.
        seed: Of the order of threads and of the copies' arrival; 0 runs threads in their order.

    Raises:
        EmulatorError: With the message of what the function threw.
    """
    library.emulated_seed(seed)
    if getattr(library, name)(*map(_c_value, arguments)) != 0:
        raise EmulatorError(library.emulated_error().decode())


def device_array(library: ctypes.CDLL, values: NDArray[Any]) -> NDArray[Any]:
    """Return a copy of `values` in device memory, where writes beside it are noticed."""
    address = library.device_alloc(values.nbytes)
    memory = (ctypes.c_ubyte * values.nbytes).from_address(address)
    weakref.finalize(memory, library.device_free, address)
    array = np.frombuffer(memory, values.dtype).reshape(values.shape)
    array[...] = values
    return array


def _c_value(argument: Any) -> Any:
    if not isinstance(argument, np.ndarray):
        return argument
    assert argument.flags.c_contiguous
    return ctypes.c_void_p(argument.ctypes.data)


def _headers() -> Iterator[Path]:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in {".h", ".cuh", ".inl"}:
                yield path


def _key(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def _make(target: Path, command: list[str]) -> None:
    if target.exists():
        return
    unfinished = target.with_suffix(f".{os.getpid()}")
    subprocess.run([*command, "-o", str(unfinished)], check=True)
    unfinished.rename(target)
