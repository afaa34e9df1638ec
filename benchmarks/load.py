"""Measure loading a model beside copying its files: both from the page cache, taking turns.

    python benchmarks/load.py MODEL
    python benchmarks/load.py MODEL -t 2 -r 5 --note ours

Bytes of the checkpoint's safetensors files per second, by camelid.LLM in a fresh process each time;
by a copy into the same file system and into a file system in memory; and by as many threads
reading into fresh memory, the least that a loader with a copy of its own must do. Copies are
removed at once. Prints a table and writes it, with every run, to benchmarks/results.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

import records
from camelid import _core

SHM = Path("/dev/shm")
PIECE_BYTES = 16 << 20  # read at once: far more than a call costs, and threads finish together
# In a process of its own: memory a process has had before costs it less than fresh memory. Python's
# start and imports are not loading.
LOAD = """
import sys, time, camelid
started = time.perf_counter()
with camelid.LLM(sys.argv[1], device="cpu", threads=int(sys.argv[2])):
    print(time.perf_counter() - started)
"""


# ---- what is measured; each returns seconds ----
def load(model: Path, threads: int) -> float:
    command = [sys.executable, "-c", LOAD, str(model), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"[load] {model} does not load: {done.stderr.strip()[-400:]}")
    return float(done.stdout)


def copy(files: list[Path], parent: Path) -> float:
    """Copy the files as cp would, which does not wait for the disk either."""
    with tempfile.TemporaryDirectory(prefix="camelid-load-", dir=parent) as folder:
        started = time.perf_counter()
        for file in files:
            copy_file(file, Path(folder) / file.name)
        return time.perf_counter() - started


def copy_file(source: Path, target: Path) -> None:
    # Not shutil.copyfile: on some file systems newer ones may share the blocks and copy nothing.
    with source.open("rb") as reader, target.open("xb") as writer:
        left = os.fstat(reader.fileno()).st_size
        while left > 0:
            n = os.sendfile(writer.fileno(), reader.fileno(), None, left)
            if n == 0:
                sys.exit(f"[load] {source} became shorter while it was copied.")
            left -= n


def read(files: list[Path], threads: int) -> float:
    """Read the files into fresh memory, which NumPy asks to have on huge pages, as the engine."""
    started = time.perf_counter()
    memory = np.empty(bytes_of(files), np.uint8)
    place = 0
    with ThreadPoolExecutor(threads) as pool:
        for file in files:
            with file.open("rb", buffering=0) as reader:
                size = os.fstat(reader.fileno()).st_size
                piece = partial(read_piece, reader.fileno(), memory[place : place + size])
                list(pool.map(piece, range(0, size, PIECE_BYTES)))
            place += size
    return time.perf_counter() - started


def read_piece(file: int, whole: NDArray[np.uint8], first: int) -> None:
    """Fill bytes [first, first + PIECE_BYTES) of a file's memory."""
    end = min(first + PIECE_BYTES, len(whole))
    while first < end:
        n = os.preadv(file, [whole[first:end].data], first)
        if n == 0:
            sys.exit("[load] a file became shorter while it was read.")
        first += n


