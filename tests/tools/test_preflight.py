"""tools/preflight.py: what this Python and made-up drivers have, and what is said about it."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import pytest

import preflight


def test_a_core_has_the_one_name_that_its_python_finds() -> None:
    assert preflight.core_name(sys.executable) == f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"


def test_a_python_that_is_none_is_named() -> None:
    with pytest.raises(SystemExit, match="--python /no/python"):
        preflight.core_name("/no/python")


def test_what_a_python_lacks_is_said_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert preflight.missing_packages(sys.executable) == set()
    assert capsys.readouterr().out == ""
    monkeypatch.setitem(preflight.PACKAGES, "a-moon", "moon_that_is_not")
    assert preflight.missing_packages(sys.executable) == {"a-moon"}
    assert "-m pip install a-moon\n" in capsys.readouterr().out


@pytest.mark.parametrize(("version", "enough"), [("2, 13, 6", False), ("3, 0, 0", True)])
def test_building_wants_the_pybind11_that_cmake_wants(
    version: str, enough: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pybind11.py").write_text(f"version_info = ({version})")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    missing = preflight.missing_for_core(sys.executable)
    assert any("pip install 'pybind11>=3'" in line for line in missing) is not enough


@pytest.mark.parametrize(
    ("versions", "said"),
    [
        ((13000, 13000), "The driver is for CUDA 13.0, the library for 13.0.\n"),
        ((12080, 12090), "for 12.9. The driver may refuse what is newer than itself.\n"),
        ((13010, 12090), "The driver is for CUDA 13.1, the library for 12.9.\n"),
    ],
)
def test_a_driver_of_this_cuda_or_a_later_one_will_do(
    versions: tuple[int, int], said: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(preflight, "cuda_versions", lambda library: versions)
    preflight.check_driver(Path("library"))
    assert capsys.readouterr().out.endswith(said)


def test_a_driver_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "cuda_versions", lambda library: (12080, 13000))
    with pytest.raises(SystemExit, match=r"driver is for CUDA 12.8, .* or build with CUDA 12\."):
        preflight.check_driver(Path("library"))


def test_a_library_that_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    (tmp_path / "library.so").touch()
    with pytest.raises(SystemExit, match=r"library.so cannot be used: .*file too short"):
        preflight.check_driver(tmp_path / "library.so")
