"""camelid against transformers on every variant (tests/variants.py, tools/make_goldens.py).

Tolerance: the exactness bar, 2e-3 of the logits' standard deviation. Sums of float32 in another
order move them by about 1e-5 of it, so what comes near the bar is a mistake, not rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import camelid
from camelid._core import testing
from checkpoints import Weights
from engines import assert_close
from variants import GOLDENS, N_GREEDY, VARIANTS, Variant, digest

TOLERANCE = 2e-3  # standard deviations
ALL = [variant.name for variant in VARIANTS]
# The other instruction sets share the model's code; these differ in kernels.
FOR_EACH_ISA = ["scout_like", "odd_shapes", "top2", "f16", "bf16", "int4_g128_asymmetric", "int8"]
CASES = [(name, testing.isas()[0]) for name in ALL] + [
    (name, isa) for isa in testing.isas()[1:] for name in FOR_EACH_ISA
]


def golden(name: str) -> dict[str, Any]:
    with np.load(GOLDENS / f"{name}.npz") as file:
        return dict(file)


@pytest.mark.parametrize(("name", "isa"), CASES)
def test_logits_and_greedy_tokens_equal_transformers(
    name: str,
    isa: str,
    checkpoint: Callable[[str], tuple[Path, Weights]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CAMELID_CPU_ISA", isa)
    folder, _ = checkpoint(name)
    wanted = golden(name)
    prompt = wanted["prompt"].tolist()
    with camelid.LLM(folder, device="cpu", threads=2) as llm:
        logits = llm.logits(prompt)
        params = camelid.SamplingParams(max_tokens=N_GREEDY, temperature=0.0, ignore_eos=True)
        (completion,) = llm.generate(prompt, params)

    std = float(wanted["std"])
    assert logits.dtype == np.float32
    assert_close(logits[:, wanted["columns"]], wanted["logits"], std=std, tolerance=TOLERANCE)
    assert_close(logits[-1], wanted["last"], std=std, tolerance=TOLERANCE, what="last logits")
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
