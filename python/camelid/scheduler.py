"""Who runs next: pure arithmetic over tokens and reserved bytes.

Running sequences that generate come first, one token each; what is left of the step's budget goes
to prompts, oldest first. A request is admitted, in order of arrival, when the KV bytes it may ever
need fit beside those of the running ones, so nothing that runs is ever stopped for lack of memory.
Must never know the engine, a clock, a thread or a token's value.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

__all__ = ["Scheduler", "Turn"]


@dataclass
class _Item:
    """One request: tokens of its prompt still to run (0: it generates), and its reservation."""

    key: int
    n_left: int
    reserved_bytes: int
    step_tokens: int | None  # most in one step


@dataclass(frozen=True)
class Turn:
    """Run the next `n_tokens` of request `key`."""

    key: int
    n_tokens: int


class Scheduler:
    """Admits requests and fills steps.

    Args:
        limit_bytes: KV bytes that all running requests may reserve together.
        max_step_tokens: Most tokens of all requests in one step.
        max_running: Most requests that run at once; never more than `max_step_tokens`.
    """

    def __init__(
        self, *, limit_bytes: int, max_step_tokens: int = 512, max_running: int = 64
    ) -> None:
        if max_step_tokens < 1 or max_running < 1:
            raise ValueError("a step holds at least one token and one request")
        self._limit_bytes = limit_bytes
        self._max_step_tokens = max_step_tokens
        # With one token each for all that run, no step is too small and no prompt starves.
        self._max_running = min(max_running, max_step_tokens)
        self._waiting: OrderedDict[int, _Item] = OrderedDict()  # in order of arrival
        self._running: dict[int, _Item] = {}  # in order of admission
        self._reserved_bytes = 0

    @property
    def n_waiting(self) -> int:
        """Requests not yet admitted."""
        return len(self._waiting)

    @property
    def n_running(self) -> int:
        """Requests admitted and not removed."""
        return len(self._running)

    @property
    def reserved_bytes(self) -> int:
        """KV bytes reserved by the running requests."""
        return self._reserved_bytes

    def add(
        self, key: int, n_tokens: int, *, reserved_bytes: int, step_tokens: int | None = None
    ) -> None:
        """Queue a request with a prompt of `n_tokens`.

        Raises:
            ValueError: If it could never run: no tokens, or more bytes than there are.
        """
        if n_tokens < 1 or not 0 <= reserved_bytes <= self._limit_bytes:
            raise ValueError(f"{n_tokens} tokens and {reserved_bytes} bytes can never run")
        self._waiting[key] = _Item(key, n_tokens, reserved_bytes, step_tokens)

    def remove(self, key: int) -> None:
        """Forget a request, waiting or running; its reservation is free again."""
        item = self._running.pop(key, None)
        if item is not None:
            self._reserved_bytes -= item.reserved_bytes
        else:
            self._waiting.pop(key, None)

    def next_step(self) -> list[Turn]:
        """Admit what fits and return the turns of one step; none when nothing is to be run.

        The turns count as run: the next call goes on behind them.
        """
        self._admit()
        budget = self._max_step_tokens
        turns = [Turn(item.key, 1) for item in self._running.values() if item.n_left == 0]
        budget -= len(turns)
        for item in self._running.values():
            if budget == 0:
                break
            if item.n_left == 0:
                continue
            n_tokens = min(item.n_left, budget, item.step_tokens or budget)
            turns.append(Turn(item.key, n_tokens))
            budget -= n_tokens
        for turn in turns:
            item = self._running[turn.key]
            item.n_left = max(item.n_left - turn.n_tokens, 0)
        return turns

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_running:
            item = next(iter(self._waiting.values()))
            if self._reserved_bytes + item.reserved_bytes > self._limit_bytes:
                return  # those behind it wait too, or a large request might never run
            self._running[item.key] = self._waiting.pop(item.key)
            self._reserved_bytes += item.reserved_bytes
