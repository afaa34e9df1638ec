"""Builds CUDA sources for the CPU and calls what they export, without any GPU.

    library = build("tests/cuda/matmul_case.cu", "cuda/ops/matmul.cu")
    call(library, "run_matmul", x, y, 5, seed=3)  # raises what a launch threw

Sources are compiled as they are; tests/cuda/emulated/ gives the names of cuda/device/ a meaning.
Its README says what is checked.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import weakref
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
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
# What the sanitizers call goes to the emulator instead of their own libraries. Accesses that the
# compiler merged would be reported as ones of another size.
WATCH = [
    "-fsanitize=thread,alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero",
    "-fsanitize=float-cast-overflow",
    "-fno-tree-loop-vectorize",
    "-fno-tree-slp-vectorize",
]
# -O1 compiles more than twice as fast as -O2; tests that run are hardly slower.
FLAGS = [
    "-std=c++20",
    "-O1",
    "-g1",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Wno-maybe-uninitialized",
]


class EmulatorError(Exception):
    """What a launch threw."""


@functools.cache
def build(*sources: str, watch: bool = True, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """Return the library of `sources` and the emulator.

    Each source is compiled once for each content of itself and of all headers.

    Args:
        sources: Paths from the root of the repository.
        watch: Compile kernels to report every access, and fail those that leave their memory, are
            not aligned, or race with another thread's, in whatever order they happened to run,
            and what C++ leaves undefined; for two to three times the time.
        flags: More for the compiler.
    """
    objects = _compile_all(sources, watch=watch, flags=flags)
    library = CACHE / f"{_key(*(path.name.encode() for path in objects))}.so"
    _make(library, [*_compiler(), "-shared", *map(str, objects)])
    loaded = ctypes.CDLL(str(library))
    loaded.device_error.restype = ctypes.c_char_p
    loaded.emulated_seed.argtypes = [ctypes.c_uint64]
    loaded.device_alloc.restype = ctypes.c_void_p
    loaded.device_alloc.argtypes = [ctypes.c_size_t]
    loaded.device_free.argtypes = [ctypes.c_void_p]
    return loaded


def build_core() -> Path:
    """Build the whole extension `camelid._core` with the emulated GPU as its CUDA backend.

    The engine and the bindings are those that `make` built; nothing of them knows the difference.
    """
    built = ROOT / "build" / "venv"
    engine = built / "libcamelid_core.a"
    bindings = sorted((built / "CMakeFiles" / "_core.dir" / "csrc").glob("*.o"))
    if not engine.exists() or not bindings or _is_stale(ROOT / ".venv" / ".installed"):
        pytest.skip(f"the engine's objects in {built} are not those of src/ and csrc/: run make")
    cuda = ROOT / "cuda"
    sources = [*sorted(cuda.glob("host/*.cu")), *sorted(cuda.glob("ops/*.cu"))]
    # Of sm90/ those that are not CUTLASS's.
    sources += [path for path in sorted(cuda.glob("sm90/*.cu")) if "matmul" not in path.name]
    sources.append(EMULATOR / "no_cutlass.cpp")
    objects = _compile_all([str(path.relative_to(ROOT)) for path in sources], watch=False)
    inputs = [*objects, *bindings, engine]
    stamps = (f"{path} {path.stat().st_mtime_ns}".encode() for path in inputs)
    core = CACHE / f"core-{_key(*stamps)}" / "_core.so"
    core.parent.mkdir(exist_ok=True)
    _make(core, [*_compiler(), "-shared", *map(str, inputs), "-pthread"])
    return core


def _is_stale(stamp: Path) -> bool:
    """Tell whether the engine was built, as the Makefile's stamp says, before it was changed."""
    files = [path for folder in ("src", "csrc") for path in (ROOT / folder).rglob("*.*")]
    return not stamp.exists() or stamp.stat().st_mtime < max(f.stat().st_mtime for f in files)


