"""Tokens are those that the sampler draws from whole rows, whoever looks at the logits.

A GPU finds the best of them and draws from all, so that rows need not be downloaded. The same seed
then gives the same tokens as on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import backends
from camelid import _core
from camelid._core import testing
from checkpoints import Weights
from engines import LOGITS, SAMPLE, open_engine, open_greedy, step

CHOICES: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 1.7, "n_logprobs": 3},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.5, "top_k": 40, "top_p": 0.95},
    {"temperature": 1.0, "min_p": 0.001},
    {"temperature": 0.0, "repetition_penalty": 1.3, "n_logprobs": 2},
    {"temperature": 1.0, "frequency_penalty": 0.7, "presence_penalty": 0.2},
    {"temperature": 0.0, "logit_bias": {3: 2.0, 250: -1.0}, "banned": [1, 2]},
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_tokens_are_drawn_as_from_whole_rows(
    checkpoint: Callable[[str], tuple[Path, Weights]], choice: dict[str, Any]
) -> None:
    """Beside each sequence runs one that is given the same tokens, and tells all its logits."""
    engine = open_engine(checkpoint("dense")[0])
    vocab = 271
    prompt = np.random.default_rng(5).integers(0, 256, 9).tolist()
    params = _core.SamplerParams(seed=11, **choice)
    wanted = testing.Sampler(params, vocab)
    drawn, shown = engine.open_sequence(params), open_greedy(engine)
    tokens = prompt
    for _ in range(12):
        (got,) = step(engine, [(drawn, tokens)], SAMPLE).sampled
        logits = step(engine, [(shown, tokens)], LOGITS).logits[-1]
        wanted.observe_prompt(tokens)
        expected = wanted.sample(logits)
        assert got.token == expected.token
        assert got.logprob == pytest.approx(expected.logprob, abs=1e-4)
        assert [token for token, _ in got.top] == [token for token, _ in expected.top]
        tokens = [got.token]


ON_DEVICE: list[dict[str, Any]] = [
    {"temperature": 0.0, "n_logprobs": 5},
    {"temperature": 1.0, "n_logprobs": 0},
    {"temperature": 0.6, "top_p": 0.5},
    {"temperature": 1.2, "top_k": 50},
    {"temperature": 0.0, "repetition_penalty": 1.1, "banned": [3]},
]


@pytest.mark.gpu_only("the host sees the CPU's logits anyway")
def test_a_step_of_decoding_downloads_once(
    checkpoint: Callable[[str], tuple[Path, Weights]],
) -> None:
    """Whatever sequences want of their logits, the host asks for none of the rows themselves."""
    if not backends.is_emulated():
        pytest.skip("of an emulated GPU: it counts")
    engine = open_engine(checkpoint("dense")[0])
    sequences = [engine.open_sequence(_core.SamplerParams(seed=3, **one)) for one in ON_DEVICE]
    step(engine, [(sequence, [5, 6, 7]) for sequence in sequences], SAMPLE)
    tokens = [9] * len(sequences)
    for _ in range(6):
        before = backends.n_downloads()
        sampled = step(engine, list(zip(sequences, [[t] for t in tokens], strict=True)), SAMPLE)
        assert backends.n_downloads() == before + 1
        tokens = [one.token for one in sampled.sampled]
