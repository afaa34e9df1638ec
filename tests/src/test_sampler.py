"""The sampler (src/step/sampler.cpp): each rule alone, their order, and hostile values.

Draws are compared with exact probabilities. With N draws a frequency has a standard deviation of at
most 0.5 / sqrt(N); five of them are allowed, and seeds are fixed, so no test is a matter of luck.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from camelid import InvalidRequest, _core
from camelid._core import testing

N_DRAWS = 4000
ALLOWED = 5 * 0.5 / N_DRAWS**0.5
VOCAB = 202_048  # of Llama 4


def make(vocab_size: int, **params: Any) -> testing.Sampler:
    return testing.Sampler(_core.SamplerParams(**params), vocab_size)


def logits_of(values: Any) -> np.ndarray:
    return np.asarray(values, np.float32)


def softmax(logits: Any) -> np.ndarray:
    x = np.asarray(logits, np.float64)
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def frequencies(logits: np.ndarray, *, n_draws: int = N_DRAWS, **params: Any) -> np.ndarray:
    """How often each token is drawn by one sampler, without penalties."""
    sampler = make(len(logits), **params)
    tokens = [sampler.sample(logits).token for _ in range(n_draws)]
    return np.bincount(tokens, minlength=len(logits)) / n_draws


def assert_distribution(logits: Any, expected: np.ndarray, **params: Any) -> None:
    got = frequencies(logits_of(logits), seed=11, **params)
    assert not got[expected == 0].any(), "drew a token the rule excludes"
    assert np.abs(got - expected).max() < ALLOWED


def restricted(probabilities: np.ndarray, kept: list[int]) -> np.ndarray:
    out = np.zeros_like(probabilities)
    out[kept] = probabilities[kept]
    return out / out.sum()


LOGITS = logits_of([1.0, 3.0, -1.0, 2.0, 0.5, 2.5, -8.0])
BY_RANK = [1, 5, 3, 0, 4, 2, 6]


def test_greedy_takes_the_best_and_the_lowest_id_among_equals() -> None:
    assert make(7, temperature=0).sample(LOGITS).token == 1
    assert make(5, temperature=0).sample(logits_of([0, 2, 1, 2, 2])).token == 1
    assert make(3, temperature=0).sample(logits_of([-7, -7, -7])).token == 0
    assert make(1, temperature=0).sample(logits_of([3])).token == 0


@pytest.mark.parametrize("rule", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}], ids=str)
def test_the_narrowest_rule_is_greedy(rule: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    for seed in range(20):
        logits = rng.standard_normal(5000).astype(np.float32)
        sampler = make(5000, temperature=2.0, seed=seed, **rule)
        assert sampler.sample(logits).token == logits.argmax()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_temperature_divides_the_logits(temperature: float) -> None:
    assert_distribution(LOGITS, softmax(LOGITS / temperature), temperature=temperature)


def test_extreme_temperatures_neither_overflow_nor_divide_by_zero() -> None:
    assert set(np.flatnonzero(frequencies(LOGITS, n_draws=50, temperature=1e-40))) == {1}
    assert_distribution(LOGITS, np.full(7, 1 / 7), temperature=3e38)


def test_top_k_keeps_the_k_best() -> None:
    for k in (1, 2, 5, 7, 100):
        assert_distribution(LOGITS, restricted(softmax(LOGITS), BY_RANK[:k]), top_k=k)


def test_top_k_keeps_the_lower_ids_among_equals() -> None:
    logits = [0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0]
    assert_distribution(logits, restricted(np.ones(7), [1, 3, 5]), top_k=3)
    assert_distribution([2.0] * 7, restricted(np.ones(7), [0, 1]), top_k=2)


def test_top_p_keeps_the_fewest_tokens_that_reach_it() -> None:
    probabilities = [0.1, 0.4, 0.05, 0.2, 0.25]
    logits = np.log(probabilities)
    for top_p, kept in [(0.39, [1]), (0.41, [1, 4]), (0.64, [1, 4]), (0.66, [1, 4, 3]),
                        (0.94, [1, 4, 3, 0]), (0.96, [1, 4, 3, 0, 2])]:  # fmt: skip
        assert_distribution(logits, restricted(np.array(probabilities), kept), top_p=top_p)


def test_min_p_is_relative_to_the_best() -> None:
    probabilities = np.array([0.1, 0.4, 0.05, 0.2, 0.25])
    for min_p, kept in [(0.7, [1]), (0.6, [1, 4]), (0.45, [1, 3, 4]), (0.2, [0, 1, 3, 4])]:
        assert_distribution(np.log(probabilities), restricted(probabilities, kept), min_p=min_p)


def test_top_p_is_of_what_min_p_and_top_k_left() -> None:
    probabilities = np.array([0.4, 0.3, 0.2, 0.1])
    logits = np.log(probabilities)
    # Of the two best, the first has 4/7 > 0.55; of all four it has 0.4.
    assert_distribution(logits, np.array([1.0, 0, 0, 0]), top_k=2, top_p=0.55)
    assert_distribution(logits, np.array([1.0, 0, 0, 0]), min_p=0.6, top_p=0.55)
    assert_distribution(logits, restricted(probabilities, [0, 1]), top_p=0.55)


def test_temperature_comes_before_min_p_and_top_p() -> None:
    probabilities = np.array([0.5, 0.3, 0.2])
    hot = softmax(np.log(probabilities) / 2)  # 0.42 0.32 0.26
    assert_distribution(np.log(probabilities), hot, temperature=2, min_p=0.5)
    assert_distribution(np.log(probabilities), hot, temperature=2, top_p=0.79)


def test_logit_bias_is_added_before_everything() -> None:
    bias = {0: 1.5, 2: -100.0, 6: 9.0}
    biased = LOGITS.copy()
    biased[[0, 2, 6]] += [1.5, -100.0, 9.0]
    assert_distribution(LOGITS, softmax(biased), logit_bias=bias)
    assert make(7, temperature=0, logit_bias={6: 20.0}).sample(LOGITS).token == 6


def test_banned_tokens_are_never_drawn() -> None:
    params = {"banned": [1, 5], "logit_bias": {1: 100.0}}
    assert_distribution(LOGITS, restricted(softmax(LOGITS), [0, 2, 3, 4, 6]), **params)
    assert make(7, temperature=0, **params).sample(LOGITS).token == 3


def greedy_tokens(logits: np.ndarray, n_tokens: int, prompt: list[int], **params: Any) -> list[int]:
    sampler = make(len(logits), temperature=0, **params)
    sampler.observe_prompt(prompt)
    return [sampler.sample(logits).token for _ in range(n_tokens)]


def reference_tokens(
    logits: np.ndarray, n_tokens: int, prompt: list[int], *, logit_bias: dict[int, float],
    repetition_penalty: float, presence_penalty: float, frequency_penalty: float,
) -> list[int]:  # fmt: skip
    """vLLM's order: bias, repetition of prompt and output, frequency and presence of the output."""
    counts = np.zeros(len(logits), int)
    output: list[int] = []
    for _ in range(n_tokens):
        x = logits.astype(np.float64)
        for token, bias in logit_bias.items():
            x[token] += bias
        seen = counts > 0
        seen[prompt] = True
        x[seen] = np.where(x > 0, x / repetition_penalty, x * repetition_penalty)[seen]
        x -= frequency_penalty * counts + presence_penalty * (counts > 0)
        output.append(int(x.argmax()))
        counts[output[-1]] += 1
    return output


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.8},
        {"presence_penalty": 0.7},
        {"presence_penalty": -0.7},
        {"frequency_penalty": 0.11},
        {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.07},
        {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "logit_bias": {9: 2.0, 3: -1.0}},
    ],
    ids=str,
)
def test_penalties_follow_the_reference(params: dict[str, Any]) -> None:
    logits = np.random.default_rng(1).standard_normal(12).astype(np.float32)
    prompt = [int(logits.argmax()), 5, 5, 7]
    neutral = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    full = {**neutral, "logit_bias": {}, **params}
    expected = reference_tokens(logits, 60, prompt, **full)
    assert greedy_tokens(logits, 60, prompt, **params) == expected


