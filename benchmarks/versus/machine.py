"""What the machine is and how fast it reads and multiplies, measured in the same run.

By benchmarks/cpp when that is built; else reading alone, by NumPy, and the result says so.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

READ_BYTES = 1 << 30  # far more than any L3 of a machine with two threads


def describe(threads: int, peaks_program: Path | None) -> dict[str, Any]:
    """Return the machine's name and peaks."""
    return {
        "cpu": cpu_name(),
        "threads": threads,
        "cpus": os.cpu_count(),
        "peaks": measure_peaks(threads, peaks_program),
    }


def cpu_name() -> str:
    """Return the processor's name as /proc/cpuinfo has it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    found = re.search(r"model name\s*:\s*(.*)", text)
    return found[1] if found else platform.machine()


def measure_peaks(threads: int, program: Path | None) -> dict[str, Any]:
    """Return read bandwidth in GB/s, arithmetic in GOP/s, and what measured them."""
    if program is None:
        return {"measured_by": "numpy sum (stand-in)", "read_gb_s": numpy_read_gb_s(threads)}
    done = subprocess.run(
        [
            str(program),
            f"--threads={threads}",
            "--benchmark_filter=^peak_",
            "--benchmark_format=json",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    return {"measured_by": program.name} | parse_peaks(json.loads(done.stdout))


def parse_peaks(report: dict[str, Any]) -> dict[str, float]:
    """Take the peaks of all threads out of Google Benchmark's report."""
    peaks: dict[str, float] = {}
    for entry in report["benchmarks"]:
        name = entry["name"].removeprefix("peak_").split("/")[0]
        for counter, unit in (("GB/s", "gb_s"), ("GOP/s", "gop_s")):
            if counter in entry:
                key = f"{name}_{unit}"
                # Runs of one thread and of all are there: the machine's peak is the larger.
                peaks[key] = max(peaks.get(key, 0.0), float(entry[counter]))
    integer = [peaks[key] for key in peaks if key.startswith(("vnni", "maddubs"))]
    if integer:
        peaks["int8_gop_s"] = max(integer)
    return peaks


def numpy_read_gb_s(threads: int, *, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the median speed of summing memory on `threads` threads."""
    data = np.ones(READ_BYTES // 8, np.float64)
    parts = np.array_split(data, threads)

    def once() -> float:
        workers = [threading.Thread(target=part.sum) for part in parts]
        started = clock()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return READ_BYTES / (clock() - started) / 1e9

    return float(np.median([once() for _ in range(7)]))
