"""The model as callers see it: load once, then generate, stream, chat or read logits.

Owns the checks of a request against the model's limits, and nothing that computes: weights are
`loading.py`, running is `engine.py`, text is `tokenizer.py` and `chat.py`.
"""

from __future__ import annotations

import contextlib
import functools
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
from camelid.chat_images import ChatImages
from camelid.checkpoint import Checkpoint
from camelid.engine import EngineLoop
from camelid.errors import (
    Cancelled,
    CapacityError,
    CheckpointError,
    Error,
    InvalidRequest,
)
from camelid.image_cache import FeatureCache
from camelid.image_encoder import ImageEncoder, PromptImages
from camelid.image_inputs import ImageInputs, tile_array
from camelid.image_prompt import END, PATCH, START
from camelid.limits import Limits, context_limit
from camelid.loading import find_folder, load
from camelid.options import LoadOptions, ResolvedSampling, SamplingParams, params_for
from camelid.progress import prefill_bar, prompts_bar, show
from camelid.prompts import (
    Prompt,
    encode_prompt,
    images_of,
    is_one_prompt,
    token_array,
)
from camelid.report import show_bytes
from camelid.request import (
    Answer,
    Completion,
    Delta,
    GenerateRequest,
    LogitsRequest,
    Request,
)
from camelid.tokenizer import Tokenizer

if TYPE_CHECKING:
    from camelid.config import ModelConfig

