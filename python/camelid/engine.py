"""The loop: one thread per model that turns queued requests into engine steps and answers.

Owns the thread, its start and end, and that every sequence it opens is closed. What to run is
`scheduler.py`'s decision, what an answer is `request.py`'s. Must never know text or files.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import os
import queue
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from camelid.errors import (
    Cancelled,
    CapacityError,
    CheckpointError,
    Error,
    InternalError,
    InvalidRequest,
    Unsupported,
)
from camelid.features import Features, join_features
from camelid.scheduler import Scheduler

if TYPE_CHECKING:
    from camelid import _core
    from camelid.options import ResolvedSampling
    from camelid.request import Delta, Request

__all__ = ["EngineLoop"]

logger = logging.getLogger("camelid")

_numbers = itertools.count()
# How often a waiting caller looks whether the thread it waits for still lives.
_LOOK_SECONDS = 0.5


def _sampler_params(params: ResolvedSampling) -> _core.SamplerParams:
    from camelid import _core

    return _core.SamplerParams(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        seed=params.seed,
        n_logprobs=-1 if params.logprobs is None else params.logprobs,
        logit_bias=params.logit_bias,
    )


class EngineLoop:
    """Runs requests on an engine in a thread of its own, which starts with the first of them.

    Args:
        core: The engine, loaded. The loop is its only user.
        max_step_tokens: Most tokens in one step.
        max_running: Most sequences that run at once.
        to_sampler: Makes the engine's sampler settings.
    """

    def __init__(
        self,
        core: _core.Engine,
        *,
        max_step_tokens: int = 512,
        max_running: int = 64,
        to_sampler: Callable[[ResolvedSampling], Any] = _sampler_params,
    ) -> None:
        self._core = core
        self._to_sampler = to_sampler
        self._process = os.getpid()
        self._limit_bytes = core.memory()["kv_limit_bytes"]
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._name = f"camelid-engine-{next(_numbers)}"
        self._is_worked = threading.Lock()
        # Shared, under the lock.
        self._arrived: list[Request] = []
        self._to_cancel: list[Request] = []
        self._cancel_active = False
        self._closed = False
        self.n_cancellations = 0  # calls of cancel_all(), for what is not yet submitted
        # The thread's own.
        self._keys = itertools.count()
        self._active: dict[int, Request] = {}
        self._key_of: dict[Request, int] = {}
        self._scheduler = Scheduler(
            limit_bytes=self._limit_bytes, max_step_tokens=max_step_tokens, max_running=max_running
        )
        _loops.add(self)

    def submit(self, request: Request) -> None:
        """Queue a request; its `deliver` hears of everything that follows.

        Raises:
            InvalidRequest: If the model is closed.
            Unsupported: In a process forked after the model was loaded.
        """
        self._check_process()  # before the lock, which a fork may have left locked
        with self._wake:
            self.check_open()
            self._arrived.append(request)
            if not self._is_alive():
                # A daemon, or the interpreter would wait for it before anyone could stop it.
                thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._thread = thread
                thread.start()
            self._wake.notify()

    def cancel(self, requests: Iterable[Request]) -> None:
        """End requests early; those that have ended are left alone. Returns at once."""
        if os.getpid() == self._process:
            with self._wake:
                self._to_cancel.extend(requests)
                self._wake.notify()

    def cancel_all(self) -> None:
        """End every request that runs or waits."""
        self._check_process()
        with self._wake:
            self.n_cancellations += 1
            self._to_cancel.extend(self._arrived)
            self._cancel_active = True
            self._wake.notify()

    def wait(
        self, events: queue.SimpleQueue[Delta | Error], look: Callable[[], object] | None = None
    ) -> Delta | Error:
        """Return the next of a request's events; Ctrl-C gets through while waiting.

        Meanwhile `look` is called now and then.
        """
        while True:
            try:
                return events.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                if look is not None:
                    look()
                self._check_process()
                if not self._is_alive() and events.empty():
                    raise InternalError(
                        "[engine] the engine's thread is gone. This is a bug; please report it."
                    ) from None

    def check_open(self, *, meanwhile: bool = False) -> None:
        """Refuse to go on with a model that is closed.

        Raises:
            Cancelled: If it is, and what asks began before.
            InvalidRequest: If it is.
            Unsupported: In a process forked after the model was loaded.
        """
        self._check_process()
        if self._closed and meanwhile:
            raise _closed_meanwhile()
        if self._closed:
            raise InvalidRequest("[llm] this model is closed. Load it again to use it.")

    def encode_tile(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Run the vision tower, between two steps where requests are under way.

        Args:
            pixels: float32 [channels, side, side].

        Returns:
            float32 [tokens_per_tile, dim].

        Raises:
            Cancelled: If the model is closed.
        """
        with self._wake:
            core = None if self._closed else self._core  # which stays alive until this is done
        if core is None:
            raise _closed_meanwhile()
        features: NDArray[np.float32] = core.encode_image(pixels[None])[0]
        if self._closed:
            raise _closed_meanwhile()
        return features

    def close(self) -> None:
        """Stop the thread after the step it is in; requests under way fail with Cancelled."""
        if os.getpid() != self._process:
            return  # the thread lives in the parent
        with self._wake:
            self._closed = True
            self._wake.notify()
            thread = self._thread
        # The garbage collector may call this from the very thread that is to end.
        if thread is not None and threading.current_thread().name != self._name:
            if thread.is_alive():  # not if Ctrl-C came before it started
                thread.join()
            with self._is_worked:
                pass

    def release(self) -> None:
        """Let go of the engine's memory; only after close()."""
        if os.getpid() == self._process and self._closed:
            _loops.discard(self)
            vars(self).pop("_core", None)  # whoever uses it now has a bug worth an AttributeError

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise Unsupported(
                "[engine] this process was forked after the model was loaded, and its threads "
                "stayed in the parent. Load the model in the child, or start children with "
                'multiprocessing.set_start_method("spawn").'
            )

    def _is_alive(self) -> bool:
        # Ctrl-C during start() may leave a thread that seems dead, and is about to work.
        thread = self._thread
        return (thread is not None and thread.is_alive()) or self._is_worked.locked()

    def _work(self) -> None:
        """Be the only one to run the loop."""
        if self._is_worked.acquire(blocking=False):
            try:
                self._run()
            finally:
                self._is_worked.release()

    def _run(self) -> None:
        """Run until closed. Whatever happens, everyone gets an answer and every sequence closes."""
        reason: Error = _closed_meanwhile()
        try:
            while self._take_news():
                self._run_step()
        except BaseException as error:
            logger.exception("the engine's loop failed")
            reason = _as_error(error)
        finally:
            with self._wake:
                self._closed = True
                arrived, self._arrived = self._arrived, []
            for request in [*self._active.values(), *arrived]:
                self._fail(request, reason)

    def _take_news(self) -> bool:
        """Wait for something to do, take in requests and cancellations; False ends the loop."""
        with self._wake:
            while not (self._closed or self._arrived or self._active):
                # Nothing runs, so there is nothing to cancel.
                self._to_cancel.clear()
                self._cancel_active = False
                self._wake.wait()
            if self._closed:
                return False
            arrived, self._arrived = self._arrived, []
            to_cancel, self._to_cancel = self._to_cancel, []
            if self._cancel_active:
                to_cancel += self._active.values()
            self._cancel_active = False
        for request in arrived:
            self._enqueue(request)
        for request in to_cancel:
            if request in self._key_of:
                self._tell(request, request.cancel)
        return True

    def _enqueue(self, request: Request) -> None:
        try:
            n_bytes = self._core.kv_bytes_for(request.n_reserved)
            if n_bytes > self._limit_bytes:
                n_fit = self._core.kv_tokens_in(self._limit_bytes)
                raise CapacityError(
                    f"[kv] {request.n_reserved} tokens need {n_bytes} bytes of KV cache, "
                    f"{self._limit_bytes} exist: {n_fit} tokens fit. Shorten the prompt, lower "
                    "max_tokens, or raise memory=."
                )
        except Exception as error:
            self._fail(request, error)
            return
        key = next(self._keys)
        self._active[key] = request
        self._key_of[request] = key
        self._scheduler.add(
            key, len(request.prompt), reserved_bytes=n_bytes, step_tokens=request.step_tokens
        )

    def _run_step(self) -> None:
        turns = [(self._active[t.key], t.n_tokens) for t in self._scheduler.next_step()]
        turns = [turn for turn in turns if self._open(turn[0])]
        if not turns:
            return
        try:
            counts = [n for _, n in turns]
            features = join_features([request.next_features(n) for request, n in turns], counts)
            result = self._core.step(
                np.array([request.sequence for request, _ in turns], np.int64),
                np.array(counts, np.int32),
                np.concatenate([request.next_tokens(n) for request, n in turns], dtype=np.int32),
                np.array([request.wanted_output(n) for request, n in turns], np.uint8),
                **_as_arguments(features),
            )
        except Exception as error:
            for request, _ in turns:
                self._fail(request, error)
            return
        row = 0
        for (request, n_tokens), sampled in zip(turns, result.sampled, strict=True):
            output = request.wanted_output(n_tokens)
            if output == 1 and sampled.not_finite >= 0:
                self._fail(request, _not_finite(sampled.not_finite))
            elif output == 1:
                self._tell(request, request.take_sampled, sampled)
            elif output == 2:
                self._tell(request, request.take_logits, result.logits[row : row + n_tokens])
                row += n_tokens
            request.advance(n_tokens)

    def _open(self, request: Request) -> bool:
        """Open the request's sequence if it has none; on failure only this request ends."""
        if request.sequence is None:
            try:
                request.sequence = self._core.open_sequence(self._to_sampler(request.params))
            except Exception as error:
                self._fail(request, error)
                return False
        return True

    def _tell(self, request: Request, how: Callable[..., Delta | None], *what: Any) -> None:
        """Hand something to a request; if it cannot take it, it ends, and nobody else."""
        try:
            delta = how(*what)
            if request.finished:
                self._forget(request)
            if delta is not None:
                request.deliver(delta)
        except Exception as error:
            logger.exception("a request could not take its result")
            self._fail(request, error)

    def _fail(self, request: Request, error: BaseException) -> None:
        self._forget(request)
        request.finished = True
        try:
            request.deliver(_as_error(error))
        except Exception:
            logger.exception("a request could not take its error")

    def _forget(self, request: Request) -> None:
        """Drop a request from every list and close its sequence; harmless when done before."""
        request.drop_features()
        key = self._key_of.pop(request, None)
        if key is not None:
            del self._active[key]
            self._scheduler.remove(key)
        sequence, request.sequence = request.sequence, None
        if sequence is not None:
            try:
                self._core.close_sequence(sequence)
            except Exception:
                logger.exception("sequence %d could not be closed", sequence)


