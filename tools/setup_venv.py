"""Create .venv and install camelid into it, so that a second run only compiles what changed.

Run by the Makefile with any Python >= 3.11; standard library only. The build tools live in .venv
itself instead of in pip's throw-away environment: their paths then stay the same from one build to
the next and the compiled objects under build/ stay valid. The install is editable, so a changed
Python file needs nothing and a changed C++ file needs `make` once more.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CMAKE_MINIMUM = (3, 24)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--extras", default="", help="comma-separated, for example test,dev")
    options = parser.parse_args()

    python = options.venv / "bin" / "python"
    if not python.exists():
        say(f"creating {options.venv.name} with Python {sys.version.split()[0]}")
        venv.create(options.venv, with_pip=True)

    say("installing the build tools")
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    pip(python, "install", *requirements, *missing_programs())

    extras = f"[{options.extras}]" if options.extras else ""
    say(f"building and installing camelid{extras}")
    build_dir = f"--config-settings=build-dir={ROOT / 'build' / options.venv.name.lstrip('.')}"
    pip(python, "install", "--no-build-isolation", build_dir, "--editable", f"{ROOT}{extras}")


def missing_programs() -> list[str]:
    """Return the packages that supply cmake and ninja where the machine's are absent or too old."""
    packages = []
    cmake = shutil.which("cmake")
    answer = subprocess.run([cmake, "--version"], capture_output=True, text=True) if cmake else None
    found = re.search(r"(\d+)\.(\d+)", answer.stdout) if answer else None
    if found is None or tuple(map(int, found.groups())) < CMAKE_MINIMUM:
        packages.append("cmake")
    if shutil.which("ninja") is None:
        packages.append("ninja")
    return packages


def pip(python: Path, *arguments: str) -> None:
    # The venv's programs first, as if it were activated: the build finds its cmake and ninja there.
    environment = os.environ | {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    environment.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
    command = [str(python), "-m", "pip", "--disable-pip-version-check", arguments[0], "--quiet"]
    result = subprocess.run([*command, *arguments[1:]], env=environment)
    if result.returncode != 0:
        sys.exit(
            f"[setup] pip failed; the reason is above. The command was: pip {' '.join(arguments)}"
        )


def say(message: str) -> None:
    print(f"[setup] {message}", flush=True)


if __name__ == "__main__":
    main()
