"""Look at what the compiler made of the GPU kernels: registers kept, instructions as meant.

    python tools/check_sass.py build/cuda --log build.log

Reads the machine code of every kernel in the build's library with cuobjdump (which wants nvdisasm
beside it; the wheels nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm have them where CUDA's toolkit
does not). Fails when a kernel lacks an instruction that its speed rests on, when one of ours keeps
anything in local memory, when one reads a uniform register that nothing writes (ptxas 12.9 to 13.2
loses that of a copy's cache hint), when warpgroups take more registers than their block has, or
when ptxas wrote in the log that it spilled, serialised wgmma or ignored setmaxnreg. A log of a
build that compiled no kernel says nothing, and fails too. Standard library only.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Kernel:
    """A kernel's machine code, counted."""

    name: str  # mangled
    arch: str
    counts: Counter[str]  # of instructions, modifiers included
    gives: set[int] = field(default_factory=set)  # registers of a thread: what warpgroups keep
    takes: set[int] = field(default_factory=set)
    uniform_reads: set[int] = field(default_factory=set)  # of uniform registers, by their numbers
    uniform_writes: set[int] = field(default_factory=set)

    def has(self, pattern: str) -> int:
        """Return how many instructions begin so."""
        return sum(n for name, n in self.counts.items() if re.match(pattern, name))


# Kernels by a pattern of their mangled name, and what they must have. 16 bytes at a time, past L1;
# whole matrices out of shared memory; products on tensor cores. Rows in vectors; histograms whose
# equal bins a warp counts at once.
_STREAM = (r"HMMA\.16816\.F32\.BF16", r"LDGSTS\.E\.BYPASS\.128", r"LDSM\.16\.M88\.4")
MEANT = {
    "run_matmul_few": _STREAM,
    "run_experts_few": _STREAM,
    "run_project_kv": _STREAM,
    "run_matmul_plain": (r"HMMA\.16816\.F32\.BF16", r"LDSM"),
    "run_attention_few": _STREAM[:2],
    "run_attention_few.*KvFormatE0": (_STREAM[2], r"LDSM\.16\.MT88\.4"),  # bf16
    r"4cuda\d\d_GLOBAL_.*grouped_many_kernel": _STREAM[:2],
    r"4cuda4sm90.*grouped_many_kernel": (r"HGMMA\.64x128x16\.F32\.BF16", _STREAM[1]),
    "norm_kernel": (r"LDG\.E\.128", r"STG\.E\.(128|64)"),
    r"each_kernel.*Copy": (r"LDG\.E\.128", r"STG\.E\.128"),
    "store_kv_kernel": (r"LDG\.E\.128", r"STG\.E\.64"),
    "top_logits_kernel": (r"LDG\.E\.128", r"ATOMS\.POPC\.INC"),
    r"4cuda\d\d_GLOBAL_.*attend_many_kernel": (*_STREAM, r"LDSM\.16\.MT88\.4"),
    r"4cuda4sm90.*attend_many_kernel": (r"HGMMA\.64x128x16\.F32\.BF16", _STREAM[1]),
    "cutlass13device_kernel": (r"[HQ]GMMA\.64x", r"UTMALDG"),
}
LOCAL_MEMORY = r"(LDL|STL)(\.|$)"


# ---- reading ----
def find_cuobjdump() -> Path | None:
    """Return a cuobjdump that has nvdisasm beside it."""
    folders = [*os.get_exec_path(), *(f"{path}/nvidia/cu13/bin" for path in sys.path)]
    folders += [f"{path}/nvidia/cuda_{tool}/bin" for path in sys.path
                for tool in ("cuobjdump", "nvdisasm")]  # fmt: skip
    tools = {name: shutil.which(name, path=os.pathsep.join(folders))
             for name in ("cuobjdump", "nvdisasm")}  # fmt: skip
    if tools["cuobjdump"] is None or tools["nvdisasm"] is None:
        return None
    return Path(tools["cuobjdump"])


def dump(cuobjdump: Path, what: str, library: Path) -> Iterator[str]:
    command = [str(cuobjdump), what, str(library)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield from process.stdout
    if process.returncode != 0:
        sys.exit(f"[sass] {' '.join(command)} failed")


def note_uniform(kernel: Kernel, operands: str) -> None:
    """Note which uniform registers an instruction reads, and which it writes: its first one."""
    target = re.match(r"\s*(?:U?P\w+,\s*)*UR(\d+)\b", operands)
    if target:  # up to four together
        kernel.uniform_writes.update(range(int(target[1]), int(target[1]) + 4))
        operands = operands[target.end() :]
    kernel.uniform_reads.update(map(int, re.findall(r"\bUR(\d+)", operands)))


def read_kernels(lines: Iterator[str]) -> list[Kernel]:
    instruction = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*)")
    kernels: list[Kernel] = []
    arch = ""
    for line in lines:
        if found := instruction.match(line):
            kernels[-1].counts[found[1]] += 1
            note_uniform(kernels[-1], found[2])
            if found[1].startswith("USETMAXREG"):
                taken = "TRY_ALLOC" in found[1]
                (kernels[-1].takes if taken else kernels[-1].gives).add(
                    int(found[2].split()[-1], 16)
                )
        elif found := re.match(r"\s*Function : (\S+)", line):
            kernels.append(Kernel(found[1], arch, Counter()))
        elif found := re.match(r"arch = (\S+)", line):
            arch = found[1]
    return kernels


