"""What a GPU's memory is asked for: no more than was planned, and what happens when it is full."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import backends
import camelid
from checkpoints import Weights, write_checkpoint
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


def test_whatever_is_full_first_a_step_can_be_asked_for_again(checkpoint: Checkpoint) -> None:
    """Activations, pages or tables: what a step took and said before it was refused does no harm.

    Without chunks: of a step in several parts the first ones may be done.
    """
    folder = checkpoint("no_chunk")[0]
    prompt = prompt_of(70)
    roomy = open_engine(folder, page_size=PAGE)
    wanted = step(roomy, [(open_greedy(roomy), prompt)]).logits
    engine = open_engine(folder, page_size=PAGE)
    sequence = open_greedy(engine)
    step(engine, [(sequence, prompt[:20])], NOTHING)
    room = backends.taken_bytes()
    n_refused, got = 0, None
    while got is None:
        with backends.gpu_memory(room):
            try:
                got = step(engine, [(sequence, prompt[20:])], LOGITS).logits
            except camelid.CapacityError as error:
                n_refused += 1
                wanted_bytes, free_bytes = map(int, re.findall(r"(\d+) (?:bytes )?are", str(error)))
                room += wanted_bytes - free_bytes
        engine.check_invariants()
    assert n_refused > 8
    off = np.sqrt(np.mean((got - wanted[20:]) ** 2)) / wanted.std()
    assert off <= backends.row_tolerance(n_layers=5)


def test_memory_of_pages_that_were_given_back_serves_the_other_pool(checkpoint: Checkpoint) -> None:
    """When nothing else is left, local pages get what global ones of past sequences had."""
    engine = open_engine(checkpoint("scout_like")[0], page_size=PAGE)
    long = [open_greedy(engine) for _ in range(4)]
    for _ in range(6):
        step(engine, [(sequence, prompt_of(65)) for sequence in long], NOTHING)
    for sequence in long:
        engine.close_sequence(sequence)
    taken = backends.taken_bytes()
    little = 8 * GRANULE  # half of what the pages take beyond those that the pool had
    prompts = [prompt_of(31, seed) for seed in range(8)]
    short = [(open_greedy(engine), prompt) for prompt in prompts]
    with backends.gpu_memory(taken + little):
        for first in range(0, 8, 4):
            step(engine, short[first : first + 4], NOTHING)
    assert backends.taken_bytes() <= taken + little
    engine.check_invariants()
    got = step(engine, [(sequence, [7]) for sequence, _ in short[:3]]).logits
    for row, prompt in zip(got, prompts, strict=False):
        wanted = step(engine, [(open_greedy(engine), [*prompt, 7])]).logits[-1]
        off = np.sqrt(np.mean((row - wanted) ** 2)) / wanted.std()
        assert off <= backends.row_tolerance(n_layers=5)


def test_pools_together_never_hold_more_than_their_budget(tmp_path: Path) -> None:
    """Local pages get what global ones had, though the GPU has room enough for both."""
    layers = {"num_hidden_layers": 2, "no_rope_layers": [1, 0]}  # a local one and a global one
    # Chunks of one token, whose local page goes back after its step.
    write_checkpoint(tmp_path, config_overrides={**layers, "attention_chunk_size": 1})
    whole = open_engine(tmp_path, page_size=16 * PAGE, max_step_tokens=16)
    memory, two_pages = whole.memory(), whole.kv_bytes_for(1)
    del whole
    fixed = memory["weight_bytes"] + memory["workspace_bytes"]
    engine = open_engine(
        tmp_path, page_size=16 * PAGE, max_step_tokens=16, memory_bytes=fixed + 10 * two_pages
    )
    loaded = backends.taken_bytes()
    limit = engine.memory()["kv_limit_bytes"]
    assert 9 * two_pages < limit <= 10 * two_pages
    long = [open_greedy(engine) for _ in range(17)]
    for sequence in long:
        step(engine, [(sequence, [1])], NOTHING)
    for sequence in long:
        engine.close_sequence(sequence)
    short = [open_greedy(engine) for _ in range(9)]
    step(engine, [(sequence, [1]) for sequence in short], NOTHING)
    assert engine.memory()["kv_used_bytes"] == 9 * two_pages // 2
    assert 0 < backends.taken_bytes() - loaded <= limit + two_pages // 2 + FACTS


def test_weights_that_do_not_fit_are_refused_before_they_are_read(checkpoint: Checkpoint) -> None:
    folder = checkpoint("scout_like")[0]
    with (
        backends.gpu_memory(backends.taken_bytes() + (64 << 10)),
        pytest.raises(camelid.CapacityError, match="may still take"),
    ):
        camelid.LLM(folder, **backends.llm_options())


def test_a_workspace_that_does_not_fit_is_refused(checkpoint: Checkpoint) -> None:
    folder = checkpoint("scout_like")[0]
    weights = open_engine(folder).memory()["weight_bytes"]
    with pytest.raises(camelid.CapacityError, match="Raise memory= to"):
        open_engine(folder, memory_bytes=weights + 1024)
