"""What "auto" means for a checkpoint (plan.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from camelid import plan
from camelid.checkpoint import Checkpoint
from camelid.options import LoadOptions
from camelid.plan import LoadPlan, make_plan
from checkpoints import Quantization, write_checkpoint


def planned(folder: Path, **options: str) -> LoadPlan:
    with Checkpoint.open(folder) as checkpoint:
        return make_plan(checkpoint, LoadOptions.parse(**options))


def test_small_and_plain_models_are_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "f32")
    write_checkpoint(tmp_path / "int4", quantization=Quantization(bits=4, group_size=32))
    exact = LoadPlan("auto", "exact", "stored", "f32")
    assert planned(tmp_path / "f32") == exact
    assert planned(tmp_path / "int4") == exact
    monkeypatch.setattr(plan, "FAST_FROM_BYTES", 1)
    assert planned(tmp_path / "f32") == exact  # no weights that integers could multiply


def test_large_quantised_models_are_fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "FAST_FROM_BYTES", 1)
    for bits, head in ((4, "int8"), (8, "stored")):
        folder = tmp_path / str(bits)
        write_checkpoint(folder, quantization=Quantization(bits=bits, group_size=32))
        assert planned(folder) == LoadPlan("auto", "fast", head, "bf16")
        assert planned(folder, compute="exact") == LoadPlan("auto", "exact", "stored", "f32")
        assert planned(folder, head="stored", kv_cache="f32") == LoadPlan(
            "auto", "fast", "stored", "f32"
        )
    write_checkpoint(tmp_path / "f32")
    assert planned(tmp_path / "f32", weights="int4") == LoadPlan("int4", "fast", "int8", "bf16")


def test_a_quantised_tower_counts_as_quantised_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = ("re:.*language_model.*", "re:.*patch_embedding.*")
    quantization = Quantization(bits=8, group_size=16, ignore=text)
    write_checkpoint(tmp_path, vision=True, quantization=quantization, fused=True)
    assert planned(tmp_path).compute == "exact"
    monkeypatch.setattr(plan, "FAST_FROM_BYTES", 1)
    assert planned(tmp_path).compute == "fast"


def test_wishes_are_kept_whatever_the_size(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", quantization=Quantization(bits=4, group_size=32))
    assert planned(tmp_path / "m", compute="fast").compute == "fast"
    assert planned(tmp_path / "m", head="int8") == LoadPlan("auto", "exact", "int8", "f32")
