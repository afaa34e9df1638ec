"""Draw what versus_llama_cpp.py wrote: how near each side comes to the limit, and speed at depth.

    python benchmarks/plot.py benchmarks/results/2026-11-24-versus-llama-cpp.json

Writes FILE-limit.png and FILE-depth.png beside it, or into --out. Needs matplotlib, which nothing
else here does.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

from versus import report

mpl.use("Agg")
OURS, THEIRS = ("#b4530a", "#e39a4f", "#f2c893"), ("#4a5a6a", "#8b9bab", "#c0cad4")


def colours(record: dict[str, Any]) -> dict[str, str]:
    """Warm ones for camelid, grey ones for the peers."""
    ours = {name: OURS[i % 3] for i, name in enumerate(report.ours(record))}
    return ours | {name: THEIRS[i % 3] for i, name in enumerate(report.peers(record))}


def fraction(record: dict[str, Any], row: str, side: str) -> float | None:
    """Return the part of the limit a side reaches in a row, None where either is not known."""
    found = report.of_limit(record, row, side)
    return found[0] if found else None


def draw_limits(record: dict[str, Any], path: Path) -> None:
    """Draw bars: rows across, sides side by side."""
    rows = [
        row
        for row in report.row_names(record)
        if any(fraction(record, row, side) is not None for side in colours(record))
    ]
    figure, axes = plt.subplots(figsize=(max(6.0, 1.3 * len(rows) + 2), 4))
    width = 0.8 / len(colours(record))
    for place, (side, colour) in enumerate(colours(record).items()):
        parts = [fraction(record, row, side) for row in rows]
        there = [(x, part) for x, part in enumerate(parts) if part is not None]
        if there:
            left = [x - 0.4 + (place + 0.5) * width for x, _ in there]
            axes.bar(left, [part for _, part in there], width, label=side, color=colour)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(rows)), [row.replace(" @ ", "\n") for row in rows])
    axes.set_ylabel("fraction of this machine's limit")
    finish(figure, axes, record, path)


def draw_depths(record: dict[str, Any], path: Path) -> None:
    """Draw tokens per second of one sequence against the tokens it holds."""
    figure, axes = plt.subplots(figsize=(6, 4))
    sizes = record["row_sizes"]
    rows = [row for row in sizes if not sizes[row]["n_prompt"] and sizes[row]["n_batch"] == 1]
    for side, colour in colours(record).items():
        points = sorted(
            (sizes[row]["depth"], median(report.runs_of(record, row, side)))
            for row in rows
            if report.runs_of(record, row, side)
        )
        if points:
            style = "-o" if side in report.ours(record) else "--o"
            axes.plot(*zip(*points, strict=True), style, label=side, color=colour)
    axes.set_xlabel("tokens in the context")
    axes.set_ylabel("tokens per second")
    axes.set_ylim(bottom=0)
    finish(figure, axes, record, path)


def finish(figure: Any, axes: Any, record: dict[str, Any], path: Path) -> None:
    """Add what every picture has, and write it."""
    machine = record["machine"]
    axes.set_title(
        f"{record['model']}\n{machine['cpu']}, {machine['threads']} threads, {record['date']}",
        fontsize=9,
    )
    axes.spines[["top", "right"]].set_visible(False)
    # Below the axes, where no bar or line can be.
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "ncols": 4}
    axes.legend(frameon=False, fontsize=8, **below)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="JSON of versus_llama_cpp.py")
    parser.add_argument("--out", type=Path, help="folder of the pictures (default: beside it)")
    args = parser.parse_args()
    record = json.loads(args.results.read_text(encoding="utf-8"))
    folder = args.out or args.results.parent
    folder.mkdir(parents=True, exist_ok=True)
    draw_limits(record, folder / f"{args.results.stem}-limit.png")
    draw_depths(record, folder / f"{args.results.stem}-depth.png")


if __name__ == "__main__":
    main()
