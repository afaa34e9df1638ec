"""A timeline of steps on the CPU: which calls it names, and that it changes no result."""

from __future__ import annotations

from pathlib import Path

import pytest

from camelid import _core
from camelid.errors import InvalidRequest
from engines import SAMPLE, assert_same_bits, open_engine, open_greedy, step
from variants import VARIANTS

PROMPT = [1, 2, 3, 4, 5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("timed")
    VARIANTS[0].write(path)
    return path


def test_calls_of_a_step_are_named_in_order(folder: Path) -> None:
    engine = open_engine(folder, timed=True)
    sequence = open_greedy(engine)
    engine.start_timeline("calls")
    step(engine, [(sequence, PROMPT)], SAMPLE)
    calls = engine.stop_timeline()
    assert all(us >= 0 for _, us in calls)
    names = [name for name, _ in calls]
    assert names[:3] == ["begin", "embed", "norm"]
    layer = [name.split()[0] for name in names[3:7]]
    assert layer[:3] == ["project_kv", "attend", "matmul_add"]
    assert layer[3] in ("experts", "mlp")
    assert names[3].split()[1] in ("local", "global")
    assert [name.split()[0] for name in names[-3:]] == ["norm_rows", "matmul", "find_top"]


def test_a_step_is_measured_as_a_whole_once_for_each(folder: Path) -> None:
    engine = open_engine(folder, timed=True)
    sequence = open_greedy(engine)
    engine.start_timeline("steps")
    step(engine, [(sequence, PROMPT)], SAMPLE)
    step(engine, [(sequence, [6])], SAMPLE)
    assert [name for name, _ in engine.stop_timeline()] == ["step", "step"]
    assert engine.stop_timeline() == []
    step(engine, [(sequence, [7])], SAMPLE)  # nobody measures any more
    assert engine.stop_timeline() == []


def test_starting_again_forgets(folder: Path) -> None:
    engine = open_engine(folder, timed=True)
    sequence = open_greedy(engine)
    engine.start_timeline("calls")
    step(engine, [(sequence, PROMPT)], SAMPLE)
    engine.start_timeline("steps")
    assert engine.stop_timeline() == []


def test_logits_are_those_of_an_engine_without_a_clock(folder: Path) -> None:
    plain, timed = open_engine(folder), open_engine(folder, timed=True)
    timed.start_timeline("calls")
    logits = [step(engine, [(open_greedy(engine), PROMPT)]).logits for engine in (plain, timed)]
    assert_same_bits(*logits)


def test_an_engine_without_a_clock_says_so(folder: Path) -> None:
    engine: _core.Engine = open_engine(folder)
    with pytest.raises(InvalidRequest, match="timed=True"):
        engine.start_timeline("calls")
    with pytest.raises(InvalidRequest, match="expected calls or steps"):
        open_engine(folder, timed=True).start_timeline("seconds")
