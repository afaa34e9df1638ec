"""How many kernels a step of decoding takes: what is fused stays fused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import backends
from checkpoints import Quantization
from engines import open_engine, open_greedy, step
from variants import Variant

_PLAIN = ("re:.*lm_head", "re:.*router")


def launches(folder: Path, n_layers: int, n_tokens: int, **config: Any) -> int:
    """Return what a step of decoding of n_tokens sequences launches."""
    variant = Variant(
        "int4",
        {"num_hidden_layers": n_layers, "num_local_experts": 4, **config},
        quantization=Quantization(ignore=_PLAIN),
    )
    variant.write(folder)
    engine = open_engine(folder)
    sequences = [open_greedy(engine) for _ in range(n_tokens)]
    step(engine, [(sequence, [5, 6, 7]) for sequence in sequences])
    before = backends.n_launches()
    step(engine, [(sequence, [9]) for sequence in sequences])  # nothing runs ahead of logits
    return backends.n_launches() - before


@pytest.mark.gpu_only("a CPU launches nothing")
@pytest.mark.parametrize(("n_tokens", "apart"), [(1, 0), (9, 1)])
@pytest.mark.parametrize(
    ("feed_forward", "per_layer"),
    [
        # Queries, keys and values to their place; attention; its output; experts.
        ({"interleave_moe_layer_step": 1}, 4),
        ({"interleave_moe_layer_step": 1, "num_experts_per_tok": 2}, 5),  # and a norm
        ({"moe_layers": []}, 5),  # for experts: gate and up; down
    ],
)
def test_launches_of_a_layer(
    tmp_path: Path, feed_forward: dict[str, Any], per_layer: int, n_tokens: int, apart: int
) -> None:
    """From 9 tokens on queries, keys and values go to their place in a launch of their own."""
    if not backends.is_emulated():
        pytest.skip("of an emulated GPU: it counts")
    two, four = (launches(tmp_path / str(n), n, n_tokens, **feed_forward) for n in (2, 4))
    assert four - two == 2 * (per_layer + apart)
