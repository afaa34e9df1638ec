"""What a GPU's memory is asked for: no more than was planned, and what happens when it is full."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import backends
import camelid
from camelid import _core
from checkpoints import Weights
from engines import LOGITS, NOTHING, SAMPLE, open_engine, open_greedy, step

Checkpoint = Callable[[str], tuple[Path, Weights]]
PAGE = 16
GRANULE = 4096  # what an emulated GPU backs at once
# Of the host's facts of a step, page tables and the like: what grows with what is asked, not with
# the width of the model.
FACTS = 96 << 10


@pytest.fixture(autouse=True)
def _only_where_memory_is_counted() -> Iterator[None]:
    if not backends.is_emulated():
        pytest.skip("of an emulated GPU: on others somebody else may take memory meanwhile")
    return


def prompt_of(n_tokens: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(256), k=n_tokens)


@pytest.mark.parametrize("name", ["scout_like", "top2", "dense", "int4_g32"])
def test_steps_take_what_was_planned(checkpoint: Checkpoint, name: str) -> None:
    """The weights, the workspace and the pages in use are all there is, but for small tables."""
    before = backends.taken_bytes()
    engine = open_engine(checkpoint(name)[0], page_size=PAGE, max_step_tokens=160)
    loaded = backends.taken_bytes() - before
    sequences = [open_greedy(engine) for _ in range(3)]
    step(engine, [(sequences[0], prompt_of(160))], NOTHING)
    step(engine, [(sequence, prompt_of(50)) for sequence in sequences], SAMPLE)
    for _ in range(4):  # the second time is recorded, the others are replayed
        step(engine, [(sequence, [7]) for sequence in sequences], SAMPLE)
    memory = engine.memory()
    taken = backends.taken_bytes() - before
    planned = memory["weight_bytes"] + memory["workspace_bytes"] + memory["kv_used_bytes"]
    assert loaded < taken <= planned + 2 * GRANULE + FACTS
    assert memory["workspace_bytes"] < 1.5 * (taken - memory["weight_bytes"])
    del engine
    assert backends.taken_bytes() == before


def test_a_full_gpu_says_so_and_goes_on_when_there_is_room(checkpoint: Checkpoint) -> None:
    folder = checkpoint("scout_like")[0]
    prompt = prompt_of(200)
    roomy = open_engine(folder, page_size=PAGE)
    wanted = step(roomy, [(open_greedy(roomy), prompt)]).logits
    engine = open_engine(folder, page_size=PAGE)
    sequence = open_greedy(engine)
    step(engine, [(sequence, prompt[:20])], NOTHING)
    used = engine.memory()["kv_used_bytes"]
    with backends.gpu_memory(backends.taken_bytes()):
        for _ in range(2):
            with pytest.raises(
                camelid.CapacityError, match=r"memory is full: \d+ bytes are wanted, \d+ are free"
            ):
                step(engine, [(sequence, prompt[20:])], LOGITS)
            engine.check_invariants()
    assert engine.memory()["kv_used_bytes"] == used
    got = step(engine, [(sequence, prompt[20:])], LOGITS).logits
    off = np.sqrt(np.mean((got - wanted[20:]) ** 2)) / wanted.std()
    assert off <= backends.row_tolerance(n_layers=5)


def test_memory_of_pages_that_were_given_back_serves_the_other_pool(checkpoint: Checkpoint) -> None:
    """When nothing else is left, global pages get what local ones of past chunks had."""
    folder = checkpoint("scout_like")[0]
    engine = open_engine(folder, page_size=PAGE)
    short = [open_greedy(engine) for _ in range(8)]
    step(engine, [(sequence, prompt_of(31)) for sequence in short], NOTHING)
    for sequence in short:
        engine.close_sequence(sequence)
    sequence = open_greedy(engine)
    long = prompt_of(150)
    step(engine, [(sequence, long[:10])], NOTHING)
    kv_bytes = engine.kv_bytes_for(31) * 8
    with backends.gpu_memory(backends.taken_bytes() + FACTS):
        used = []
        for first in range(10, len(long), 7):
            step(engine, [(sequence, long[first : first + 7])], SAMPLE)
            used.append(engine.memory()["kv_used_bytes"])
    assert max(used) <= kv_bytes
    engine.check_invariants()
    got = step(engine, [(sequence, [7])]).logits[-1]
    wanted = step(engine, [(open_greedy(engine), [*long, 7])]).logits[-1]
    off = np.sqrt(np.mean((got - wanted) ** 2)) / wanted.std()
    assert off <= backends.row_tolerance(n_layers=5)


def test_weights_that_do_not_fit_are_refused_before_they_are_read(checkpoint: Checkpoint) -> None:
    folder = checkpoint("scout_like")[0]
    with (
        backends.gpu_memory(backends.taken_bytes() + (64 << 10)),
        pytest.raises(camelid.CapacityError, match="may still take"),
    ):
        camelid.LLM(folder, **backends.llm_options())


def test_a_workspace_that_does_not_fit_is_refused(checkpoint: Checkpoint) -> None:
    folder = checkpoint("scout_like")[0]
    roomy = open_engine(folder)
    weights = roomy.memory()["weight_bytes"]
    with pytest.raises(camelid.CapacityError, match="Raise memory= to"):
        open_engine(folder, memory_bytes=weights + 1024)
    assert isinstance(roomy, _core.Engine)
