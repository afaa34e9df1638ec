"""gpu_attention.py on the emulated device with a made-up clock: all is called and counted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import gpu_attention
import gpu_dense
from attention_cases import plan_spans
from emulated_gpu import TINY, Emulated

SMALL = gpu_attention.Attention(
    n_heads=4, n_kv_heads=2, head_dim=64, page_size=16,
    decode=((1, 40, gpu_attention.FORMATS), (3, 17, ("bf16",))),
    prompts=((37, ("bf16",)),),
    rows=(1, 70),
    logits=(1, 2),
)  # fmt: skip
L2 = 1 << 14


def test_every_kernel_is_called_and_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_dense, "torch_us", lambda kind, sizes, output: [2.0])
    gpu = Emulated()
    gpu_attention.main(["--library", "none", "--out", str(tmp_path)], gpu, SMALL, TINY)
    (path,) = tmp_path.glob("*-gpu-attention-emulated-5-sms.json")
    record = json.loads(path.read_text())
    assert [(row["name"].split(",")[0].split()[0], row["n_tokens"]) for row in record["rows"]] == [
        *[("decode", 1)] * 3, ("decode", 3), ("prefill", 37), *[("store_kv", 1)] * 2,
        *[("store_kv", 70)] * 2, ("rms_norm", 1), ("rms_norm", 70), ("top_logits", 1),
        ("top_logits", 2),
    ]  # fmt: skip
    assert set(gpu.called) == {
        "read_memory", "copy_memory", "run_attention", "case_attend_many", "case_store_kv",
        "case_rms_norm", "case_draw",
    }  # fmt: skip
    report = path.with_suffix(".md").read_text()
    assert "nan" not in report.lower()


def test_decoding_reads_every_key_and_value_once() -> None:
    rows = {row.name: row for row in gpu_attention.decode_rows(Emulated(), SMALL, L2)}
    ends = 2 * 2 * 4 * 64  # queries and results
    assert rows["decode attention, 1 x 40 keys, bf16"].n_bytes == 40 * 2 * 2 * 64 * 2 + ends
    assert rows["decode attention, 1 x 40 keys, fp8"].n_bytes == 40 * 2 * 2 * (64 + 4) + ends
    row = rows["decode attention, 3 x 17 keys, bf16"]
    assert row.n_bytes == 3 * (17 * 2 * 2 * 64 * 2 + ends)
    assert row.n_flops == 3 * 17 * 4 * 4 * 64


def test_prefill_counts_pairs_that_see_each_other() -> None:
    (row,) = gpu_attention.prefill_rows(Emulated(), SMALL, L2)
    assert row.n_flops == 4 * 4 * 64 * (37 * 38 // 2)


def test_tiles_of_a_prompt_are_those_of_the_plan() -> None:
    items = gpu_attention.tiles(37, 2, 64)
    span = np.array([[0, 37, 0, 0]], np.int32)
    assert items.tolist() == plan_spans(Emulated().device, span, 2, True).many.tolist()


def test_calls_in_a_row_go_to_layers_that_pass_l2_twice() -> None:
    gpu = Emulated()
    pages = gpu_attention.Pages(gpu, SMALL, "bf16", 1, 40, L2)
    assert pages.layer_bytes == 3 * 16 * 2 * 2 * 64 * 2
    layers = list(pages.layers())
    assert [c.kv_layer for c in layers] == [0, 1, 2]  # 24 KiB each: two pass 32 KiB, and one more
    assert all(c.n_layers == 3 for c in layers)


def test_one_query_of_a_sequence_is_planned_against_all_its_keys() -> None:
    gpu = Emulated()
    pages = gpu_attention.Pages(gpu, SMALL, "int8", 2, 40, L2)
    plan = pages.plan(gpu)
    assert plan.few["last_key"].tolist() == [40, 40]
    assert plan.few["page_list"].tolist() == [0, 3]
    assert len(plan.many) == 0


def test_bytes_of_writing_and_norms() -> None:
    stored = list(gpu_attention.store_rows(Emulated(), SMALL, L2))
    of_token = 8 * 64 * 4 + 4 * 64 * 2  # sums in, queries out
    assert [row.n_bytes for row in stored] == [
        n * (of_token + kv) for n in (1, 70) for kv in (2 * 2 * 64 * 2, 2 * 2 * (64 + 4))
    ]
    normed = list(gpu_attention.norm_rows(Emulated(), SMALL, L2))
    assert [row.n_bytes for row in normed] == [n * 4 * 64 * 6 for n in (1, 70)]
