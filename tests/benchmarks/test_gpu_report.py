"""gpu_report.py on made-up records: bars, what is missing, and one result of all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import gpu_report
import limits

PEAKS = {"read_gb_s": 4000.0, "copy_gb_s": 3900.0, "bf16_tflop_s": 800.0, "bf16_measured_by": "us"}
MACHINE = {"gpu": "NVIDIA H200", "multiprocessors": 132, "l2_bytes": 60 << 20}
HEAD = {"date": "2026-12-24", "version": "0.1.0", "peaks": PEAKS, "machine": MACHINE}


def kernel(name: str, n_bytes: int, us: float) -> dict[str, Any]:
    return {"name": name, "n_tokens": 1, "n_bytes": n_bytes, "n_flops": 0, "us": [us]}


def step(name: str, kv: str, ms: float, device_ms: float) -> dict[str, Any]:
    work = {"n_bytes": 8e9, "n_flops": 1e9}  # 2 ms
    return {"name": name, "kv": kv, "n_tokens": 1, "work": work, "ms": [ms],
            "device_ms": [device_ms], "timeline": []}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [kernel("decode attention, 1 x 16384 keys, bf16", 64_000_000, 20.0)]  # limit 16 us
    attention = HEAD | {"benchmark": "gpu_attention", "rows": rows}
    steps = HEAD | {
        "benchmark": "gpu_step",
        "memory": {"weight_bytes": 57_600_000_000},
        "model": {"shape": "scout", "n_layers": 48, "context": 8192},
        "rows": [step("decode, batch 1, 8192 tokens each", "bf16", 2.5, 2.46),
                 step("decode, batch 64, 8192 tokens each", "fp8", 4.0, 3.9)],
    }  # fmt: skip
    for i, record in enumerate((attention | {"rows": []}, attention, steps)):
        path = tmp_path / f"{i}.json"
        path.write_text(json.dumps(record))
        os.utime(path, (i, i))
    return tmp_path


def test_bars_and_one_result(folder: Path, tmp_path: Path) -> None:
    gpu_report.main([str(folder), "--out", str(tmp_path / "out")])
    report = (tmp_path / "out" / "2026-12-24-nvidia-h200.md").read_text()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in report.splitlines()
             if line.startswith("|")]  # fmt: skip
    table = {line[0]: line[1:] for line in lines[:11]}
    bf16 = "global decode attention, 67 MB of bf16 KV"
    assert table[bf16] == ["0.88", "0.97", "0.80", "**no**"]
    assert table["decode step, batch 1, 8K"][2:] == ["0.80", "yes"]
    assert table["decode step, batch 64, 8K"][2:] == ["0.50", "**no**"]
    assert table["prefill of 8K, 4096 a step"][2:] == ["not measured", ""]
    assert table["host time the GPU waits for, batch 1, us"] == ["< 50", "0", "40", "yes"]
    assert "## 2026-12-24: steps on NVIDIA H200" in report
    record = json.loads((tmp_path / "out" / "2026-12-24-nvidia-h200.json").read_text())
    assert set(record["records"]) == {"gpu_attention", "gpu_step"}


def test_another_gpus_records_stay_out(folder: Path) -> None:
    record = json.loads((folder / "1.json").read_text())
    record["machine"] = MACHINE | {"gpu": "NVIDIA H100"}
    (folder / "1.json").write_text(json.dumps(record))
    os.utime(folder / "1.json", (1, 1))
    os.utime(folder / "0.json", (0, 0))
    assert set(gpu_report.newest(folder)) == {"gpu_step"}


def test_without_peaks_nothing_is_judged(folder: Path) -> None:
    found = gpu_report.newest(folder)
    found["gpu_attention"]["peaks"] = limits.NO_PEAKS
    assert gpu_report.find(found, gpu_report.BARS[0]) is None


def test_an_empty_folder_is_said_to_be_empty(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no result of a GPU benchmark"):
        gpu_report.main([str(tmp_path)])
