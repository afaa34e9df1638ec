"""tools/gpu_check without a GPU: what it says, and what it would run in which order."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest

import steps
from steps import LEFT_OUT

PROGRAM = Path(__file__).resolve().parents[2] / "tools" / "gpu_check"
CORE = "_core.cpython-312-x86_64-linux-gnu.so"


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
    """Commands, of which those with "failing" in them fail; and a GPU and all else, it seems."""
    commands: list[list[str]] = []

    def run(command: list[str], *_: Any, **options: Any) -> Any:
        commands.append(command)
        failed = any("failing" in word for word in command)
        return subprocess.CompletedProcess(command, int(failed), stdout="")

    monkeypatch.setattr(gpu_check.subprocess, "run", run)
    monkeypatch.setattr(steps, "run_limited", lambda *arguments: run(*arguments).returncode)
    monkeypatch.setattr(gpu_check, "count_gpus", lambda: 1)
    monkeypatch.setattr(gpu_check, "check_driver", lambda library: None)
    monkeypatch.setattr(gpu_check, "missing_packages", lambda python: set())
    monkeypatch.setattr(gpu_check, "missing_for_core", lambda python: [])
    monkeypatch.setattr(gpu_check, "core_name", lambda python: CORE)
    monkeypatch.setattr(gpu_check, "find_sanitizer", lambda: "/usr/bin/compute-sanitizer")
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
    library, core = tmp_path / "library.so", tmp_path / CORE
    library.touch()
    core.touch()
    return ["--library", str(library), "--core", str(core), "--build", str(tmp_path / "build")]


def names_of(out: str, verdict: str) -> list[str]:
    summary = out.split("=== summary")[1]
    return [line.split(maxsplit=2)[-1] for line in summary.splitlines() if line.startswith(verdict)]


def test_what_was_carried_is_tested_measured_and_sanitized(
    gpu_check: Any, ran: list[list[str]], carried: list[str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    assert gpu_check.main([*carried, "--out", str(out)]) == 0
    lines = (out / "steps.jsonl").read_text().splitlines()
    passed = [step["name"] for step in map(json.loads, lines)]
    kinds = [name.split(": ")[0] if ": test_" in name else name for name in passed]
    assert list(dict.fromkeys(kinds)) == [
        "engine sees the GPU", "engine decodes a tiny model", "engine decodes the demo model",
        "tests of kernels", "engine against references", "gpu_step", "gpu_attention",
        "gpu_kernels", "report", "memcheck", "memcheck: engine", "racecheck", "synccheck",
    ]  # fmt: skip
    for kind in ("tests of kernels", "memcheck", "racecheck", "synccheck"):
        assert f"{kind}: test_attention_few" in passed
        assert f"{kind}: test_matmul_dense" in passed
    commands = dict(zip(passed, ran, strict=True))
    assert commands["engine against references"][-3:] == ["tests/parity", "--device", "cuda"]
    # Of the tiny model nothing is reported.
    assert commands["engine decodes a tiny model"][2:4] == ["--out", str(out / "tiny")]
    assert commands["gpu_step"][2:4] == ["--out", str(out / "records")]
    assert commands["report"][-2:] == ["--out", str(out)]
    assert len(names_of(capsys.readouterr().out, "passed")) == len(passed)


def test_a_folder_with_a_run_is_only_gone_on_with(
    gpu_check: Any, ran: list[list[str]], carried: list[str]
) -> None:
    only = [*carried, "--only", "^engine sees|^report"]
    assert gpu_check.main(only) == 0
    with pytest.raises(SystemExit, match="go on with it by --resume"):
        gpu_check.main(only)
    assert gpu_check.main([*only, "--resume"]) == 0
    assert [Path(command[1]).name for command in ran] == ["-c", "gpu_report.py", "gpu_report.py"]


def test_steps_that_lack_something_are_named(
    gpu_check: Any, ran: list[list[str]], carried: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(gpu_check, "find_sanitizer", lambda: None)
    monkeypatch.setattr(gpu_check, "missing_packages", lambda python: {"tqdm"})
    assert gpu_check.main([*carried[:2], *carried[4:]]) == LEFT_OUT
    out = capsys.readouterr().out
    assert "gpu_step (needs the core (--core), tqdm)" in out
    assert "racecheck: test_rows (needs compute-sanitizer)" in out
    passed = [name for name in names_of(out, "passed") if ": " not in name]
    assert passed == ["gpu_attention", "gpu_kernels", "report"]
    assert len(ran) == len(names_of(out, "passed"))


def test_an_engine_that_sees_no_gpu_is_not_measured(
    gpu_check: Any, ran: list[list[str]], carried: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(gpu_check, "SEES_GPU", "failing")
    assert gpu_check.main(carried) == 1
    out = capsys.readouterr().out
    assert len(names_of(out, "FAILED")) == 1
    assert "gpu_step ('engine sees the GPU' did not pass)" in out


def test_steps_run_with_the_python_that_was_named_from_wherever_it_was(
    gpu_check: Any, ran: list[list[str]], carried: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    args = gpu_check.parse(
        [
            "--library",
            "a.so",
            "--core",
            CORE,
            "--build",
            "b",
            "--python",
            "./py",
            "--commit",
            "told",
        ]
    )
    assert args.out == tmp_path / "b" / "results"
    (tmp_path / CORE).touch()
    for step in gpu_check.plan(args):
        assert str(tmp_path / "py") in step.command
        assert step.environment["CAMELID_COMMIT"] == "told"
        assert step.environment["CAMELID_GPU_LIBRARY"] == str(tmp_path / "a.so")
        inside = step.name.startswith("engine") or step.name in ("gpu_step", "memcheck: engine")
        assert ("PYTHONPATH" in step.environment) == inside


def test_a_core_for_another_python_is_refused(
    gpu_check: Any, ran: list[list[str]], carried: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "core_name", lambda python: "_core.cpython-311-linux.so")
    with pytest.raises(SystemExit, match=r"is for another Python: .* finds only _core.cpython-311"):
        gpu_check.main(carried)
    assert ran == []


@pytest.mark.parametrize("wrong", [["--note", "a/b"], ["--only", "("]])
def test_wrong_arguments_are_refused_before_anything_runs(
    gpu_check: Any, ran: list[list[str]], wrong: list[str]
) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main(wrong)
    assert ran == []


def test_the_staged_package_has_this_core_and_no_other(gpu_check: Any, tmp_path: Path) -> None:
    core = tmp_path / CORE
    core.touch()
    for _ in range(2):  # again, over what is there
        package = gpu_check.stage(core, tmp_path / "python") / "camelid"
    assert (package / core.name).resolve() == core
    assert (package / "bench.py").read_text() == (gpu_check.PACKAGE / "bench.py").read_text()
    assert (package / "_core.pyi").exists() is False
    assert [path.name for path in package.glob("_core*")] == [core.name]


def test_build_only_asks_for_library_and_core_and_no_gpu(
    gpu_check: Any, ran: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(shutil, "which", lambda name, **_: f"/usr/bin/{name}")
    monkeypatch.setattr(gpu_check, "count_gpus", lambda: 0)
    (tmp_path / "libcamelid_gpu_check.so").touch()
    (tmp_path / CORE).touch()
    (tmp_path / "_core.cpython-310-x86_64-linux-gnu.so").touch()  # of another day
    assert gpu_check.main(["--build-only", "--build", str(tmp_path), "--python", "/py"]) == 0
    assert f"{tmp_path / CORE}: 0 bytes" in capsys.readouterr().out
    configure, build = ran
    assert {"-DCAMELID_CUDA=ON", "-DCAMELID_EXTENSION=ON", "-DPython_EXECUTABLE=/py"} <= {
        *configure
    }
    assert build[-3:] == ["--target", "camelid_gpu_check", "_core"]


def test_the_engine_is_left_out_only_where_that_was_said(
    gpu_check: Any, ran: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, **_: f"/usr/bin/{name}")
    monkeypatch.setattr(gpu_check, "missing_for_core", lambda python: ["pybind11 from 3 on"])
    (tmp_path / "libcamelid_gpu_check.so").touch()
    only = ["--build-only", "--build", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"pybind11 from 3 on\. --no-core builds"):
        gpu_check.main(only)
    assert gpu_check.main([*only, "--no-core"]) == 0
    configure, build = ran
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
    gpu_check.build(tmp_path, "/py", with_core=True)
    assert "-GNinja" in ran[0]
    (tmp_path / "CMakeCache.txt").touch()  # of a first time that failed
    gpu_check.build(tmp_path, "/py", with_core=True)
    assert ran[2][:2] == ["cmake", "-S"]
    assert "-GNinja" not in ran[2]


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
