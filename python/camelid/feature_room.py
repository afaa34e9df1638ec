"""How many features may wait for their turn: those who would exceed it wait before they encode.

Features of a prompt are held from its first tile until its tokens have run. Must never know what
they are, or the engine.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

__all__ = ["FeatureRoom", "Ticket"]

# How often who waits looks whether it still wants to; whoever leaves wakes it at once.
_LOOK_SECONDS = 0.2


class Ticket:
    """One prompt's part of the room, from `FeatureRoom.enter` until it leaves."""

    def __init__(self, room: FeatureRoom, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        self._room = room

    def leave(self) -> None:
        """Make room for others; harmless when done before, or never entered. Any thread may."""
        self._room.leave(self)


class FeatureRoom:
    """Lets prompts in, in order of arrival, while their bytes fit; an empty room takes any prompt.

    Args:
        limit_bytes: Most bytes of all prompts inside, but for one alone.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._changed = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._inside: set[Ticket] = set()

    @property
    def used_bytes(self) -> int:
        """Bytes of all prompts inside."""
        return sum(ticket.n_bytes for ticket in self._inside)

    def enter(self, ticket: Ticket, wants: Callable[[], bool]) -> bool:
        """Wait for room; False once `wants`, asked now and then, says it is not wanted any more."""
        with self._changed:
            self._waiting.append(ticket)
            try:
                while not self._has_room(ticket):
                    if not wants():
                        return False
                    self._changed.wait(_LOOK_SECONDS)
                self._inside.add(ticket)
                return True
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()

    def leave(self, ticket: Ticket) -> None:
        """Let go of a prompt's bytes, if it is inside."""
        with self._changed:
            self._inside.discard(ticket)
            self._changed.notify_all()

    def _has_room(self, ticket: Ticket) -> bool:
        # Who comes later may be smaller, but a large prompt would wait for ever behind small ones.
        if self._waiting[0] is not ticket:
            return False
        return not self._inside or self.used_bytes + ticket.n_bytes <= self.limit_bytes
