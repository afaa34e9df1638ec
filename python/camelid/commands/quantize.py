"""`camelid quantize`: a smaller copy of a checkpoint."""

from __future__ import annotations

import argparse

from camelid.commands.common import shows_progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("source", help="folder of an unquantised checkpoint; only read")
    parser.add_argument("target", help="folder to create")
    parser.add_argument("--weights", default="int4", metavar="X", help="int4 (default) or int8")
    parser.add_argument(
        "--group-size",
        type=int,
        default=128,
        metavar="N",
        help="values that share a scale (default 128); 0: one scale for each row",
    )
    parser.add_argument(
        "--vision", action="store_true", help="quantise the vision tower too (default: leave it)"
    )
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="NAME",
        help="leave this module alone: a name, or re: and a pattern; may be repeated",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="(default: physical cores)")


def run(options: argparse.Namespace) -> int:
    """Write the copy."""
    from tqdm import tqdm

    from camelid.quantize import quantize
    from camelid.report import show_bytes

    with tqdm(
        desc="quantizing", unit="B", unit_scale=True, disable=not shows_progress(), leave=False
    ) as bar:

        def progress(done: int, total: int, name: str) -> None:
            bar.total = total
            bar.update(done - bar.n)

        result = quantize(
            options.source,
            options.target,
            weights=options.weights,
            group_size=options.group_size,
            vision=options.vision,
            ignore=options.ignore,
            progress=progress,
            threads=options.threads,
        )
    print(
        f"{result.folder}: {show_bytes(result.source_bytes)} became "
        f"{show_bytes(result.written_bytes)} in {result.n_shards} file(s); "
        f"{result.n_quantised} matrices are {options.weights}, {result.n_kept} as they were."
    )
    return 0
