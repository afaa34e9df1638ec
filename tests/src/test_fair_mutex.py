"""The engine's mutex (src/base/fair_mutex): whoever waits is next."""

from __future__ import annotations

from camelid._core import testing


def test_who_asks_again_at_once_comes_after_who_waits() -> None:
    # A busy machine may keep the other thread from waiting in time, now and then. With std::mutex
    # it hardly ever comes first.
    assert testing.turns_kept(n_rounds=50) >= 40
