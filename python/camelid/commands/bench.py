"""`camelid bench`: tokens per second, in llama-bench's language."""

from __future__ import annotations

import argparse
import json
from typing import Any

from camelid.bench import Case, Row, cases, measure
from camelid.commands.common import add_load_flags, load_options, shows_progress
from camelid.errors import InvalidRequest
from camelid.options import LoadOptions, parse_count
from camelid.report import show_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("model", help="folder of a checkpoint, or a hub id")
    for flag, name, default, text in (
        ("-p", "n_prompt", "512", "tokens of a prompt to read"),
        ("-n", "n_gen", "128", "tokens to generate"),
        ("-d", "depth", "0", "tokens already in the context"),
        ("-b", "batch", "1", "sequences that generate at once"),
    ):
        parser.add_argument(
            flag, dest=name, default=default, metavar="N,N", help=f"{text} (default {default})"
        )
    parser.add_argument("-t", dest="threads", type=int, metavar="N", help="as --threads")
    parser.add_argument(
        "-r", dest="repeats", type=int, default=5, metavar="N", help="runs of each (default 5)"
    )
    parser.add_argument(
        "-ub",
        dest="step_tokens",
        default="512",
        metavar="N",
        help="most tokens of a prompt in one step (default 512); GPUs like 2048 and more",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_load_flags(parser)


def run(options: argparse.Namespace) -> int:
    """Measure and print."""
    from tqdm import tqdm

    import camelid
    from camelid.checkpoint import Checkpoint
    from camelid.loading import find_folder, load

    if options.repeats < 1:
        raise InvalidRequest(f"[bench] -r is {options.repeats}, expected at least 1.")
    flags = {"-p": options.n_prompt, "-n": options.n_gen, "-d": options.depth, "-b": options.batch}
    numbers = [_numbers(flag, text) for flag, text in flags.items()]
    what = cases(*numbers)
    step_tokens = parse_count("-ub", options.step_tokens)
    wanted = LoadOptions.parse(**load_options(options))
    _check_cases(what, numbers[3], options.repeats + 1, wanted.max_context)
    with Checkpoint.open(find_folder(options.model)) as checkpoint:
        loaded = load(checkpoint, wanted, max_step_tokens=step_tokens, progress=shows_progress())
    _check_fit(loaded.core, what, options.repeats + 1)
    memory = loaded.core.memory()
    record = {
        "version": camelid.__version__,
        "model": str(options.model),
        "device": loaded.core.describe(),
        **vars(loaded.plan),
        "step_tokens": step_tokens,
        **{name: memory[name] for name in ("weight_bytes", "workspace_bytes", "kv_limit_bytes")},
    }
    total = len(what) * (options.repeats + 1)
    with tqdm(total=total, desc="measuring", disable=not shows_progress(), leave=False) as bar:
        rows = list(
            measure(
                loaded.core,
                loaded.config.vocab_size,
                what,
                repeats=options.repeats,
                step_tokens=step_tokens,
                feeds_back=loaded.core.describe().startswith("cuda"),
                progress=bar.update,
            )
        )
    if options.json:
        print(
            json.dumps(
                {**record, "rows": [_row_record(row, options.repeats + 1) for row in rows]},
                indent=2,
            )
        )
        return 0
    print(
        f"{record['model']}, {record['device']}, {record['compute']}, KV cache {record['kv_cache']}"
    )
    print(
        f"{show_bytes(memory['weight_bytes'])} of weights, "
        f"{show_bytes(memory['kv_limit_bytes'])} for keys and values"
    )
    print(f"{'test':<24}{'median tokens/s':>16}   runs")
    for row in rows:
        runs = " ".join(f"{speed:.2f}" for speed in row.tokens_per_second)
        print(f"{row.case.name:<24}{row.median:>16.2f}   {runs}")
    return 0


def _numbers(flag: str, text: str) -> list[int]:
    """Read a list of numbers, each once."""
    values = [item.strip() for item in text.split(",")]
    numbers = [0 if value == "0" else parse_count(flag, value) for value in values]
    return list(dict.fromkeys(numbers))


def _check_cases(
    what: list[Case], batches: list[int], n_runs: int, max_context: int | None
) -> None:
    """Refuse what cannot be measured before a model is loaded for it."""
    if 0 in batches:
        raise InvalidRequest("[bench] -b holds a 0, expected at least one sequence.")
    if not what:
        raise InvalidRequest("[bench] -p and -n are both 0: there is nothing to measure.")
    for case in what:
        if max_context is not None and case.n_context(n_runs) > max_context:
            raise InvalidRequest(
                f"[bench] {case.name} takes {case.n_context(n_runs)} tokens of context, "
                f"--max-context allows {max_context}."
            )


def _check_fit(core: Any, what: list[Case], n_runs: int) -> None:
    limit = core.memory()["kv_limit_bytes"]
    for case in what:
        needed = core.kv_bytes_for(case.n_context(n_runs)) * case.n_batch
        if needed > limit:
            raise InvalidRequest(
                f"[bench] {case.name} needs {needed} bytes of KV cache, {limit} exist. Choose a "
                "smaller -d or -b, or raise --memory."
            )


def _row_record(row: Row, n_runs: int) -> dict[str, Any]:
    return {
        "test": row.case.name,
        "n_prompt": row.case.n_prompt,
        "n_gen": row.case.n_answer,
        "depth": row.case.depth,
        "batch": row.case.n_batch,
        "runs_per_context": row.case.runs_per_context(n_runs),
        "tokens_per_second": row.tokens_per_second,
        "median": row.median,
    }
