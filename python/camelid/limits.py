"""How much a model can take in one request: its context, and what its KV cache holds.

Must never know a prompt's content.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from camelid.errors import CapacityError, InvalidRequest
from camelid.options import LoadOptions
from camelid.report import show_bytes

if TYPE_CHECKING:
    from camelid import _core
    from camelid.config import ModelConfig

__all__ = ["Limits", "context_limit"]

_DEFAULT_MAX_TOKENS = 256


@dataclass(frozen=True)
class Limits:
    """Most tokens of prompt and answer together."""

    max_context: int  # tokens that the model or the caller allows
    kv_tokens: int  # that the KV cache has room for
    kv_bytes: int

    @classmethod
    def of(cls, core: _core.Engine, max_context: int) -> Limits:
        """Return the limits of a loaded engine."""
        kv_bytes = core.memory()["kv_limit_bytes"]
        return cls(max_context, core.kv_tokens_in(kv_bytes), kv_bytes)

    def check(self, n_prompt: int, n_answer: int) -> None:
        """Refuse what will not fit.

        Raises:
            InvalidRequest: If prompt and answer exceed the context.
            CapacityError: If they exceed the KV cache.
        """
        total = n_prompt + n_answer
        asked = f"{n_prompt} tokens" if n_answer == 0 else f"{n_prompt} + {n_answer} tokens"
        if total > self.max_context:
            raise InvalidRequest(
                f"[llm] prompt and answer of {asked} exceed the context of {self.max_context}. "
                "Shorten the prompt, lower max_tokens, or load with a larger max_context= where "
                "the model allows it."
            )
        if total > self.kv_tokens:
            raise CapacityError(
                f"[kv] prompt and answer of {asked} exceed the KV cache: "
                f"{show_bytes(self.kv_bytes)} hold {self.kv_tokens} tokens. Shorten the "
                "prompt, lower max_tokens, or load with a larger memory=."
            )

    def answer_tokens(self, n_prompt: int, max_tokens: int | None) -> int:
        """Return how many tokens may be generated after a prompt; refuse what will not fit."""
        self.check(n_prompt, 1 if max_tokens is None else max_tokens)
        if max_tokens is not None:
            return max_tokens
        return min(_DEFAULT_MAX_TOKENS, min(self.max_context, self.kv_tokens) - n_prompt)


def context_limit(options: LoadOptions, config: ModelConfig) -> int:
    """Return the most tokens of prompt and answer together, which options may lower.

    Raises:
        InvalidRequest: If they would raise it.
    """
    limit = config.max_position_embeddings
    if options.max_context is None:
        return limit
    if options.max_context > limit:
        raise InvalidRequest(
            f"[options] max_context is {options.max_context}, expected at most {limit}: the "
            "model's own limit, max_position_embeddings in its config.json."
        )
    return options.max_context
