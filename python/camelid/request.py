"""One request from its prompt to its last token: what it still has to run, and what it hands back.

Owns the records callers receive, stop strings, and the text of an answer as it grows. Must never
know of other requests, threads or the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from camelid.errors import Error, TokenizerError
from camelid.tokenizer import StreamDecoder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from camelid.feature_room import Ticket
    from camelid.features import Features, PromptFeatures
    from camelid.image_encoder import PromptImages
    from camelid.options import ResolvedSampling
    from camelid.tokenizer import Tokenizer

__all__ = [
    "Completion",
    "Delta",
    "FinishReason",
    "GenerateRequest",
    "LogitsRequest",
    "LogprobEntry",
    "Request",
    "StopScanner",
    "Usage",
]

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Usage:
    """Tokens of one request."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class LogprobEntry:
    """One token's log probability (natural log, before temperature and penalties).

    `top` holds the likeliest tokens at this place, best first; theirs is empty.
    """

    token_id: int
    token: str  # bytes that are no UTF-8 show as U+FFFD; `Tokenizer.token_bytes` has them
    logprob: float
    top: tuple[LogprobEntry, ...] = ()


@dataclass(frozen=True)
class Completion:
    """The answer to one prompt.

    `token_ids` are all tokens sampled, one that ended the answer included; `text` leaves out
    special tokens and stop strings. `finish_reason` is "stop" (an end token or stop string),
    "length" (the limit), or "cancelled" (the text so far is kept).
    """

    text: str
    token_ids: list[int]
    logprobs: list[LogprobEntry] | None
    finish_reason: FinishReason
    usage: Usage


@dataclass(frozen=True)
class Delta:
    """What is new since the last one; `finish_reason` and `usage` are set on the last only.

    A delta may carry tokens and no text: half a character, or what may become a stop string.
    """

    text: str
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[LogprobEntry] | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


class StopScanner:
    """Passes text on until a stop string is whole, holding back what may become one.

    The first stop string to be complete wins, of two complete at once the longer one; so the result
    does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Take a piece of text, return what is certain to come before any stop string."""
        if self.stopped:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        ends = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)[1]]
        cut = len(text) - max(_longest_overlap(text, stop) for stop in self._stops)
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """Return what was held back: nothing more is to come."""
        held, self._held = self._held, ""
        return held


def _longest_overlap(text: str, stop: str) -> int:
    """Return how many last characters of `text` are the beginning of `stop`, short of all of it."""
    for n in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0


class _Sampled(Protocol):
    """One sampled token as the engine returns it."""

    @property
    def token(self) -> int: ...
    @property
    def logprob(self) -> float: ...
    @property
    def top(self) -> list[tuple[int, float]]: ...


class Request:
    """What the loop needs of any request: tokens to run, and whom to tell.

    `deliver` is called from the engine's thread with each delta and, at the end, with the last
    delta or an error; it must not block. When it hears of the end, the sequence is closed.
    """

    # Most tokens of this request in one step; None: whatever the step has room for.
    step_tokens: int | None = None
    output = 1  # of the last tokens of the prompt: 1 sample, 2 logits of every token
    images: PromptImages | None = None  # to be encoded before it is submitted
    features: PromptFeatures | None = None  # of the prompt's image tokens, until they have run
    ticket: Ticket | None = None  # of the room where those features wait

    def __init__(
        self,
        prompt: NDArray[np.int32],
        params: ResolvedSampling,
        deliver: Callable[[Delta | Error], None],
        *,
        n_reserved: int,
    ) -> None:
        self.prompt = prompt  # int32 [n_tokens], at least one
        self.params = params
        self.deliver = deliver
        self.n_reserved = n_reserved  # tokens its KV pages must hold at most
        self.n_run = 0  # tokens of the prompt that have run
        self.sequence: int | None = None  # the engine's, once it runs
        self.next_token = -1  # to run next, once the prompt has
        self.finished = False

    def next_tokens(self, n_tokens: int) -> NDArray[np.int32] | list[int]:
        """Return the `n_tokens` to run next."""
        if self.n_run < len(self.prompt):
            return self.prompt[self.n_run : self.n_run + n_tokens]
        return [self.next_token]

    def next_features(self, n_tokens: int) -> Features | None:
        """Return the features of the `n_tokens` to run next."""
        if self.features is None:
            return None
        return self.features.part(self.n_run, n_tokens)

    def advance(self, n_tokens: int) -> None:
        """Note that a step ran the next `n_tokens`."""
        self.n_run = min(self.n_run + n_tokens, len(self.prompt))
        if self.n_run == len(self.prompt):
            self.drop_features()

    def drop_features(self) -> None:
        """Let go of the features, which have run or never will; harmless when done before."""
        self.features = None
        self.leave_room()

    def leave_room(self) -> None:
        """Let other prompts' features in; any thread may."""
        if self.ticket is not None:
            self.ticket.leave()

    def wanted_output(self, n_tokens: int) -> int:
        """Return what a step over the next `n_tokens` must give back."""
        return self.output if self.n_run + n_tokens >= len(self.prompt) else 0

    def take_sampled(self, sampled: _Sampled) -> Delta:
        """Take the token a step sampled; return what is new."""
        raise NotImplementedError

    def take_logits(self, logits: NDArray[np.float32]) -> Delta | None:
        """Take the logits of the tokens a step ran; return the last delta once all are there."""
        raise NotImplementedError

    def cancel(self) -> Delta:
        """End early; return the last delta."""
        raise NotImplementedError


