"""gpu_step.py on a tiny shape: on the CPU, and on the emulated GPU in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest

import gpu_step
import limits
from emulated_build import ROOT, build_core
from random_model import RandomModel, config_of, open_engine

TINY = config_of("tiny", None)
PEAKS = {"read_gb_s": 4000.0, "copy_gb_s": 3900.0, "bf16_tflop_s": 800.0, "bf16_measured_by": "us"}
ARGUMENTS = ["--shape", "tiny", "--context", "48", "--batches", "1,3", "--pieces", "16,48",
             "--piece", "32", "--runs", "4", "--memory", "8000000", "--threads", "1",
             "--timeline"]  # fmt: skip


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, Any]:
    known = {"peaks": PEAKS, "machine": {"gpu": "Some GPU"}}
    monkeypatch.setattr(gpu_step, "measure_peaks", lambda record, _: record.update(known))
    gpu_step.main([*ARGUMENTS, "--device", "cpu", "--library", "none", "--kv", "bf16,int8",
                   "--out", str(tmp_path), *arguments])  # fmt: skip
    (path,) = tmp_path.glob("*-gpu-step-some-gpu.json")
    report = path.with_suffix(".md").read_text()
    assert "nan" not in report
    assert "decode, batch 3" in report
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def test_every_kind_of_step_is_measured_and_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = run(tmp_path, monkeypatch)
    assert [(row["name"], row["kv"]) for row in record["rows"]] == [
        (name, kv)
        for kv in ("bf16", "int8")
        for name in ("decode, batch 1, 48 tokens each", "decode, batch 3, 48 tokens each",
                     "prefill, 48 tokens, 16 a step", "prefill, 48 tokens, 48 a step")
    ]  # fmt: skip
    assert record["model"] == {"shape": "tiny", "n_layers": 4, "context": 48}
    one, three = record["rows"][:2]
    assert len(one["ms"]) == len(one["device_ms"]) == 4
    names = {call["name"]: call for call in three["timeline"]}
    assert names["attend local"]["calls"] == 3
    assert names["attend global"]["calls"] == 1
    assert names["project_kv local"]["calls"] == 3
    assert names["matmul 512 x 256"]["calls"] == 1  # the head
    assert names["experts"]["work"]["n_flops"] == 4 * limits.experts(TINY, 3).n_flops


def test_a_kind_of_step_that_fails_loses_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(engine: object, config: object, kv: str, piece: int, args: object) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(gpu_step, "measure_prefill", fails)
    with pytest.raises(SystemExit, match="failed: peaks, prefill 16, bf16 KV, wrong KV"):
        gpu_step.main([*ARGUMENTS, "--device", "cpu", "--library", "none", "--kv", "bf16,wrong",
                       "--pieces", "16", "--out", str(tmp_path)])  # fmt: skip
    (path,) = tmp_path.glob("*-gpu-step-cpu.json")
    record = json.loads(path.read_text())
    assert [row["n_tokens"] for row in record["rows"]] == [1, 3]
    assert "**prefill 16, bf16 KV failed**: RuntimeError: no room" in (
        path.with_suffix(".md").read_text()
    )


def test_work_of_calls_adds_up_to_the_steps() -> None:
    calls = {"project_kv local": 36, "project_kv global": 12, "matmul_add 5120 x 5120": 48,
             "experts": 48, "attend local": 36, "attend global": 12, "matmul 202048 x 5120": 1,
             "norm": 1}  # fmt: skip
    scout = config_of("scout", None)
    total = limits.Work()
    for name, n in calls.items():
        total += gpu_step.work_of_call(scout, {"name": name, "calls": n}, 8, 8191, "bf16")
    whole = limits.decode(scout, 8, 8191, "bf16")
    assert total.n_bytes == pytest.approx(whole.n_bytes)
    assert total.n_flops == pytest.approx(whole.n_flops)


def test_fewer_sequences_where_there_is_no_memory_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(RandomModel(TINY), device="cpu", kv_cache="bf16", memory_bytes=8_000_000)
    memory = engine.memory()
    fixed = 8_000_000 - memory["kv_limit_bytes"]
    room = fixed + 2 * engine.kv_bytes_for(48)
    args = gpu_step.parse([*ARGUMENTS, "--device", "cpu"])
    small = open_engine(RandomModel(TINY), device="cpu", kv_cache="bf16", memory_bytes=room)
    row = gpu_step.measure_decode(small, TINY, "bf16", 5, args)
    assert row is not None
    assert row.n_tokens == 2
    assert "batch 2, 48 tokens each (5 wanted" in row.name


@pytest.mark.parametrize(
    ("gigabytes", "n_layers"), [(0, 48), (143.8, 48), (85.5, 48), (42, 24), (24, 12), (1, 4)]
)
def test_smaller_gpus_run_fewer_layers(gigabytes: float, n_layers: int) -> None:
    assert gpu_step.fitting_layers(config_of("scout", None), gigabytes * 1e9) == n_layers


def test_random_layers_are_not_alike_and_take_no_memory() -> None:
    model = RandomModel(TINY)
    first, second = model.layer(0), model.layer(1)
    assert (first.experts[0][0].words != first.experts[1][0].words).any()
    assert (first.q.words != second.q.words).any()
    assert first.router is not None
    assert second.router is not None
    assert first.router.data is not None
    assert (first.router.data != second.router.data).any()
    assert first.input_norm is second.post_norm


@pytest.mark.slow
def test_on_the_emulated_gpu(tmp_path: Path) -> None:
    gpu_check = _load(ROOT / "tools" / "gpu_check")
    staged = gpu_check.stage(build_core(), tmp_path / "python")
    # Without site: an editable camelid would come first.
    site = sysconfig.get_paths()["purelib"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(staged), site])}
    arguments = [*ARGUMENTS[:-1], "--kv", "fp8", "--out", str(tmp_path), "--runs", "1",
                 "--batches", "2", "--pieces", "48", "--timeline"]  # fmt: skip
    program = str(ROOT / "benchmarks" / "gpu_step.py")
    done = subprocess.run([sys.executable, "-S", program, *arguments], env=environment,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "emulated" in done.stdout
    (path,) = tmp_path.glob("*-gpu-step-cuda.json")
    decode, prefill = json.loads(path.read_text())["rows"]
    assert {call["name"] for call in decode["timeline"]} >= {"experts", "attend local"}
    assert prefill["device_ms"][0] > 0


def _load(path: Path) -> Any:
    loader = SourceFileLoader(path.name, str(path))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    dont_write, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = dont_write
    return module
