"""The devices that tests of kernels run on: the emulated one, and a GPU where there is one.

Both are a library of the kernels and of C functions that call them (tests/cuda/*.cu). For the GPU
it was built by `tools/gpu_check`, which says where it is in CAMELID_GPU_LIBRARY.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import weakref
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from emulated_build import ROOT, build, explain

LIBRARY = "CAMELID_GPU_LIBRARY"
CASES = (
    "tests/cuda/ops.cu",
    "tests/cuda/pack.cu",
    "tests/cuda/grouped_case.cu",
    "tests/cuda/rows_case.cu",
    "tests/cuda/attention_case.cu",
    "tests/cuda/attention_many_case.cu",
)
# What of cuda/sm90/ the emulated device can run: all but CUTLASS.
HOPPER = ("cuda/sm90/grouped.cu", "cuda/sm90/attention_many.cu")


class DeviceError(Exception):
    """What a call threw."""


class Memory:
    """An array in device memory, with guards around it."""

    def __init__(self, library: ctypes.CDLL, shape: tuple[int, ...], dtype: Any) -> None:
        self._library, self._shape, self._dtype = library, shape, np.dtype(dtype)
        self.n_bytes = math.prod(shape) * self._dtype.itemsize
        self.address: int = library.device_alloc(max(1, self.n_bytes))
        if not self.address:
            raise DeviceError(library.device_error().decode())
        weakref.finalize(self, library.device_free, self.address)

    def write(self, values: NDArray[Any]) -> None:
        values = np.ascontiguousarray(values, self._dtype)
        self._copy(self.address, values.ctypes.data)

    def read(self) -> NDArray[Any]:
        values = np.empty(self._shape, self._dtype)
        self._copy(values.ctypes.data, self.address)
        return values

    def _copy(self, to: int, from_: int) -> None:
        if self._library.device_copy(to, from_, self.n_bytes) != 0:
            raise DeviceError(self._library.device_error().decode())


class Device:
    """Memory of a device, and calls to what its library exports."""

    def __init__(self, library: ctypes.CDLL, *, emulated: bool) -> None:
        self.library, self.emulated = library, emulated
        library.device_error.restype = ctypes.c_char_p
        library.device_alloc.restype = ctypes.c_void_p
        library.device_alloc.argtypes = [ctypes.c_size_t]
        library.device_free.argtypes = [ctypes.c_void_p]
        library.device_copy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]

    def reserve(self, n_bytes: int) -> Memory:
        """Return bytes that begin as NaNs."""
        return Memory(self.library, (n_bytes,), np.uint8)

    def put(self, values: NDArray[Any]) -> Memory:
        memory = Memory(self.library, values.shape, values.dtype)
        memory.write(values)
        return memory

    def is_hopper(self) -> bool:
        return self.emulated or self.library.compute_capability() == 90

    def arrange(self, *, seed: int = 0, multiprocessors: int = 5) -> None:
        """Choose the order of threads, when copies arrive, and how large grids are.

        A GPU has its own ideas of all three.
        """
        if self.emulated:
            self.library.emulated_seed(ctypes.c_uint64(seed))
            self.library.emulated_multiprocessors(multiprocessors)

    def call(self, name: str, *arguments: Any) -> None:
        """Call an exported function that returns 0, or 1 after an error.

        Args:
            name: Of the function.
            arguments: Memory becomes its address, structures pointers to them, the rest is ctypes'.

        Raises:
            DeviceError: With what the function threw, or where something wrote beside its memory.
        """
        self.submit(name, *arguments)
        self.submit("check_guards")

    def submit(self, name: str, *arguments: Any) -> None:
        """Call, without a look at the guards: the call may only be recorded."""
        if getattr(self.library, name)(*map(_c_value, arguments)) != 0:
            message = self.library.device_error().decode()
            raise DeviceError(explain(self.library, message) if self.emulated else message)


def _c_value(argument: Any) -> Any:
    if isinstance(argument, Memory):
        return ctypes.c_void_p(argument.address)
    if isinstance(argument, ctypes.Structure):
        return ctypes.byref(argument)
    return argument


@functools.cache
def emulated_device() -> Device:
    ops = sorted((ROOT / "cuda" / "ops").glob("*.cu"))
    sources = [*CASES, *HOPPER, *(str(path.relative_to(ROOT)) for path in ops)]
    return Device(build(*sources), emulated=True)


@functools.cache
def gpu_device() -> Device:
    path = os.environ.get(LIBRARY)
    if path is None:
        pytest.skip("needs a GPU and a library for it: run tools/gpu_check")
    device = Device(ctypes.CDLL(path), emulated=False)
    if device.library.device_count() == 0:
        pytest.fail(f"{path} finds no GPU: {device.library.device_error().decode()}")
    return device
