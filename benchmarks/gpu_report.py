"""Put what was measured on one GPU into one result, with what it should reach.

    python benchmarks/gpu_report.py build/gpu/results/records --out benchmarks/results

Reads the newest record of gpu_kernels, gpu_attention and gpu_step in a folder, as far as they are
there, and writes DATE-GPU.json and .md. Measures nothing; tools/gpu_check calls it at the end.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

import gpu_attention  # noqa: E402
import gpu_kernels  # noqa: E402
import gpu_step  # noqa: E402
import records  # noqa: E402

Record = dict[str, Any]
MARKDOWN: dict[str, Callable[[Record], str]] = {
    "gpu_step": gpu_step.markdown,
    "gpu_attention": lambda record: gpu_kernels.markdown(record, gpu_attention.NOTE),
    "gpu_kernels": lambda record: gpu_kernels.markdown(record, gpu_kernels.NOTE),
}
# Host time for which a step may leave the GPU waiting.
MOST_WAITED_US = 50


@dataclass(frozen=True)
class Bar:
    """What a row should reach of its limit, and what is hoped for."""

    what: str
    benchmark: str
    row: str  # its name begins so
    kv: str  # of steps; "": any
    least: float
    aim: float


BARS = (
    Bar("global decode attention, 67 MB of bf16 KV", "gpu_attention",
        "decode attention, 1 x 16384 keys, bf16", "", 0.88, 0.97),
    Bar("global decode attention, 69 MB of fp8 KV", "gpu_attention",
        "decode attention, 1 x 32768 keys, fp8", "", 0.80, 0.95),
    Bar("local decode attention at 8K, batch 1", "gpu_attention",
        "decode attention, 1 x 8192 keys, bf16", "", 0.50, 0.80),
    Bar("prefill attention, causal 16K, bf16", "gpu_attention",
        "prefill attention, causal, 16384 tokens, bf16", "", 0.65, 0.87),
    Bar("decode step, batch 1, 8K", "gpu_step", "decode, batch 1, 8192", "bf16", 0.60, 0.88),
    Bar("decode step, batch 64, 8K", "gpu_step", "decode, batch 64, 8192", "", 0.60, 0.85),
    Bar("prefill of 8K, 4096 a step", "gpu_step", "prefill, 8192 tokens, 4096", "", 0.60, 0.85),
)  # fmt: skip


def newest(folder: Path) -> dict[str, Record]:
    """Return the newest record of each benchmark in a folder, by name, of the last GPU alone."""
    found: dict[str, Record] = {}
    last = ""
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.get("benchmark") in MARKDOWN:
            found[record["benchmark"]] = record
            last = record["machine"]["gpu"]
    return {name: record for name, record in found.items() if record["machine"]["gpu"] == last}


def reached(record: Record, row: dict[str, Any]) -> float:
    """Return a row's limit over its median."""
    if record["benchmark"] == "gpu_step":
        return gpu_step.limit_ms(row["work"], record["peaks"]) / median(row["ms"])
    return gpu_kernels.limit_us(row, record["peaks"]) / median(row["us"])


def find(found: dict[str, Record], bar: Bar) -> float | None:
    """Return the best that rows of a bar reached, None where nothing measured it."""
    record = found.get(bar.benchmark)
    rows = [row for row in record["rows"] if row["name"].startswith(bar.row)
            and (not bar.kv or row["kv"] == bar.kv)] if record else []  # fmt: skip
    if record is None or not record["peaks"]["read_gb_s"]:
        return None
    return max((reached(record, row) for row in rows), default=None)


def waited_us(found: dict[str, Record]) -> float | None:
    """Return how long the GPU waits for the host in a step of one sequence, at best."""
    rows = found.get("gpu_step", {}).get("rows", [])
    waits = [1000 * (median(row["ms"]) - median(row["device_ms"]))
             for row in rows if row["name"].startswith("decode, batch 1")]  # fmt: skip
    return min(waits, default=None)


def bar_table(found: dict[str, Record]) -> str:
    """Return a Markdown table of what should be reached and what was."""
    lines = [["of its limit", "at least", "aim", "reached", ""]]
    for bar in BARS:
        value = find(found, bar)
        lines.append(
            [bar.what, f"{bar.least:.2f}", f"{bar.aim:.2f}",
             "not measured" if value is None else f"{value:.2f}", verdict(value, bar.least)]
        )  # fmt: skip
    waited = waited_us(found)
    lines.append(
        ["host time the GPU waits for, batch 1, us", f"< {MOST_WAITED_US}", "0",
         "not measured" if waited is None else f"{waited:.0f}",
         verdict(None if waited is None else -waited, -MOST_WAITED_US)]
    )  # fmt: skip
    return records.table(lines)


def verdict(value: float | None, least: float) -> str:
    return "" if value is None else "yes" if value >= least else "**no**"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the benchmarks wrote their results")
    records.add_note(parser)
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="folder of the result")
    args = parser.parse_args(argv)
    found = newest(args.folder)
    if not found:
        sys.exit(f"[gpu_report] {args.folder} holds no result of a GPU benchmark.")
    last = next(iter(found.values()))
    gpu = last["machine"]["gpu"]
    bars = bar_table(found)
    parts = [f"# {last['date']}: {gpu}, camelid {last['version']}", records.software(last), bars]
    parts += [f"#{make(found[name])}" for name, make in MARKDOWN.items() if name in found]
    keys = ("date", "version", "commit", "driver", "machine")
    record = {key: last[key] for key in keys if key in last}
    record |= {"benchmark": "", "records": found}
    note = "-".join(filter(None, (records.slug(gpu), args.note)))
    path = records.write(record, "\n\n".join(parts), args.out, note)
    print(bars)
    print(f"[gpu_report] wrote {path}.json and .md")


if __name__ == "__main__":
    main()
