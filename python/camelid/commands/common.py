"""What commands share: flags for loading and sampling, bars, colours, and speeds."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from camelid.options import SamplingParams

if TYPE_CHECKING:
    from camelid.llm import LLM
    from camelid.request import Delta

_SAMPLING = (
    ("--max-tokens", "max_tokens", int, "most tokens to generate (default 256)"),
    ("--temperature", "temperature", float, "0 is greedy"),
    ("--top-p", "top_p", float, "keep the likeliest tokens that together reach this"),
    ("--top-k", "top_k", int, "keep this many of the likeliest tokens; 0 keeps all"),
    ("--min-p", "min_p", float, "keep tokens this times as likely as the likeliest"),
    ("--repetition-penalty", "repetition_penalty", float, "above 1 repeats less"),
    ("--presence-penalty", "presence_penalty", float, "-2 to 2"),
    ("--frequency-penalty", "frequency_penalty", float, "-2 to 2"),
    ("--seed", "seed", int, "the same seed gives the same text"),
)
_AUTO = ("device", "weights", "compute", "head", "kv_cache")  # loading flags that may be "auto"
SAMPLING_TYPES = {name: kind for _, name, kind, _ in _SAMPLING}


def add_load_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of loading; each takes its default from CAMELID_<NAME>."""
    group = parser.add_argument_group("loading")
    for flag, kind, text in (
        ("--device", str, "auto, cpu, cuda or cuda:N"),
        ("--weights", str, "auto (as stored), bf16, int8 or int4"),
        ("--compute", str, "auto, exact (float activations) or fast (int8 or bf16 ones)"),
        ("--head", str, "auto, stored or int8"),
        ("--kv-cache", str, "auto (f32 when exact, else bf16), f32, bf16, int8; on a GPU also fp8"),
        ("--max-context", str, "most tokens of prompt and answer together, such as 32K"),
        ("--memory", str, "for weights and KV cache together, such as 20GiB"),
        ("--threads", int, "threads to compute with (default: physical cores)"),
    ):
        name = flag[2:].replace("-", "_")
        # argparse passes a string default through `type`, so a bad variable is reported as a flag.
        default = os.environ.get(f"CAMELID_{name.upper()}")
        if default is None and name in _AUTO:
            default = "auto"
        group.add_argument(flag, type=kind, default=default, metavar="X", help=text)


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of sampling; those not given are left to the model's defaults."""
    group = parser.add_argument_group("sampling")
    for flag, _, kind, text in _SAMPLING:
        group.add_argument(flag, type=kind, metavar="X", help=text)
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="end the answer here; may be repeated"
    )
    group.add_argument("--ignore-eos", action="store_true", help="go on past the model's own end")


def sampling_params(options: argparse.Namespace) -> SamplingParams:
    """Return the sampling the flags ask for."""
    return SamplingParams(
        stop=options.stop,
        ignore_eos=options.ignore_eos,
        **{name: getattr(options, name) for name in SAMPLING_TYPES},
    )


def load_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the flags of loading as keywords of `LLM`."""
    names = (*_AUTO, "max_context", "memory", "threads")
    return {name: getattr(options, name) for name in names}


def load_model(options: argparse.Namespace) -> LLM:
    """Load the model the flags name, with a bar where someone watches."""
    from camelid.llm import LLM

    return LLM(options.model, progress=shows_progress(), **load_options(options))


def shows_progress() -> bool:
    """Say whether a person watches stderr."""
    return sys.stderr.isatty()


def paint(text: str, code: str) -> str:
    """Colour text where a person reads it and did not ask for none (https://no-color.org)."""
    if os.environ.get("NO_COLOR") or not sys.stdout.isatty():
        return text
    return f"\x1b[{code}m{text}\x1b[0m"


_SHORTEST_SECONDS = 0.02  # whose speed means something


class Printer:
    """Prints an answer as it grows, and measures it.

    Ctrl-C ends the answer, not the program: `interrupted` says so.
    """

    def __init__(self) -> None:
        self.text = ""
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.interrupted = False
        self.n_prompt_tokens: int | None = None
        self._prompt_seconds = 0.0
        self._answer_seconds = 0.0

    def print(self, deltas: Iterator[Delta]) -> None:
        """Print until the last delta, then end the line."""
        started = first = last = time.perf_counter()
        try:
            for delta in deltas:
                last = time.perf_counter()
                if not self.token_ids:
                    first = last
                self.text += delta.text
                self.token_ids += delta.token_ids
                if delta.usage is not None:
                    self.n_prompt_tokens = delta.usage.prompt_tokens
                self.finish_reason = delta.finish_reason
                sys.stdout.write(_printable(delta.text))
                sys.stdout.flush()
        except KeyboardInterrupt:
            self.interrupted = True
            self.finish_reason = "cancelled"
        finally:
            close = getattr(deltas, "close", None)
            if close is not None:
                close()
        self._prompt_seconds, self._answer_seconds = first - started, last - first
        if not self.text.endswith("\n"):
            sys.stdout.write("\n")
        sys.stdout.flush()

    def speeds(self) -> str:
        """Return the speeds of reading and writing, for people."""
        parts = []
        if self.n_prompt_tokens:
            parts.append(_speed(self.n_prompt_tokens, self._prompt_seconds, "prompt tokens"))
        # The first token belongs to the prompt's time. Of answers that took no time to speak of,
        # the clock tells when this thread woke up.
        if len(self.token_ids) > 1 and self._answer_seconds >= _SHORTEST_SECONDS:
            parts.append(_speed(len(self.token_ids) - 1, self._answer_seconds, "tokens"))
        return ", ".join(parts)


def _printable(text: str) -> str:
    """Return what the terminal's encoding can show of a text."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def _speed(n_tokens: int, seconds: float, what: str) -> str:
    return f"{n_tokens} {what} at {n_tokens / max(seconds, 1e-9):.1f} tokens/s"