class GenerateRequest(Request):
    """A prompt to be continued."""

    def __init__(
        self,
        prompt: NDArray[np.int32],
        params: ResolvedSampling,
        deliver: Callable[[Delta | Error], None],
        *,
        max_tokens: int,
        end_ids: frozenset[int],
        tokenizer: Tokenizer | None,
    ) -> None:
        super().__init__(prompt, params, deliver, n_reserved=len(prompt) + max_tokens)
        self._max_tokens = max_tokens
        self._end_ids = params.stop_token_ids | (frozenset() if params.ignore_eos else end_ids)
        self._tokenizer = tokenizer
        # Without a tokenizer an answer is its token ids; its text stays empty.
        self._decoder = StreamDecoder(tokenizer) if tokenizer else None
        self._scanner = StopScanner(params.stop)
        self._n_sampled = 0

    def take_sampled(self, sampled: _Sampled) -> Delta:
        """Return what a sampled token adds, and end the answer if it is the last."""
        token = self.next_token = sampled.token
        self._n_sampled += 1
        text = ""
        reason: FinishReason | None = None
        if token in self._end_ids:
            reason = "stop"
        else:
            text = self._scanner.push(self._decoder.push(token) if self._decoder else "")
            if self._n_sampled == self._max_tokens:
                reason = "length"
        if reason:
            text += self._scanner.push(self._decoder.flush() if self._decoder else "")
            text += self._scanner.flush()
        if self._scanner.stopped:
            reason = "stop"
        return self._delta(text, [token], self._logprobs(sampled), reason)

    def cancel(self) -> Delta:
        """End with the text so far; half a character that was held back is dropped."""
        return self._delta(self._scanner.flush(), [], None, "cancelled")

    def _delta(
        self,
        text: str,
        token_ids: list[int],
        logprobs: list[LogprobEntry] | None,
        reason: FinishReason | None,
    ) -> Delta:
        if reason is None:
            return Delta(text, token_ids, logprobs)
        self.finished = True
        usage = Usage(len(self.prompt), self._n_sampled)
        return Delta(text, token_ids, logprobs, reason, usage)

    def _logprobs(self, sampled: _Sampled) -> list[LogprobEntry] | None:
        if self.params.logprobs is None:
            return None
        top = tuple(self._entry(token, logprob) for token, logprob in sampled.top)
        return [self._entry(sampled.token, sampled.logprob, top)]

    def _entry(
        self, token: int, logprob: float, top: tuple[LogprobEntry, ...] = ()
    ) -> LogprobEntry:
        text = ""
        try:
            if self._tokenizer is not None:
                text = self._tokenizer.token_bytes(token).decode("utf-8", "replace")
        except TokenizerError:
            pass  # a row of the model's table that no token has
        return LogprobEntry(token, text, logprob, top)


class LogitsRequest(Request):
    """A sequence whose logits are wanted after every token."""

    output = 2
    # Bounds the engine's copy of a step's logits: 128 rows of 202,048 floats are 99 MiB.
    step_tokens = 128

    def __init__(
        self,
        prompt: NDArray[np.int32],
        params: ResolvedSampling,
        deliver: Callable[[Delta | Error], None],
        *,
        logits: NDArray[np.float32],
    ) -> None:
        super().__init__(prompt, params, deliver, n_reserved=len(prompt))
        self._logits = logits  # [len(prompt), vocab_size]

    def wanted_output(self, n_tokens: int) -> int:
        """Return that every token's logits are wanted."""
        return self.output

    def take_logits(self, logits: NDArray[np.float32]) -> Delta | None:
        """Copy the rows of a step to their place; `n_run` still counts the tokens before it."""
        self._logits[self.n_run : self.n_run + len(logits)] = logits
        done = self.n_run + len(logits) == len(self.prompt)
        return self._end("length") if done else None

    def cancel(self) -> Delta:
        """End without a result."""
        return self._end("cancelled")

    def _end(self, reason: FinishReason) -> Delta:
        self.finished = True
        return Delta("", finish_reason=reason, usage=Usage(len(self.prompt), 0))


class Answer:
    """Gathers the deltas of one request and passes on the last of its events, to `at_end`."""

    def __init__(self, at_end: Callable[[Delta | Error], None]) -> None:
        self._at_end = at_end
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[LogprobEntry] | None = None
        self._last: Delta | None = None

    def take(self, event: Delta | Error) -> None:
        """Take what the loop delivers."""
        if isinstance(event, Delta):
            self._texts.append(event.text)
            self._token_ids += event.token_ids
            if event.logprobs is not None:
                self._logprobs = self._logprobs or []
                self._logprobs += event.logprobs
            if event.finish_reason is None:
                return
            self._last = event
        self._at_end(event)

    def completion(self) -> Completion:
        """Return the whole answer."""
        last = self._last
        assert last is not None, "only asked for after the last event"
        assert last.finish_reason is not None
        assert last.usage is not None
        return Completion(
            "".join(self._texts), self._token_ids, self._logprobs, last.finish_reason, last.usage
        )
