"""Build without python/, then without csrc/ too, then without cuda/ too: the deletion test.

Copies the tree once and deletes one folder after the other from the same copy, so that only the
first of the three builds compiles everything. Unoptimised: it asks whether it builds, not how fast
it runs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ["src", "cuda", "csrc", "python", "CMakeLists.txt", "pyproject.toml"]
# What to delete next, and the file that must then have been built.
ROUNDS = [("python", "_core.*.so"), ("csrc", "libcamelid_core.a"), ("cuda", "libcamelid_core.a")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "deletion")
    work = parser.parse_args().work
    shutil.rmtree(work, ignore_errors=True)
    tree, build = work / "tree", work / "build"
    tree.mkdir(parents=True)
    for name in NEEDED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name)
        elif source.exists():
            shutil.copy2(source, tree / name)
    for deleted, product in ROUNDS:
        print(f"[deletion] without {deleted}/", flush=True)
        shutil.rmtree(tree / deleted, ignore_errors=True)
        for stale in build.glob("_core.*.so"):
            stale.unlink()
        configure = ["cmake", "-S", str(tree), "-B", str(build), "-G", "Ninja"]
        run(*configure, "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O0",
            f"-DPython_EXECUTABLE={sys.executable}")  # fmt: skip
        run("cmake", "--build", str(build), "--parallel", str(os.cpu_count() or 1))
        if not list(build.glob(product)):
            sys.exit(f"[deletion] without {deleted}/ the build made no {product}")
    shutil.rmtree(work)
    print("[deletion] each folder builds without those to its right")
    return 0


def run(*command: str) -> None:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode != 0:
        sys.exit(f"{result.stdout}\n[deletion] failed: {' '.join(command)}")


if __name__ == "__main__":
    sys.exit(main())
