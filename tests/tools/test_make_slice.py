"""tools/make_slice.py and its GGUF writer, on tiny dimensions: both files hold the same model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import camelid
import gguf_file as gguf
import make_slice
from camelid.safetensors import SafetensorsFile
from checkpoints import write_tokenizer

TINY = {
    "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "intermediate_size": 128, "intermediate_size_mlp": 256, "num_local_experts": 3,
}  # fmt: skip
VOCAB = 288  # the test tokenizer has 271
N_LAYERS = 4


def nothing(n_bytes: int) -> None:
    pass


@pytest.fixture(scope="module", params=["scout", "maverick"])
def made(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("slice")
    data = make_slice.slice_config(request.param, N_LAYERS, VOCAB) | TINY
    make_slice.write_folder(folder / "model", data, nothing)
    make_slice.write_gguf(folder / "model.gguf", data, nothing)
    return folder / "model", folder / "model.gguf"


def values_of(path: Path, header: gguf.GgufHeader, name: str) -> NDArray[np.float32]:
    """Decode a tensor as ggml's structs say, apart from the code that wrote it."""
    info = header.tensors[name]
    data = np.fromfile(path, np.uint8, info.nbytes, offset=header.offsets[name])
    if info.kind is gguf.F32:
        return data.view(np.float32).reshape(info.shape)
    blocks = data.reshape(-1, info.kind.block_bytes)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    codes = blocks[:, 2:]
    if info.kind is gguf.Q4_0:
        codes = np.concatenate([codes & 15, codes >> 4], axis=1).astype(np.float32) - 8
    else:
        codes = codes.view(np.int8).astype(np.float32)
    return (codes * scale).reshape(info.shape)


def folder_values(folder: Path, name: str) -> NDArray[np.float32]:
    """Decode a linear of the folder: bf16, or pack-quantized INT4 in groups of 128."""
    file = SafetensorsFile(folder / "model.safetensors")
    read = {key: file.view(key).copy() for key in file.tensors if key.startswith(name)}
    file.close()
    if f"{name}.weight" in read:
        bits = read[f"{name}.weight"].view(np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32)
    words = read[f"{name}.weight_packed"].view(np.uint32)
    nibbles = (words[:, None] >> (4 * np.arange(8, dtype=np.uint32))) & 15
    scales = read[f"{name}.weight_scale"].view(np.uint16).astype(np.uint32) << 16
    return (nibbles.reshape(-1, 128).astype(np.float32) - 8) * scales.view(np.float32)[:, None]


def test_gguf_has_every_tensor_where_it_says(made: tuple[Path, Path]) -> None:
    _, path = made
    header = gguf.read_header(path)
    maverick = header.metadata["llama4.interleave_moe_layer_step"] == 2
    n_dense = 2 if maverick else 0
    # Embedding, head, final norm; 2 norms and 4 projections a layer; a MoE layer has a router, 3
    # shared and 3 stacks of experts, a dense one 3 matrices.
    assert len(header.tensors) == 3 + N_LAYERS * 6 + (N_LAYERS - n_dense) * 7 + n_dense * 3
    end = 0
    for name, offset in header.offsets.items():
        assert offset % gguf.ALIGNMENT == 0
        assert end <= offset < end + gguf.ALIGNMENT or end == 0
        end = offset + header.tensors[name].nbytes
    assert end <= path.stat().st_size < end + gguf.ALIGNMENT
    assert header.metadata["general.architecture"] == "llama4"
    assert header.metadata["llama4.expert_count"] == 3
    assert header.metadata["llama4.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert header.tensors["blk.1.ffn_down_exps.weight"].shape == (3, 128, 128)
    assert ("blk.0.ffn_gate.weight" in header.tensors) == maverick


def test_both_files_hold_the_same_numbers(made: tuple[Path, Path]) -> None:
    folder, path = made
    header = gguf.read_header(path)
    for name, there in (
        ("blk.2.attn_q.weight", "model.layers.2.self_attn.q_proj"),
        ("blk.3.ffn_gate_inp.weight", "model.layers.3.feed_forward.router"),
        ("blk.1.ffn_up_shexp.weight", "model.layers.1.feed_forward.shared_expert.up_proj"),
        ("token_embd.weight", "model.embed_tokens"),
        ("output.weight", "lm_head"),
    ):
        values = values_of(path, header, name)
        np.testing.assert_array_equal(values.ravel(), folder_values(folder, there).ravel())
        assert values.std() > 0
    stacked = values_of(path, header, "blk.3.ffn_gate_exps.weight")
    expert = folder_values(folder, "model.layers.3.feed_forward.experts.2.gate_proj")
    np.testing.assert_array_equal(stacked[2].ravel(), expert.ravel())
    assert not np.array_equal(stacked[0], stacked[1])


def test_sizes_are_known_beforehand(made: tuple[Path, Path]) -> None:
    folder, path = made
    n_folder, n_gguf = make_slice.sizes(json.loads((folder / "config.json").read_text()))
    assert 0 <= path.stat().st_size - n_gguf < 20_000
    assert 0 <= (folder / "model.safetensors").stat().st_size - n_folder < 40_000


def test_camelid_runs_the_folder(made: tuple[Path, Path], tmp_path: Path) -> None:
    write_tokenizer(made[0])
    with camelid.LLM(str(made[0]), device="cpu", threads=1) as llm:
        logits = llm.logits([1, 2, 3, 90])
    assert logits.shape == (4, VOCAB)
    assert np.isfinite(logits).all()
    assert logits.std() > 0.01


def test_a_writer_refuses_what_was_not_announced(tmp_path: Path) -> None:
    info = gguf.TensorInfo("a", (2, 32), gguf.Q8_0)
    codes = np.arange(64, dtype=np.int8).reshape(2, 32)
    with gguf.GgufWriter(tmp_path / "a.gguf", {"k": "v", "n": 7, "x": 0.5}, [info]) as writer:
        with pytest.raises(ValueError, match="announced"):
            writer.write("b", [])
        writer.write("a", [gguf.q8_0_blocks(codes, 0.25)])
    header = gguf.read_header(tmp_path / "a.gguf")
    assert header.metadata == {"k": "v", "n": 7, "x": 0.5}
    assert header.tensors == {"a": info}
    np.testing.assert_array_equal(values_of(tmp_path / "a.gguf", header, "a"), codes * 0.25)

    with (
        pytest.raises(ValueError, match="got 3 bytes, expected 68"),
        gguf.GgufWriter(tmp_path / "b.gguf", {}, [info]) as writer,
    ):
        writer.write("a", [b"abc"])
    with (
        pytest.raises(ValueError, match="never written"),
        gguf.GgufWriter(tmp_path / "c.gguf", {}, [info]),
    ):
        pass
    with pytest.raises(ValueError, match="do not fill blocks"):
        _ = gguf.TensorInfo("a", (2, 33), gguf.Q4_0).nbytes