__all__ = ["LLM"]

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
            A vision tower stays as stored but for "bf16".
        compute: "exact" multiplies float32 activations, on the CPU alone; "fast" int8 ones by INT4
            and INT8 weights, and bf16 ones by bf16 weights where the processor can. "auto" is fast
            from 64 MiB of INT4 and INT8 weights on. A GPU always multiplies bf16.
        head: "stored", or "int8" for a plain output head; auto is int8 where fast meets INT4
            weights.
        kv_cache: "auto", "f32", "bf16", "int8", or on a GPU "fp8"; auto is f32 where compute is
            exact, else bf16, which halves the cache and moves logits by about 0.01 standard
            deviations. int8 halves it again and moves them by about 0.02; both by more where they
            flip a near tie of a router.
        max_context: Most tokens of prompt and answer together; the config's limit if None.
        memory: Bytes for weights, KV cache, workspace and remembered images together, or "20GiB";
            None takes nine tenths of what is available, as it is needed.
        threads: Threads to compute with; None for all physical cores.
        image_files: Whether images in messages may be local paths. Servers pass False: a client's
            path would read the server's files.
        fetch_images: Whether images in messages may be http(s) URLs. They are fetched from public
            addresses only, within limits of size and time (`image_fetch.py`), and at most 16 of
            them, in 30 seconds, for one call.
        image_cache: Bytes for images encoded before, or "256MiB", out of `memory`; 0 remembers
            none. None takes 256 MiB, or a sixteenth of what the weights leave if that is less.
            Encoded images of prompts that wait are held to as many bytes, but for one prompt's;
            the tiles of the prompt that each call is encoding are not counted.
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
        image_files: bool = True,
        fetch_images: bool = False,
        image_cache: int | str | None = None,
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
            image_files=image_files,
            fetch_images=fetch_images,
            image_cache=image_cache,
        )
        self._folder = find_folder(model)
        self._template: ChatTemplate | None = None
        self._template_lock = threading.Lock()
        with Checkpoint.open(self._folder) as checkpoint:
            self._config = checkpoint.config
            most_tokens = context_limit(options, self._config)
            self._tokenizer = _find_tokenizer(self._folder)
            self._image_inputs = ImageInputs.from_options(
                self._folder, self._config.vision, options
            )
            loaded = load(checkpoint, options, progress=progress)
        self._end_ids = frozenset(self._config.eos_ids)
        if self._tokenizer is not None:
            self._end_ids |= self._tokenizer.eos_ids
        self._device = loaded.core.describe()
        self._limits = Limits.of(loaded.core, most_tokens)
        self._loop = EngineLoop(
            loaded.core, max_step_tokens=loaded.plan.step_tokens, max_running=_MAX_RUNNING
        )
        cache = FeatureCache(loaded.image_cache_bytes)
        self._image_encoder = ImageEncoder(self._loop, self._config, cache)
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
        return self._limits.max_context

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

        A text gets the BOS token in front, once. Prompts run together, as many as fit. Images are
        read once to check them, and again when their prompt's turn comes, so that the tiles of one
        prompt are held at a time.

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
        answers = [Answer(done.put) for _ in many]
        requests: list[Request] = []
        since = self._loop.n_cancellations
        each = params_for(params, len(many))
        for prompt, wanted, answer in zip(many, each, answers, strict=True):
            ids = encode_prompt(prompt, self._tokenizer, self._config.vocab_size)
            request = self._generate_request(ids, wanted.resolve(), answer.take)
            given = images_of(prompt)
            request.images = self._images(ids, given)
            if request.images is not None and len(many) > 1:
                # Read twice, to refuse at once what cannot be served, and to hold one prompt's.
                request.images.let_go(functools.partial(self._image_inputs.read, given))
            requests.append(request)
        with self._running(requests, progress, since), prompts_bar(len(many), progress) as bar:
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
        (wanted,) = params_for(params, 1)
        ids = encode_prompt(prompt, self._tokenizer, self._config.vocab_size)
        events: queue.SimpleQueue[Delta | Error] = queue.SimpleQueue()
        request = self._generate_request(ids, wanted.resolve(), events.put)
        request.images = self._images(ids, images_of(prompt))
        return self._deltas(request, events, progress)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Completion:
        """Answer a conversation; unset parameters follow the folder's generation_config.json.

        Messages of the user may hold images, among parts of text: {"type": "image_url",
        "image_url": {"url": ...}} as OpenAI's clients send them, or {"type": "image", "image":
        picture}, "url" or "path", as transformers takes them. A URL is data:, file:, a path, or
        http(s) where the model was loaded with fetch_images=True. `detail` changes nothing.

        Args:
            messages: OpenAI message objects: {"role": "user", "content": "Hello"}.
            params: How to sample.
            tools: OpenAI tool objects.

        Raises:
            InvalidRequest: If a message, image, tool or parameter cannot be served.
            CapacityError: If prompt and answer exceed the KV cache's memory.
            TemplateError: If the folder's chat template fails.
            Unsupported: If there are images and the model has no vision tower, or such URLs are
                not allowed.
        """
        done: queue.SimpleQueue[Delta | Error] = queue.SimpleQueue()
        answer = Answer(done.put)
        since = self._loop.n_cancellations
        request = self._chat_request(messages, params, tools, answer.take)
        with self._running([request], since=since):
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
        events: queue.SimpleQueue[Delta | Error] = queue.SimpleQueue()
        request = self._chat_request(messages, params, tools, events.put)
        return self._deltas(request, events, progress)

    def logits(
        self,
        token_ids: Sequence[int] | NDArray[np.integer[Any]],
        *,
        images: Sequence[Any] | None = None,
    ) -> NDArray[np.float32]:
        """Return the logits after every token, float32 [n_tokens, vocab_size].

        Nothing is added to the ids: begin them with the BOS id where the model expects it. `images`
        are Pillow images, or tiles as `encode_image` takes them, in the order of their patch
        tokens. Where pairs of <|image_start|> and <|image_end|> enclose these, one pair for each
        image, each must fill its own; otherwise their total must fit. With None, patch tokens are
        tokens like others.

        Raises:
            InvalidRequest: If there are no ids, one is outside the vocabulary, or images and patch
                tokens do not match.
            CapacityError: If the result or the KV cache will not fit in memory.
            Unsupported: If images are given to a model without a vision tower.
        """
        since = self._loop.n_cancellations
        ids = token_array(token_ids, self._config.vocab_size)
        self._limits.check(len(ids), 0)
        logits = _empty_logits(len(ids), self._config.vocab_size)
        events: queue.SimpleQueue[Delta | Error] = queue.SimpleQueue()
        request = LogitsRequest(ids, ResolvedSampling(), events.put, logits=logits)
        request.images = self._images(ids, images)
        with self._running([request], since=since):
            event = self._loop.wait(events)
        if isinstance(event, Error):
            raise event
        if event.finish_reason == "cancelled":
            raise Cancelled("[logits] the request was cancelled before it had a result.")
        return logits

    def encode_image(
        self, pixel_values: NDArray[np.floating[Any]], *, progress: bool = False
    ) -> NDArray[np.float32]:
        """Return the embeddings that stand for an image's patch tokens.

        Args:
            pixel_values: Tiles [n_tiles, channels, side, side] in [-1, 1], the overview last, side
                as in the config.
            progress: Show a bar on stderr when it takes long.

        Returns:
            float32 [n_tiles, tokens_per_tile, dim]. A tile's result does not depend on the others.

        Raises:
            Cancelled: If the model is closed, or its requests are cancelled, meanwhile.
            InvalidRequest: If the shape or a value is not what the model takes.
            Unsupported: If the model has no vision tower.
        """
        tiles = tile_array(pixel_values, self._config.vision)
        encoded = self._image_encoder.encode(tiles, progress=progress)
        if encoded is None:
            raise Cancelled("[vision] the request was cancelled before it had a result.")
        return np.stack(encoded)

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

    def _deltas(
        self, request: Request, events: queue.SimpleQueue[Delta | Error], progress: bool
    ) -> Iterator[Delta]:
        with self._running([request], progress), prefill_bar(len(request.prompt), progress) as bar:
            while True:
                event = self._loop.wait(events, lambda: show(bar, request.n_run))
                bar.close()  # the first event ends the prefill
                if isinstance(event, Error):
                    raise event
                yield event
                if event.finish_reason is not None:
                    return

    @contextlib.contextmanager
    def _running(
        self, requests: list[Request], progress: bool = False, since: int | None = None
    ) -> Iterator[None]:
        """Run requests; whatever ends the block, none of them goes on behind it.

        `since` is the number of cancellations when the call began; None: it begins now.
        """
        since = self._loop.n_cancellations if since is None else since
        try:
            # Those without images first: encoding takes a while.
            for request in sorted(requests, key=lambda request: request.images is not None):
                self._start(request, since, progress)
            yield
        finally:
            for request in requests:
                request.leave_room()
            left = [request for request in requests if not request.finished]
            if left:
                self._loop.cancel(left)

    def _start(self, request: Request, since: int, progress: bool) -> None:
        """Encode the images of a request, and submit it, unless it was cancelled before."""
        if request.finished:
            return
        if self._loop.n_cancellations != since:
            request.deliver(request.cancel())
            return
        images, request.images = request.images, None
        if images is not None and not self._image_encoder.encode_prompt(
            request, images, since=since, progress=progress
        ):
            request.drop_features()
            request.deliver(request.cancel())
            return
        self._loop.submit(request)

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
            max_tokens=self._limits.answer_tokens(len(ids), params.max_tokens),
            end_ids=self._end_ids,
            tokenizer=self._tokenizer,
        )

    def _chat_request(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None,
        tools: Sequence[Mapping[str, Any]] | None,
        deliver: Callable[[Delta | Error], None],
    ) -> GenerateRequest:
        (wanted,) = params_for(params, 1)
        with self._template_lock:
            if self._template is None:
                self._template = ChatTemplate.from_folder(self._folder, self.tokenizer)
        self._loop.check_open()
        since = self._loop.n_cancellations
        images = ChatImages(
            self._image_inputs,
            self.tokenizer.special_id,
            lambda n: self._limits.check(n, 1),
            lambda: self._check_wanted(since),
        )
        try:
            encoded = self._template.encode(messages, tools=tools, image_handler=images.take)
            self._check_wanted(since)
        except Cancelled:
            if self._loop.n_cancellations == since:
                raise  # closed
            request = self._generate_request(np.zeros(0, np.int32), wanted.resolve(), deliver)
            deliver(request.cancel())
            return request
        ids = token_array(encoded, self._config.vocab_size)
        resolved = wanted.resolve(self._config.generation)
        request = self._generate_request(ids, resolved, deliver)
        request.images = self._place(ids, images.tiles) if images.tiles else None
        return request

    def _check_wanted(self, since: int) -> None:
        """Raise Cancelled where requests were cancelled after `since`, or the model is closed."""
        if self._loop.n_cancellations != since:
            raise Cancelled("[llm] the request was cancelled before it had a prompt.")
        try:
            self._loop.check_open()
        except InvalidRequest:
            raise Cancelled(
                "[llm] the model was closed while this request was under way."
            ) from None

    def _images(self, ids: NDArray[np.int32], images: Any) -> PromptImages | None:
        """Read the images of a prompt of token ids, and find the tokens they stand for."""
        if images is None:  # its image tokens, if any, are tokens like others
            return None
        return self._place(ids, self._image_inputs.read(images))

    def _place(
        self, ids: NDArray[np.int32], tiles: Sequence[NDArray[np.float32]]
    ) -> PromptImages | None:
        marks = _find_image_marks(self._folder, self._config, self._tokenizer)
        return PromptImages.place(ids, tiles, self._config, marks)


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


def _find_tokenizer(folder: Path) -> Tokenizer | None:
    """Return the folder's tokenizer; None where it has no tokenizer file at all."""
    if any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        return Tokenizer.from_folder(folder)
    return None


def _find_image_marks(
    folder: Path, config: ModelConfig, tokenizer: Tokenizer | None
) -> tuple[int, int] | None:
    """Return the tokens that begin and end an image; None where the folder does not say.

    Raises:
        CheckpointError: If the token of images is outside the vocabulary, or the tokenizer has
            another one.
    """
    if config.vision is None:
        return None
    index = config.image_token_index
    if index >= config.vocab_size:
        raise CheckpointError(
            f"[config] {folder}: image_token_index is {index} in config.json, expected a token id "
            f"below vocab_size = {config.vocab_size}. Download it again."
        )
    if tokenizer is None:
        return None
    special = tokenizer.special_tokens
    patch = special.get(PATCH, index)
    if patch != index:
        raise CheckpointError(
            f"[config] {folder}: image_token_index is {index} in config.json, the tokenizer's "
            f"{PATCH} is {patch}. Download both files again."
        )
    if START in special and END in special:
        return special[START], special[END]
    return None
