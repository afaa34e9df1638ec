"""What is made of the runs: medians, ratios, fractions of the machine's limits, and a table.

Works on the record that is written as JSON, so a table can be made again from a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean, median, mode
from typing import Any

from versus.rows import Row, work_per_token


def result_of(record: dict[str, Any], row: str, side: str) -> dict[str, Any]:
    """Return what a side gave in a row; runs are empty where it was not measured."""
    for found in record["rows"]:
        if (found["row"], found["side"]) == (row, side):
            return found | {"runs": []} if found["failed"] else dict(found)
    return {"runs": []}


def runs_of(record: dict[str, Any], row: str, side: str) -> list[float]:
    """Return a side's tokens per second in a row, empty where it was not measured."""
    return [float(speed) for speed in result_of(record, row, side)["runs"]]


def turns_of(
    record: dict[str, Any], row: str, side: str
) -> Iterator[tuple[list[float], dict[str, Any]]]:
    """Yield each turn's runs, and the peaks while it ran: the mean of before and after.

    Records from before there were peaks of turns are one turn at the peaks of the start.
    """
    runs, around = runs_of(record, row, side), result_of(record, row, side).get("peaks")
    if runs and not around:
        yield runs, record["machine"]["peaks"]
    elif runs and around:
        n_each = len(runs) // len(around)  # a side measures as many in each turn
        for turn, peaks in enumerate(around):
            mean = {key: fmean(both) for key, both in peaks.items()}
            yield runs[turn * n_each : (turn + 1) * n_each], mean


def turn_medians(record: dict[str, Any], row: str, side: str) -> list[float]:
    """Return the median of each turn's runs."""
    return [median(runs) for runs, _ in turns_of(record, row, side)]


def ratio(ours: list[float], others: list[float]) -> float | None:
    """Return how many times as fast: the median of the ratios of turns, by each turn's median.

    Sides that took different numbers of turns are compared by their medians over turns.
    """
    if not ours or not others:
        return None
    if len(ours) == len(others):
        return median(a / b for a, b in zip(ours, others, strict=True))
    return median(ours) / median(others)


def limit_speed(
    record: dict[str, Any], row: str, kv_bytes: float, peaks: dict[str, Any]
) -> tuple[float, str] | None:
    """Return the tokens per second that peaks allow, and which peak that is."""
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


def of_limit(record: dict[str, Any], row: str, side: str) -> tuple[float, str] | None:
    """Return the part of the limit a side reaches, and what bounds it; None where unknown.

    The median over turns, each held against the peaks measured around it. Unknown for several
    sequences: how many experts their tokens share is the router's affair.
    """
    if record["row_sizes"][row]["n_batch"] > 1:
        return None
    parts, bounds = [], []
    for runs, peaks in turns_of(record, row, side):
        limit = limit_speed(record, row, kv_bytes(record, side), peaks)
        if limit is None:
            return None
        parts.append(median(runs) / limit[0])
        bounds.append(limit[1])
    return (median(parts), mode(bounds)) if parts else None


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
        ratios = []
        for peer in peers(record):
            mine, theirs = (turn_medians(record, row, name) for name in (side, peer))
            times = ratio(mine, theirs) if side in ours(record) else None
            ratios.append("" if times is None else f"{times:.2f}")
        limit = of_limit(record, row, side)
        bound = [f"{limit[0]:.0%}", limit[1]] if limit else ["", ""]
        yield [row, side, f"{median(runs):.2f}", *ratios, *bound]


def failures(record: dict[str, Any]) -> list[str]:
    """Return a sentence for each thing that was not measured."""
    return [
        f"{found['row']}, {found['side']}: {found['failed']}"
        for found in record["rows"]
        if found["failed"]
    ]


def peak_ranges(record: dict[str, Any]) -> str:
    """Return the least and most of each peak measured between turns, "" in records without."""
    found: dict[str, list[float]] = {}
    for result in record["rows"]:
        for peaks in result.get("peaks", []):
            for key, both in peaks.items():
                found.setdefault(key, []).extend(both)
    return ", ".join(f"{key} {min(all_):.1f} to {max(all_):.1f}" for key, all_ in found.items())


def limit_text(record: dict[str, Any]) -> str:
    """Say what the limit is, and how its peaks were measured."""
    text = (
        "The limit is the least any program must do for a token (each weight, key and value read "
        "once a step, each multiply and add done once) at the machine's peaks; INT4 weights with a "
        "scale for each 128, an INT8 head. There is none for several sequences: how many experts "
        "their tokens share depends on the router. "
    )
    ranges = peak_ranges(record)
    if not ranges:
        return text + "The peaks are the ones above, of one moment."
    return text + (
        "The peaks are measured before and after every turn of a side, on all threads, and a turn "
        "is held against the mean of the two; the table shows the median over turns. Within this "
        f"run they were: {ranges}. Where they change during a turn, the mean misses it."
    )


def markdown(record: dict[str, Any]) -> str:
    """Return the whole report."""
    machine, peaks = record["machine"], record["machine"]["peaks"]
    named = ", ".join(f"{k} {v:.1f}" for k, v in peaks.items() if isinstance(v, float))
    lines = [
        f"# {record['date']}: camelid {record['version']} against llama.cpp",
        "",
        f"{machine['cpu']}, {machine['threads']} threads. Peaks at the start, by "
        f"{peaks['measured_by']}: {named}.",
        "",
        f"Model: {record['model']}. Both sides hold the same weights, number for number. Speeds "
        "are medians; ratios are medians of the ratios of turns, since what disturbs a turn of one "
        "side often disturbs the other's.",
        "",
        ratio_table(record),
        "",
        limit_text(record),
        "Rows at a depth: camelid's runs follow each other where they add at most an eighth to it; "
        "llama.cpp starts each at the depth itself, which it reads once; a llama-bench without -d "
        "reads it again for each run, and so measures fewer at the deepest.",
        "",
        "| side | program |",
        "|---|---|",
        *(f"| {side['name']} | `{side['program']}` |" for side in record["sides"]),
        "",
    ]
    if failures(record):
        lines += ["Not measured:", "", *(f"- {text}" for text in failures(record)), ""]
    return "\n".join(lines)
