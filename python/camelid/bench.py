"""Measures the engine in llama-bench's terms: tokens per second of prompts and of answers.

Drives the engine step by step, sampling included, without queue or text. Must never print.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from camelid import _core

__all__ = ["Case", "Row", "cases", "measure"]

STEP_TOKENS = 512


@dataclass(frozen=True)
class Case:
    """One thing to measure: `n_prompt` tokens read, or `n_answer` generated, behind `depth` others.

    Exactly one of the two is positive.
    """

    n_prompt: int
    n_answer: int
    depth: int = 0  # tokens already in each sequence
    n_batch: int = 1  # sequences at once

    @property
    def name(self) -> str:
        """The name as llama-bench writes it: pp512, tg128 @ d4096."""
        text = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_answer}"
        text += f" @ d{self.depth}" if self.depth else ""
        return text + (f" @ b{self.n_batch}" if self.n_batch > 1 else "")

    @property
    def n_tokens(self) -> int:
        """Tokens one run is timed over."""
        return (self.n_prompt or self.n_answer) * self.n_batch

    @property
    def n_context(self) -> int:
        """Tokens each sequence holds at the end."""
        # An answer needs something to follow: one token where there is no depth.
        return self.depth + self.n_prompt if self.n_prompt else max(self.depth, 1) + self.n_answer


@dataclass
class Row:
    """The runs of one case."""

    case: Case
    tokens_per_second: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The middle run, which one slow run does not move."""
        return median(self.tokens_per_second)


def cases(
    n_prompts: list[int], n_answers: list[int], depths: list[int], batches: list[int]
) -> list[Case]:
    """Return every combination; a zero leaves its kind out, and prompts are read one at a time."""
    prompts = [Case(n, 0, depth) for n, depth in product(n_prompts, depths) if n > 0]
    answers = [
        Case(0, n, depth, batch) for n, depth, batch in product(n_answers, depths, batches) if n > 0
    ]
    return [*prompts, *answers]


def measure(
    core: _core.Engine,
    vocab_size: int,
    what: list[Case],
    *,
    repeats: int,
    progress: Callable[[], object] = lambda: None,
) -> Iterator[Row]:
    """Yield a row for each case, after one run of it that does not count."""
    for case in what:
        row = Row(case)
        for repeat in range(repeats + 1):
            seconds = _run(core, vocab_size, case)
            progress()
            if repeat > 0:
                row.tokens_per_second.append(case.n_tokens / seconds)
        yield row


def _run(core: _core.Engine, vocab_size: int, case: Case) -> float:
    """Return the seconds of one run."""
    from camelid import _core

    rng = np.random.default_rng(0)
    length = case.n_context - case.n_answer  # of what is read
    prompts = rng.integers(0, vocab_size, (case.n_batch, length), np.int32)
    sequences: list[int] = []
    try:
        greedy = _core.SamplerParams(temperature=0.0)
        while len(sequences) < case.n_batch:  # one by one: each that is open will be closed
            sequences.append(core.open_sequence(greedy))
        tokens = np.zeros(case.n_batch, np.int32)
        for place, sequence in enumerate(sequences):
            if case.depth or case.n_answer:
                before = prompts[place, : length - case.n_prompt]
                tokens[place] = _read(core, sequence, before)
        started = time.perf_counter()
        if case.n_prompt:
            _read(core, sequences[0], prompts[0, case.depth :])
        else:
            _write(core, sequences, tokens, case.n_answer)
        return time.perf_counter() - started
    finally:
        for sequence in sequences:
            core.close_sequence(sequence)


def _read(core: _core.Engine, sequence: int, tokens: NDArray[np.int32]) -> int:
    """Run a prompt in steps; return the token sampled after it."""
    sampled = -1
    for first in range(0, len(tokens), STEP_TOKENS):
        piece = tokens[first : first + STEP_TOKENS]
        last = first + len(piece) == len(tokens)
        result = core.step(
            np.array([sequence], np.int64),
            np.array([len(piece)], np.int32),
            np.ascontiguousarray(piece),
            np.array([1 if last else 0], np.uint8),
        )
        sampled = result.sampled[0].token
    return sampled


def _write(
    core: _core.Engine, sequences: list[int], tokens: NDArray[np.int32], n_steps: int
) -> None:
    """Generate `n_steps` tokens in every sequence at once."""
    each = np.array(sequences, np.int64)
    ones, outputs = np.ones(len(each), np.int32), np.ones(len(each), np.uint8)
    for _ in range(n_steps):
        result = core.step(each, ones, tokens, outputs)
        tokens = np.array([sampled.token for sampled in result.sampled], np.int32)
