"""tools/steps.py: what becomes of steps, what is kept of them, and that none outlives its run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import steps
from steps import LEFT_OUT, Step, Steps, run_limited

TOOLS = Path(steps.__file__).parent


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def kept(folder: Path) -> dict[str, str]:
    lines = (folder / "steps.jsonl").read_text().splitlines()
    return {step["name"]: step["verdict"] for step in map(json.loads, lines)}


def has_ended(pid: str) -> bool:
    """Tell whether a process that was killed is gone, which takes it a moment."""
    stat, ends = Path(f"/proc/{pid}/stat"), time.monotonic() + 10
    while stat.exists() and stat.read_text().split()[2] not in "ZX":
        if time.monotonic() > ends:
            return False
        time.sleep(0.01)
    return True


def test_what_fails_hides_nothing_and_all_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = [
        Step("says: a", python("import os; print('hello', os.environ['A'])"), 1, {"A": "b"}),
        Step("fails", python("raise SystemExit(3)"), 1),
        Step("needs", python(""), 1, needs=("numpy", "a moon")),
        Step("follows", python(""), 1, after="fails"),
        Step("goes on", python(""), 1, after="says: a"),
    ]
    assert Steps(tmp_path, lacking=["a moon"]).run(wanted) == 1
    out = capsys.readouterr().out
    assert "hello b" in out
    assert (tmp_path / "logs" / "says-a.txt").read_text() == "hello b\n"
    assert "needs (needs a moon)" in out
    assert "follows ('fails' did not pass)" in out
    assert kept(tmp_path) == {"says: a": "passed", "fails": "FAILED", "needs": "NOT RUN",
                              "follows": "NOT RUN", "goes on": "passed"}  # fmt: skip


def test_a_run_that_goes_on_leaves_out_what_passed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = tmp_path / "ran"
    note = f"open({str(ran)!r}, 'a').write('x')"
    wanted = [
        Step("once", python(note), 1),
        Step("always", python(note), 1, always=True),
        Step("later", python("raise SystemExit(1)"), 1, after="once"),
    ]
    assert Steps(tmp_path).run(wanted) == 1
    wanted[2] = Step("later", python(""), 1, after="once")
    assert Steps(tmp_path, resume=True).run(wanted) == 0
    assert ran.read_text() == "xxx"
    assert "passed   before  once" in capsys.readouterr().out
    assert kept(tmp_path) == {"once": "passed", "always": "passed", "later": "passed"}


def test_time_is_for_all_steps_together(tmp_path: Path) -> None:
    sleeps = python("import time; time.sleep(60)")
    wanted = [Step("cut off", sleeps, 1), Step("no turn", sleeps, 1)]
    assert Steps(tmp_path, minutes=0.5 / 60).run(wanted) == LEFT_OUT
    assert kept(tmp_path) == {"cut off": "CUT OFF", "no turn": "NOT RUN"}
    assert Steps(tmp_path, minutes=1).run([Step("own time", sleeps, 0.5 / 60)]) == 1
    assert kept(tmp_path)["own time"] == "TOO LONG"


def test_what_takes_too_long_says_where_it_is_and_is_ended_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "LAST_WORDS_S", 0.5)
    # The child hears no signal but the last, and is in the group of its parent.
    pid, log = tmp_path / "pid", tmp_path / "log"
    program = f"""
import pathlib, subprocess, time
child = subprocess.Popen(["sh", "-c", "trap : ABRT; sleep 60; sleep 60"])
pathlib.Path({str(pid)!r}).write_text(str(child.pid))
def here(): time.sleep(60)
here()
"""
    environment = os.environ | {"PYTHONFAULTHANDLER": "1"}
    assert run_limited(python(program), environment, 3, log) is None
    assert has_ended(pid.read_text())
    assert "in here" in log.read_text()
    assert run_limited(python("raise SystemExit(3)"), {}, 60, log) == 3


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_ended_ends_its_step_and_tells_what_it_knows(
    tmp_path: Path, end: signal.Signals
) -> None:
    pid = tmp_path / "pid"
    program = f"""
import sys
sys.path.insert(0, {str(TOOLS)!r})
from pathlib import Path
from steps import Step, Steps
sleeps = ["sh", "-c", "sleep 60 & echo $! > {pid}.new; mv {pid}.new {pid}; wait"]
Steps(Path({str(tmp_path)!r})).run([Step("ends", ["true"], 1), Step("sleeps", sleeps, 1)])
"""
    run = subprocess.Popen(
        python(program), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while run.poll() is None and not pid.exists():
        time.sleep(0.01)
    run.send_signal(end)
    out = run.communicate(timeout=30)[0]
    assert run.returncode in (128 + signal.SIGTERM, -signal.SIGINT)
    assert has_ended(pid.read_text())
    assert kept(tmp_path) == {"ends": "passed", "sleeps": "STOPPED"}
    assert "STOPPED" in out.split("=== summary")[1]
