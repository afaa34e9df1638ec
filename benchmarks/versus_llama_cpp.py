"""Measure camelid against llama.cpp: the same weights, the same machine, taking turns.

    python benchmarks/versus_llama_cpp.py                      # builds llama.cpp, makes the model
    python benchmarks/versus_llama_cpp.py --rows pp512,tg64 --peer llama.cpp=PATH/llama-bench \\
        --peer ik=PATH/llama-bench --flags "ik=-rtr 1" --batched-flags "ik=-rtr"

The model is a slice of Scout: real layers, few of them, random weights (tools/make_slice.py).
Prints a table of ratios and writes it, with every run, to benchmarks/results. Never runs two
programs at the same time.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

import camelid
from camelid import _core
from versus import machine, peer, report
from versus.rows import Row, all_rows
from versus.sides import Camelid, NoAnswer, Peer

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "versus"
# Only for saying beforehand how long it will take; two cores of 2024 do about this.
ASSUMED_PROMPT_SPEED, ASSUMED_ANSWER_SPEED, ASSUMED_LOAD_SECONDS = 200.0, 40.0, 6.0
ASSUMED_GAUGE_SECONDS = 1.0
QUICK_ROWS = "pp512,tg64,d4096,b8,b32"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", default="all", help=f"of {','.join(all_rows(5))}; all, or quick: {QUICK_ROWS}"
    )
    parser.add_argument("-r", dest="n_runs", type=int, default=5, help="runs of each (default 5)")
    parser.add_argument("-t", dest="threads", type=int, default=_core.default_threads())
    parser.add_argument("--folder", type=Path, default=WORK / "scout4", help="made when absent")
    parser.add_argument("--gguf", type=Path, default=WORK / "scout4.gguf", help="the same model")
    for flag, text in (
        ("--peer", "NAME=PATH of a llama-bench, its llama-batched-bench beside it"),
        ("--flags", "NAME=flags for that peer's llama-bench"),
        ("--batched-flags", "NAME=flags for its llama-batched-bench"),
    ):
        parser.add_argument(flag, action="append", default=[], metavar="NAME=...", help=text)
    parser.add_argument(
        "--random-tokens", action="append", default=[], metavar="NAME",
        help="that peer's llama-batched-bench is patched to feed different tokens to its sequences",
    )  # fmt: skip
    parser.add_argument("--kv-cache", default="bf16,int8", help="camelid's; all but the first only "
                        "where there is a depth (default bf16,int8)")  # fmt: skip
    parser.add_argument("--camelid-flags", default="", help="more flags of `camelid bench`")
    built = next(iter(sorted((ROOT / "build").glob("**/camelid_benchmarks"))), None)
    parser.add_argument(
        "--peaks",
        type=Path,
        default=built,
        help="benchmarks/cpp's program (default: one in build/)",
    )
    parser.add_argument("--note", default="", help="part of the result's name")
    return parser.parse_args()


def chosen_rows(args: argparse.Namespace) -> list[Row]:
    known = all_rows(args.n_runs)
    text = {"all": ",".join(known), "quick": QUICK_ROWS}.get(args.rows, args.rows)
    unknown = [key for key in text.split(",") if key not in known]
    if unknown:
        sys.exit(f"[versus] --rows names {', '.join(unknown)}; there are {', '.join(known)}.")
    return [known[key] for key in text.split(",")]


def by_name(flag: str, items: list[str]) -> dict[str, str]:
    pairs = [item.partition("=") for item in items]
    for name, equals, value in pairs:
        if not (name and equals and value):
            sys.exit(f"[versus] {flag} {name}: expected NAME=VALUE, for example ik=PATH.")
    return {name: value for name, _, value in pairs}


def all_sides(args: argparse.Namespace) -> list[Camelid | Peer]:
    """Return camelid's sides first, then the peers; build the peer when none is named."""
    bytes_of = {"f32": 4.0, "bf16": 2.0, "int8": 1.0}
    sides: list[Camelid | Peer] = [
        Camelid(
            "camelid" if index == 0 else f"camelid, {kv} KV", args.folder, args.threads, kv,
            args.camelid_flags, only_deep=index > 0, kv_bytes=bytes_of.get(kv, 2.0),
        )
        for index, kv in enumerate(args.kv_cache.split(","))
    ]  # fmt: skip
    peers = by_name("--peer", args.peer) or {"llama.cpp": str(peer.build_llama_cpp(WORK))}
    flags = by_name("--flags", args.flags)
    batched = by_name("--batched-flags", args.batched_flags)
    for name in {*flags, *batched, *args.random_tokens} - {*peers}:
        sys.exit(f"[versus] flags are given for {name}, which no --peer names.")
    for name, path in peers.items():
        if not Path(path).exists():
            sys.exit(f"[versus] --peer {name}: {path} is not there.")
        has_depth = peer.has_depth(Path(path))
        sides.append(
            Peer(
                name, Path(path).resolve(), args.gguf, args.threads, has_depth,
                flags.get(name, ""), batched.get(name, ""),
                # Those without -d left llama.cpp before its batched bench drew tokens at random.
                batches_one_token=not has_depth and name not in args.random_tokens,
            )
        )  # fmt: skip
    return sides


def make_model(args: argparse.Namespace) -> dict[str, Any]:
    """Make the slice where it is absent; return its config."""
    if args.folder.exists() != args.gguf.exists():
        sys.exit(f"[versus] of {args.folder} and {args.gguf} one exists; remove it, or name both.")
    if not args.folder.exists():
        make = [sys.executable, str(ROOT / "tools" / "make_slice.py"), str(args.folder)]
        subprocess.run([*make, "--gguf", str(args.gguf)], check=True)
    config: dict[str, Any] = json.loads((args.folder / "config.json").read_text())
    return config


