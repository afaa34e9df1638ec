"""What the smaller benchmarks have in common: their arguments, and results of a head and a table.

Must never know what was measured. camelid is imported where it is asked for: kernels of a GPU are
measured on machines that do not have it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tomllib
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
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
        "errors": {},
    }


@contextmanager
def kept_error(record: dict[str, Any], what: str) -> Iterator[None]:
    """Let what fails be told in a record, so that the rest is measured all the same."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        record["errors"][what] = f"{type(error).__name__}: {error}"


def exit_if_failed(record: dict[str, Any]) -> None:
    """Exit with 1 where kept_error() kept one."""
    if record["errors"]:
        sys.exit(f"[{record['benchmark']}] failed: {', '.join(record['errors'])}")


def failures(record: dict[str, Any]) -> str:
    """Return what failed as Markdown, "" where nothing did."""
    return "\n".join(f"- **{what} failed**: {' '.join(error.split())}"
                     for what, error in record.get("errors", {}).items())  # fmt: skip


def commit() -> str:
    """Return what of this repository was measured, "" where that is not known.

    CAMELID_COMMIT says it where the files are, but not git's own.
    """
    if told := os.environ.get("CAMELID_COMMIT"):
        return told
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
    """Write DATE-BENCHMARK-NOTE.json and .md; return their path without the ending."""
    path = new_path(record, folder, note)
    rewrite(record, markdown, path)
    return path


def new_path(record: dict[str, Any], folder: Path, note: str) -> Path:
    """Return where a result is to lie: DATE-BENCHMARK-NOTE, without the ending.

    Another result of that name stays; the later one gets a number.
    """
    whole = "-".join(filter(None, (record["date"], record["benchmark"].replace("_", "-"), note)))
    folder.mkdir(parents=True, exist_ok=True)
    name, number = whole, 1
    while (folder / f"{name}.json").exists() or (folder / f"{name}.md").exists():
        number += 1
        name = f"{whole}-{number}"
    return folder / name


def rewrite(record: dict[str, Any], markdown: str, path: Path) -> None:
    """Write a result over what was found before; whoever is killed meanwhile leaves the former."""
    for ending, text in ((".json", json.dumps(record, indent=1)), (".md", markdown)):
        unfinished = path.with_name(f"{path.name}{ending}.unfinished")
        unfinished.write_text(text + "\n", encoding="utf-8")
        unfinished.replace(path.with_name(path.name + ending))
