"""`camelid inspect`: what a model weighs and how much context fits, from its headers alone."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from camelid.commands.common import paint
from camelid.options import LoadOptions

if TYPE_CHECKING:
    from camelid.plan import LoadPlan
    from camelid.report import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("model", help="folder of a checkpoint, or a hub id")
    parser.add_argument(
        "--memory", metavar="X", help="such as 64GiB (default: what this machine has to spare)"
    )
    parser.add_argument(
        "--weights", default="auto", metavar="X", help="auto (as stored), bf16, int8 or int4"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Print the report."""
    from camelid.checkpoint import Checkpoint, account
    from camelid.loading import find_folder
    from camelid.plan import make_plan
    from camelid.report import inspect

    wanted = LoadOptions.parse(memory=options.memory, weights=options.weights)
    with Checkpoint.open(find_folder(options.model)) as checkpoint:
        account(checkpoint)
        plan = make_plan(checkpoint, wanted)
        report = inspect(checkpoint, weights=plan.weights, head=plan.head)
    memory_bytes = _available() if wanted.memory is None else wanted.memory
    record = _record(report, plan, memory_bytes)
    print(json.dumps(record, indent=2) if options.json else _table(report, record))
    return 0


def _available() -> int:
    from camelid import _core

    return _core.available_memory()


def _record(report: Report, plan: LoadPlan, memory_bytes: int) -> dict[str, Any]:
    left = max(memory_bytes - report.loaded_bytes, 0)
    longest = report.config["max_position_embeddings"]
    return {
        "folder": report.folder,
        "architecture": report.architecture,
        "stored_as": report.stored_as,
        "plan": vars(plan),
        "config": report.config,
        "n_parameters": report.n_parameters,
        "active_parameters": report.active_parameters,
        "stored_bytes": report.stored_bytes,
        "loaded_bytes": report.loaded_bytes,
        "parts": {name: vars(part) for name, part in report.parts.items() if part.n_parameters},
        "memory_bytes": memory_bytes,
        "fits": report.loaded_bytes <= memory_bytes,
        "kv_cache": {
            name: {
                "bytes_per_token": kv.bytes_per_token,
                "chunk_bytes": kv.chunk_bytes,
                "chunk_tokens": kv.chunk_tokens,
                "context_tokens": min(kv.tokens_in(left), longest),
            }
            for name, kv in report.kv.items()
        },
    }


def _table(report: Report, record: dict[str, Any]) -> str:
    from camelid.report import show_bytes

    config = report.config
    lines = [
        paint(report.folder, "1"),
        f"{report.architecture}, stored as {report.stored_as}",
        f"{config['n_layers']} layers, {config['n_moe_layers']} of them with {config['n_experts']} "
        f"experts (top {config['top_k']}), width {config['dim']}, {config['n_heads']} heads over "
        f"{config['n_kv_heads']} KV heads of {config['head_dim']}, vocabulary "
        f"{config['vocab_size']:,}",
        f"{_count(report.n_parameters)} parameters, {_count(report.active_parameters)} active for "
        "each token",
        "",
        f"{'':15}{'parameters':>12}{'in the file':>14}{'in memory':>14}",
    ]
    for name, part in report.parts.items():
        if part.n_parameters:
            sizes = (show_bytes(part.stored_bytes), show_bytes(part.loaded_bytes))
            lines.append(f"{name:15}{_count(part.n_parameters):>12}{sizes[0]:>14}{sizes[1]:>14}")
    totals = (show_bytes(report.stored_bytes), show_bytes(report.loaded_bytes))
    lines += [f"{'all':15}{_count(report.n_parameters):>12}{totals[0]:>14}{totals[1]:>14}", ""]
    n_growing = config["n_growing_layers"]
    for name, kv in report.kv.items():
        text = f"KV cache {name}: {show_bytes(kv.bytes_per_token)} a token in {n_growing} layers"
        if kv.chunk_tokens:
            text += (
                f", and {show_bytes(kv.chunk_bytes)} at most in the other "
                f"{config['n_layers'] - n_growing} (a chunk of {kv.chunk_tokens:,} tokens)"
            )
        lines.append(text)
    lines.append(_fit(record))
    return "\n".join(lines)


def _fit(record: dict[str, Any]) -> str:
    from camelid.report import show_bytes

    memory = show_bytes(record["memory_bytes"])
    if not record["fits"]:
        return f"In {memory} the weights do not fit; try --weights int4."
    contexts = " or ".join(
        f"{kv['context_tokens']:,} tokens ({name})" for name, kv in record["kv_cache"].items()
    )
    return f"In {memory} fit the weights and a context of about {contexts}."


def _count(value: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return str(value)
