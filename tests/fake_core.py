"""An engine without a model: for the loop's logic, where what is sampled must be known beforehand.

Each sequence's next token is a function of all its tokens, so a test can tell the answer; every
promise the real engine asks of its caller is checked.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from camelid.engine import EngineLoop
from camelid.errors import Error
from camelid.options import SamplingParams
from camelid.request import Delta, GenerateRequest
from camelid.tokenizer import Tokenizer
from checkpoints import write_tokenizer

VOCAB = 271
PAGE = 16
PAGE_BYTES = 1000


@dataclass
class FakeSampled:
    token: int
    logprob: float = -0.5
    top: list[tuple[int, float]] = field(default_factory=list)
    not_finite: int = -1


@dataclass
class FakeResult:
    sampled: list[FakeSampled]
    logits: Any


def next_token(tokens: list[int]) -> int:
    """Return what the fake model says after `tokens`: a small letter."""
    return ord("a") + sum((i + 1) * token for i, token in enumerate(tokens)) % 26


class FakeCore:
    """Stands in for `_core.Engine`."""

    def __init__(self, *, n_pages: int = 64, max_step_tokens: int = 512) -> None:
        self.limit = n_pages * PAGE_BYTES
        self.max_step_tokens = max_step_tokens
        self.sequences: dict[int, list[int]] = {}
        self.steps: list[list[tuple[int, int, int]]] = []  # (sequence, tokens, output)
        self.says: Callable[[list[int]], int] = next_token
        # The token whose logit is not finite after a sequence ran these, or -1.
        self.bad_logit: Callable[[list[int]], int] = lambda tokens: -1
        self.before_step: Callable[[list[list[int]]], None] = lambda tokens: None
        self.on_open: Callable[[Any], None] = lambda params: None
        self._n_opened = 0

    def memory(self) -> dict[str, int]:
        used = sum(self.kv_bytes_for(len(tokens)) for tokens in self.sequences.values())
        return {"kv_limit_bytes": self.limit, "kv_used_bytes": used, "page_size": PAGE}

    def kv_bytes_for(self, n_tokens: int) -> int:
        return -(-n_tokens // PAGE) * PAGE_BYTES

    def kv_tokens_in(self, n_bytes: int) -> int:
        return n_bytes // PAGE_BYTES * PAGE

    def open_sequence(self, params: Any) -> int:
        self.on_open(params)
        self._n_opened += 1
        self.sequences[self._n_opened] = []
        return self._n_opened

    def close_sequence(self, sequence: int) -> None:
        del self.sequences[sequence]

    def step(self, sequences: Any, counts: Any, tokens: Any, outputs: Any) -> FakeResult:
        assert [a.dtype for a in (sequences, counts, tokens, outputs)] == [
            np.int64, np.int32, np.int32, np.uint8,
        ]  # fmt: skip
        assert len(set(sequences.tolist())) == len(sequences) == len(counts) == len(outputs) > 0
        assert counts.min() >= 1
        assert counts.sum() == len(tokens) <= self.max_step_tokens
        pieces = [list(map(int, piece)) for piece in np.split(tokens, np.cumsum(counts)[:-1])]
        self.before_step(pieces)
        self.steps.append(
            list(zip(sequences.tolist(), counts.tolist(), outputs.tolist(), strict=True))
        )
        result = FakeResult([], np.zeros((0, VOCAB), np.float32))
        rows = []
        for sequence, piece, output in zip(sequences.tolist(), pieces, outputs, strict=True):
            for token in piece:
                self.sequences[sequence].append(token)
                if output == 2:
                    rows.append(self.sequences[sequence][-1:] * VOCAB)
            said = self.says(self.sequences[sequence]) if output == 1 else -1
            result.sampled.append(FakeSampled(said, not_finite=self.bad_logit(piece)))
        assert self.memory()["kv_used_bytes"] <= self.limit, "the scheduler promised too much"
        if rows:
            result.logits = np.array(rows, np.float32)
        return result


class Harness:
    """A loop over a fake engine, and requests to it."""

    def __init__(self, folder: Path, core: FakeCore, **options: Any) -> None:
        write_tokenizer(folder)
        self.tokenizer = Tokenizer.from_folder(folder)
        self.core = core
        options = {"max_step_tokens": core.max_step_tokens, "to_sampler": lambda p: p} | options
        self.loop = EngineLoop(core, **options)  # type: ignore[arg-type]

    def request(
        self, prompt: str | list[int], *, max_tokens: int = 8, deliver: Any = None, **params: Any
    ) -> tuple[GenerateRequest, queue.SimpleQueue[Delta | Error]]:
        ids = list(prompt.encode()) if isinstance(prompt, str) else prompt
        events: queue.SimpleQueue[Delta | Error] = queue.SimpleQueue()
        request = GenerateRequest(
            np.array(ids, np.int32),
            SamplingParams(**params).resolve(),
            deliver or events.put,
            max_tokens=max_tokens,
            end_ids=self.tokenizer.eos_ids,
            tokenizer=self.tokenizer,
        )
        return request, events

    def start(self, prompt: str | list[int], **options: Any) -> Any:
        request, events = self.request(prompt, **options)
        self.loop.submit(request)
        return request, events

    def finish(self, events: queue.SimpleQueue[Delta | Error]) -> list[Delta | Error]:
        """Return all events of a request."""
        got = []
        while True:
            got.append(self.loop.wait(events))
            if isinstance(got[-1], Error) or got[-1].finish_reason:
                return got

    def expected(self, prompt: str, n_tokens: int) -> str:
        tokens = list(prompt.encode())
        for _ in range(n_tokens):
            tokens.append(next_token(tokens))
        return bytes(tokens[len(prompt.encode()) :]).decode()


def text_of(events: list[Delta | Error]) -> str:
    """Join the texts of deltas."""
    assert all(isinstance(event, Delta) for event in events), events
    return "".join(event.text for event in events if isinstance(event, Delta))


class Gate:
    """Holds the engine inside a step until opened."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()

    def __call__(self, tokens: list[list[int]]) -> None:
        self.reached.set()
        assert self.open.wait(30), "nobody opened the gate"