def read_registers(lines: Iterable[str]) -> dict[tuple[str, str], int]:
    """Return with how many registers a thread of each kernel (architecture, name) begins."""
    registers: dict[tuple[str, str], int] = {}
    arch = name = ""
    for line in lines:
        if found := re.match(r"arch = (\S+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            name = found[1]
        elif found := re.match(r"\s*REG:(\d+)", line):
            registers[arch, name] = int(found[1])
    return registers


def demangled(names: list[str]) -> list[str]:
    """Return names as people read them, without the namespaces and arguments of ours."""
    if shutil.which("c++filt") is None:
        return names
    listing = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout
    shorter = listing.replace("(anonymous namespace)::", "").replace("camelid::cuda::", "")
    return [re.sub(r"^void |(?<=[\w>])\(.*", "", line)[:80] for line in shorter.splitlines()]


# ---- judging ----
def wants_too_many(kernel: Kernel, at_start: int) -> str | None:
    """Say whether the last warps to take registers would wait for ever.

    A block has what its threads begin with. It is as large as that many registers allow, one
    warpgroup of it gives and all others take: so our kernels are, and CUTLASS's.
    """
    if not kernel.takes:
        return None
    if not kernel.gives:
        return f"takes {max(kernel.takes)} registers, and nobody gives any"
    n_warpgroups = 64 * 1024 // at_start // 128
    wanted = max(kernel.gives) + (n_warpgroups - 1) * max(kernel.takes)
    if wanted <= n_warpgroups * at_start:
        return None
    return (f"{n_warpgroups} warpgroups begin with {at_start} registers a thread, "
            f"{n_warpgroups * at_start} in all, and want {wanted}")  # fmt: skip


def violations(kernels: list[Kernel]) -> Iterator[tuple[Kernel, str]]:
    for kernel in kernels:
        if n := kernel.has(LOCAL_MEMORY):
            yield kernel, f"{n} accesses of local memory: registers spill, or arrays are indexed"
        if lost := kernel.uniform_reads - kernel.uniform_writes:
            names = ", ".join(f"UR{n}" for n in sorted(lost))
            yield kernel, f"reads {names}, which nothing writes"
        # What it lets start early relies on it for all that came before.
        if kernel.has("PREEXIT") and not kernel.has("ACQBULK"):
            yield kernel, "lets its successor start and does not wait for its predecessor"
        for part, patterns in MEANT.items():
            if re.search(part, kernel.name):
                for pattern in patterns:
                    if not kernel.has(pattern):
                        yield kernel, f"no instruction {pattern}"
    for part in MEANT:
        if not any(re.search(part, kernel.name) for kernel in kernels):
            yield Kernel(part, "any", Counter()), "there is no such kernel"


def log_violations(log: str) -> Iterator[str]:
    kernel = arch = "?"
    if "Compiling entry function" not in log:
        yield "the log names no kernel: nothing was compiled, so it says nothing of spills"
    for line in log.splitlines():
        if found := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            kernel, arch = found[1], found[2]
        spills = re.search(r"[1-9]\d* bytes spill", line)
        if spills or re.search(r"(?i)wgmma.*seriali|setmaxnreg", line):
            yield f"{demangled([kernel])[0]} for {arch}: {line.strip()}"


def print_table(kernels: list[Kernel]) -> None:
    columns = {
        "HMMA": "HMMA", "GMMA": "[HQ]GMMA", "LDGSTS": "LDGSTS", "LDSM": "LDSM",
        "local": LOCAL_MEMORY,
    }  # fmt: skip
    print("arch     total " + " ".join(f"{name:>6}" for name in columns) + "  kernel")
    for kernel, name in zip(kernels, demangled([k.name for k in kernels]), strict=True):
        counts = " ".join(f"{kernel.has(pattern):6}" for pattern in columns.values())
        print(f"{kernel.arch:8} {kernel.counts.total():5} {counts}  {name}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("build", type=Path, nargs="?", help="folder with libcamelid_cuda.a")
    parser.add_argument("--log", type=Path, help="what the build printed")
    parser.add_argument("--table", action="store_true", help="print counts of every kernel")
    options = parser.parse_args()
    bad = list(log_violations(options.log.read_text())) if options.log else []
    if options.build:
        cuobjdump = find_cuobjdump()
        if cuobjdump is None:
            sys.exit("[sass] no cuobjdump that has an nvdisasm: install CUDA's toolkit, or the "
                     "wheels nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm")  # fmt: skip
        library = options.build / "libcamelid_cuda.a"
        kernels = read_kernels(dump(cuobjdump, "-sass", library))
        registers = read_registers(dump(cuobjdump, "-res-usage", library))
        if options.table:
            print_table(kernels)
        found = list(violations(kernels))
        found += [
            (kernel, why)
            for kernel in kernels
            if (why := wants_too_many(kernel, registers[kernel.arch, kernel.name]))
        ]
        names = demangled([kernel.name for kernel, _ in found])
        bad += [f"{name} for {kernel.arch}: {why}"
                for name, (kernel, why) in zip(names, found, strict=True)]  # fmt: skip
        print(f"[sass] {len(kernels)} kernels looked at")
    print("\n".join([*bad, f"[sass] {len(bad)} violations"]))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
