"""step_overhead.py on tiny checkpoints: what is compared, and what is written down."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import step_overhead
from camelid.checkpoint import Checkpoint
from camelid.config import load_config
from camelid.tokenizer import Tokenizer
from checkpoints import Quantization, write_checkpoint

# Layers of all kinds: local and global, dense and with experts.
MIXED = {"interleave_moe_layer_step": 2, "num_experts_per_tok": 2}


@pytest.fixture(autouse=True)
def few_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_overhead, "N_TINY_TOKENS", 6)
    monkeypatch.setattr(step_overhead, "N_MODEL_TOKENS", 4)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))


def test_both_paths_of_both_models_are_measured(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", config_overrides=MIXED)
    command = [str(tmp_path / "model"), "-t", "1", "-r", "2", "--out", str(tmp_path / "out")]
    step_overhead.main(command)
    (path,) = (tmp_path / "out").glob("*-step-overhead.json")
    record: dict[str, Any] = json.loads(path.read_text())
    assert record["benchmark"] == "step_overhead"
    assert record["machine"]["threads"] == 1
    assert record["model"] == "4 layers, 4 experts, 4 heads, width 64, vocabulary 320"
    assert [row["path"] for row in record["rows"]] == ["engine", "generate"]
    for row in record["rows"]:
        for key in ("overhead_us", "step_us"):
            assert len(row[key]) == 2
            assert min(row[key]) > 0
    report = path.with_suffix(".md").read_text()
    assert "| `LLM.generate` |" in report
    assert str(tmp_path) not in report + json.dumps(record)
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize("vision", [False, True], ids="vision={}".format)
def test_the_tiny_model_differs_in_widths_alone(tmp_path: Path, vision: bool) -> None:
    quantization = Quantization(bits=8, symmetric=False)
    write_checkpoint(
        tmp_path / "model", config_overrides=MIXED, quantization=quantization, vision=vision
    )
    config = load_config(tmp_path / "model")
    step_overhead.write_tiny(tmp_path / "model", tmp_path / "tiny", config.vocab_size)
    tiny = load_config(tmp_path / "tiny")
    assert (tiny.dim, tiny.head_dim, tiny.expert_dim, tiny.dense_dim) == (32, 16, 32, 32)
    # Nor does it see, say how it was stored, or advise how to sample.
    other = "architecture prefix vision image_token_index quantization generation"
    widths = "dim head_dim expert_dim dense_dim"
    same = {name: getattr(config, name) for name in f"{widths} {other}".split()}
    assert replace(tiny, **same) == config
    assert Tokenizer.from_folder(tmp_path / "tiny").vocab_size == 271


@pytest.mark.parametrize(("bits", "weights"), [(4, "int4"), (8, "int8"), (None, "auto")])
def test_the_tiny_model_runs_through_the_same_code(
    tmp_path: Path, bits: int | None, weights: str
) -> None:
    write_checkpoint(tmp_path, quantization=Quantization(bits=bits) if bits else None)
    with Checkpoint.open(tmp_path) as checkpoint:
        ours, tiny = step_overhead.load_options(checkpoint, 2)
    assert (ours.threads, ours.weights, ours.compute) == (2, "auto", "auto")
    assert (tiny.threads, tiny.weights) == (2, weights)
    assert (tiny.compute, tiny.head, tiny.kv_cache) == ("exact", "stored", "f32")


@pytest.mark.parametrize("vocab_size", [100, 3000, 70000])
def test_a_model_without_a_tokenizer_is_given_one(tmp_path: Path, vocab_size: int) -> None:
    step_overhead.write_tokenizer(tmp_path / "tokenizer.model", vocab_size)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.vocab_size == max(256 + 2048, vocab_size)
    assert tokenizer.decode(tokenizer.encode("camelid")) == "camelid"
