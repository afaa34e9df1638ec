"""A quantised copy is exact, whole or absent, and never touches its source."""

from __future__ import annotations

import errno
import importlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from camelid.checkpoint import Checkpoint, account
from camelid.errors import CapacityError, CheckpointError, InvalidRequest, Unsupported
from camelid.layout import vision_linears
from camelid.quantization import Scheme
from camelid.sources import LinearSource, head_source, layer_sources, linear_source
from checkpoints import Quantization, bf16_bits, pack, source_values, write_checkpoint
from checkpoints import quantize as reference_quantize

# By name: the package may export the function under the name of its module.
module = importlib.import_module("camelid.quantize")
quantize = module.quantize
real_linear = module._quantize_linear


def stand_in(
    source: LinearSource, scheme: Scheme, threads: int
) -> tuple[NDArray[np.int32], NDArray[np.uint16]]:
    """What `_core.quantize` does, in NumPy."""
    how = Quantization(bits=scheme.bits, group_size=scheme.group_size)
    q, scales, _ = reference_quantize(source_values(source), how)
    return pack(q, scheme.bits), bf16_bits(scales)


@pytest.fixture(autouse=True)
def _numpy_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_quantize_linear", stand_in)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def dequantised(values: NDArray[np.float32], bits: int, group_size: int) -> NDArray[np.float32]:
    q, scales, _ = reference_quantize(values, Quantization(bits=bits, group_size=group_size))
    return (q * scales[:, np.arange(values.shape[1]) // (group_size or values.shape[1])]).astype(
        np.float32
    )


SOURCES: dict[str, dict[str, Any]] = {
    "f32 fused": {},
    "bf16 conditional sharded": {"dtype": "BF16", "vision": True, "shards": 3},
    "f16 per expert": {"dtype": "F16", "fused": False},
    "dense layers, tied": {
        "config_overrides": {"interleave_moe_layer_step": 2, "tie_word_embeddings": True}
    },
}


@pytest.mark.parametrize("weights", ["int4", "int8"])
@pytest.mark.parametrize("group_size", [32, 0])
@pytest.mark.parametrize("source", SOURCES)
def test_copy_loads_and_is_the_rounded_source(
    tmp_path: Path, source: str, weights: str, group_size: int
) -> None:
    write_checkpoint(tmp_path / "src", seed=2, **SOURCES[source])
    before = snapshot(tmp_path / "src")
    result = quantize(tmp_path / "src", tmp_path / "dst", weights=weights, group_size=group_size)
    assert snapshot(tmp_path / "src") == before
    bits = {"int4": 4, "int8": 8}[weights]
    with Checkpoint.open(tmp_path / "src") as old, Checkpoint.open(tmp_path / "dst") as new:
        account(new)
        assert new.total_bytes == result.written_bytes < old.total_bytes == result.source_bytes
        n_quantised = 0
        for layer in range(new.config.n_layers):
            was, now = layer_sources(old, layer), layer_sources(new, layer)
            np.testing.assert_array_equal(was.input_norm, now.input_norm)
            for a, b in zip(was.linears(), now.linears(), strict=True):
                wanted = source_values(a)
                if not a.name.endswith("router.weight"):
                    assert (b.bits, b.group_size) == (bits, group_size or b.in_dim)
                    wanted = dequantised(wanted, bits, group_size)
                    n_quantised += 1
                np.testing.assert_array_equal(wanted, source_values(b))
        assert n_quantised == result.n_quantised
        plain = {n: e for n, e in old.tensors.items() if n in new.tensors}
        assert all(np.array_equal(old.view(name), new.view(name)) for name in plain)
        assert any("vision_model" in name for name in plain) == old.config.has_vision
        assert (head_source(new) is None) == new.config.tie_word_embeddings


def test_config_is_what_llm_compressor_writes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "src", vision=True)
    quantize(tmp_path / "src", tmp_path / "dst", group_size=32)
    old = json.loads((tmp_path / "src" / "config.json").read_text())
    new = json.loads((tmp_path / "dst" / "config.json").read_text())
    section = new.pop("quantization_config")
    assert new == old
    assert section["quant_method"] == "compressed-tensors"
    assert section["format"] == "pack-quantized"
    assert section["quantization_status"] == "compressed"
    group = section["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"]
    assert group["input_activations"] is None
    assert group["weights"].items() >= {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32,
        "dynamic": False,
    }.items()  # fmt: skip
    assert "language_model.lm_head" in section["ignore"]
    assert "language_model.model.layers.0.feed_forward.router" in section["ignore"]
    assert "vision_model.model.layers.1.self_attn.q_proj" in section["ignore"]
    assert "multi_modal_projector.linear_1" in section["ignore"]
    assert not any("experts" in name for name in section["ignore"])