def test_only_the_repetition_penalty_counts_the_prompt() -> None:
    logits = logits_of([1.0, 0.9])
    assert greedy_tokens(logits, 1, [0], repetition_penalty=1.5) == [1]
    assert greedy_tokens(logits, 1, [0], presence_penalty=1.5, frequency_penalty=1.5) == [0]


def test_penalties_that_overflow_leave_finite_logits() -> None:
    logits = logits_of([3e38, -3e38, 1.0])
    for params in (
        {"repetition_penalty": 1e-38},
        {"repetition_penalty": 3e38},
        {"presence_penalty": -3e38, "frequency_penalty": -3e38},
        {"logit_bias": {0: 3e38, 1: -3e38}},
        {"logit_bias": {0: 3e38, 1: 3e38, 2: 3e38}, "top_k": 2, "top_p": 0.5},
    ):
        sampler = make(3, seed=1, **params)
        sampler.observe_prompt([0, 1, 2])
        assert all(sampler.sample(logits).token in (0, 1, 2) for _ in range(5))


def test_logprobs_are_of_the_model_itself() -> None:
    rng = np.random.default_rng(2)
    logits = (rng.standard_normal(1000) * 4).astype(np.float32)
    expected = np.log(softmax(logits))
    rules = {"temperature": 0.7, "top_k": 20, "logit_bias": {3: 30.0}, "presence_penalty": 5.0}
    sampler = make(1000, n_logprobs=30, seed=4, **rules)
    for _ in range(20):
        sampled = sampler.sample(logits)
        order = np.argsort(-logits, kind="stable")[:30]
        assert [token for token, _ in sampled.top] == order.tolist()
        # Logits of order ten in float32, and as many roundings as a sum in double precision allows.
        np.testing.assert_allclose([p for _, p in sampled.top], expected[order], atol=2e-6)
        np.testing.assert_allclose(sampled.logprob, expected[sampled.token], atol=2e-6)
        assert dict(sampled.top).get(sampled.token, sampled.logprob) == sampled.logprob


