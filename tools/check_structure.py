"""Check the rules that the compilers cannot: who may include whom, what may appear where, sizes.

Prints one line per violation and fails when there is one. With `--objects BUILD_DIR` it checks what
a build left behind instead: the files compiled for a larger instruction set must define no symbol
that the linker could choose for everybody. Standard library only.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Where the quoted includes of a folder may lead: src <- cuda <- csrc, src <- benchmarks/cpp, and in
# cuda/ layout <- device <- ops <- sm90.
LAYERS = ["cuda/layout", "cuda/device", "cuda/ops", "cuda/sm90"]
MAY_INCLUDE = {
    "src": ["src"],
    **{layer: ["src", *LAYERS[: i + 1]] for i, layer in enumerate(LAYERS)},
    "cuda": ["src", "cuda"],
    "csrc": ["src", "csrc"],
    "benchmarks/cpp": ["src", "benchmarks/cpp"],
    "benchmarks/cuda": ["src", "cuda", "tests/cuda"],
    "tests/cuda": ["src", "cuda", "tests/cuda"],
}

# A pattern, the folders it may appear in, and what to do instead.
CUDA_FOLDERS = ("cuda", *LAYERS, "benchmarks/cuda", "tests/cuda")
BELONGS = [
    (re.compile(r"#\s*include\s*[<\"](pybind11/|Python\.h)"), ("csrc",), "Python belongs in csrc/"),
    (
        re.compile(r"#\s*include\s*<cu(da|blas)|\b__(global|device)__\b"),
        CUDA_FOLDERS,
        "CUDA belongs in cuda/",
    ),
    (
        re.compile(r"#\s*include\s*<(cutlass|cute)/"),
        ("cuda/sm90",),
        "CUTLASS belongs in cuda/sm90/",
    ),
    (
        re.compile(r"\basm\b"),
        ("cuda/device", "cuda/sm90", "tests/cuda", "src", "benchmarks/cpp"),
        "inline assembly belongs in cuda/device/, and Hopper's in cuda/sm90/",
    ),
    (
        re.compile(r"#\s*(if|ifdef|ifndef|elif)\b.*\b(WITH|HAVE|USE|ENABLE|CAMELID)\w*_CUDA\b"),
        (),
        "CMake chooses the CUDA backend by linking it, not by a macro",
    ),
]
NEVER_IN_SRC = re.compile(
    r"(?<!\w)(std::(cout|cerr|clog|exit|abort|terminate)\b|(?<![.:>])(printf|fprintf|puts|exit|abort)\()"
)
# The engine, its tests and its tools compare against other implementations, never by depending on
# one.
HEAVY_IMPORT = re.compile(r"^\s*(import|from)\s+(torch|transformers|tokenizers|safetensors)\b")
INCLUDE_ROOTS = ["src", "cuda", "csrc", "benchmarks/cpp", "tests/cuda", "tests/cuda/emulated"]
MAX_COLUMNS = 100
MAX_LINES = 600
SEAM_LINES = 150
CPP = {".h", ".cpp", ".inl", ".cu", ".cuh"}


def files(folder: str, suffixes: set[str]) -> Iterator[Path]:
    for path in sorted((ROOT / folder).rglob("*")):
        if path.suffix in suffixes and path.is_file():
            yield path


def check_cpp(folder: str) -> Iterator[tuple[Path, int, str]]:
    inner = [ROOT / other for other in MAY_INCLUDE if other.startswith(f"{folder}/")]
    for path in files(folder, CPP):
        if any(path.is_relative_to(other) for other in inner):
            continue  # has rules of its own
        lines = path.read_text(encoding="utf-8").splitlines()
        told_in_header = path.suffix == ".cpp" and path.with_suffix(".h").exists()
        if not told_in_header and not "".join(lines[:1]).startswith("//"):
            yield path, 1, "open with a paragraph: what this file owns, what it must never know"
        if len(lines) > MAX_LINES:
            yield path, len(lines), f"a file stops at {MAX_LINES} lines"
        for number, line in enumerate(lines, 1):
            if len(line) > MAX_COLUMNS:
                yield path, number, f"{len(line)} columns, at most {MAX_COLUMNS}"
            for reason in line_violations(folder, path, line):
                yield path, number, reason


def line_violations(folder: str, path: Path, line: str) -> Iterator[str]:
    include = re.match(r'\s*#\s*include\s*"([^"]+)"', line)
    if include:
        roots = [path.parent, *(ROOT / root for root in INCLUDE_ROOTS)]
        found = [r / include[1] for r in roots if (r / include[1]).exists()]
        allowed = [(ROOT / name).resolve() for name in MAY_INCLUDE[folder]]
        if not any(a in f.resolve().parents for f in found for a in allowed):
            yield f'"{include[1]}" is not in {" or ".join(MAY_INCLUDE[folder])}/'
    code = line.split("//")[0]
    for pattern, homes, reason in BELONGS:
        if folder not in homes and pattern.search(code):
            yield reason
    if folder == "src" and NEVER_IN_SRC.search(code):
        yield "src/ never prints, exits or aborts; throw camelid::Error"


def check_python() -> Iterator[tuple[Path, int, str]]:
    for path in files("python", {".py", ".pyi"}):
        lines = path.read_text(encoding="utf-8").splitlines()
        if len(lines) > MAX_LINES:
            yield path, len(lines), f"a file stops at {MAX_LINES} lines"
        for number, line in enumerate(lines, 1):
            if HEAVY_IMPORT.match(line):
                yield path, number, "not a dependency of ours; ARCHITECTURE.md says why"


def check_seam() -> Iterator[tuple[Path, int, str]]:
    seam = ROOT / "src" / "backend" / "backend.h"
    if seam.exists() and (n_lines := len(seam.read_text().splitlines())) > SEAM_LINES:
        yield seam, n_lines, f"the seam between model and machine stays under {SEAM_LINES} lines"


def check_objects(build: Path) -> Iterator[tuple[Path, int, str]]:
    """Find symbols of the ISA files that other files may define too.

    The linker keeps one copy of an inline function. If it kept the one compiled with AVX-512, every
    machine would run it, and those without AVX-512 would die on it.
    """
    objects = sorted(build.rglob("isa_avx*.cpp.o"))
    if not objects:
        yield build, 0, "no isa_avx*.cpp.o below this folder"
    for path in objects:
        listing = subprocess.run(
            ["nm", "--defined-only", "--demangle", str(path)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for line in listing.splitlines():
            kind, name = line.split(maxsplit=2)[1:]
            if kind in "WwVvu" and "DW.ref." not in name:
                yield path, 0, f"shared symbol compiled for a larger instruction set: {name}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objects", type=Path, metavar="BUILD_DIR")
    options = parser.parse_args()
    if options.objects:
        violations = list(check_objects(options.objects.resolve()))
    else:
        violations = [v for folder in MAY_INCLUDE for v in check_cpp(folder)]
        violations += [*check_python(), *check_seam()]
    for path, number, reason in violations:
        where = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        print(f"{where}:{number}: {reason}")
    print(f"[structure] {len(violations)} violations")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
