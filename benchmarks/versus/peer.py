"""Gets llama.cpp: downloads the source package that pins it and compiles its two benchmarks.

llama-cpp-python's source package carries llama.cpp, so one version number names all of it.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

PACKAGE, VERSION = "llama_cpp_python", "0.3.36"


def build_llama_cpp(work: Path) -> Path:
    """Return llama-bench, compiled for this machine; what `work` holds already is not redone."""
    build = work / "llama.cpp-build"
    bench = build / "bin" / "llama-bench"
    if bench.exists() and bench.with_name("llama-batched-bench").exists():
        return bench
    source = download(work) / "vendor" / "llama.cpp"
    print(f"[versus] compiling llama.cpp in {build}; several minutes", file=sys.stderr)
    flags = {
        "CMAKE_BUILD_TYPE": "Release",
        "BUILD_SHARED_LIBS": "OFF",
        "GGML_NATIVE": "ON",
        "LLAMA_CURL": "OFF",
        "LLAMA_BUILD_TESTS": "OFF",
        "LLAMA_BUILD_SERVER": "OFF",
        "LLAMA_BUILD_EXAMPLES": "OFF",
    }
    defines = [f"-D{name}={value}" for name, value in flags.items()]
    run("cmake", "-S", source, "-B", build, *defines)
    run("cmake", "--build", build, "--parallel", "--target", "llama-bench", "llama-batched-bench")
    return bench


def download(work: Path) -> Path:
    """Return the unpacked source package."""
    folder = work / f"{PACKAGE}-{VERSION}"
    if folder.exists():
        return folder
    work.mkdir(parents=True, exist_ok=True)
    name = PACKAGE.replace("_", "-")
    # Not ":all:", which would compile the tools of the build too.
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", name]
    run(*pip, "--dest", work, f"{name}=={VERSION}")
    with tarfile.open(work / f"{folder.name}.tar.gz") as archive:
        archive.extractall(work, filter="data")
    return folder


def has_depth(bench: Path) -> bool:
    """Tell whether this llama-bench knows -d."""
    text = subprocess.run([str(bench), "--help"], capture_output=True, text=True, check=False)
    return "--n-depth" in text.stdout + text.stderr


def run(*command: str | Path) -> None:
    """Run a command; its output is shown when it fails."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout[-4000:], done.stderr[-4000:], sep="\n", file=sys.stderr)
        sys.exit(f"[versus] {' '.join(map(str, command))} failed with {done.returncode}")
