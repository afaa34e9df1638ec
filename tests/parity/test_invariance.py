"""An answer does not depend on how a prompt is cut, on what else runs, or on how many threads do.

All to the bit: every row's sums run in an order of their own. A GPU takes other kernels for few
tokens than for many; there every way to run a prompt must give what tests/judge.py says. Also what
the KV cache holds when.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import camelid
from backends import is_emulated, is_gpu, isas, kv_caches, quick, use_isa
from camelid import _core
from camelid.features import Features
from checkpoints import Weights
from engines import (
    LOGITS,
    NOTHING,
    SAMPLE,
    assert_close,
    assert_same_bits,
    logits_in_pieces,
    open_engine,
    open_greedy,
    open_llm,
    step,
)
from judge import Judge
from variants import VARIANTS

Checkpoint = Callable[[str], tuple[Path, Weights]]
PAGE = 16  # tokens: several pages to a chunk of 32

# A RoPE and a NoPE model in float32, one whose chunk is no multiple of the page, and each format.
MODELS = ["scout_like", "all_nope", "odd_shapes", "top2", "bf16", "int4_g32", "int8"]
CASES = [(name, isas()[0]) for name in MODELS] + [
    (name, isa) for isa in isas()[1:] for name in ("scout_like", "odd_shapes", "int4_g32")
]


def prompt_of(name: str, n_tokens: int, seed: float = 0) -> list[int]:
    return random.Random(f"{name} {seed}").choices(range(256), k=n_tokens)


class Subject(NamedTuple):
    """An engine, and what it must answer whatever else it does."""

    engine: _core.Engine
    judge: Judge

    def check(self, got: np.ndarray, prompt: Sequence[int]) -> None:
        """Hold logits of a sequence to those of one step for all of it."""
        if is_gpu():
            self.judge.check(got, prompt)
        else:
            assert_same_bits(got, logits_in_pieces(self.engine, prompt, [len(prompt)]))


QUICK = [(("scout_like", "gpu"),), (("int4_g32", "gpu"),)]


@pytest.fixture(params=quick([(case,) for case in CASES], QUICK), ids=lambda case: "-".join(case))
def subject(
    request: pytest.FixtureRequest, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> Subject:
    name, isa = request.param
    use_isa(monkeypatch, isa)
    folder, weights = checkpoint(name)
    return Subject(open_engine(folder, page_size=PAGE), Judge(folder, weights))


@pytest.fixture
def engine(subject: Subject) -> _core.Engine:
    return subject.engine


SIZES = [[1], [7], [33], [31, 1, 2, 50], [64, 3]]


@pytest.mark.parametrize("sizes", quick(SIZES, [[1], [33], [64, 3]]), ids=str)
def test_logits_are_the_same_when_the_prompt_is_cut(subject: Subject, sizes: list[int]) -> None:
    # Emulated, a step takes a third of a second however few its tokens are.
    prompt = prompt_of("cut", 37 if is_emulated() and max(sizes) < 8 else 101)
    subject.check(logits_in_pieces(subject.engine, prompt, sizes), prompt)


def test_logits_are_the_same_in_a_mixed_batch(subject: Subject) -> None:
    """Seven sequences of several lengths join a running batch one by one, in random pieces."""
    draw = random.Random(1)
    prompts = [prompt_of("batch", n, n) for n in (1, 5, 32, 33, 64, 70, 97)]
    engine = subject.engine
    sequences = [open_greedy(engine) for _ in prompts]
    done = [0] * len(prompts)
    together: list[list[np.ndarray]] = [[] for _ in prompts]
    turn = 0
    while any(done[i] < len(prompt) for i, prompt in enumerate(prompts)):
        turn += 1
        running = [i for i, p in enumerate(prompts[:turn]) if done[i] < len(p)]
        draw.shuffle(running)
        sizes = [draw.choice([1, 1, 2, 15, 40]) for _ in running]
        parts = [
            (sequences[i], prompts[i][done[i] : done[i] + n])
            for i, n in zip(running, sizes, strict=True)
        ]
        if not parts:
            continue
        rows = step(engine, parts).logits
        for i, (_, tokens) in zip(running, parts, strict=True):
            together[i].append(rows[: len(tokens)])
            rows = rows[len(tokens) :]
            done[i] += len(tokens)
    engine.check_invariants()
    for got, prompt in zip(together, prompts, strict=True):
        subject.check(np.concatenate(got), prompt)


def test_sampled_tokens_are_the_same_beside_a_long_prompt(engine: _core.Engine) -> None:
    """Greedy decode while another prompt is filled in, against decode alone."""

    def decode(others: list[int]) -> list[int]:
        sequence, other = open_greedy(engine), open_greedy(engine)
        token = step(engine, [(sequence, prompt_of("a", 30))], SAMPLE).sampled[0].token
        tokens = [token]
        for i in range(5 if is_emulated() else 20):
            parts, outputs = [(sequence, [token])], [SAMPLE]
            if others:
                parts.insert(i % 2, (other, others[9 * i : 9 * i + 9]))
                outputs.insert(i % 2, [NOTHING, LOGITS][i % 3 == 0])
            result = step(engine, parts, outputs)
            token = next(sampled.token for sampled in result.sampled if sampled.token >= 0)
            tokens.append(token)
        engine.close_sequence(sequence)
        engine.close_sequence(other)
        return tokens

    assert decode(prompt_of("b", 180)) == decode([])


@pytest.mark.cpu_only("near ties of routers may fall otherwise with other kernels")
def test_generated_tokens_are_the_same_in_company(checkpoint: Checkpoint) -> None:
    """Through the scheduler: prompts that share steps of 512 tokens, against each alone."""
    prompts = [prompt_of("company", n, n) for n in (1, 31, 32, 33, 200, 500, 90)]
    params = camelid.SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    with open_llm(checkpoint("chunk16")[0]) as llm:
        together = llm.generate(prompts, params)
        alone = [llm.generate(prompt, params)[0] for prompt in prompts]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]


@pytest.mark.slow_emulated
def test_logits_are_the_same_beside_running_answers(checkpoint: Checkpoint) -> None:
    prompt = prompt_of("read", 300)
    params = camelid.SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    folder, weights = checkpoint("chunk16")
    with open_llm(folder) as llm:
        wanted = llm.logits(prompt)
        answers = llm.stream(prompt_of("answer", 20), params)
        next(iter(answers))
        got = llm.logits(prompt)
        if is_gpu():
            Judge(folder, weights).check(got, prompt)
        else:
            assert_same_bits(got, wanted)
        assert sum(len(delta.token_ids) for delta in answers) == 29


@pytest.mark.cpu_only("a GPU's threads are its own")
@pytest.mark.parametrize("name", ["scout_like", "maverick_like", "int4_g128_asymmetric"])
def test_logits_are_the_same_with_more_threads(name: str, checkpoint: Checkpoint) -> None:
    prompt = prompt_of("threads", 90)
    folder = checkpoint(name)[0]
    one, three = (logits_in_pieces(open_engine(folder, threads=n), prompt, [90]) for n in (1, 3))
    assert_same_bits(three, one)


@pytest.mark.slow_emulated
def test_page_size_moves_logits_by_rounding_only(checkpoint: Checkpoint) -> None:
    folder = checkpoint("scout_like")[0]
    prompt = prompt_of("pages", 100)
    small, large = (
        logits_in_pieces(open_engine(folder, page_size=n), prompt, [100]) for n in (16, 64)
    )
    # Every page ends in one update of the running softmax: other borders, other roundings.
    assert_close(small, large, std=float(large.std()), tolerance=1e-4)


def used(engine: _core.Engine) -> int:
    return engine.memory()["kv_used_bytes"]


@pytest.mark.slow_emulated
def test_local_kv_is_freed_at_the_chunk_boundary(checkpoint: Checkpoint) -> None:
    """A model of chunked layers alone holds nothing at a boundary, at most one chunk ever."""
    engine = open_engine(checkpoint("all_rope")[0], page_size=PAGE)  # chunk 32, two pages
    sequence = open_greedy(engine)
    page = engine.kv_bytes_for(1)
    held = []
    for token in prompt_of("free", 32 * 4 + 5):
        step(engine, [(sequence, [token])], NOTHING)
        held.append(used(engine) // page)
    one_chunk = [1] * 16 + [2] * 15 + [0]
    assert held == (one_chunk * 5)[: len(held)]
    assert engine.kv_bytes_for(32) == engine.kv_bytes_for(1 << 30) == 2 * page
    engine.check_invariants()
    engine.close_sequence(sequence)
    assert used(engine) == 0


@pytest.mark.slow_emulated
def test_global_kv_grows_while_local_kv_does_not(checkpoint: Checkpoint) -> None:
    engine = open_engine(checkpoint("scout_like")[0], page_size=PAGE)  # 4 local layers, 1 global
    global_page = engine.kv_bytes_for(48) - engine.kv_bytes_for(32)
    local_page = engine.kv_bytes_for(16) - global_page
    assert local_page == 4 * global_page
    sequence = open_greedy(engine)
    most = 0
    for n_done, token in enumerate(prompt_of("grow", 150), start=1):
        step(engine, [(sequence, [token])], NOTHING)
        n_local = -(-(n_done % 32) // PAGE)
        assert used(engine) == -(-n_done // PAGE) * global_page + n_local * local_page
        most = max(most, used(engine))
        assert most <= engine.kv_bytes_for(n_done)
    # At its fullest, late in the last whole chunk, it held what is reserved for it to the byte.
    assert engine.kv_bytes_for(127) == 8 * global_page + 2 * local_page
    engine.close_sequence(sequence)
    assert used(engine) == 0
    engine.check_invariants()


def test_one_step_over_many_chunks_never_holds_two(checkpoint: Checkpoint) -> None:
    """A budget of one chunk is enough for a prompt of five given in one step."""
    folder = checkpoint("all_rope")[0]
    roomy = open_engine(folder, page_size=PAGE)
    memory = roomy.memory()
    limit = memory["weight_bytes"] + memory["workspace_bytes"] + roomy.kv_bytes_for(32)
    tight = open_engine(folder, page_size=PAGE, memory_bytes=limit)
    assert tight.memory()["kv_limit_bytes"] == tight.kv_bytes_for(32)
    prompt = prompt_of("tight", 150)
    assert_same_bits(logits_in_pieces(tight, prompt, [150]), logits_in_pieces(roomy, prompt, [150]))


@pytest.mark.slow_emulated
def test_all_logits_of_a_prompt_too_long_for_one_wave(checkpoint: Checkpoint) -> None:
    """More rows than the logits of one wave, beside a sequence that only samples."""
    folder, weights = checkpoint("no_chunk")
    engine = open_engine(folder, page_size=PAGE)
    prompt, beside = prompt_of("long", 700), prompt_of("beside", 20)
    parts = [(open_greedy(engine), prompt), (open_greedy(engine), beside)]
    result = step(engine, parts, [LOGITS, SAMPLE])
    assert result.logits.shape[0] == 700
    Subject(engine, Judge(folder, weights)).check(result.logits, prompt)
    (alone,) = step(engine, [(open_greedy(engine), beside)], SAMPLE).sampled
    assert result.sampled[1].token == alone.token


@pytest.mark.slow_emulated
def test_steps_beyond_the_budget_change_nothing(checkpoint: Checkpoint) -> None:
    """Random steps in a cache too small for them: refused whole, or right to the bit."""
    folder = checkpoint("chunk16")[0]
    roomy = open_engine(folder, page_size=PAGE)
    memory = roomy.memory()
    limit = memory["weight_bytes"] + memory["workspace_bytes"] + 5 * roomy.kv_bytes_for(30)
    tight = open_engine(folder, page_size=PAGE, memory_bytes=limit)
    draw = random.Random(2)
    pairs: list[tuple[int, int]] = []  # the same sequence in the tight and in the roomy engine
    n_refused = n_run = 0
    n_steps = 40 if is_emulated() else 150
    for _ in range(n_steps):
        if len(pairs) < 4:
            pairs.append((open_greedy(tight), open_greedy(roomy)))
        chosen = draw.sample(pairs, draw.randint(1, len(pairs)))
        pieces = [prompt_of("tight", draw.choice([1, 3, 17, 60]), draw.random()) for _ in chosen]
        before = used(tight)
        try:
            rows = step(tight, list(zip([t for t, _ in chosen], pieces, strict=True))).logits
        except camelid.errors.CapacityError:
            n_refused += 1
            assert used(tight) == before
            for pair in chosen[:1]:
                tight.close_sequence(pair[0])
                roomy.close_sequence(pair[1])
                pairs.remove(pair)
        else:
            n_run += 1
            wanted = step(roomy, list(zip([r for _, r in chosen], pieces, strict=True))).logits
            assert_same_bits(rows, wanted)
        tight.check_invariants()
        assert used(tight) <= tight.memory()["kv_limit_bytes"]
    assert n_refused > n_steps / 8
    assert n_run > n_steps / 8


@pytest.mark.parametrize("kv_cache", kv_caches()[1:])
def test_logits_of_a_smaller_kv_are_the_same_when_the_prompt_is_cut(
    kv_cache: str, checkpoint: Checkpoint
) -> None:
    folder, weights = checkpoint("scout_like")
    prompt = prompt_of("cut", 90)
    judge = Judge(folder, weights, kv=kv_cache)
    subject = Subject(open_engine(folder, kv_cache=kv_cache), judge)
    for sizes, threads in [([7], 1)] if is_emulated() else [([1], 1), ([31, 1, 2, 50], 3)]:
        engine = open_engine(folder, kv_cache=kv_cache, threads=threads)
        subject.check(logits_in_pieces(engine, prompt, sizes), prompt)


@pytest.mark.slow_emulated
def test_freed_pages_do_not_leak_into_another_sequence(checkpoint: Checkpoint) -> None:
    engine = open_engine(checkpoint("scout_like")[0], page_size=PAGE)
    wanted = logits_in_pieces(engine, prompt_of("clean", 70), [70])
    for seed in range(3):
        logits_in_pieces(engine, prompt_of("dirt", 120, seed), [50])
    assert_same_bits(logits_in_pieces(engine, prompt_of("clean", 70), [70]), wanted)


@pytest.mark.parametrize("kv_cache", kv_caches())
@pytest.mark.parametrize("fast", [False] if is_gpu() else [False, True])
@pytest.mark.parametrize(("name", "isa"), quick(CASES, [("odd_shapes", "gpu")]))
def test_numbers_that_are_not_finite_stay_in_their_own_sequence(
    name: str,
    isa: str,
    fast: bool,
    kv_cache: str,
    checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beside a sequence of NaN, and in the pages it leaves, others keep their bits."""
    use_isa(monkeypatch, isa)
    folder, weights = checkpoint(name)
    engine = open_engine(folder, page_size=PAGE, fast=fast, kv_cache=kv_cache)
    (dim,) = next(
        value.shape for key, value in weights.items() if key.endswith("model.norm.weight")
    )
    prompt = prompt_of("good", 45)
    wanted = logits_in_pieces(engine, prompt, [45])
    judge = Judge(folder, weights, kv=kv_cache)

    def assert_same(got: np.ndarray) -> None:
        judge.check(got, prompt) if is_gpu() else assert_same_bits(got, wanted)

    for value in (np.nan, np.inf):
        rows = np.where(np.arange(45 + 20) < 45, -1, 0).astype(np.int32)
        features = Features(np.full((1, dim), value, np.float32), rows)
        good, bad = open_greedy(engine), open_greedy(engine)
        result = step(engine, [(good, prompt), (bad, [1] * 20)], [LOGITS, SAMPLE], features)
        assert_same(result.logits)
        assert result.sampled[1].not_finite >= 0
        assert result.sampled[1].token == -1
        engine.close_sequence(bad)
        engine.close_sequence(good)
        assert_same(logits_in_pieces(engine, prompt, [1, 7]))


@pytest.mark.cpu_only("a GPU has no f32 to compare with; its formats are judged above")
@pytest.mark.parametrize("kv_cache", ["bf16", "int8"])
@pytest.mark.parametrize("name", ["scout_like", "maverick_like", "no_chunk"])
def test_smaller_kv_is_close_to_f32_kv(name: str, kv_cache: str, checkpoint: Checkpoint) -> None:
    prompt = next(variant for variant in VARIANTS if variant.name == name).prompt()
    folder = checkpoint(name)[0]
    exact, rounded = (
        logits_in_pieces(open_engine(folder, kv_cache=kind), prompt, [len(prompt)])
        for kind in ("f32", kv_cache)
    )
    # A BF16 value is off by up to 2^-9 of itself, an int8 one by 1/254 of its head's largest.
    # Averaging over keys takes from that, and layers add to it. The median, because a row whose
    # expert was chosen by a hair may choose another.
    worst_of_row = np.abs(rounded - exact).max(axis=1) / exact.std()
    off = {"bf16": 2**-9, "int8": 1 / 254}[kv_cache]
    assert 0 < np.median(worst_of_row) < 10 * off
