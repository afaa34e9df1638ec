"""What the machine is and how fast it reads and multiplies, at the start and between turns.

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
LIMITING = ("read_gb_s", "int8_gop_s")
GAUGE_SECONDS = 0.2  # for each peak; filling the memory that is read takes as long again


def describe(threads: int, peaks_program: Path | None) -> dict[str, Any]:
    """Return the machine's name and peaks."""
    return identify(threads) | {"peaks": measure_peaks(threads, peaks_program)}


def identify(threads: int) -> dict[str, Any]:
    """Return the machine's name, and how much of it is used."""
    return {"cpu": cpu_name(), "threads": threads, "cpus": os.cpu_count()}


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
    return {"measured_by": program.name} | run_program(program, threads, "^peak_")


def gauge(threads: int, program: Path | None, peaks: dict[str, Any]) -> dict[str, float]:
    """Return the peaks that limits are made of as they are now, in less than a second.

    On a shared machine they change within minutes. `peaks`, from the start, names the integer loop
    that is worth running.
    """
    if program is None:
        return {"read_gb_s": numpy_read_gb_s(threads)}
    loops = {key.removesuffix("_gop_s"): peaks[key] for key in peaks if is_integer_loop(key)}
    names = "|".join(["read", *([max(loops, key=loops.__getitem__)] if loops else [])])
    found = run_program(program, threads, f"^peak_({names})/{threads}/", GAUGE_SECONDS)
    return {key: found[key] for key in LIMITING if key in found}


def run_program(
    program: Path, threads: int, names: str, min_seconds: float = 0.5
) -> dict[str, float]:
    """Run those of benchmarks/cpp's peaks whose names match, each for `min_seconds` at least."""
    done = subprocess.run(
        [
            str(program),
            f"--threads={threads}",
            f"--benchmark_filter={names}",
            f"--benchmark_min_time={min_seconds:g}",
            "--benchmark_format=json",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    return parse_peaks(json.loads(done.stdout))


def is_integer_loop(key: str) -> bool:
    """Tell whether a peak is that of a loop of int8 products."""
    return key.startswith(("vnni", "maddubs"))


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
    integer = [peaks[key] for key in peaks if is_integer_loop(key)]
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
