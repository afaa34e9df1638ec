"""What the smaller benchmarks have in common: their arguments, and results of a head and a table.

Must never know what was measured. camelid is imported where it is asked for: kernels of a GPU are
measured on machines that do not have it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def arguments(description: str | None, argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    from camelid import _core

    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder of a checkpoint")
    parser.add_argument("-t", dest="threads", type=int, default=_core.default_threads())
    parser.add_argument("-r", dest="n_runs", type=int, default=5, help="runs of each (default 5)")
    add_note(parser)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    return parser.parse_args(argv)


def add_note(parser: argparse.ArgumentParser) -> None:
    """Let --note be part of a file's name: refused before anything is measured."""
    parser.add_argument("--note", type=note, default="", help="part of the result's name")


def note(text: str) -> str:
    if text == re.sub(r"[^A-Za-z0-9._-]", "", text):
        return text
    raise argparse.ArgumentTypeError(f"{text!r}: wanted are letters, digits and any of . _ -")


def head(benchmark: str, threads: int) -> dict[str, Any]:
    """Return what a record begins with."""
    import camelid
    from versus import machine

    return {
        "benchmark": benchmark,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "version": camelid.__version__,
        "machine": machine.identify(threads),
    }


def gpu_head(benchmark: str, machine: dict[str, Any]) -> dict[str, Any]:
    """Return what a record of a GPU begins with; needs no camelid."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {
        "benchmark": benchmark,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "version": project["version"],
        "commit": commit(),
        "driver": driver(),
        "machine": machine,
    }


def commit() -> str:
    """Return what of this repository was measured, "" where that is not known."""
    command = [
        "git",
        "-C",
        str(ROOT),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
        "--exclude=*",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def driver() -> str:
    """Return the version of NVIDIA's driver, "" where there is none."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return ""
    found = re.search(r"\d+\.\d+(\.\d+)?", text)
    return found[0] if found else ""


def software(record: dict[str, Any]) -> str:
    """Return what was measured, on which driver, by which CUDA, in a sentence."""
    runtime = record["machine"].get("cuda_runtime", 0)
    cuda = f"CUDA {runtime // 1000}.{runtime % 1000 // 10}" if runtime else "an unknown CUDA"
    return (f"Commit {record.get('commit') or 'unknown'}, driver "
            f"{record.get('driver') or 'unknown'}, {cuda}.")  # fmt: skip


def slug(name: str) -> str:
    """Return what of a name may stand in a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def table(lines: list[list[str]]) -> str:
    """Return a Markdown table; the first line names the columns, numbers from the second on."""
    rule = ["---"] + ["---:"] * (len(lines[0]) - 1)
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def write(record: dict[str, Any], markdown: str, folder: Path, note: str) -> Path:
    """Write DATE-BENCHMARK-NOTE.json and .md; return their path without the ending.

    Another result of that name stays; the later one gets a number.
    """
    whole = "-".join(filter(None, (record["date"], record["benchmark"].replace("_", "-"), note)))
    folder.mkdir(parents=True, exist_ok=True)
    name, number = whole, 1
    while (folder / f"{name}.json").exists() or (folder / f"{name}.md").exists():
        number += 1
        name = f"{whole}-{number}"
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(markdown + "\n", encoding="utf-8")
    return folder / name