@pytest.mark.parametrize(("weights", "group_size"), [("int4", 16), ("int8", 0)])
def test_vision_tower_is_quantised_when_asked_for(
    tmp_path: Path, weights: str, group_size: int
) -> None:
    write_checkpoint(tmp_path / "src", vision=True, dtype="BF16")
    result = quantize(
        tmp_path / "src",
        tmp_path / "dst",
        weights=weights,
        group_size=group_size,
        vision=True,
        ignore=["multi_modal_projector.linear_1"],
    )
    patches = "vision_model.patch_embedding.linear"
    bits = {"int4": 4, "int8": 8}[weights]
    with Checkpoint.open(tmp_path / "src") as old, Checkpoint.open(tmp_path / "dst") as new:
        account(new)
        assert new.config.quantization is not None
        assert new.config.vision is not None
        kept = set()
        for linear, _ in vision_linears(new.config.vision, new.config.dim):
            was, now = linear_source(old, linear), linear_source(new, linear)
            wanted = source_values(was)
            if now.bits == 0:
                kept.add(linear.name)
            else:
                assert (now.bits, now.group_size) == (bits, group_size or linear.in_dim)
                wanted = dequantised(wanted, bits, group_size)
            np.testing.assert_array_equal(source_values(now), wanted)
        assert kept == {patches, "multi_modal_projector.linear_1"}
    section = json.loads((tmp_path / "dst" / "config.json").read_text())["quantization_config"]
    ignored = {name for name in section["ignore"] if name.startswith(("vision", "multi_modal"))}
    assert ignored == kept
    text = quantize(tmp_path / "src", tmp_path / "text", weights=weights, group_size=group_size)
    # Two layers of q, k, v, o, fc1 and fc2, and the adapter's two.
    assert result.n_quantised - text.n_quantised == text.n_kept - result.n_kept == 14
    assert result.written_bytes < text.written_bytes


def test_vision_without_a_tower_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "src")
    with pytest.raises(InvalidRequest, match="no vision tower"):
        quantize(tmp_path / "src", tmp_path / "dst", group_size=32, vision=True)
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_vision_whose_groups_do_not_divide_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "src", vision=True)
    with pytest.raises(CheckpointError, match=r"vision_adapter\.mlp\.fc2 has 48 inputs"):
        quantize(tmp_path / "src", tmp_path / "dst", group_size=32, vision=True)


def test_everything_but_weights_is_copied(tmp_path: Path) -> None:
    source = tmp_path / "src"
    write_checkpoint(source, shards=2)
    (source / "chat_template.jinja").write_text("{{ x }}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ y }}")
    for name in ("original.gguf", "consolidated.00.pth", ".gitattributes"):
        (source / name).write_text("not wanted")
    (source / "original").mkdir()
    quantize(source, tmp_path / "dst", group_size=32)
    names = {str(p.relative_to(tmp_path / "dst")) for p in (tmp_path / "dst").rglob("*")}
    assert names == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "model.safetensors", "chat_template.jinja", "additional_chat_templates",
        "additional_chat_templates/tools.jinja",
    }  # fmt: skip


def test_shards_are_bounded_and_indexed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "src")
    limit = 60_000
    result = quantize(tmp_path / "src", tmp_path / "dst", group_size=32, max_shard_bytes=limit)
    index = json.loads((tmp_path / "dst" / "model.safetensors.index.json").read_text())
    assert result.n_shards > 3
    files = set(index["weight_map"].values())
    assert files == {
        f"model-{i + 1:05d}-of-{result.n_shards:05d}.safetensors" for i in range(result.n_shards)
    }
    with Checkpoint.open(tmp_path / "dst") as checkpoint:
        account(checkpoint)
        assert index["metadata"]["total_size"] == checkpoint.total_bytes
        for file in files:
            held = [n for n, f in index["weight_map"].items() if f == file]
            assert sum(checkpoint.tensors[n].nbytes for n in held) <= limit or len(held) == 1


def test_ignored_linears_stay_plain_and_experts_come_apart(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "src", dtype="BF16")
    quantize(
        tmp_path / "src",
        tmp_path / "dst",
        group_size=32,
        ignore=["re:.*self_attn", "re:.*layers.2.feed_forward.experts.*"],
    )
    with Checkpoint.open(tmp_path / "src") as old, Checkpoint.open(tmp_path / "dst") as new:
        account(new)
        was, now = layer_sources(old, 2), layer_sources(new, 2)
        assert now.q.bits == 0
        assert now.shared is not None
        assert now.shared[0].bits == 4
        assert now.experts[3][1].dtype == "BF16"
        assert now.experts[3][1].name.endswith("experts.3.up_proj.weight")
        for a, b in zip(was.experts, now.experts, strict=True):
            for x, y in zip(a, b, strict=True):
                np.testing.assert_array_equal(source_values(x), source_values(y))
        assert layer_sources(new, 1).experts[0][0].bits == 4


