"""camelid against transformers on every variant (tests/variants.py, tools/make_goldens.py).

Tolerance on the CPU: the exactness bar, 2e-3 of the logits' standard deviation. Sums of float32 in
another order move them by about 1e-5 of it, so what comes near the bar is a mistake, not rounding.
A GPU is held to the reference that rounds as it does (tests/judge.py), and by its typical row to
transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import camelid
from backends import is_emulated, is_gpu, isas, quick, use_isa
from checkpoints import Weights
from engines import assert_close, open_llm
from judge import Judge, assert_likeliest, rows_off
from variants import GOLDENS, N_GREEDY, VARIANTS, Variant, digest

TOLERANCE = 2e-3  # standard deviations
ALL = [variant.name for variant in VARIANTS]
# The other instruction sets share the model's code; these differ in kernels.
FOR_EACH_ISA = ["scout_like", "odd_shapes", "top2", "f16", "bf16", "int4_g128_asymmetric", "int8"]
CASES = [(name, isas()[0]) for name in ALL] + [
    (name, isa) for isa in isas()[1:] for name in FOR_EACH_ISA
]
QUICK = ["all_nope", "dense", "odd_shapes", "int4_g128_asymmetric", "int8"]


def golden(name: str) -> dict[str, Any]:
    with np.load(GOLDENS / f"{name}.npz") as file:
        return dict(file)


@pytest.mark.parametrize(("name", "isa"), quick(CASES, [(name, "gpu") for name in QUICK]))
def test_logits_and_greedy_tokens_equal_transformers(
    name: str,
    isa: str,
    checkpoint: Callable[[str], tuple[Path, Weights]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_isa(monkeypatch, isa)
    folder, weights = checkpoint(name)
    wanted = golden(name)
    prompt = wanted["prompt"].tolist()
    n_greedy = 4 if is_emulated() else N_GREEDY
    with open_llm(folder, threads=2) as llm:
        params = camelid.SamplingParams(max_tokens=n_greedy, temperature=0.0, ignore_eos=True)
        (completion,) = llm.generate(prompt, params)
        logits = llm.logits(prompt + completion.token_ids)
    assert logits.dtype == np.float32
    std, n = float(wanted["std"]), len(prompt)
    if is_gpu():
        judged = Judge(folder, weights).check(logits, prompt + completion.token_ids)
        assert_likeliest(completion.token_ids, judged[n - 1 :])
        off = rows_off(logits[:n, wanted["columns"]], wanted["logits"], std)
        assert np.median(off) < 0.03  # of all variants, in which a router's near ties fall at will
        return
    assert_close(logits[:n, wanted["columns"]], wanted["logits"], std=std, tolerance=TOLERANCE)
    assert_close(logits[n - 1], wanted["last"], std=std, tolerance=TOLERANCE, what="last logits")
    assert completion.token_ids == wanted["greedy"].tolist()


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_golden_is_of_this_checkpoint(
    variant: Variant, checkpoint: Callable[[str], tuple[Path, Weights]]
) -> None:
    wanted = golden(variant.name)
    _, weights = checkpoint(variant.name)
    stale = "tests/checkpoints.py or the variant changed: run tools/make_goldens.py"
    assert wanted["prompt"].tolist() == variant.prompt(), stale
    assert str(wanted["digest"]) == digest(weights), stale
