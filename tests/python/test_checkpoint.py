"""Folders to named views: every layout, every tensor accounted for, every source exact."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from camelid.checkpoint import Checkpoint, account, expected_tensors
from camelid.config import load_config
from camelid.errors import CheckpointError, Unsupported
from camelid.safetensors import SafetensorsFile
from camelid.sources import (
    embedding_source,
    final_norm_source,
    head_source,
    layer_sources,
)
from checkpoints import (
    SPECIAL_IDS,
    TEXT_CONFIG,
    Quantization,
    source_values,
    write_checkpoint,
    write_file,
)

ASYMMETRIC = Quantization(symmetric=False, scale_dtype="F16")
CHANNEL = Quantization(bits=8, group_size=0, ignore=("re:.*router",))
EVERYTHING = Quantization(group_size=64, symmetric=False, scale_dtype="F32", ignore=())
LAYOUTS: dict[str, dict[str, Any]] = {
    "f32 fused": {},
    "bf16 conditional sharded": {"dtype": "BF16", "vision": True, "shards": 5},
    "f16 per expert, dense layers": {
        "dtype": "F16", "fused": False, "config_overrides": {"interleave_moe_layer_step": 2},
    },
    "tied": {"config_overrides": {"tie_word_embeddings": True}},
    "int4 group conditional": {"quantization": Quantization(), "vision": True, "dtype": "BF16"},
    "int4 asymmetric": {"quantization": ASYMMETRIC, "shards": 2},
    "int8 channel with attention and head": {"quantization": CHANNEL},
    "int4 everything, vision too": {"quantization": EVERYTHING, "vision": True},
    "int4 experts fused and plain": {"quantization": Quantization(ignore=("re:.*experts.*",)),
                                     "fused": True},
    "odd sizes": {
        "quantization": Quantization(bits=8, symmetric=False, group_size=24),
        "config_overrides": {"hidden_size": 36, "intermediate_size": 27, "vocab_size": 300},
    },
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_exactly_the_weights_written(tmp_path: Path, layout: str) -> None:
    written = write_checkpoint(tmp_path, seed=5, **LAYOUTS[layout])
    seen = set()

    def same(name: str, got: NDArray[np.float32]) -> None:
        seen.add(name)
        np.testing.assert_array_equal(got, written[name], err_msg=name)

    with Checkpoint.open(tmp_path) as checkpoint:
        account(checkpoint)
        config = checkpoint.config
        base = f"{config.prefix}model"
        same(f"{base}.embed_tokens.weight", source_values(embedding_source(checkpoint)))
        same(f"{base}.norm.weight", final_norm_source(checkpoint))
        head = head_source(checkpoint)
        assert (head is None) == config.tie_word_embeddings
        if head is not None:
            same(f"{config.prefix}lm_head.weight", source_values(head))
        for layer in range(config.n_layers):
            sources = layer_sources(checkpoint, layer)
            prefix = f"{base}.layers.{layer}"
            same(f"{prefix}.input_layernorm.weight", sources.input_norm)
            same(f"{prefix}.post_attention_layernorm.weight", sources.post_norm)
            for name in "qkvo":
                same(
                    f"{prefix}.self_attn.{name}_proj.weight", source_values(getattr(sources, name))
                )
            prefix += ".feed_forward"
            mlps = {"": sources.dense, ".shared_expert": sources.shared}
            for part, mlp in mlps.items():
                for name, source in zip(("gate", "up", "down"), mlp or (), strict=False):
                    same(f"{prefix}{part}.{name}_proj.weight", source_values(source))
            if config.is_moe_layer[layer]:
                assert sources.router is not None
                same(f"{prefix}.router.weight", source_values(sources.router))
                gates, ups, downs = (
                    np.stack([source_values(expert[i]).T for expert in sources.experts])
                    for i in range(3)
                )
                same(f"{prefix}.experts.gate_up_proj", np.concatenate([gates, ups], axis=2))
                same(f"{prefix}.experts.down_proj", downs)
            assert len(set(sources.tensor_names)) == len(sources.tensor_names)
            checkpoint.release(sources.tensor_names)
        vision = {name for name in written if name.startswith(("vision_model", "multi_modal"))}
        assert seen == set(written) - vision
        assert bool(vision) == config.has_vision


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layer_names_every_tensor_it_reads(tmp_path: Path, layout: str) -> None:
    write_checkpoint(tmp_path, **LAYOUTS[layout])
    with Checkpoint.open(tmp_path) as checkpoint:
        named = set()
        for layer in range(checkpoint.config.n_layers):
            named |= set(layer_sources(checkpoint, layer).tensor_names)
        rest = {name for name in checkpoint.tensors if name not in named}
        assert all("layernorm" in n or "layers" not in n or "vision" in n for n in rest)
        assert checkpoint.total_bytes == sum(e.nbytes for e in checkpoint.tensors.values())


def test_misaligned_words_are_copied(tmp_path: Path) -> None:
    """A file of ours is aligned; the format does not promise it."""
    write_checkpoint(tmp_path, quantization=Quantization())
    file = SafetensorsFile(tmp_path / "model.safetensors")
    stored: dict[str, Any] = {"a.rotary_emb.inv_freq": ("U8", (1,), b"x")}
    stored |= {
        name: (entry.dtype, entry.shape, file.view(name).tobytes())
        for name, entry in file.tensors.items()
    }
    file.close()
    write_file(tmp_path / "model.safetensors", stored)
    with Checkpoint.open(tmp_path) as checkpoint:
        account(checkpoint)
        source = layer_sources(checkpoint, 0).experts[0][0]
        assert source.words is not None
        assert source.words.ctypes.data % 4 == 0
        assert source_values(source).shape == (32, 64)


def test_tied_config_with_a_head_in_the_file_uses_the_file(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path)
    edit_config(tmp_path, tie_word_embeddings=True)
    with Checkpoint.open(tmp_path) as checkpoint:
        account(checkpoint)
        head = head_source(checkpoint)
        assert head is not None
        np.testing.assert_array_equal(source_values(head), written["lm_head.weight"])


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(folder: Path, change: Any) -> None:
    """Apply `change` to the stored tensors of a single file."""
    path = folder / "model.safetensors"
    file = SafetensorsFile(path)
    stored = {n: (e.dtype, e.shape, file.view(n).tobytes()) for n, e in file.tensors.items()}
    file.close()
    change(stored)
    write_file(path, stored)


ROUTER = "model.layers.1.feed_forward.router.weight"
NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s.pop(ROUTER), [f"{ROUTER} is missing", "F32 or F16 or BF16 [4, 64]"]),
        (
            lambda s: s.update({ROUTER: ("F32", (64, 4), s[ROUTER][2])}),
            [f"{ROUTER} in model.safetensors is F32 [64, 4]", "[4, 64]"],
        ),
        (
            lambda s: s.update({NORM: ("I32", (64,), s[NORM][2])}),
            [f"{NORM} in model.safetensors is I32 [64]", "expected F32 or F16 or BF16 [64]"],
        ),
        (
            lambda s: s.update({"model.layers.4.x": ("U8", (1,), b"1")}),
            ["'model.layers.4.x' in model.safetensors is unexpected (U8 [1])"],
        ),
        (
            lambda s: s.pop("model.layers.2.feed_forward.experts.down_proj"),
            ["model.layers.2.feed_forward.experts.down_proj is missing", "[4, 32, 64]"],
        ),
        (
            lambda s: [s.pop(n) for n in list(s) if "self_attn" in n],
            ["model.layers.0.self_attn.q_proj.weight is missing", "more"],
        ),
    ],
)
def test_missing_unexpected_and_misshapen_tensors_are_named(
    tmp_path: Path, change: Any, named: list[str]
) -> None:
    write_checkpoint(tmp_path)
    rewrite(tmp_path, change)
    with Checkpoint.open(tmp_path) as checkpoint, pytest.raises(CheckpointError) as caught:
        account(checkpoint)
    for part in named:
        assert part in str(caught.value)


def test_several_problems_come_in_one_message(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)

    def change(stored: dict[str, Any]) -> None:
        stored.pop(ROUTER)
        stored[NORM] = ("F32", (8, 8), stored[NORM][2])
        stored["surprise"] = ("U8", (1,), b"1")

    rewrite(tmp_path, change)
    with Checkpoint.open(tmp_path) as checkpoint, pytest.raises(CheckpointError) as caught:
        account(checkpoint)
    for part in ("is missing", "is F32 [8, 8]", "'surprise' in model.safetensors is unexpected"):
        assert part in str(caught.value)


def test_known_leftovers_are_tolerated(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    names = ("model.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq")
    rewrite(tmp_path, lambda s: s.update(dict.fromkeys(names, ("F32", (1,), b"1234"))))
    with Checkpoint.open(tmp_path) as checkpoint:
        account(checkpoint)


EXPERT = "model.layers.0.feed_forward.experts.1.up_proj"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s.pop(f"{EXPERT}.weight_scale"), "weight_scale is missing"),
        (lambda s: s.pop(f"{EXPERT}.weight_zero_point"), "weight_zero_point is missing"),
        (
            lambda s: s.update({f"{EXPERT}.weight_zero_point": ("I32", (2, 4), b"\0" * 32)}),
            "weight_zero_point in model.safetensors is I32 [2, 4], expected I32 [4, 2]",
        ),
        (
            lambda s: s.update({f"{EXPERT}.weight_packed": ("I32", (64, 4), b"\0" * 1024)}),
            "weight_packed in model.safetensors is I32 [64, 4], expected I32 [32, 8]",
        ),
        (
            lambda s: s.update(
                {"model.layers.0.self_attn.q_proj.weight_packed": ("I32", (1,), b"\0" * 4)}
            ),
            "q_proj.weight_packed' in model.safetensors is unexpected",
        ),
    ],
)
def test_quantised_tensors_are_accounted_for(tmp_path: Path, change: Any, named: str) -> None:
    write_checkpoint(tmp_path, quantization=Quantization(symmetric=False))
    rewrite(tmp_path, change)
    with Checkpoint.open(tmp_path) as checkpoint, pytest.raises(CheckpointError) as caught:
        account(checkpoint)
    assert named in str(caught.value)


def test_column_order_is_refused_by_name(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, quantization=Quantization())
    rewrite(tmp_path, lambda s: s.update({f"{EXPERT}.weight_g_idx": ("I32", (1,), b"\0" * 4)}))
    with (
        Checkpoint.open(tmp_path) as checkpoint,
        pytest.raises(Unsupported, match=r"weight_g_idx.*permutes"),
    ):
        account(checkpoint)


def test_weight_shape_that_lies_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, quantization=Quantization())
    lie = np.array([64, 32], "<i8").tobytes()
    rewrite(tmp_path, lambda s: s.update({f"{EXPERT}.weight_shape": ("I64", (2,), lie)}))
    with Checkpoint.open(tmp_path) as checkpoint:
        account(checkpoint)
        with pytest.raises(CheckpointError, match=r"holds \[64, 32\], expected \[32, 64\]"):
            layer_sources(checkpoint, 0)


def test_norm_that_is_not_finite_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    bad = np.ones(64, np.float32)
    bad[7] = np.inf
    rewrite(tmp_path, lambda s: s.update({NORM: ("F32", (64,), bad.tobytes())}))
    with (
        Checkpoint.open(tmp_path) as checkpoint,
        pytest.raises(CheckpointError, match=r"model\.norm\.weight .* holds inf at 7"),
    ):
        final_norm_source(checkpoint)


def test_closed_and_unknown_are_errors(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match="no tensor x"):
        checkpoint.view("x")
    with pytest.raises(CheckpointError, match="no tensor x"):
        checkpoint.release("x")
    checkpoint.close()
    with pytest.raises(CheckpointError, match="is closed"):
        checkpoint.view(NORM)


# Folders and indexes.


def index_of(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "model.safetensors.index.json").read_text())
    return data


def write_index(folder: Path, index: dict[str, Any]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "file",
    [
        "../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "a\\x.safetensors",
        "..", ".", "", "x.safetensors\0", "x.bin", 7, None, ["x.safetensors"], "sub/x.safetensors",
    ],
)  # fmt: skip
def test_path_that_leaves_the_folder_is_refused(tmp_path: Path, file: Any) -> None:
    write_checkpoint(tmp_path, shards=2)
    index = index_of(tmp_path)
    index["weight_map"][NORM] = file
    write_index(tmp_path, index)
    with pytest.raises(CheckpointError, match=r"expected the name of a \.safetensors file"):
        Checkpoint.open(tmp_path)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, shards=4)
    for number in (2, 3):
        (tmp_path / f"model-0000{number}-of-00004.safetensors").unlink()
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path)
    assert "2 are missing: 'model-00002-of-00004.safetensors', 'model-00003" in str(caught.value)


def test_shard_with_an_impossible_name_is_missing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, shards=2)
    for file in ("x" * 5000 + ".safetensors", "\ud800.safetensors"):
        write_index(tmp_path, {"weight_map": {NORM: file}})
        with pytest.raises(CheckpointError, match="1 are missing"):
            Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match="is not a folder"):
        Checkpoint.open("x" * 5000)


def test_linked_shards_are_followed(tmp_path: Path) -> None:
    """The cache of the hub holds links into a folder of blobs."""
    write_checkpoint(tmp_path / "blobs", shards=2)
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        os.symlink(f"../blobs/{path.name}", tmp_path / "snapshot" / path.name)
    with Checkpoint.open(tmp_path / "snapshot") as checkpoint:
        account(checkpoint)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: m.pop(NORM), f"'{NORM}' is in model-00002-of-00002.safetensors but not in the"),
        (
            lambda m: m.update({NORM: "model-00001-of-00002.safetensors"}),
            f"'{NORM}' is in model-00002-of-00002.safetensors, the index says model-00001",
        ),
        (
            lambda m: m.update({"ghost": "model-00001-of-00002.safetensors"}),
            "'ghost' is missing from model-00001-of-00002.safetensors",
        ),
    ],
)
def test_index_that_disagrees_with_its_files_is_refused(
    tmp_path: Path, change: Any, named: str
) -> None:
    write_checkpoint(tmp_path, shards=2)
    index = index_of(tmp_path)
    change(index["weight_map"])
    write_index(tmp_path, index)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path)
    assert named in str(caught.value)


def test_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, shards=2)
    index = index_of(tmp_path)
    index["weight_map"]["extra"] = "extra.safetensors"
    write_index(tmp_path, index)
    stored = {"extra": ("U8", (1,), b"1"), NORM: ("F32", (64,), b"\0" * 256)}
    write_file(tmp_path / "extra.safetensors", stored)
    with pytest.raises(CheckpointError, match=r"is in extra\.safetensors and in model-00002"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_damaged_index_is_refused(tmp_path: Path, content: str) -> None:
    write_checkpoint(tmp_path, shards=2)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("file", "error", "named"),
    [
        (None, CheckpointError, "holds no weights"),
        ("model.Q4_K_M.gguf", Unsupported, "GGUF"),
        ("consolidated.00.pth", Unsupported, "PyTorch pickles"),
        ("pytorch_model-00001-of-00002.bin", Unsupported, "PyTorch pickles"),
        ("model-00001-of-00002.safetensors", CheckpointError, "Download the index"),
    ],
)
def test_folder_without_usable_weights_says_what_it_holds(
    tmp_path: Path, file: str | None, error: type[Exception], named: str
) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    if file is not None:
        (tmp_path / file).touch()
    with pytest.raises(error, match=named):
        Checkpoint.open(tmp_path)


def test_file_instead_of_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(CheckpointError, match="is not a folder"):
        Checkpoint.open(tmp_path / "x")


def test_truncated_shard_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, shards=2)
    path = tmp_path / "model-00002-of-00002.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="model-00002-of-00002"):
        Checkpoint.open(tmp_path)


def test_config_that_promises_endless_tensors_ends_soon(tmp_path: Path) -> None:
    """4096 layers of 4096 experts are 50 million names: none of them may be listed first."""
    write_checkpoint(tmp_path, quantization=Quantization())
    edit_config(tmp_path, num_hidden_layers=4096, num_local_experts=4096)
    with (
        Checkpoint.open(tmp_path) as checkpoint,
        pytest.raises(CheckpointError, match="and 1 more"),
    ):
        account(checkpoint)


# The released models: tensors and parameters of transformers' modules, counted on the
# reference implementation.
RELEASED_VISION = {
    "hidden_size": 1408, "num_hidden_layers": 34, "num_attention_heads": 16,
    "intermediate_size": 5632, "image_size": 336, "patch_size": 14, "vision_output_dim": 4096,
}  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "n_tensors", "n_parameters"),
    [
        ({}, 1133, 108_641_793_536),
        (
            {"num_local_experts": 128, "interleave_moe_layer_step": 2, "use_qk_norm": False},
            1061,
            401_583_781_376,
        ),
    ],
    ids=["scout", "maverick"],
)
def test_released_models_have_the_published_tensors(
    tmp_path: Path, overrides: dict[str, Any], n_tensors: int, n_parameters: int
) -> None:
    config = {
        "architectures": ["Llama4ForConditionalGeneration"],
        "text_config": overrides,
        "vision_config": RELEASED_VISION,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = expected_tensors(load_config(tmp_path))
    assert len(expected) == n_tensors
    assert sum(math.prod(tensor.shape) for tensor in expected.values()) == n_parameters


def test_helper_writes_the_ids_it_promises(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    assert load_config(tmp_path).bos_id == SPECIAL_IDS["<|begin_of_text|>"]
    assert load_config(tmp_path).eos_ids == tuple(TEXT_CONFIG["eos_token_id"])
