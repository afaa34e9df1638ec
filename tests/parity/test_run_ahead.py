"""Steps that a device starts before they are asked for never show, whatever is asked for instead.

A GPU does so (src/step/step.h); on the CPU the same holds for want of it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import backends
from camelid import _core
from checkpoints import Weights
from engines import LOGITS, NOTHING, SAMPLE, open_engine, open_greedy, step
from vision_variants import VISION_VARIANTS

PAGE = 16


class Told:
    """Sequences of one engine, and the tokens each was given."""

    def __init__(self, engine: _core.Engine, n: int) -> None:
        self.engine = engine
        rng = np.random.default_rng(n)
        self.tokens = {
            open_greedy(engine): rng.integers(0, 256, 5 + 9 * i).tolist() for i in range(n)
        }
        self.next = self._step([(s, t) for s, t in self.tokens.items()])

    def _step(self, parts: list[tuple[int, list[int]]]) -> dict[int, int]:
        sampled = step(self.engine, parts, SAMPLE).sampled
        return {sequence: one.token for (sequence, _), one in zip(parts, sampled, strict=True)}

    def go_on(self, sequences: list[int], instead: dict[int, list[int]] | None = None) -> None:
        """Run the tokens sampled last, or others in their place."""
        parts = [(s, (instead or {}).get(s, [self.next[s]])) for s in sequences]
        for sequence, tokens in parts:
            self.tokens[sequence] = self.tokens.get(sequence, []) + tokens
        self.next |= self._step(parts)

    def check(self, n_layers: int) -> None:
        """Hold what comes after each sequence to a fresh one that is given the same tokens."""
        for sequence, tokens in self.tokens.items():
            got = step(self.engine, [(sequence, [7])]).logits[-1]
            wanted = step(self.engine, [(open_greedy(self.engine), [*tokens, 7])]).logits[-1]
            off = np.sqrt(np.mean((got - wanted) ** 2)) / wanted.std()
            assert off <= backends.row_tolerance(n_layers=n_layers)
        self.engine.check_invariants()


def test_steps_that_nobody_asked_for_leave_no_trace(
    checkpoint: Callable[[str], tuple[Path, Weights]],
) -> None:
    engine = open_engine(checkpoint("dense")[0], page_size=PAGE)
    told = Told(engine, 4)
    a, b, c, d = told.tokens
    for _ in range(3):
        told.go_on([a, b, c, d])
    engine.close_sequence(b)  # its next token is on the way
    del told.tokens[b]
    told.go_on([a, c, d])
    told.go_on([c, a])  # in another order, and without one of them
    told.go_on([a, c, d], {c: [11]})  # not what it sampled
    told.go_on([a, c, d], {d: [3, 1, 4, 1, 5]})  # more than one
    new = open_greedy(engine)
    told.next[new] = 200
    told.go_on([a, new, c])  # one that is new
    for _ in range(3):
        told.go_on([a, c, d, new])
    told.check(n_layers=4)


def test_a_page_that_was_taken_ahead_is_given_back(
    checkpoint: Callable[[str], tuple[Path, Weights]],
) -> None:
    engine = open_engine(checkpoint("dense")[0], page_size=PAGE)
    before = engine.memory()["kv_used_bytes"]
    sequence = open_greedy(engine)
    (one,) = step(engine, [(sequence, list(range(PAGE - 1)))], SAMPLE).sampled
    step(engine, [(sequence, [one.token])], SAMPLE)  # the page is full; the next one is under way
    engine.close_sequence(sequence)
    assert engine.memory()["kv_used_bytes"] == before
    engine.check_invariants()


def test_what_is_asked_for_may_change_between_steps_of_one_token(
    checkpoint: Callable[[str], tuple[Path, Weights]],
) -> None:
    """Steps of as many tokens, of which none, one or two tell something; all logits of some."""
    engine = open_engine(checkpoint("dense")[0], page_size=PAGE)
    told = Told(engine, 2)
    a, b = told.tokens
    draw = np.random.default_rng(1)
    for _ in range(3):
        for output in (SAMPLE, NOTHING, LOGITS):
            for _ in range(3):
                parts = [(s, [int(draw.integers(0, 256))]) for s in (a, b)]
                outputs = [output, draw.choice([SAMPLE, NOTHING])]
                result = step(engine, parts, outputs)
                for sequence, tokens in parts:
                    told.tokens[sequence] += tokens
                assert len(result.logits) == (1 if output == LOGITS else 0)
        told.next |= told._step([(a, [1]), (b, [2])])
        told.tokens[a].append(1)
        told.tokens[b].append(2)
        told.go_on([a, b])
    told.check(n_layers=4)


def test_all_logits_of_a_step_that_was_started_ahead(
    checkpoint: Callable[[str], tuple[Path, Weights]],
) -> None:
    engine = open_engine(checkpoint("dense")[0], page_size=PAGE)
    told = Told(engine, 1)
    (a,) = told.tokens
    for _ in range(3):
        told.go_on([a])
    token = told.next[a]
    logits = step(engine, [(a, [token])], LOGITS).logits
    assert logits.shape == (1, 271)
    told.tokens[a].append(token)
    wanted = step(engine, [(open_greedy(engine), told.tokens[a])]).logits[-1]
    off = np.sqrt(np.mean((logits[0] - wanted) ** 2)) / wanted.std()
    assert off <= backends.row_tolerance(n_layers=4)
    told.check(n_layers=4)


def test_many_parts_of_a_prompt_are_under_way_at_once(
    checkpoint: Callable[[str], tuple[Path, Weights]],
) -> None:
    """Of a step that tells nothing nobody waits for the chunks; what each needs stays its own."""
    backends.arrange(3)  # all as late as may be
    engine = open_engine(checkpoint("scout_like")[0], page_size=PAGE)
    prompt = np.random.default_rng(2).integers(0, 256, 180).tolist()
    sequence = open_greedy(engine)
    step(engine, [(sequence, prompt)], NOTHING)
    got = step(engine, [(sequence, [7])]).logits[-1]
    wanted = step(engine, [(open_greedy(engine), [*prompt, 7])]).logits[-1]
    off = np.sqrt(np.mean((got - wanted) ** 2)) / wanted.std()
    assert off <= backends.row_tolerance(n_layers=5)


def test_an_image_is_encoded_while_a_step_is_ahead(tmp_path: Path) -> None:
    (variant,) = (v for v in VISION_VARIANTS if v.name == "shuffle_1")
    variant.write(tmp_path)
    engine = open_engine(tmp_path, page_size=PAGE)
    alone, beside = Told(engine, 2), Told(engine, 2)
    for told in (alone, beside):
        for _ in range(4):
            told.go_on(list(told.tokens))
            if told is beside:
                engine.encode_image(variant.pixels())
    assert list(alone.tokens.values()) == list(beside.tokens.values())
    assert list(alone.next.values()) == list(beside.next.values())


def test_steps_that_cannot_be_recorded_run_all_the_same(
    checkpoint: Callable[[str], tuple[Path, Weights]],
) -> None:
    if not backends.is_emulated():
        pytest.skip("of an emulated GPU: it can be told to refuse")
    folder = checkpoint("dense")[0]
    prompt = list(range(40))

    def decode() -> tuple[list[int], str]:
        engine = open_engine(folder, page_size=PAGE)
        sequence = open_greedy(engine)
        tokens = prompt
        said = []
        for _ in range(8):
            (one,) = step(engine, [(sequence, tokens)], SAMPLE).sampled
            tokens = [one.token]
            said.append(one.token)
        engine.check_invariants()
        return said, engine.describe()

    wanted, described = decode()
    assert "not recorded" not in described
    with backends.without_recordings():
        got, described = decode()
    assert got == wanted
    assert "steps are not recorded: [cuda] graph: not supported" in described
