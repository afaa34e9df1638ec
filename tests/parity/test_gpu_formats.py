"""Experts whose matrices a GPU holds in different ways: each of them tiles, or rows of bf16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from backends import quick
from checkpoints import Quantization, write_checkpoint
from engines import logits_in_pieces, open_engine
from judge import Judge
from variants import VARIANTS

_PLAIN = ("re:.*lm_head", "re:.*router", "re:.*self_attn")
# Attention in tiles begins norms, which others then have to finish.
_TILED = ("re:.*lm_head", "re:.*router")
_LONG = {"attention_chunk_size": 96}  # steps end where chunks do
CASES: dict[str, tuple[dict[str, Any], Quantization]] = {
    "plain down": ({}, Quantization(ignore=(*_PLAIN, "re:.*down_proj"))),
    "plain gate and up": ({}, Quantization(ignore=(*_PLAIN, "re:.*gate_proj", "re:.*up_proj"))),
    "plain gate": ({}, Quantization(ignore=(*_PLAIN, "re:.*gate_proj"))),
    "plain shared expert": ({}, Quantization(ignore=(*_PLAIN, "re:.*shared_expert"))),
    "groups no tile has, of down": (
        {"hidden_size": 48, "intermediate_size": 96},
        Quantization(group_size=48, ignore=_PLAIN),
    ),
    "groups no tile has, of gate and up": (
        {"hidden_size": 96, "intermediate_size": 48},
        Quantization(group_size=48, ignore=_PLAIN),
    ),
    "tiles, and plain down": (_LONG, Quantization(ignore=(*_TILED, "re:.*experts.*down_proj"))),
    "tiles, and plain experts": (_LONG, Quantization(ignore=(*_TILED, r"re:.*experts\.\d.*"))),
    "tiles, and plain shared expert": (_LONG, Quantization(ignore=(*_TILED, "re:.*shared_expert"))),
    "tiles, and plain values": (_LONG, Quantization(ignore=(*_TILED, "re:.*v_proj"))),
    "tiles of other bits, and plain experts": (
        {"rms_norm_eps": 0.5, **_LONG},
        Quantization(bits=8, group_size=32, ignore=(*_TILED, r"re:.*experts\.\d.*")),
    ),
    "no tiles at all": ({}, Quantization(bits=8, group_size=16, ignore=_PLAIN)),
}


@pytest.mark.gpu_only("the CPU holds each linear by itself")
@pytest.mark.parametrize(
    ("case", "top_k"),
    quick(
        [(case, top_k) for case in CASES for top_k in (1, 2)],
        [
            ("plain down", 1),
            ("plain gate and up", 2),
            ("plain shared expert", 1),
            ("tiles, and plain experts", 1),
            ("tiles, and plain values", 2),
        ],
    ),
)
def test_experts_in_all_formats(tmp_path: Path, case: str, top_k: int) -> None:
    base = {**next(v for v in VARIANTS if v.name == "scout_like").config, "num_hidden_layers": 2}
    config, quantization = CASES[case]
    overrides = {
        "vocab_size": 271, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "intermediate_size": 96, "intermediate_size_mlp": 96,
        "attention_chunk_size": 32, **base, "num_local_experts": 4, "num_experts_per_tok": top_k,
        **config,
    }  # fmt: skip
    folder = tmp_path / "model"
    weights = write_checkpoint(
        folder, config_overrides=overrides, seed=top_k, quantization=quantization
    )
    judge = Judge(folder, weights)
    engine = open_engine(folder)
    prompt = [(7 * i * i + 3) % 256 for i in range(90)]
    for size in (90, 40, 5):  # grouped products; of few tokens; few for kernels of all formats
        judge.check(logits_in_pieces(engine, prompt, [size]), prompt)