def test_logprobs_come_as_many_as_asked() -> None:
    none = make(7, temperature=0).sample(LOGITS)
    assert (none.logprob, none.top) == (0.0, [])
    zero = make(7, temperature=0, n_logprobs=0).sample(LOGITS)
    assert zero.logprob < 0
    assert zero.top == []
    assert len(make(7, temperature=0, n_logprobs=50).sample(LOGITS).top) == 7
    ties = make(4, temperature=0, n_logprobs=3).sample(logits_of([1, 2, 1, 2]))
    assert [token for token, _ in ties.top] == [1, 3, 0]
    far = make(2, temperature=0, n_logprobs=2).sample(logits_of([3e38, -3e38]))
    assert far.logprob == 0.0


def draws(seed: int, n_draws: int = 200) -> list[int]:
    sampler = make(1000, seed=seed)
    logits = np.zeros(1000, np.float32)
    return [sampler.sample(logits).token for _ in range(n_draws)]


def test_seed_decides_every_draw() -> None:
    assert draws(3) == draws(3)
    assert draws(3) != draws(4)
    for a, b in [(0, 1), (1, 2**64 - 1), (2**63, 0)]:
        same = np.equal(draws(a), draws(b)).sum()
        assert same <= 3  # of 200, where 0.2 are expected


def test_draws_of_neighbouring_seeds_are_uniform() -> None:
    logits = np.zeros(10, np.float32)
    first = [make(10, seed=seed).sample(logits).token for seed in range(N_DRAWS)]
    assert np.abs(np.bincount(first, minlength=10) / N_DRAWS - 0.1).max() < ALLOWED


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_named_and_not_sampled(bad: float) -> None:
    for temperature in (0.0, 1.0):
        logits = LOGITS.copy()
        logits[4] = bad
        sampler = make(7, temperature=temperature, seed=3)
        sampled = sampler.sample(logits)
        assert (sampled.not_finite, sampled.token) == (4, -1)
        again = sampler.sample(LOGITS)  # as if the other had never been
        assert again.not_finite == -1
        assert again.token == make(7, temperature=temperature, seed=3).sample(LOGITS).token


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, np.nan, np.inf]),
        ("top_k", [-1]),
        ("top_p", [0.0, -0.5, 1.01, np.nan]),
        ("min_p", [-0.01, 1.01, np.nan]),
        ("repetition_penalty", [0.0, -1.0, np.inf, np.nan]),
        ("presence_penalty", [np.inf, np.nan]),
        ("frequency_penalty", [-np.inf, np.nan]),
        ("logit_bias", [{7: 1.0}, {-1: 1.0}, {0: np.inf}, {0: np.nan}]),
        ("banned", [[7], [-1]]),
    ],
)
def test_parameters_out_of_range_are_refused_by_name(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(InvalidRequest, match=rf"\[sampling\] {name} "):
            make(7, **{name: value})


def test_number_of_logprobs_is_bounded() -> None:
    for n in (-2, 1001):
        with pytest.raises(InvalidRequest, match=r"\[sampling\] logprobs is -?\d+, expected"):
            make(7, n_logprobs=n)


def test_banning_every_token_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="every token is banned"):
        make(3, banned=[2, 0, 1, 1])
    make(3, banned=[0, 1, 1])


