"""The bars that calls on a model show on stderr when asked to.

Must never know what it is that takes its time.
"""

from __future__ import annotations

from typing import Any

__all__ = ["images_bar", "prefill_bar", "prompts_bar", "show"]

# Nothing to see at first: these bars appear when somebody has waited, in seconds.
_DELAY = 1


def prompts_bar(n_prompts: int, progress: bool) -> Any:
    """Return a bar of prompts that are answered."""
    from tqdm import tqdm

    return tqdm(total=n_prompts, desc="generating", unit="prompt", disable=not progress)


def prefill_bar(n_tokens: int, progress: bool) -> Any:
    """Return a bar of a prompt's tokens that have run."""
    return _late_bar(n_tokens, "prefill", "tok", progress)


def images_bar(n_tiles: int, progress: bool) -> Any:
    """Return a bar of tiles that are encoded."""
    return _late_bar(n_tiles, "images", "tile", progress)


def show(bar: Any, n: int) -> None:
    """Let a bar stand at `n`."""
    bar.n = n
    bar.refresh()


def _late_bar(total: int, what: str, unit: str, progress: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit=unit, leave=False, delay=_DELAY, disable=not progress)
