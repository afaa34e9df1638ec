"""tools/gpu_check without a GPU: what it says, and what it would run in which order."""

from __future__ import annotations

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

    monkeypatch.setattr(gpu_check.subprocess, "run", run)
    monkeypatch.setattr(gpu_check, "count_gpus", lambda: 1)
    return commands


def test_without_a_gpu_it_says_so_in_one_sentence(
    gpu_check: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "count_gpus", lambda: 0)
    assert gpu_check.main([]) == 2
    assert capsys.readouterr().out.count("\n") == 1


def test_a_carried_library_is_tested_sanitized_and_measured(
    gpu_check: Any, ran: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    library = tmp_path / "library.so"
    library.touch()
    assert gpu_check.main(["--library", str(library), "--out", str(tmp_path)]) == 0
    assert [command[0] == "compute-sanitizer" for command in ran] == [False, *[True] * 3, False]
    assert ran[-1][-2:] == ["--out", str(tmp_path)]
    assert capsys.readouterr().out.count("passed") == 5


def test_what_is_not_there_is_named_and_what_fails_hides_nothing(
    gpu_check: Any, ran: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(gpu_check, "pytest", lambda *arguments: ["failing"])
    library = tmp_path / "library.so"
    library.touch()
    assert gpu_check.main(["--library", str(library)]) == 1
    assert len(ran) == 2
    out = capsys.readouterr().out
    assert out.count("NOT RUN") == 3
    assert out.count("FAILED") == 1
    assert out.count("passed") == 1


def test_build_only_asks_for_the_library_and_no_gpu(
    gpu_check: Any, ran: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "count_gpus", lambda: 0)
    (tmp_path / "libcamelid_gpu_check.so").touch()
    assert gpu_check.main(["--build-only", "--build", str(tmp_path)]) == 0
    configure, build = ran
    assert "-DCAMELID_CUDA=ON" in configure
    assert build[:5] == ["cmake", "--build", str(tmp_path), "--target", "camelid_gpu_check"]
