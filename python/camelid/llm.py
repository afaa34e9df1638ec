"""The model as callers see it: load once, then generate, stream, chat or read logits.

Owns the checks of a request against the model's limits, and nothing that computes: weights are
`loading.py`, running is `engine.py`, text is `tokenizer.py` and `chat.py`.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from camelid.chat import ChatTemplate
from camelid.checkpoint import Checkpoint
from camelid.engine import EngineLoop
from camelid.errors import (
    Cancelled,
    CapacityError,
    Error,
    InvalidRequest,
)
from camelid.features import Features, place_features
from camelid.image_inputs import ImageInputs, tile_array
from camelid.loading import find_folder, load
from camelid.options import LoadOptions, ResolvedSampling, SamplingParams
from camelid.prompts import (
    Prompt,
    encode_prompt,
    images_of,
    is_one_prompt,
    token_array,
)
from camelid.report import show_bytes
from camelid.request import (
    Completion,
    Delta,
    GenerateRequest,
    LogitsRequest,
    LogprobEntry,
    Request,
)
from camelid.tokenizer import Tokenizer

if TYPE_CHECKING:
    from camelid.config import ModelConfig

__all__ = ["LLM"]

DEFAULT_MAX_TOKENS = 256
_MAX_STEP_TOKENS = 512
_MAX_RUNNING = 64


class LLM:
    """A Llama 4 model in memory. Threads may share it; their requests run together.

    Use it as a context manager or call `close()`; otherwise it frees itself when forgotten. After a
    fork it is usable in the parent only.

    Args:
        model: Folder of a checkpoint, or a hub id such as "meta-llama/Llama-4-Scout-17B-16E".
        device: "auto", "cpu", "cuda" or "cuda:N".
        weights: "auto" as stored, "bf16", "int8" or "int4"; embeddings and router are never made
            smaller than bf16, the head only by `head`.
        compute: "exact" multiplies float activations; "fast" int8 ones by INT4 and INT8 weights,
            and bf16 ones by bf16 weights where the processor can; auto is fast from 64 MiB of INT4
            and INT8 weights on.
        head: "stored", or "int8" for a plain output head; auto is int8 where fast meets INT4
            weights.
        kv_cache: "auto", "f32", "bf16" or "int8"; auto is f32 where compute is exact, else bf16,
            which halves the cache and moves logits by about 0.01 standard deviations. int8 halves
            it again and moves them by about 0.02; both by more where they flip a near tie of a
            router.
        max_context: Most tokens of prompt and answer together; the config's limit if None.
        memory: Bytes for weights, KV cache and workspace together, or "20GiB"; None takes nine
            tenths of what is available, as it is needed.
        threads: Threads to compute with; None for all physical cores.
        progress: Show a bar on stderr while loading.

    Raises:
        CapacityError: Before anything is loaded, if the weights will not fit.
        CheckpointError: If the folder is damaged, incomplete or contradicts itself.
        InvalidRequest: If an option is malformed.
        Unsupported: If the folder or an option asks for something camelid does not have.

    Example:
        with camelid.LLM(camelid.demo_model_path()) as llm:
            print(llm.generate("The town of")[0].text)
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        device: str = "auto",
        weights: str = "auto",
        kv_cache: str = "auto",
        compute: str = "auto",
        head: str = "auto",
        max_context: int | str | None = None,
        memory: int | str | None = None,
        threads: int | None = None,
        progress: bool = False,
    ) -> None:
        options = LoadOptions.parse(
            device=device,
            weights=weights,
            kv_cache=kv_cache,
            compute=compute,
            head=head,
            max_context=max_context,
            memory=memory,
            threads=threads,
        )
        self._folder = find_folder(model)
        self._template: ChatTemplate | None = None
        self._template_lock = threading.Lock()
        with Checkpoint.open(self._folder) as checkpoint:
            self._config = checkpoint.config
            self._max_context = _max_context(options, self._config)
            self._tokenizer = _find_tokenizer(self._folder)
            loaded = load(checkpoint, options, max_step_tokens=_MAX_STEP_TOKENS, progress=progress)
        self._end_ids = frozenset(self._config.eos_ids)
        if self._tokenizer is not None:
            self._end_ids |= self._tokenizer.eos_ids
        self._device = loaded.core.describe()
        self._kv_limit_bytes = loaded.core.memory()["kv_limit_bytes"]
        self._kv_tokens = loaded.core.kv_tokens_in(self._kv_limit_bytes)
        self._loop = EngineLoop(
            loaded.core, max_step_tokens=_MAX_STEP_TOKENS, max_running=_MAX_RUNNING
        )
        # Also at interpreter exit, before its threads are stopped in the middle of anything.
        self._finalizer = weakref.finalize(self, self._loop.close)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            TokenizerError: If the folder has none; such a model takes and gives token ids only.
        """
        if self._tokenizer is None:
            return Tokenizer.from_folder(self._folder)  # says what is missing
        return self._tokenizer

    @property
    def config(self) -> ModelConfig:
        """What the folder says about the model."""
        return self._config

    @property
    def max_context(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._max_context

    @property
    def device(self) -> str:
        """What computes, such as "cpu: avx512, 8 threads"."""
        return self._device

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams | None] | None = None,
        *,
        progress: bool = False,
    ) -> list[Completion]:
        """Continue one prompt or many; the results come in the order of the prompts.

        A text gets the BOS token in front, once. Prompts run together, as many as fit.

        Args:
            prompts: A text, a list of token ids, {"prompt_token_ids": ids}, or a list of those.
            params: One for all, or one for each prompt; unset fields are neutral.
            progress: Show a bar on stderr.

        Raises:
            InvalidRequest: If a prompt or parameter cannot be served; nothing has run then.
            CapacityError: If a prompt and its answer exceed the KV cache's memory.
            Cancelled: If the model is closed meanwhile.
        """
        many = [prompts] if is_one_prompt(prompts) else list(prompts)
        done: queue.SimpleQueue[Delta | Error] = queue.SimpleQueue()
        answers = [_Answer(done) for _ in many]
        requests: list[Request] = []
        each = _params_for(params, len(many))
        for prompt, wanted, answer in zip(many, each, answers, strict=True):
            ids = encode_prompt(prompt, self._tokenizer, self._config.vocab_size)
            request = self._generate_request(ids, wanted.resolve(), answer.take)
            request.features = self._features(ids, images_of(prompt))
            requests.append(request)
        with self._running(requests), _bar(len(many), progress) as bar:
            for _ in many:
                event = self._loop.wait(done)
                if isinstance(event, Error):
                    raise event
                bar.update()
        return [answer.completion() for answer in answers]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, progress: bool = False
    ) -> Iterator[Delta]:
        """Continue a prompt and yield the answer as it grows.

        The request starts with the first `next()`; closing the iterator cancels it. The texts
        joined equal what `generate` returns.

        Args:
            prompt: As for `generate`.
            params: How to sample.
            progress: Show a bar on stderr while a long prompt is read.

        Raises:
            InvalidRequest: At once, if the prompt or a parameter cannot be served.
        """
        (wanted,) = _params_for(params, 1)
        ids = encode_prompt(prompt, self._tokenizer, self._config.vocab_size)
        return self._stream(ids, wanted.resolve(), progress, self._features(ids, images_of(prompt)))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Completion:
        """Answer a conversation; unset parameters follow the folder's generation_config.json.

        Args:
            messages: OpenAI message objects: {"role": "user", "content": "Hello"}.
            params: How to sample.
            tools: OpenAI tool objects.

        Raises:
            InvalidRequest: If a message, tool or parameter cannot be served.
            TemplateError: If the folder's chat template fails.
            Unsupported: If a message holds an image.
        """
        ids, wanted = self._chat_prompt(messages, params, tools)
        done: queue.SimpleQueue[Delta | Error] = queue.SimpleQueue()
        answer = _Answer(done)
        with self._running([self._generate_request(ids, wanted, answer.take)]):
            event = self._loop.wait(done)
            if isinstance(event, Error):
                raise event
        return answer.completion()

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        progress: bool = False,
    ) -> Iterator[Delta]:
        """Answer a conversation as `chat` does, and yield the answer as `stream` does."""
        return self._stream(*self._chat_prompt(messages, params, tools), progress)

    def logits(
        self,
        token_ids: Sequence[int] | NDArray[np.integer[Any]],
        *,
        images: Sequence[Any] | None = None,
    ) -> NDArray[np.float32]:
        """Return the logits after every token, float32 [n_tokens, vocab_size].

        Nothing is added to the ids: begin them with the BOS id where the model expects it. `images`
        are Pillow images, or tiles as `encode_image` takes them, in the order of their patch
        tokens.

        Raises:
            InvalidRequest: If there are no ids, one is outside the vocabulary, or images and patch
                tokens do not match.
            CapacityError: If the result or the KV cache will not fit in memory.
            Unsupported: If images are given to a model without a vision tower.
        """
        ids = token_array(token_ids, self._config.vocab_size)
        self._check_length(len(ids), 0)
        logits = _empty_logits(len(ids), self._config.vocab_size)
        events: queue.SimpleQueue[Delta | Error] = queue.SimpleQueue()
        request = LogitsRequest(ids, ResolvedSampling(), events.put, logits=logits)
        request.features = self._features(ids, images)
        with self._running([request]):
            event = self._loop.wait(events)
        if isinstance(event, Error):
            raise event
        if event.finish_reason == "cancelled":
            raise Cancelled("[logits] the request was cancelled before it had a result.")
        return logits

    def encode_image(self, pixel_values: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        """Return the embeddings that stand for an image's patch tokens.

        Args:
            pixel_values: Tiles [n_tiles, channels, side, side] in [-1, 1], the overview last, side
                as in the config.

        Returns:
            float32 [n_tiles, tokens_per_tile, dim]. A tile's result does not depend on the others.

        Raises:
            InvalidRequest: If the shape or a value is not what the model takes.
            Unsupported: If the model has no vision tower.
        """
        return self._loop.encode_image(tile_array(pixel_values, self._config.vision))

    def _features(self, ids: NDArray[np.int32], images: Any) -> Features | None:
        """Encode the images of a prompt and find the tokens they stand for."""
        if images is None:
            return None
        tiles = ImageInputs(self._folder, self._config.vision).read(images)
        encoded = [self._loop.encode_image(image) for image in tiles]
        return place_features(ids, encoded, self._config.image_token_index) if encoded else None

    def cancel(self) -> None:
        """End all requests under way, in whatever thread; their answers so far are kept."""
        self._loop.cancel_all()

    def close(self) -> None:
        """Free the model; requests under way fail with Cancelled. Harmless when done before."""
        self._loop.close()
        self._finalizer.detach()
        self._loop.release()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _stream(
        self,
        ids: NDArray[np.int32],
        params: ResolvedSampling,
        progress: bool,
        features: Features | None = None,
    ) -> Iterator[Delta]:
        events: queue.SimpleQueue[Delta | Error] = queue.SimpleQueue()
        request = self._generate_request(ids, params, events.put)
        request.features = features
        return self._deltas(request, events, progress)

    def _deltas(
        self, request: Request, events: queue.SimpleQueue[Delta | Error], progress: bool
    ) -> Iterator[Delta]:
        with self._running([request]), _prefill_bar(len(request.prompt), progress) as bar:
            while True:
                event = self._loop.wait(events, lambda: _show(bar, request.n_run))
                bar.close()  # the first event ends the prefill
                if isinstance(event, Error):
                    raise event
                yield event
                if event.finish_reason is not None:
                    return

    @contextlib.contextmanager
    def _running(self, requests: list[Request]) -> Iterator[None]:
        """Run requests; whatever ends the block, none of them goes on behind it."""
        try:
            for request in requests:
                self._loop.submit(request)
            yield
        finally:
            left = [request for request in requests if not request.finished]
            if left:
                self._loop.cancel(left)

    def _generate_request(
        self,
        ids: NDArray[np.int32],
        params: ResolvedSampling,
        deliver: Callable[[Delta | Error], None],
    ) -> GenerateRequest:
        largest = params.largest_id()
        if largest >= self._config.vocab_size:
            raise InvalidRequest(
                f"[options] stop_token_ids or logit_bias names token {largest}, expected 0 to "
                f"{self._config.vocab_size - 1}."
            )
        if params.stop and self._tokenizer is None:
            raise InvalidRequest(
                "[options] stop: this folder has no tokenizer, so there is no text to search. Use "
                "stop_token_ids."
            )
        return GenerateRequest(
            ids,
            params,
            deliver,
            max_tokens=self._answer_limit(len(ids), params.max_tokens),
            end_ids=self._end_ids,
            tokenizer=self._tokenizer,
        )

    def _answer_limit(self, n_prompt: int, max_tokens: int | None) -> int:
        """Return how many tokens may be generated after a prompt; refuse what will not fit."""
        self._check_length(n_prompt, 1 if max_tokens is None else max_tokens)
        if max_tokens is not None:
            return max_tokens
        return min(DEFAULT_MAX_TOKENS, min(self._max_context, self._kv_tokens) - n_prompt)

    def _check_length(self, n_prompt: int, n_answer: int) -> None:
        total = n_prompt + n_answer
        asked = f"{n_prompt} tokens" if n_answer == 0 else f"{n_prompt} + {n_answer} tokens"
        if total > self._max_context:
            raise InvalidRequest(
                f"[llm] prompt and answer of {asked} exceed the context of {self._max_context}. "
                "Shorten the prompt, lower max_tokens, or load with a larger max_context= where "
                "the model allows it."
            )
        if total > self._kv_tokens:
            raise CapacityError(
                f"[kv] prompt and answer of {asked} exceed the KV cache: "
                f"{show_bytes(self._kv_limit_bytes)} hold {self._kv_tokens} tokens. Shorten the "
                "prompt, lower max_tokens, or load with a larger memory=."
            )

    def _chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None,
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> tuple[NDArray[np.int32], ResolvedSampling]:
        (wanted,) = _params_for(params, 1)
        with self._template_lock:
            if self._template is None:
                self._template = ChatTemplate.from_folder(self._folder, self.tokenizer)
        ids = self._template.encode(messages, tools=tools)
        return token_array(ids, self._config.vocab_size), wanted.resolve(self._config.generation)


class _Answer:
    """Gathers the deltas of one request and passes on the last of its events."""

    def __init__(self, done: queue.SimpleQueue[Delta | Error]) -> None:
        self._done = done
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[LogprobEntry] | None = None
        self._last: Delta | None = None

    def take(self, event: Delta | Error) -> None:
        if isinstance(event, Delta):
            self._texts.append(event.text)
            self._token_ids += event.token_ids
            if event.logprobs is not None:
                self._logprobs = self._logprobs or []
                self._logprobs += event.logprobs
            if event.finish_reason is None:
                return
            self._last = event
        self._done.put(event)

    def completion(self) -> Completion:
        last = self._last
        assert last is not None, "only asked for after the last event"
        assert last.finish_reason is not None
        assert last.usage is not None
        return Completion(
            "".join(self._texts), self._token_ids, self._logprobs, last.finish_reason, last.usage
        )


def _empty_logits(n_tokens: int, vocab_size: int) -> NDArray[np.float32]:
    from camelid import _core

    # Asked for first: the system hands out more than it has, and kills who believes it.
    available = _core.available_memory()
    row_bytes = vocab_size * 4
    if n_tokens * row_bytes > available:
        raise CapacityError(
            f"[logits] {n_tokens} rows of {vocab_size} take {show_bytes(n_tokens * row_bytes)}, "
            f"{show_bytes(available)} are left, enough for {available // row_bytes} tokens. Ask "
            "for fewer at once."
        )
    return np.empty((n_tokens, vocab_size), np.float32)


def _show(bar: Any, n: int) -> None:
    bar.n = n
    bar.refresh()


def _prefill_bar(n_tokens: int, progress: bool) -> Any:
    from tqdm import tqdm

    # Nothing to see at first: a bar appears when somebody has waited.
    return tqdm(
        total=n_tokens, desc="prefill", unit="tok", leave=False, delay=1, disable=not progress
    )


def _bar(total: int, progress: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc="generating", unit="prompt", disable=not progress)


def _params_for(params: Any, n_prompts: int) -> list[SamplingParams]:
    """Return one SamplingParams for each prompt."""
    each = list(params) if isinstance(params, (list, tuple)) else [params] * n_prompts
    if len(each) != n_prompts:
        raise InvalidRequest(
            f"[options] got {len(each)} params for {n_prompts} prompts, expected one for all or "
            "one for each."
        )
    for item in each:
        if item is not None and not isinstance(item, SamplingParams):
            raise InvalidRequest(
                f"[options] params is {type(item).__name__}, expected camelid.SamplingParams."
            )
    return [SamplingParams() if item is None else item for item in each]


def _max_context(options: LoadOptions, config: ModelConfig) -> int:
    limit = config.max_position_embeddings
    if options.max_context is None:
        return limit
    if options.max_context > limit:
        raise InvalidRequest(
            f"[options] max_context is {options.max_context}, expected at most {limit}: the "
            "model's own limit, max_position_embeddings in its config.json."
        )
    return options.max_context


def _find_tokenizer(folder: Path) -> Tokenizer | None:
    """Return the folder's tokenizer; None where it has no tokenizer file at all."""
    if any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        return Tokenizer.from_folder(folder)
    return None