def vocabulary(spread: float) -> np.ndarray:
    return (np.random.default_rng(3).standard_normal(VOCAB) * spread).astype(np.float32)


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
def test_rules_on_a_whole_vocabulary_match_a_sort(spread: float) -> None:
    logits = vocabulary(spread)
    order = np.lexsort((np.arange(VOCAB), -logits))
    cumulative = np.cumsum(softmax(logits)[order])
    for top_k in (1, 50, 5000, 150_000):
        kept = set(order[:top_k].tolist())
        sampler = make(VOCAB, top_k=top_k)
        assert all(sampler.sample(logits).token in kept for _ in range(8))
    for top_p in (0.001, 0.5, 0.9, 0.999):
        n_kept = int(np.searchsorted(cumulative, top_p)) + 2  # one more: sums differ in rounding
        kept = set(order[:n_kept].tolist())
        sampler = make(VOCAB, top_p=top_p)
        assert all(sampler.sample(logits).token in kept for _ in range(8))


def test_draws_from_many_tokens_follow_their_ranks() -> None:
    logits = vocabulary(1.0)[:20_000]
    order = np.argsort(-logits)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    cumulative = np.cumsum(softmax(logits)[order])
    sampler = make(len(logits), seed=5, top_p=0.8)
    n = 1000
    got = np.sort([cumulative[rank[sampler.sample(logits).token]] / 0.8 for _ in range(n)])
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is exceeded once in a thousand seeds.
    assert np.abs(got - (np.arange(n) + 0.5) / n).max() < 1.95 / n**0.5


def best_of(logits: np.ndarray, n: int, temperature: float) -> tuple[Any, ...]:
    """What a device says of a row: the n best, sums over all, and what is not finite."""
    order = np.argsort(-logits, kind="stable")[:n]
    differences = logits.astype(np.float64) - logits[order[0]]
    scale = 1 / temperature if temperature > 0 else 1.0
    return (
        logits[order],
        order.tolist(),
        float(np.exp(differences).sum()),
        float(np.exp(differences * scale).sum()),
        -1,
    )


@pytest.mark.parametrize("n_best", [1, 7, 128])
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0},
        {"temperature": 0.6, "top_p": 0.9},
        {"temperature": 1.5, "top_p": 0.5, "min_p": 0.01},
        {"temperature": 0.8, "top_k": 20},
        {"temperature": 2.0, "top_k": 100, "top_p": 0.95},
        {"temperature": 0.7, "min_p": 0.1},
        {"temperature": 1.0},
        {"temperature": 0.3, "n_logprobs": 3},
    ],
)
def test_the_best_logits_decide_as_all_do_or_not_at_all(
    params: dict[str, Any], n_best: int
) -> None:
    """The same tokens and logprobs, draw for draw; None wherever tokens beyond could be drawn."""
    rng = np.random.default_rng(len(params) + n_best)
    decided = 0
    for seed in range(40):
        vocab = 1000 if seed % 4 else 100
        logits = (rng.standard_normal(vocab) * 3).astype(np.float32)
        if seed % 3 == 0:
            logits = np.round(logits)  # many are equal
        whole, top = (make(vocab, seed=seed, **params) for _ in range(2))
        best = best_of(logits, n_best, params["temperature"])
        for _ in range(5):
            got = top.sample_top(*best)
            if got is None:
                break
            decided += 1
            wanted = whole.sample(logits)
            assert got.token == wanted.token
            assert got.logprob == pytest.approx(wanted.logprob, abs=1e-5)
            assert [token for token, _ in got.top] == [token for token, _ in wanted.top]
    if params["temperature"] == 0 or (n_best == 128 and params != {"temperature": 1.0}):
        assert decided > 0


