"""tools/gpu_check without a GPU: what it says, and what it would run in which order."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "tools" / "gpu_check"


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    loader = SourceFileLoader("gpu_check", str(PROGRAM))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture
def ran(gpu_check: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands, of which those with "failing" in them fail; and a GPU, it seems."""
    commands: list[list[str]] = []

    def run(command: list[str], **options: Any) -> Any:
        commands.append(command)
        failed = any("failing" in word for word in command)
        return subprocess.CompletedProcess(command, int(failed), stdout="")

    def run_limited(command: list[str], environment: dict[str, str], limit_s: float) -> int:
        assert limit_s >= 15 * 60
        return int(run(command).returncode)

    monkeypatch.setattr(gpu_check.subprocess, "run", run)
    monkeypatch.setattr(gpu_check, "run_limited", run_limited)
    monkeypatch.setattr(gpu_check, "count_gpus", lambda: 1)
    return commands


def test_without_a_gpu_it_says_so_in_one_sentence(
    gpu_check: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "count_gpus", lambda: 0)
    assert gpu_check.main([]) == 2
    assert capsys.readouterr().out.count("\n") == 1


@pytest.fixture
def carried(tmp_path: Path) -> list[str]:
    """Arguments that name a library and a core."""
    library, core = tmp_path / "library.so", tmp_path / "_core.cpython-312-x86_64-linux-gnu.so"
    library.touch()
    core.touch()
    return ["--library", str(library), "--core", str(core), "--build", str(tmp_path / "build")]


def names_of(out: str, verdict: str) -> list[str]:
    summary = out.split("=== summary")[1]
    return [line.split(maxsplit=2)[-1] for line in summary.splitlines() if line.startswith(verdict)]