def test_progress_counts_every_source_byte(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "src")
    calls: list[tuple[int, int, str]] = []
    result = quantize(
        tmp_path / "src",
        tmp_path / "dst",
        group_size=32,
        progress=lambda done, total, name: calls.append((done, total, name)),
    )
    done = [call[0] for call in calls]
    assert done == sorted(done)
    assert done[-1] == result.source_bytes
    assert {call[1] for call in calls} == {result.source_bytes}
    assert "model.layers.0.feed_forward.experts.0.gate_proj" in {call[2] for call in calls}


@pytest.mark.parametrize("when", [1, 20, 60])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_run_leaves_nothing(
    tmp_path: Path, when: int, error: type[BaseException]
) -> None:
    write_checkpoint(tmp_path / "src")
    before = snapshot(tmp_path / "src")
    seen = 0

    def interrupt(done: int, total: int, name: str) -> None:
        nonlocal seen
        seen += 1
        assert not (tmp_path / "dst").exists()
        (partial,) = tmp_path.glob("dst.partial-*")
        assert not (partial / "config.json").exists()
        if seen == when:
            raise error

    with pytest.raises(error):
        quantize(tmp_path / "src", tmp_path / "dst", group_size=32, progress=interrupt)
    assert [p.name for p in tmp_path.iterdir()] == ["src"]
    assert snapshot(tmp_path / "src") == before


def test_full_disk_is_met_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "src")
    usage = os.statvfs(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("U", (), {"free": 1000}))
    assert usage.f_bsize
    with pytest.raises(CapacityError, match="1000 bytes free"):
        quantize(tmp_path / "src", tmp_path / "dst", group_size=32)
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_disk_that_fills_up_meanwhile_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "src")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CapacityError, match="no space left"):
        quantize(tmp_path / "src", tmp_path / "dst", group_size=32)
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_target_must_be_new_or_empty_and_apart(tmp_path: Path) -> None:
    source = tmp_path / "src"
    write_checkpoint(source)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    (tmp_path / "file").touch()
    for target in (source, source / "dst", tmp_path / "full", tmp_path / "file"):
        with pytest.raises(InvalidRequest):
            quantize(source, target, group_size=32)
    (tmp_path / "empty").mkdir()
    quantize(source, tmp_path / "empty", group_size=32)
    quantize(source, tmp_path / "a" / "b", group_size=32)
    assert (tmp_path / "empty" / "config.json").exists()
    assert (tmp_path / "a" / "b" / "config.json").exists()


def test_quantised_source_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "src", quantization=Quantization())
    with pytest.raises(Unsupported, match="quantised already"):
        quantize(tmp_path / "src", tmp_path / "dst")


def test_groups_that_do_not_divide_are_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "src", config_overrides={"intermediate_size": 40})
    with pytest.raises(CheckpointError, match=r"experts\.0\.down_proj has 40 inputs"):
        quantize(tmp_path / "src", tmp_path / "dst", group_size=32)
    quantize(tmp_path / "src", tmp_path / "dst", group_size=32, ignore=["re:.*down_proj"])


@pytest.mark.parametrize(
    "options",
    [{"weights": "int3"}, {"weights": "fp8"}, {"group_size": -1}, {"group_size": 12}],
)
def test_bad_options_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        quantize(tmp_path / "src", tmp_path / "dst", **options)


def test_damaged_source_is_refused_before_writing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "src", shards=2)
    (tmp_path / "src" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        quantize(tmp_path / "src", tmp_path / "dst")
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize(("weights", "group_size"), [("int4", 32), ("int8", 0), ("int4", 0)])
def test_engine_and_numpy_write_the_same_bytes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    weights: str,
    group_size: int,
) -> None:
    pytest.importorskip("camelid._core")
    write_checkpoint(tmp_path / "src", dtype=dtype, config_overrides={"moe_layers": [1, 2]})
    quantize(tmp_path / "src", tmp_path / "numpy", weights=weights, group_size=group_size)
    monkeypatch.setattr(module, "_quantize_linear", real_linear)
    quantize(tmp_path / "src", tmp_path / "core", weights=weights, group_size=group_size)
    assert snapshot(tmp_path / "numpy") == snapshot(tmp_path / "core")


@pytest.mark.slow  # imports torch
@pytest.mark.filterwarnings("ignore")  # theirs
def test_compressed_tensors_reads_what_is_written(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    write_checkpoint(tmp_path / "src")
    quantize(tmp_path / "src", tmp_path / "dst", group_size=32)
    config = json.loads((tmp_path / "dst" / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig(**config).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    tensors = load_file(tmp_path / "dst" / "model.safetensors")
    with Checkpoint.open(tmp_path / "dst") as checkpoint:
        for source in layer_sources(checkpoint, 1).linears():
            if source.bits == 0:
                continue
            base = source.name.removesuffix("_packed")
            names = ("packed", "scale", "shape")
            state = {f"weight_{name}": tensors[f"{base}_{name}"] for name in names}
            weight = compressor.decompress(state, scheme)["weight"]
            wanted = torch.from_numpy(source_values(source)).to(weight.dtype)
            assert torch.equal(weight, wanted), source.name
