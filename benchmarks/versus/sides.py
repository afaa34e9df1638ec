"""Who is measured: the command line each side runs for a row, and how its answer is read.

Must never start anything.
"""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from versus.rows import Row

# Most tokens a side reads in a turn before what is measured. At 100 tokens a second, which slow
# sides do in a long context, these take a quarter of an hour.
MAX_DEPTH_TOKENS = 80_000


class NoAnswer(Exception):
    """A side printed something else than speeds."""


@dataclass(frozen=True)
class Camelid:
    """`camelid bench` with one kind of KV cache."""

    name: str
    model: Path
    threads: int
    kv_cache: str
    flags: str = ""
    only_deep: bool = False  # rows without a depth would say nothing new
    kv_bytes: float = 2.0

    def runs(self, row: Row) -> bool:
        """Tell whether this side measures a row."""
        return not self.only_deep or (row.depth > 16 and not row.n_prompt)

    def repeats(self, row: Row) -> int:
        """Return how many runs a turn measures."""
        return row.n_repeats

    def readings(self, row: Row) -> int:
        """Return how often a turn reads the depth."""
        # Answers follow each other behind one reading; prompts start anew, the first uncounted.
        return row.n_repeats + 1 if row.n_prompt else 1

    def commands(self, row: Row) -> list[list[str]]:
        """Return the command that measures a row once over."""
        sizes = {"-p": row.n_prompt, "-n": row.n_answer, "-d": row.depth, "-b": row.n_batch}
        sizes |= {"-r": self.repeats(row), "-t": self.threads}
        numbers = [text for flag, size in sizes.items() for text in (flag, str(size))]
        program = [sys.executable, "-m", "camelid", "bench", str(self.model)]
        flags = ["--kv-cache", self.kv_cache, *shlex.split(self.flags)]
        return [[*program, *numbers, "--json", *flags]]

    def speeds(self, row: Row, outputs: list[str]) -> list[float]:
        """Read tokens per second."""
        (found,) = parse_json(outputs[0])["rows"]
        if found["test"] != row.name:
            raise NoAnswer(f"camelid measured {found['test']} instead of {row.name}")
        return [float(speed) for speed in found["tokens_per_second"]]


@dataclass(frozen=True)
class Peer:
    """llama-bench, and llama-batched-bench beside it, of llama.cpp or a descendant of it."""

    name: str
    bench: Path
    model: Path  # GGUF
    threads: int
    has_depth: bool = True  # llama-bench -d; ik_llama.cpp has -gp instead
    flags: str = ""  # for llama-bench
    batched_flags: str = ""  # for llama-batched-bench, whose flags are spelled differently
    # ik_llama.cpp's llama-batched-bench feeds token 0 to all sequences, so that one expert of each
    # layer works for all of them; llama.cpp's and ours feed different ones.
    batches_one_token: bool = False
    kv_bytes: float = 2.0

    def runs(self, row: Row) -> bool:
        """Tell whether this side measures a row."""
        return True

    def repeats(self, row: Row) -> int:
        """Return how many runs a turn measures: fewer where each would read a long depth again."""
        if self.has_depth or not row.depth:
            return row.n_repeats
        return max(1, min(row.n_repeats, MAX_DEPTH_TOKENS // row.depth))

    def readings(self, row: Row) -> int:
        """Return how often a turn reads the depth."""
        # llama.cpp's -d reads it once: llama-bench keeps the state there and restores it for the
        # later runs (struct ctx_state, in the version peer.py names). ik_llama.cpp's -gp clears the
        # cache and reads it again for every run.
        return 1 if self.has_depth else self.repeats(row)

    def commands(self, row: Row) -> list[list[str]]:
        """Return the commands that measure a row once over."""
        if row.n_batch > 1 and self.batches_one_token:
            raise NoAnswer("its llama-batched-bench feeds one token to all sequences: one expert")
        if row.n_batch > 1:
            return [self._batched(row)]
        if row.n_prompt and row.depth and not self.has_depth:
            # The second part of a prompt is the whole less the first part.
            return [
                self._bench(row, "-p", row.depth + row.n_prompt),
                self._bench(row, "-p", row.depth),
            ]
        if row.n_prompt:
            depth = ["-d", row.depth] if row.depth else []
            return [self._bench(row, "-p", row.n_prompt, "-n", 0, *depth)]
        if row.depth and not self.has_depth:
            return [self._bench(row, "-p", 0, "-n", 0, "-gp", f"{row.depth},{row.n_answer}")]
        depth = ["-d", row.depth] if row.depth else []
        return [self._bench(row, "-p", 0, "-n", row.n_answer, *depth)]

    def _bench(self, row: Row, *numbers: Any) -> list[str]:
        sizes = [*map(str, numbers), "-r", str(self.repeats(row)), "-t", str(self.threads)]
        if "-n" not in sizes:
            sizes += ["-n", "0"]
        return [
            str(self.bench),
            "-m",
            str(self.model),
            *sizes,
            "-o",
            "json",
            *shlex.split(self.flags),
        ]

    def _batched(self, row: Row) -> list[str]:
        program = self.bench.with_name("llama-batched-bench")
        # Room for as many sequences as there are, and for the whole of each.
        room = row.n_batch * (row.depth + row.n_answer)
        sizes = {
            "-npp": row.depth, "-ntg": row.n_answer, "-npl": row.n_batch,
            "-c": -(-room // 256) * 256, "-t": self.threads,
        }  # fmt: skip
        numbers = [text for flag, size in sizes.items() for text in (flag, str(size))]
        return [str(program), "-m", str(self.model), *numbers, *shlex.split(self.batched_flags)]

    def speeds(self, row: Row, outputs: list[str]) -> list[float]:
        """Read tokens per second."""
        if row.n_batch > 1:
            return [batched_speed(outputs[0], row)]
        found = [parse_json(output)[-1] for output in outputs]
        if len(found) == 2:
            times = zip(found[0]["samples_ns"], found[1]["samples_ns"], strict=True)
            return [row.n_prompt * 1e9 / (whole - first) for whole, first in times]
        return [float(speed) for speed in found[0]["samples_ts"]]


def parse_json(output: str) -> Any:
    """Read what a program printed to standard output."""
    try:
        return json.loads(output)
    except ValueError as error:
        raise NoAnswer(f"not JSON: {output[:200]!r}") from error


def batched_speed(output: str, row: Row) -> float:
    """Read the generation speed out of llama-batched-bench's table."""
    lines = [line for line in output.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    heads = next((line for line in cells if "S_TG t/s" in line), None)
    if heads is None:
        raise NoAnswer(f"no table: {output[:200]!r}")
    wanted = {"PP": str(row.depth), "TG": str(row.n_answer), "B": str(row.n_batch)}
    for line in cells:
        found = dict(zip(heads, line, strict=True))
        if all(found[head] == value for head, value in wanted.items()):
            return float(found["S_TG t/s"])
    raise NoAnswer(f"no row {row.name}: {output[:200]!r}")