# ---- where there is room ----
def bytes_of(files: list[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def warm(files: list[Path]) -> None:
    """Bring the files into the page cache; before each run, since the one before may evict them."""
    buffer = bytearray(PIECE_BYTES)
    for file in files:
        with file.open("rb", buffering=0) as reader:
            while reader.readinto(buffer):
                pass


def folder_beside(files: list[Path]) -> Path:
    """Return a folder in the files' file system, outside the model where that is possible."""
    own = files[0].resolve().parent
    same = own.parent.stat().st_dev == own.stat().st_dev
    return own.parent if same and os.access(own.parent, os.W_OK) else own


def why_no_copy(parent: Path, n_bytes: int) -> str | None:
    """Return why no copy of so many bytes can be made in a folder, None if it can."""
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        return "its folder cannot be written"
    free = shutil.disk_usage(parent).free
    if free < n_bytes:
        return f"a copy needs {n_bytes:,} bytes, {free:,} are free"
    return why_no_memory(n_bytes)


def why_no_memory(n_bytes: int) -> str | None:
    """Return why so many bytes cannot lie in memory twice, cached and copied, None if they can."""
    there = _core.available_memory()
    if there < 2 * n_bytes:
        return f"cache and copy need {2 * n_bytes:,} bytes of memory, {there:,} are available"
    return None


def measure(model: Path, files: list[Path], threads: int, n_runs: int) -> list[dict[str, Any]]:
    """Run everything in turns; return for each what it is, its seconds, or why there are none."""
    n_bytes = bytes_of(files)
    beside = folder_beside(files)
    run: dict[str, tuple[str | None, Callable[[], float]]] = {
        "camelid.LLM": (None, partial(load, model, threads)),
        "copy, same file system": (why_no_copy(beside, n_bytes), partial(copy, files, beside)),
        "copy, file system in memory": (why_no_copy(SHM, n_bytes), partial(copy, files, SHM)),
        "read into fresh memory": (why_no_memory(n_bytes), partial(read, files, threads)),
    }
    found: list[dict[str, Any]] = [
        {"what": what, "seconds": [], "not_measured": why} for what, (why, _) in run.items()
    ]
    with tqdm(total=n_runs * len(run)) as bar:
        for _ in range(n_runs):
            for result in found:
                bar.set_description(result["what"])
                if not result["not_measured"]:
                    warm(files)
                    result["seconds"].append(run[result["what"]][1]())
                bar.update()
    return found


# ---- what is made of it ----
def speed_table(record: dict[str, Any]) -> str:
    """Return a Markdown table: GB/s, and loading's share of each speed, the median over turns."""
    lines = [["", "GB/s, median", "least", "most", "loading reaches"]]
    ours = record["rows"][0]["seconds"]
    for row in record["rows"]:
        seconds = row["seconds"]
        if seconds:
            speeds = [record["model"]["bytes"] / 1e9 / each for each in seconds]
            share = median(other / mine for mine, other in zip(ours, seconds, strict=True))
            shown = [f"{value:.2f}" for value in (median(speeds), min(speeds), max(speeds))]
            lines.append([row["what"], *shown, "" if row is record["rows"][0] else f"{share:.0%}"])
    return records.table(lines)


def markdown(record: dict[str, Any]) -> str:
    """Return the report."""
    machine, model = record["machine"], record["model"]
    n_turns = len(record["rows"][0]["seconds"])
    missing = [row for row in record["rows"] if row["not_measured"]]
    return "\n".join(
        [
            f"# {record['date']}: loading with camelid {record['version']}, beside copying",
            "",
            f"{machine['cpu']}, {machine['threads']} threads. {model['bytes'] / 1e9:.2f} GB in "
            f"{model['files']} files, in the page cache; {n_turns} turns, each of every row.",
            "",
            speed_table(record),
            "",
            "Loading is `camelid.LLM` in a fresh process, whose start and imports do not count. "
            "One thread copies, inside the kernel, and does not wait for the disk. As many threads "
            "as load read into fresh memory; they neither look at the bytes nor move them again. "
            "The last column is the median over turns.",
            *(f"Not measured: {row['what']}: {row['not_measured']}." for row in missing),
        ]
    )


def main(argv: list[str] | None = None) -> None:
    args = records.arguments(__doc__, argv)
    files = sorted(args.model.glob("*.safetensors"))
    if not files:
        sys.exit(f"[load] {args.model} holds no safetensors files.")
    model = {"files": len(files), "bytes": bytes_of(files)}
    rows = measure(args.model, files, args.threads, args.n_runs)
    record = records.head("load", args.threads) | {"model": model, "rows": rows}
    print(speed_table(record))
    print(
        f"[load] wrote {records.write(record, markdown(record), args.out, args.note)}.json and .md"
    )


if __name__ == "__main__":
    main()
