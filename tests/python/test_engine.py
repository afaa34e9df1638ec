"""The loop over a fake engine: order, cancellation, failure, closing, and that nothing leaks."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from camelid.errors import (
    Cancelled,
    CapacityError,
    CheckpointError,
    InternalError,
    InvalidRequest,
)
from camelid.options import SamplingParams
from camelid.request import LogitsRequest
from fake_core import PAGE, VOCAB, FakeCore, Gate, Harness, text_of


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[Harness]:
    made = Harness(tmp_path, FakeCore())
    yield made
    made.core.before_step = lambda tokens: None
    made.loop.close()
    assert made.core.sequences == {}, "a sequence was left open"
    assert made.loop._scheduler.reserved_bytes == 0
    assert not made.loop._active
    assert not made.loop._key_of


def test_one_request(harness: Harness) -> None:
    _, events = harness.start("hello", max_tokens=6)
    got = harness.finish(events)
    assert text_of(got) == harness.expected("hello", 6)
    assert len(got) == 6


def test_no_thread_before_the_first_request(tmp_path: Path) -> None:
    harness = Harness(tmp_path, FakeCore())
    assert harness.loop._thread is None
    harness.loop.close()


def test_requests_run_together_and_each_gets_its_own(harness: Harness) -> None:
    gate = Gate()
    harness.core.before_step = gate
    prompts = ["first", "second one", "3"]
    started = [harness.start(prompt, max_tokens=5) for prompt in prompts]
    gate.open.set()
    for prompt, (_, events) in zip(prompts, started, strict=True):
        assert text_of(harness.finish(events)) == harness.expected(prompt, 5)
    assert max(len(step) for step in harness.core.steps) >= 2


def test_long_prompts_run_in_pieces_beside_answers(tmp_path: Path) -> None:
    core = FakeCore(max_step_tokens=8)
    harness = Harness(tmp_path, core, max_running=4)
    prompt = "x" * 53
    _, first = harness.start("ab", max_tokens=20)
    _, second = harness.start(prompt, max_tokens=3)
    assert text_of(harness.finish(first)) == harness.expected("ab", 20)
    assert text_of(harness.finish(second)) == harness.expected(prompt, 3)
    outputs = [entry for step in core.steps for entry in step if entry[1] > 1]
    assert all(output == 0 for _, _, output in outputs[:-1][1:])
    harness.loop.close()
    assert core.sequences == {}


def test_a_request_waits_for_memory_and_nothing_is_promised_twice(tmp_path: Path) -> None:
    core = FakeCore(n_pages=2)
    harness = Harness(tmp_path, core)
    started = [harness.start("x" * (PAGE - 4), max_tokens=4 + i) for i in range(6)]
    for i, (_, events) in enumerate(started):
        assert text_of(harness.finish(events)) == harness.expected("x" * (PAGE - 4), 4 + i)
    harness.loop.close()
    assert core.sequences == {}


def test_what_can_never_fit_fails_alone(harness: Harness) -> None:
    _, ok = harness.start("a", max_tokens=2)
    _, huge = harness.start("a", max_tokens=10_000)
    (error,) = harness.finish(huge)
    assert isinstance(error, CapacityError)
    assert "1024 tokens fit" in str(error)
    assert text_of(harness.finish(ok)) == harness.expected("a", 2)


def test_a_failing_step_fails_its_requests_and_no_others(harness: Harness) -> None:
    def fail(tokens: list[list[int]]) -> None:
        if any(99 in piece for piece in tokens):
            raise CheckpointError("[weights] a step failed.")

    harness.core.before_step = fail
    _, bad = harness.start([99], max_tokens=4)
    (error,) = harness.finish(bad)
    assert isinstance(error, CheckpointError)
    _, good = harness.start("ok", max_tokens=4)
    assert text_of(harness.finish(good)) == harness.expected("ok", 4)


def test_a_logit_that_is_not_finite_ends_its_own_request_only(harness: Harness) -> None:
    gate = Gate()
    harness.core.before_step = gate
    harness.core.bad_logit = lambda tokens: 3 if 99 in tokens else -1
    started = [harness.start(prompt, max_tokens=9)[1] for prompt in ("one", [98, 99], "two")]
    gate.open.set()
    (error,) = harness.finish(started[1])
    assert isinstance(error, CheckpointError)
    assert "[sampling] the logit of token 3 is not finite" in str(error)
    assert text_of(harness.finish(started[0])) == harness.expected("one", 9)
    assert text_of(harness.finish(started[2])) == harness.expected("two", 9)
    assert any(len(step) == 3 for step in harness.core.steps)  # they did run together


@pytest.mark.parametrize(
    ("raised", "wanted"), [(MemoryError(), CapacityError), (RuntimeError("odd"), InternalError)]
)
def test_foreign_exceptions_become_ours(harness: Harness, raised: Any, wanted: Any) -> None:
    def fail(tokens: list[list[int]]) -> None:
        raise raised

    harness.core.before_step = fail
    first, second = harness.start("a")[1], harness.start("b")[1]
    errors = [harness.finish(first)[-1], harness.finish(second)[-1]]
    assert all(type(error) is wanted for error in errors)
    assert errors[0] is not errors[1]


def test_a_sequence_that_cannot_open_fails_alone(harness: Harness) -> None:
    def refuse(params: Any) -> None:
        if params.seed == 13:
            raise InvalidRequest("[sampling] no")

    gate = Gate()
    harness.core.before_step = gate
    harness.core.on_open = refuse
    first = harness.start("x", max_tokens=3)[1]
    gate.reached.wait()
    bad, good = harness.start("a", seed=13)[1], harness.start("b", seed=14, max_tokens=3)[1]
    gate.open.set()
    assert isinstance(harness.finish(bad)[-1], InvalidRequest)
    assert text_of(harness.finish(good)) == harness.expected("b", 3)
    assert text_of(harness.finish(first)) == harness.expected("x", 3)


def test_a_receiver_that_raises_ends_its_own_request_only(harness: Harness) -> None:
    calls = []

    def deliver(event: Any) -> None:
        calls.append(event)
        raise ValueError("not today")

    harness.start("bad", deliver=deliver)
    _, good = harness.start("good", max_tokens=5)
    assert text_of(harness.finish(good)) == harness.expected("good", 5)
    assert len(calls) == 2, "the delta, then the error"


def test_cancel_keeps_the_text_so_far(harness: Harness) -> None:
    request, events = harness.start("abc", max_tokens=500)
    first = harness.loop.wait(events)
    harness.loop.cancel([request])
    got = [first, *harness.finish(events)]
    assert got[-1].finish_reason == "cancelled"  # type: ignore[union-attr]
    text = text_of(got)
    assert harness.expected("abc", 500).startswith(text)
    assert 1 <= len(text) < 500


def test_cancel_before_it_runs_and_after_it_ended(harness: Harness) -> None:
    gate = Gate()
    harness.core.before_step = gate
    _, running = harness.start("a", max_tokens=2)
    gate.reached.wait()
    waiting, events = harness.start("b", max_tokens=2)
    harness.loop.cancel([waiting])
    gate.open.set()
    (last,) = harness.finish(events)
    assert last.finish_reason == "cancelled"  # type: ignore[union-attr]
    assert text_of(harness.finish(running)) == harness.expected("a", 2)
    harness.loop.cancel([waiting])
    assert text_of(harness.finish(harness.start("c", max_tokens=2)[1])) == harness.expected("c", 2)


def test_cancel_all_spares_what_comes_later(harness: Harness) -> None:
    harness.loop.cancel_all()
    gate = Gate()
    harness.core.before_step = gate
    started = [harness.start("abc", max_tokens=400) for _ in range(3)]
    gate.reached.wait()
    harness.loop.cancel_all()
    later = harness.start("later", max_tokens=3)[1]
    gate.open.set()
    for _, events in started:
        assert harness.finish(events)[-1].finish_reason == "cancelled"  # type: ignore[union-attr]
    assert text_of(harness.finish(later)) == harness.expected("later", 3)


def test_close_fails_what_runs_and_refuses_what_comes(harness: Harness) -> None:
    gate = Gate()
    harness.core.before_step = gate
    started = [harness.start("abc", max_tokens=400) for _ in range(3)]
    gate.reached.wait()
    closer = threading.Thread(target=harness.loop.close)
    closer.start()
    gate.open.set()
    closer.join(30)
    for _, events in started:
        assert isinstance(harness.finish(events)[-1], Cancelled)
    with pytest.raises(InvalidRequest, match="closed"):
        harness.start("late")
    harness.loop.close()


def test_a_broken_loop_answers_everyone(harness: Harness, monkeypatch: Any) -> None:
    def broken() -> Any:
        raise KeyError("a bug of ours")

    monkeypatch.setattr(harness.loop._scheduler, "next_step", broken)
    _, events = harness.start("a")
    (error,) = harness.finish(events)
    assert isinstance(error, InternalError)


def test_logits_come_in_small_steps(harness: Harness) -> None:
    n = 300
    logits = np.full((n, VOCAB), -1, np.float32)
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    ids = np.arange(n, dtype=np.int32) % 200
    harness.loop.submit(LogitsRequest(ids, SamplingParams().resolve(), events.put, logits=logits))
    assert harness.finish(events)[-1].finish_reason == "length"  # type: ignore[union-attr]
    assert (logits[:, 0] == ids).all()
    assert [step[0][1] for step in harness.core.steps] == [128, 128, 44]


def test_many_threads_share_the_loop(harness: Harness) -> None:
    wrong = []

    def work(name: int) -> None:
        for turn in range(10):
            prompt = f"thread {name} turn {turn}"
            got = text_of(harness.finish(harness.start(prompt, max_tokens=7)[1]))
            if got != harness.expected(prompt, 7):
                wrong.append((prompt, got))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


SCRIPT = """
import sys, tempfile, threading
from pathlib import Path
from fake_core import FakeCore, Harness
harness = Harness(Path(tempfile.mkdtemp()), FakeCore())
_, events = harness.start("abc", max_tokens=900)
harness.loop.wait(events)
"""


def run_script(body: str) -> subprocess.CompletedProcess[str]:
    paths = [str(Path(__file__).parents[1]), *sys.path]
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT) + textwrap.dedent(body)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_interpreter_exits_while_a_request_runs() -> None:
    done = run_script("print('bye')")
    assert (done.returncode, done.stdout) == (0, "bye\n")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_is_told_and_exits() -> None:
    done = run_script("""
        import os, warnings
        from camelid.errors import Unsupported
        warnings.simplefilter("ignore")
        pid = os.fork()
        if pid == 0:
            try:
                harness.start("child")
            except Unsupported as error:
                assert "forked" in str(error)
                harness.loop.close()
                sys.exit(7)
            sys.exit(8)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        harness.finish(events)
        harness.loop.close()
        print("parent goes on")
    """)
    assert (done.returncode, done.stdout) == (0, "parent goes on\n"), done.stderr