def _closed_meanwhile() -> Cancelled:
    return Cancelled("[llm] the model was closed while this request was under way.")


def _not_finite(token: int) -> CheckpointError:
    return CheckpointError(
        f"[sampling] the logit of token {token} is not finite. The checkpoint may be damaged, or "
        "its values overflow float32."
    )


def _as_arguments(features: Features | None) -> dict[str, Any]:
    if features is None:
        return {}
    return {"features": features.values, "feature_rows": features.rows}


def _as_error(error: BaseException) -> Error:
    """Return an Error of its own for each request: a raised one collects its raiser's frames."""
    if isinstance(error, Error):
        return type(error)(*error.args)
    if isinstance(error, MemoryError):
        mine: Error = CapacityError(
            "[engine] the machine ran out of memory during a step. Set a lower memory= or "
            "max_context=, or run fewer requests at once."
        )
    else:
        mine = InternalError(
            f"[engine] {type(error).__name__}: {error}. This is a bug of camelid; please report it."
        )
    mine.__cause__ = error
    return mine


_loops: weakref.WeakSet[EngineLoop] = weakref.WeakSet()


def _keep_engines() -> None:
    """In a forked child, never destroy an engine: its destructor would wait for its threads."""
    for loop in list(_loops):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(loop._core))


os.register_at_fork(after_in_child=_keep_engines)