@pytest.mark.parametrize(
    "rules",
    [
        {"repetition_penalty": 1.3},
        {"presence_penalty": 1.5, "frequency_penalty": 0.25},
        {"logit_bias": {3: -2.0, 17: -90.0}},
        {"banned": list(range(0, 100, 3))},
        {"repetition_penalty": 1.1, "banned": [5], "logit_bias": {9: -1.0}},
    ],
)
@pytest.mark.parametrize("choice", [{"temperature": 0}, {"temperature": 0.9, "top_k": 5}])
def test_the_best_logits_decide_where_rules_only_lower(
    rules: dict[str, Any], choice: dict[str, Any]
) -> None:
    """Penalties of tokens that are not among the best change nothing about the best."""
    rng = np.random.default_rng(7)
    decided = refused = 0
    for seed in range(30):
        vocab = 400
        logits = np.round(rng.standard_normal(vocab) * 3, 1).astype(np.float32)
        whole, top = (make(vocab, seed=seed, n_logprobs=2, **choice, **rules) for _ in range(2))
        prompt = rng.integers(0, vocab, 40).tolist()
        for sampler in (whole, top):
            sampler.observe_prompt(prompt)
        for _ in range(12):
            got = top.sample_top(*best_of(logits, 16, choice["temperature"]))
            if got is None:
                refused += 1
                break
            decided += 1
            wanted = whole.sample(logits)
            assert got.token == wanted.token
            assert got.logprob == pytest.approx(wanted.logprob, abs=1e-5)
            assert [token for token, _ in got.top] == [token for token, _ in wanted.top]
    assert decided > 100


def test_a_token_drawn_from_the_whole_row_is_taken_where_nothing_else_decides() -> None:
    rng = np.random.default_rng(3)
    for seed in range(50):
        logits = rng.standard_normal(3000).astype(np.float32)
        temperature = float(rng.uniform(0.5, 2))
        whole, top = (
            make(3000, seed=seed, temperature=temperature, n_logprobs=1) for _ in range(2)
        )
        for _ in range(4):
            assert top.draws_plainly
            weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
            drawn = int(np.argmax(np.cumsum(weights) > top.uniform * weights.sum()))
            best = best_of(logits, 128, temperature)
            got = top.sample_top(*best, drawn=drawn, drawn_logit=logits[drawn])
            wanted = whole.sample(logits)
            assert got.token == wanted.token == drawn
            assert got.logprob == pytest.approx(wanted.logprob, abs=1e-5)
    others: list[dict[str, Any]] = [
        {"temperature": 0}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}, {"banned": [1]},
        {"repetition_penalty": 1.1}, {"logit_bias": {3: 1.0}},
    ]  # fmt: skip
    for params in others:
        assert not make(10, **params).draws_plainly


def test_the_best_logits_do_not_decide_where_rules_raise_others() -> None:
    logits = logits_of(np.arange(50.0))
    for rule in (
        {"repetition_penalty": 0.9},
        {"frequency_penalty": -0.5},
        {"presence_penalty": -0.5},
        {"logit_bias": {3: 90.0}},
        {"banned": list(range(40, 50))},
        {"n_logprobs": 11},
    ):
        sampler = make(50, temperature=0, **rule)
        sampler.observe_prompt([1])
        sampler.sample(np.roll(logits, 10))  # 9, which is not among the best
        assert sampler.sample_top(*best_of(logits, 10, 0.0)) is None, rule
    assert make(50, temperature=0).sample_top(*best_of(logits, 10, 0.0)).token == 49
    assert make(50, temperature=0, banned=[49]).sample_top(*best_of(logits, 10, 0.0)).token == 48
    raised = make(50, temperature=0, logit_bias={45: 90.0})
    assert raised.sample_top(*best_of(logits, 10, 0.0)).token == 45
    bad = (logits_of([]), [], 0.0, 0.0, 7)
    assert make(50, temperature=0).sample_top(*bad).not_finite == 7


def test_a_temperature_of_almost_0_is_greedy() -> None:
    logits = logits_of(np.arange(50.0))
    assert make(50, temperature=1e-40).sample_top(*best_of(logits, 10, 0.0)).token == 49
