"""What a machine has of what tools/gpu_check needs: GPUs, a driver, a Python and its packages.

Asks, and says what is missing and what to do about it. Must never build or run anything.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

# What steps import, by the names that pip knows.
PACKAGES = {"numpy": "numpy", "pytest": "pytest", "tiktoken": "tiktoken", "jinja2": "jinja2",
            "pillow": "PIL", "tqdm": "tqdm"}  # fmt: skip
IMPORTS = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError:
        print(name)
"""
BUILDS = """
import os, sysconfig
try:
    import pybind11
    version = pybind11.version_info[0]
except ImportError:
    version = 0
if version < 3:
    print("pybind11 from version 3 on (pip install 'pybind11>=3')")
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    print("the headers of Python (Debian, Ubuntu: python3-dev)")
"""


# ---- the GPU ----
def count_gpus() -> int:
    """Return how many GPUs the driver shows; 0 also where there is no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    return 0 if failed else count.value


def cuda_versions(library: Path) -> tuple[int, int]:
    """Return the driver's CUDA, and the one a library was built with: 13000 for 13.0."""
    numbers = (ctypes.c_int * 2)()
    ctypes.CDLL(str(library)).cuda_versions(numbers)
    return numbers[0], numbers[1]


def check_driver(library: Path) -> None:
    """Say which CUDA meets which; exit where no kernel of the library could start."""
    try:
        driver, built = cuda_versions(library)
    except (OSError, AttributeError) as error:
        sys.exit(f"[gpu_check] {library} cannot be used: {error}. Build it here, or where the "
                 "system is as old as here, from these sources.")  # fmt: skip
    versions = f"the driver is for CUDA {dotted(driver)}, the library for {dotted(built)}"
    if driver // 1000 < built // 1000:
        sys.exit(f"[gpu_check] No kernel can start: {versions}. Update the driver, or build with "
                 f"CUDA {driver // 1000}.")  # fmt: skip
    older = " The driver may refuse what is newer than itself." if driver < built else ""
    print(f"[gpu_check] {versions[0].upper()}{versions[1:]}.{older}")


def dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def find_sanitizer() -> str | None:
    """Return where compute-sanitizer is."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [f"{home}/{part}" for home in homes if home for part in ("bin", "compute-sanitizer")]
    path = os.pathsep.join([os.environ.get("PATH", ""), *folders])
    return shutil.which("compute-sanitizer", path=path)


# ---- Python ----
def ask(python: str, program: str, *arguments: str) -> list[str]:
    """Return the lines that a Python prints."""
    command = [python, "-c", program, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"[gpu_check] --python {python}: {getattr(error, 'stderr', '') or error}")
    return done.stdout.splitlines()


def core_name(python: str) -> str:
    """Return the one name under which a Python finds the core."""
    (suffix,) = ask(python, "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))")
    return f"_core{suffix}"


def missing_packages(python: str) -> set[str]:
    """Return which of PACKAGES a Python cannot import; say so."""
    absent = ask(python, IMPORTS, *PACKAGES.values())
    missing = {name for name, module in PACKAGES.items() if module in absent}
    if missing:
        print(f"[gpu_check] {python} lacks what some steps need: "
              f"{python} -m pip install {' '.join(sorted(missing))}")  # fmt: skip
    return missing


def missing_for_core(python: str) -> list[str]:
    """Return what a Python lacks to build the core, and how to get it."""
    return ask(python, BUILDS)
