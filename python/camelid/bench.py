"""Measures the engine in llama-bench's terms: tokens per second of prompts and of answers.

Drives the engine step by step, sampling included, without queue or text. Must never print.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from camelid import _core

__all__ = ["Case", "Row", "cases", "measure"]


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

    def runs_per_context(self, n_runs: int) -> int:
        """Return how many of `n_runs` answers follow each other behind one reading of the depth.

        All of them where they add at most an eighth to it: reading tens of thousands of tokens
        again for every run would take minutes. Else one. Prompts always start anew.
        """
        return n_runs if self.n_answer * n_runs * 8 <= self.depth and self.n_answer else 1

    def n_context(self, n_runs: int) -> int:
        """Return the tokens each sequence holds at the end of a measurement of `n_runs` runs."""
        # An answer needs something to follow: one token where there is no depth.
        before = self.depth if self.n_prompt else max(self.depth, 1)
        return before + self.n_prompt + self.n_answer * self.runs_per_context(n_runs)


@dataclass
class Row:
    """The runs of one case."""

    case: Case
    tokens_per_second: list[float]

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
    step_tokens: int = 512,
    feeds_back: bool = False,
    progress: Callable[[], object] = lambda: None,
) -> Iterator[Row]:
    """Yield a row for each case, after one run of it that does not count.

    Args:
        core: A loaded engine.
        vocab_size: Of its model.
        what: What to measure.
        repeats: Runs of each case.
        step_tokens: Most tokens of a prompt in one step.
        feeds_back: Whether answers go on with what was sampled, which a GPU starts before it is
            asked to. Else with random tokens, which cost no sampling.
        progress: Called after each run.
    """
    for case in what:
        seconds: list[float] = []
        while len(seconds) <= repeats:
            with _context(core, vocab_size, case, step_tokens, feeds_back) as context:
                for _ in range(case.runs_per_context(repeats + 1)):
                    seconds.append(context.run())
                    progress()
        yield Row(case, [case.n_tokens / each for each in seconds[1:]])


@dataclass
class _Context:
    """Open sequences that hold the case's depth, and what comes next in each."""

    core: _core.Engine
    case: Case
    sequences: list[int]
    prompt: NDArray[np.int32]  # [n_prompt]
    answer: NDArray[np.int32]  # [n_answer, n_batch]
    step_tokens: int
    feeds_back: bool

    def run(self) -> float:
        """Return the seconds of one run."""
        started = time.perf_counter()
        if self.case.n_prompt:
            _read(self.core, self.sequences[0], self.prompt, self.step_tokens)
        else:
            self._write()
        return time.perf_counter() - started

    def _write(self) -> None:
        """Run one step for each row of the answer, sampling as if it mattered.

        The likeliest token is never fed back: a model of random weights soon says the same in every
        sequence, and all would go to one expert.
        """
        each = np.array(self.sequences, np.int64)
        ones, outputs = np.ones(len(each), np.int32), np.ones(len(each), np.uint8)
        for row in self.answer:
            tokens = self.answer[0] if self.feeds_back else row
            result = self.core.step(each, ones, tokens, outputs)
            if self.feeds_back:  # also to the next run
                self.answer[0] = [sampled.token for sampled in result.sampled]


@contextmanager
def _context(
    core: _core.Engine, vocab_size: int, case: Case, step_tokens: int, feeds_back: bool
) -> Iterator[_Context]:
    """Open the sequences of a case and read what comes before the measured part."""
    from camelid import _core

    rng = np.random.default_rng(0)
    n_before = case.n_context(1) - case.n_prompt - case.n_answer
    before = rng.integers(0, vocab_size, (case.n_batch, n_before), np.int32)
    context = _Context(
        core,
        case,
        sequences=[],
        prompt=rng.integers(0, vocab_size, case.n_prompt, np.int32),
        answer=rng.integers(0, vocab_size, (case.n_answer, case.n_batch), np.int32),
        step_tokens=step_tokens,
        feeds_back=feeds_back,
    )
    try:
        for place in range(case.n_batch):  # one by one: each that is open will be closed
            params = _core.SamplerParams(temperature=0.0)
            if feeds_back:  # of so many that sequences differ, and not more than a GPU looks at
                params = _core.SamplerParams(temperature=1.0, top_k=100, seed=place)
            context.sequences.append(core.open_sequence(params))
            if n_before:
                _read(core, context.sequences[place], before[place], step_tokens)
        yield context
    finally:
        for sequence in context.sequences:
            core.close_sequence(sequence)


def _read(core: _core.Engine, sequence: int, tokens: NDArray[np.int32], step_tokens: int) -> None:
    """Run a prompt in steps, sampling after its last token."""
    for first in range(0, len(tokens), step_tokens):
        piece = tokens[first : first + step_tokens]
        last = first + len(piece) == len(tokens)
        core.step(
            np.array([sequence], np.int64),
            np.array([len(piece)], np.int32),
            np.ascontiguousarray(piece),
            np.array([1 if last else 0], np.uint8),
        )
