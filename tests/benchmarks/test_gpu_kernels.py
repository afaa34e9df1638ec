"""gpu_kernels.py on the emulated device with a made-up clock: all is called, and written down."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import gpu_dense
import gpu_kernels
import gpu_parts
import records
from emulated_gpu import TINY, Emulated


def test_every_kernel_is_called_and_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_dense, "torch_us", lambda kind, sizes, output: [2.0])
    gpu = Emulated()
    gpu_kernels.main(["--library", "none", "--out", str(tmp_path)], gpu, TINY)
    (path,) = tmp_path.glob("*-gpu-kernels-emulated-5-sms.json")
    record = json.loads(path.read_text())
    assert [(row["name"].split()[1], row["n_tokens"]) for row in record["rows"]] == [
        ("QKV", 1), ("QKV", 8), ("O", 1), ("O", 8), ("experts", 1), ("experts", 9),
        ("experts,", 7), ("experts,", 7), ("experts,", 7), ("lm_head", 1), ("lm_head", 8),
        ("top", 7), ("of", 7), ("top", 7), ("of", 7), ("packing", 0), ("packing", 0),
    ]  # fmt: skip
    assert set(gpu.called) == {
        "read_memory", "copy_memory", "run_matmul_few", "run_experts_few", "case_grouped",
        "case_route", "case_combine", "run_pack",
    }  # fmt: skip
    report = path.with_suffix(".md").read_text()
    assert "(by torch)" in report
    assert "nan" not in report.lower()


def test_bytes_are_those_that_a_call_must_read() -> None:
    gpu = Emulated()
    (row,) = gpu_kernels.matmul_rows(gpu, "O", 160, 128, 4, (1,), 1 << 14)
    assert row.n_bytes == 160 * 128 // 2 + 160 * 2 + 128 * 2 + 160 * 4
    # One chunk of 128 inputs; ffn_dim of 64 fills half of one.
    one, nine = gpu_kernels.moe_rows(gpu, TINY, 1 << 14)
    pair = (2 * 64 + 128) * 128 // 2 + (2 * 64 + 128) * 2
    assert one.n_bytes == 2 * pair + 3 * 128 * 2 + 128 * 2 + 2 * 128 * 4
    assert one.name.endswith("1 hit")
    assert nine.n_flops == 9 * one.n_flops


def test_limit_is_the_larger_of_reading_and_multiplying() -> None:
    peaks = {"read_gb_s": 4000.0, "bf16_tflop_s": 800.0}
    row = {"n_bytes": 4_000_000, "n_flops": 1600 * 10**6}
    assert gpu_kernels.limit_us(row, peaks) == pytest.approx(2.0)
    assert gpu_kernels.limit_us(row, peaks | {"read_gb_s": 400.0}) == pytest.approx(10.0)
    assert gpu_kernels.limit_us(row, peaks | {"bf16_tflop_s": 0.0}) == pytest.approx(1.0)


def test_table_holds_medians_against_limits() -> None:
    record = {
        "peaks": {"read_gb_s": 4000.0, "copy_gb_s": 3000.0, "bf16_tflop_s": 800.0},
        "rows": [{"name": "k", "n_tokens": 1, "n_bytes": 8_000_000, "n_flops": 0,
                  "us": [4.0, 4.0, 5.0], "torch_us": [3.0]}],
    }  # fmt: skip
    line = gpu_kernels.kernel_table(record).splitlines()[2]
    assert line == "| k | 1 | 8.0 | 4.00 | 4.00 to 4.80 | 2.00 | 50% | 2000 | 67% | 0.75 |"


@pytest.mark.parametrize(("n_bytes", "copies"), [(1000, 2), (100, 3), (99, 4), (10, 21)])
def test_copies_pass_l2_twice(n_bytes: int, copies: int) -> None:
    assert gpu_parts.n_copies(n_bytes, 100) == copies


def test_results_of_a_day_stay_and_notes_are_names(tmp_path: Path) -> None:
    record = {"date": "2026-12-24", "benchmark": "gpu_kernels"}
    names = [records.write(record, "", tmp_path, "x").name for _ in range(3)]
    assert names == [f"2026-12-24-gpu-kernels-x{number}" for number in ("", "-2", "-3")]
    with pytest.raises(SystemExit):
        gpu_kernels.parse(["--library", "none", "--note", "a/b"], "gpu_kernels", None)


def test_what_fails_is_told_and_loses_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_peaks(gpu: object, model: object) -> None:
        raise OSError("no clock")

    def fails_later(gpu: object, model: object, l2: int) -> Iterator[gpu_parts.Row]:
        yield gpu_parts.Row("early", 1, 1000, 0, [5.0])
        kept = next(tmp_path.glob("*.json")).read_text()
        assert "early" in kept  # before anything else is measured
        raise RuntimeError("an illegal\naddress")

    monkeypatch.setattr(gpu_kernels, "memory_peaks", no_peaks)
    monkeypatch.setattr(gpu_dense, "torch_us", lambda kind, sizes, output: [])
    monkeypatch.setitem(gpu_kernels.FAMILIES, "experts", fails_later)
    arguments = ["--library", "none", "--out", str(tmp_path), "--only", "^O$|experts|pack"]
    with pytest.raises(SystemExit, match=r"\[gpu_kernels\] failed: peaks of memory, experts"):
        gpu_kernels.main(arguments, Emulated(), TINY)
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    names = [row["name"].split()[0] for row in record["rows"]]
    assert names == ["INT4", "INT4", "early", "INT4", "INT8"]
    assert record["errors"]["experts"] == "RuntimeError: an illegal\naddress"
    report = path.with_suffix(".md").read_text()
    assert "- **experts failed**: RuntimeError: an illegal address" in report
    assert "fails_later" in capsys.readouterr().err  # where


def test_a_result_says_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    record = records.gpu_head("gpu_kernels", {"cuda_runtime": 13000})
    assert set(record) == {
        "benchmark", "date", "version", "commit", "driver", "machine", "errors"
    }  # fmt: skip
    monkeypatch.setenv("CAMELID_COMMIT", "told")
    assert records.commit() == "told"
    record |= {"commit": "0123456789ab-dirty", "driver": "580.65.06"}
    assert records.software(record) == "Commit 0123456789ab-dirty, driver 580.65.06, CUDA 13.0."
    assert "unknown" in records.software({"machine": {}})