def test_what_was_carried_is_tested_sanitized_and_measured(
    gpu_check: Any, ran: list[list[str]], carried: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(shutil, "which", lambda name, **_: f"/usr/bin/{name}")
    assert gpu_check.main([*carried, "--out", str(tmp_path)]) == 0
    passed = names_of(capsys.readouterr().out, "passed")
    tests = [name for name in passed if ": " in name]
    assert passed == [
        *tests, "engine sees the GPU", "engine against references", "engine under memcheck",
        "camelid bench", "gpu_kernels", "gpu_attention", "gpu_step", "report",
    ]  # fmt: skip
    for kind in ("tests of kernels", "memcheck", "racecheck", "synccheck"):
        assert f"{kind}: test_attention_few" in tests
        assert f"{kind}: test_matmul_dense" in tests
    programs = [Path(word).name for command in ran for word in command
                if word.startswith("benchmarks/")]  # fmt: skip
    assert programs == ["gpu_step.py", "gpu_kernels.py", "gpu_attention.py", "gpu_step.py",
                        "gpu_report.py"]  # fmt: skip
    assert ran[len(tests) + 1][-3:] == ["tests/parity", "--device", "cuda"]
    assert ran[-1][-2:] == ["--out", str(tmp_path)]


def test_without_a_core_kernels_are_measured_and_the_rest_is_named(
    gpu_check: Any, ran: list[list[str]], carried: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_check.main([*carried[:2], *carried[4:]]) == gpu_check.LEFT_OUT
    out = capsys.readouterr().out
    left_out = names_of(out, "NOT RUN")
    lacking = [line for line in left_out if "no compute-sanitizer on this machine" in line]
    assert [line.split()[2] for line in lacking] == ["memcheck", "racecheck", "synccheck"]
    assert "engine (no --core, and none could be built)" in out
    assert "gpu_step (no engine)" in out
    passed = [name for name in names_of(out, "passed") if ": " not in name]
    assert passed == ["gpu_kernels", "gpu_attention", "report"]


def test_what_is_not_there_is_named_and_what_fails_hides_nothing(
    gpu_check: Any, ran: list[list[str]], carried: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(shutil, "which", lambda name, **_: None)
    monkeypatch.setattr(gpu_check, "pytest", lambda *arguments: ["/bin/failing"])
    assert gpu_check.main(carried) == 1
    out = capsys.readouterr().out
    assert out.count("NOT RUN") == 4
    failed = names_of(out, "FAILED")
    assert "tests of kernels: test_rows" in failed
    assert failed[-1] == "engine against references"
    assert "gpu_step" in names_of(out, "passed")


def test_an_engine_that_sees_no_gpu_is_not_measured(
    gpu_check: Any, ran: list[list[str]], carried: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(gpu_check, "SEES_GPU", "failing")
    assert gpu_check.main(carried) == 1
    out = capsys.readouterr().out
    assert names_of(out, "FAILED") == ["engine sees the GPU"]
    assert "gpu_step (no engine)" in out


def test_the_staged_package_has_this_core_and_no_other(gpu_check: Any, tmp_path: Path) -> None:
    core = tmp_path / "_core.cpython-312-x86_64-linux-gnu.so"
    core.touch()
    for _ in range(2):  # again, over what is there
        package = gpu_check.stage(core, tmp_path / "python") / "camelid"
    assert (package / core.name).resolve() == core
    assert (package / "bench.py").read_text() == (gpu_check.PACKAGE / "bench.py").read_text()
    assert (package / "_core.pyi").exists() is False
    assert [path.name for path in package.glob("_core*")] == [core.name]


def test_build_only_asks_for_library_and_core_and_no_gpu(
    gpu_check: Any, ran: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, **_: f"/usr/bin/{name}")
    monkeypatch.setattr(gpu_check, "count_gpus", lambda: 0)
    (tmp_path / "libcamelid_gpu_check.so").touch()
    (tmp_path / "_core.cpython-312-x86_64-linux-gnu.so").touch()
    assert gpu_check.main(["--build-only", "--build", str(tmp_path), "--python", "/py"]) == 0
    asked, configure, build = ran
    assert asked[0] == "/py"
    assert {"-DCAMELID_CUDA=ON", "-DCAMELID_EXTENSION=ON", "-DPython_EXECUTABLE=/py"} <= {
        *configure
    }
    assert build[-3:] == ["--target", "camelid_gpu_check", "_core"]


def test_a_python_without_headers_leaves_the_engine_out(
    gpu_check: Any, ran: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert gpu_check.can_build_core("/failing/python") is False
    assert "/failing/python lacks pybind11 or Python's headers" in capsys.readouterr().out
    monkeypatch.setattr(shutil, "which", lambda name, **_: f"/usr/bin/{name}")
    monkeypatch.setattr(gpu_check, "can_build_core", lambda python: False)
    (tmp_path / "libcamelid_gpu_check.so").touch()
    assert gpu_check.main(["--build-only", "--build", str(tmp_path)]) == 0
    configure, build = ran[1:]
    assert "-DCAMELID_EXTENSION=OFF" in configure
    assert build[-2:] == ["--target", "camelid_gpu_check"]


def test_without_cmake_it_says_how_to_carry(
    gpu_check: Any, ran: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, **_: None)
    with pytest.raises(SystemExit, match="--library FILE --core FILE"):
        gpu_check.main(["--build", str(tmp_path)])


def test_configures_each_time_with_the_generator_of_the_first(
    gpu_check: Any, ran: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, **_: f"/usr/bin/{name}")
    (tmp_path / "libcamelid_gpu_check.so").touch()
    gpu_check.build(tmp_path, "/py")
    assert "-GNinja" in ran[1]
    (tmp_path / "CMakeCache.txt").touch()  # of a first time that failed
    gpu_check.build(tmp_path, "/py")
    assert ran[4][:2] == ["cmake", "-S"]
    assert "-GNinja" not in ran[4]


def test_a_note_that_is_no_name_is_refused_before_anything_runs(
    gpu_check: Any, ran: list[list[str]]
) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main(["--note", "a/b"])
    assert ran == []


def test_what_takes_too_long_is_ended_with_what_it_started(
    gpu_check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "LAST_WORDS_S", 0.2)
    # The parent hears no signal but the last, and the child is in its group.
    pid = tmp_path / "pid"
    program = f"""
import pathlib, signal, subprocess, time
signal.signal(signal.SIGABRT, signal.SIG_IGN)
child = subprocess.Popen(["sh", "-c", "trap : ABRT; sleep 60; sleep 60"])
pathlib.Path({str(pid)!r}).write_text(str(child.pid))
time.sleep(60)
"""
    status = gpu_check.run_limited([sys.executable, "-c", program], dict(os.environ), 5)
    assert status is None
    child = Path(f"/proc/{pid.read_text()}/stat")
    assert not child.exists() or child.read_text().split()[2] in "ZX"
    assert gpu_check.run_limited([sys.executable, "-c", "raise SystemExit(3)"], {}, 60) == 3


def test_each_kernel_has_small_tests() -> None:
    """Of a file of kernels, or of a part of it, the tests have its name."""
    root = PROGRAM.parents[1]
    for path in [*root.glob("cuda/ops/*.cu"), *root.glob("cuda/sm90/*.cu")]:
        text = path.read_text()
        if "__global__" not in text and "Gemm<" not in text:
            continue
        name = (
            "matmul_dense" if path.stem.startswith("matmul_") and "sm90" in str(path) else path.stem
        )
        tests = (root / "tests" / "cuda" / f"test_{name}.py").read_text()
        assert "pytest.mark.small" in tests, path