def call(library: ctypes.CDLL, name: str, *arguments: Any, seed: int = 0) -> None:
    """Call an exported function that returns 0, or 1 after an error, under a seed.

    Args:
        library: What `build` returned.
        name: Of the function.
        arguments: NumPy arrays become pointers to device memory, those not from `device_array` to
            a copy that is copied back; whole numbers become C's int, the rest is ctypes'.
        seed: Of the order of threads and of the copies' arrival; 0 runs threads in their order.

    Raises:
        EmulatorError: With the message of what the function threw.
    """
    library.emulated_seed(seed)
    values, copies = list(arguments), []
    for i, argument in enumerate(arguments):
        if isinstance(argument, np.ndarray) and not isinstance(argument, DeviceArray):
            values[i] = device_array(library, argument)
            copies.append((argument, values[i]))
    if getattr(library, name)(*map(_c_value, values)) != 0:
        raise EmulatorError(explain(library, library.device_error().decode()))
    for host, device in copies:
        if host.flags.writeable:
            host[...] = device


def explain(library: ctypes.CDLL, message: str) -> str:
    """Replace places in the code of `library` by lines of its sources."""
    return re.sub(r"code\+0x([0-9a-f]+)", lambda match: _line_of(library, match[1]), message)


class DeviceArray(np.ndarray[Any, Any]):
    """An array in device memory."""


def device_array(library: ctypes.CDLL, values: NDArray[Any]) -> DeviceArray:
    """Return a copy of `values` in device memory, where accesses beside it are noticed."""
    address = library.device_alloc(values.nbytes)
    memory = (ctypes.c_ubyte * values.nbytes).from_address(address)
    weakref.finalize(memory, library.device_free, address)
    array = np.ndarray(values.shape, values.dtype, memory).view(DeviceArray)
    array[...] = values
    return array


def _line_of(library: ctypes.CDLL, offset: str) -> str:
    """Return the line of a kernel that called what returns to an offset in the library."""
    addr2line = shutil.which("addr2line")
    if addr2line is None:
        return f"{Path(library._name).name}+0x{offset}"
    before = hex(int(offset, 16) - 1)
    places = subprocess.run(
        [addr2line, "-i", "-e", library._name, before],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    twins = str(EMULATOR / "device")
    place = next((place for place in places if not place.startswith(twins)), places[0])
    return place.split(" ")[0].split("/")[-1]


def _c_value(argument: Any) -> Any:
    if not isinstance(argument, np.ndarray):
        return argument
    assert argument.flags.c_contiguous
    return ctypes.c_void_p(argument.ctypes.data)


def _compiler() -> list[str]:
    compiler = (
        shlex.split(os.environ.get("CXX", ""))
        or [path for name in ("g++", "clang++") if (path := shutil.which(name))][:1]
    )
    if not compiler:
        pytest.skip("kernels are emulated by compiling them for the CPU: no g++, no clang++")
    return compiler


def _compile_all(sources: Iterable[str], *, watch: bool, flags: tuple[str, ...] = ()) -> list[Path]:
    """Return the objects of the emulator and of `sources`."""
    CACHE.mkdir(parents=True, exist_ok=True)
    common = [*_compiler(), *FLAGS, *flags, *(f"-I{ROOT / folder}" for folder in FOLDERS)]
    kernels = [*common, *WATCH] if watch else common
    # The emulator first: of inline functions that both have, the linker keeps the first, and the
    # emulator's own must not report to itself.
    objects = [_compile(common, EMULATOR / name) for name in ("fibers.cpp", "settings.cpp")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects += pool.map(functools.partial(_compile, kernels), map(ROOT.joinpath, sources))
    return objects


def _compile(command: list[str], source: Path) -> Path:
    listed = subprocess.run(
        [*command, "-x", "c++", "-MM", str(source)], capture_output=True, text=True, check=False
    ).stdout
    # "name.o: source header \\\n header": what it is compiled from, nothing where that fails.
    read = sorted(set(listed.partition(":")[2].replace("\\\n", " ").split()) | {str(source)})
    contents = (Path(path).read_bytes() for path in read)
    target = CACHE / f"{source.stem}-{_key(*(word.encode() for word in command), *contents)}.o"
    _make(target, [*command, "-x", "c++", "-c", str(source)])
    return target


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
