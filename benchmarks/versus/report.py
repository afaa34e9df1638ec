"""What is made of the runs: medians, ratios, fractions of the machine's limits, and a table.

Works on the record that is written as JSON, so a table can be made again from a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

from versus.rows import Row, work_per_token


def runs_of(record: dict[str, Any], row: str, side: str) -> list[float]:
    """Return a side's tokens per second in a row, empty where it was not measured."""
    for found in record["rows"]:
        if (found["row"], found["side"]) == (row, side):
            return [] if found["failed"] else [float(speed) for speed in found["runs"]]
    return []


def ratio(ours: list[float], others: list[float]) -> float | None:
    """Return how many times as fast: of turns, where each side has as many runs."""
    if not ours or not others:
        return None
    if len(ours) == len(others):
        return median(a / b for a, b in zip(ours, others, strict=True))
    return median(ours) / median(others)


def limit_speed(record: dict[str, Any], row: str, kv_bytes: float) -> tuple[float, str] | None:
    """Return the tokens per second this machine's peaks allow, and which peak that is."""
    peaks = record["machine"]["peaks"]
    work = work_per_token(record["config"], Row(**record["row_sizes"][row]), kv_bytes)
    limits = []
    if "read_gb_s" in peaks:
        limits.append((peaks["read_gb_s"] * 1e9 / work.bytes_read, "reading"))
    if "int8_gop_s" in peaks:
        limits.append((peaks["int8_gop_s"] * 1e9 / work.operations, "int8 arithmetic"))
    # With the peak of one kind only, nothing can be said of a row that the other may bound.
    bound = min(limits, default=None)
    if bound is not None and "int8_gop_s" not in peaks and row_reads_prompt(record, row):
        return None
    return bound


def row_reads_prompt(record: dict[str, Any], row: str) -> bool:
    """Tell whether arithmetic bounds a row."""
    return bool(record["row_sizes"][row]["n_prompt"])


def row_names(record: dict[str, Any]) -> list[str]:
    """Return the rows in the order they were run."""
    return list(record["row_sizes"])


def ours(record: dict[str, Any]) -> list[str]:
    """Return the names of camelid's sides."""
    return [side["name"] for side in record["sides"] if side["is_camelid"]]


def peers(record: dict[str, Any]) -> list[str]:
    """Return the names of the other sides."""
    return [side["name"] for side in record["sides"] if not side["is_camelid"]]


def kv_bytes(record: dict[str, Any], side: str) -> float:
    """Return the bytes a side's cache takes per element."""
    return next(float(found["kv_bytes"]) for found in record["sides"] if found["name"] == side)


def ratio_table(record: dict[str, Any]) -> str:
    """Return a Markdown table: medians, camelid over each peer, and the fraction of the limit."""
    heads = ["row", "side", "tokens/s"]
    heads += [f"x {peer}" for peer in peers(record)] + ["of the limit", "bound by"]
    lines = [heads, ["---", "---"] + ["---:"] * (len(heads) - 3) + ["---"]]
    for row in row_names(record):
        lines += list(_row_lines(record, row))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row_lines(record: dict[str, Any], row: str) -> Iterator[list[str]]:
    for side in [*ours(record), *peers(record)]:
        runs = runs_of(record, row, side)
        if not runs:
            continue
        speed = median(runs)
        ratios = []
        for peer in peers(record):
            times = ratio(runs, runs_of(record, row, peer)) if side in ours(record) else None
            ratios.append("" if times is None else f"{times:.2f}")
        limit = limit_speed(record, row, kv_bytes(record, side))
        bound = [f"{speed / limit[0]:.0%}", limit[1]] if limit else ["", ""]
        yield [row, side, f"{speed:.2f}", *ratios, *bound]


def failures(record: dict[str, Any]) -> list[str]:
    """Return a sentence for each thing that was not measured."""
    return [
        f"{found['row']}, {found['side']}: {found['failed']}"
        for found in record["rows"]
        if found["failed"]
    ]


def markdown(record: dict[str, Any]) -> str:
    """Return the whole report."""
    machine, peaks = record["machine"], record["machine"]["peaks"]
    named = ", ".join(f"{k} {v:.1f}" for k, v in peaks.items() if isinstance(v, float))
    lines = [
        f"# {record['date']}: camelid {record['version']} against llama.cpp",
        "",
        f"{machine['cpu']}, {machine['threads']} threads. Peaks in the same run, by "
        f"{peaks['measured_by']}: {named}.",
        "",
        f"Model: {record['model']}. Both sides hold the same weights, number for number. Speeds "
        "are medians; ratios are medians of the ratios of turns, since what disturbs a turn of one "
        "side often disturbs the other's.",
        "",
        ratio_table(record),
        "",
        "The limit is the least any program must do for a token (each weight, key and value read "
        "once a step, each multiply and add done once) at the peaks above; INT4 weights with a "
        "scale for each 128, an INT8 head.",
        "Rows at a depth: camelid's runs follow each other where they add at most an eighth to it; "
        "llama.cpp starts each at the depth itself.",
        "",
        "| side | program |",
        "|---|---|",
        *(f"| {side['name']} | `{side['program']}` |" for side in record["sides"]),
        "",
    ]
    if failures(record):
        lines += ["Not measured:", "", *(f"- {text}" for text in failures(record)), ""]
    return "\n".join(lines)