def expected_seconds(side: Camelid | Peer, row: Row) -> float:
    """Guess what one turn of one side takes."""
    n_runs = side.repeats(row) + 1
    answers = row.n_answer * (1 if row.n_batch == 1 else 3) * n_runs
    prompts = row.n_prompt * n_runs + row.depth * row.n_batch * side.readings(row)
    speeds = prompts / ASSUMED_PROMPT_SPEED + answers / ASSUMED_ANSWER_SPEED
    return ASSUMED_LOAD_SECONDS + ASSUMED_GAUGE_SECONDS + speeds


def run_turn(side: Camelid | Peer, row: Row) -> list[float]:
    """Run a side once; return tokens per second."""
    outputs = []
    scratch = tempfile.gettempdir()
    for command in side.commands(row):
        # Elsewhere, since some peers leave a log where they are started.
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=scratch)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            raise NoAnswer(last[0])
        outputs.append(done.stdout or done.stderr)  # ik's batched table is on the other one
    return side.speeds(row, outputs)


def measure(
    sides: list[Camelid | Peer], rows: list[Row], gauge: Callable[[], dict[str, float]]
) -> Iterator[list[dict[str, Any]]]:
    """Run everything; yield each row's results, one per side, when the row is done.

    `gauge` measures the machine between turns: once after each, which is before the next.
    """
    total = sum(
        expected_seconds(side, row) * row.n_turns
        for row in rows
        for side in sides
        if side.runs(row)
    )
    print(f"[versus] {len(rows)} rows, {len(sides)} sides: about {total / 60:.0f} minutes")
    before = gauge()
    with tqdm(total=round(total), unit="s", bar_format="{l_bar}{bar}| {elapsed} {desc}") as bar:
        for row in rows:
            taking_part = [side for side in sides if side.runs(row)]
            found = [new_result(row, side) for side in taking_part]
            for _ in range(row.n_turns):
                for side, result in zip(taking_part, found, strict=True):
                    bar.set_description(f"{row.name}, {side.name}")
                    if not result["failed"]:  # else it is not asked again
                        take_turn(side, row, result)
                        after = gauge()
                        result["peaks"].append({key: [before[key], after[key]] for key in before})
                        before = after
                    bar.update(round(expected_seconds(side, row)))
            shown = [f"{one['side']} {report_median(one)}" for one in found]
            tqdm.write(f"{row.name}: {', '.join(shown)}")
            yield found


def new_result(row: Row, side: Camelid | Peer) -> dict[str, Any]:
    return {
        "row": row.name,
        "side": side.name,
        "runs": [],
        "failed": None,
        "busy": [],  # of each turn, as the next
        "peaks": [],  # before and after
    }


def take_turn(side: Camelid | Peer, row: Row, result: dict[str, Any]) -> None:
    """Add a turn's runs, or why there are none."""
    started, cpu_started = time.monotonic(), children_seconds()
    try:
        result["runs"] += run_turn(side, row)
    except NoAnswer as error:
        result["failed"] = str(error)
        tqdm.write(f"[versus] {row.name}, {side.name}: {error}")
    # Processor seconds per second and thread, loading included: far less than in other turns means
    # that the machine did something else.
    wall = time.monotonic() - started
    result["busy"].append(round((children_seconds() - cpu_started) / wall / side.threads, 2))


def children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def report_median(result: dict[str, Any]) -> str:
    return f"{median(result['runs']):.2f}" if result["runs"] else "-"


def describe_side(side: Camelid | Peer) -> dict[str, Any]:
    if isinstance(side, Camelid):
        program = f"camelid bench --kv-cache {side.kv_cache} {side.flags}".strip()
    else:
        program = f"{side.bench.name} {side.flags}".strip()
    return {
        "name": side.name,
        "is_camelid": isinstance(side, Camelid),
        "program": program,
        "kv_bytes": side.kv_bytes,
    }


def main() -> None:
    args = arguments()
    args.folder, args.gguf = args.folder.resolve(), args.gguf.resolve()
    rows = chosen_rows(args)
    sides = all_sides(args)
    config = make_model(args)
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    shape = "Scout" if config["interleave_moe_layer_step"] == 1 else "Maverick"
    record: dict[str, Any] = {
        "benchmark": "versus_llama_cpp",
        "date": date,
        "version": camelid.__version__,
        "model": f"{config['num_hidden_layers']} layers of {shape}'s shape, "
        f"{config['num_local_experts']} experts, vocabulary {config['vocab_size']}",
        "config": config,
        "machine": machine.describe(args.threads, args.peaks),
        "sides": [describe_side(side) for side in sides],
        "row_sizes": {row.name: dataclasses.asdict(row) for row in rows},
        "rows": [],
    }
    name = f"{date}-versus-llama-cpp" + (f"-{args.note}" if args.note else "")
    folder = ROOT / "benchmarks" / "results"
    gauge = partial(machine.gauge, args.threads, args.peaks, record["machine"]["peaks"])
    for found in measure(sides, rows, gauge):
        record["rows"] += found
        # After each row: an hour's numbers survive what happens in the next.
        text = json.dumps(record, indent=1) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
        (folder / f"{name}.md").write_text(report.markdown(record), encoding="utf-8")
    print(report.ratio_table(record))
    for text in report.failures(record):
        print(f"not measured: {text}")
    print(f"[versus] wrote {folder / name}.json and .md")


if __name__ == "__main__":
    main()
