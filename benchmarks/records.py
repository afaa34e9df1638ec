"""What the smaller benchmarks have in common: their arguments, and results of a head and a table.

Must never know what was measured. camelid is imported where it is asked for: kernels of a GPU are
measured on machines that do not have it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
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
    parser.add_argument("--note", default="", help="part of the result's name")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    return parser.parse_args(argv)


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
        "machine": machine,
    }


def slug(name: str) -> str:
    """Return what of a name may stand in a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def table(lines: list[list[str]]) -> str:
    """Return a Markdown table; the first line names the columns, numbers from the second on."""
    rule = ["---"] + ["---:"] * (len(lines[0]) - 1)
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def write(record: dict[str, Any], markdown: str, folder: Path, note: str) -> Path:
    """Write DATE-BENCHMARK-NOTE.json and .md; return their path without the ending."""
    name = "-".join(filter(None, (record["date"], record["benchmark"].replace("_", "-"), note)))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(markdown + "\n", encoding="utf-8")
    return folder / name
