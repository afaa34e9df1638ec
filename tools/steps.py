"""Run commands one after the other, each within its time, and keep what became of them at once.

In the folder of a run: steps.jsonl, a line for each step as soon as it ended, and logs/NAME.txt,
all that it printed. Must never know what the commands do.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent
RECORD = "steps.jsonl"
LEFT_OUT = 3
LOOK_S = 0.2  # between two looks at what a step printed
LAST_WORDS_S = 20  # between asking a step to end, when Python says where it is, and ending it


@dataclass(frozen=True)
class Step:
    """A command, from the root of the repository, and what it takes."""

    name: str
    command: list[str]
    minutes: float  # at most
    environment: dict[str, str] = field(default_factory=dict)  # in addition to this process's
    needs: tuple[str, ...] = ()
    after: str = ""  # the step that must not have failed before
    always: bool = False  # also where it passed before


class Steps:
    """A run: its folder, the time it has, and what became of each step."""

    def __init__(
        self,
        folder: Path,
        *,
        minutes: float = math.inf,
        lacking: Iterable[str] = (),
        resume: bool = False,
    ) -> None:
        """Begin a run, or go on with what has not passed yet.

        Args:
            folder: Of what is kept.
            minutes: For all steps together.
            lacking: What this machine does not have, of what steps need.
            resume: Leave out what passed, as the folder says.
        """
        self._folder, self._lacking = folder, set(lacking)
        self._ends = time.monotonic() + 60 * minutes
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        self._before = read_verdicts(folder) if resume else {}
        self._verdicts: dict[str, str] = {}
        self._lines: list[str] = []

    def run(self, steps: Iterable[Step]) -> int:
        """Run all that can be run, whatever became of those before; return the exit code.

        A process that is terminated ends its step first, with all that it started.
        """
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            for step in steps:
                self._take(step)
        finally:
            print("\n=== summary", *self._lines, sep="\n", flush=True)
        found = set(self._verdicts.values())
        return 1 if found & {"FAILED", "TOO LONG"} else LEFT_OUT if found - {"passed"} else 0

    def _take(self, step: Step) -> None:
        if self._before.get(step.name) == "passed" and not step.always:
            self._lines.append(f"{'passed':8} before  {step.name}")
            return
        lacking = [need for need in step.needs if need in self._lacking]
        if lacking:
            self._keep(step.name, "NOT RUN", reason=f"needs {', '.join(lacking)}")
        elif (self._before | self._verdicts).get(step.after, "passed") != "passed":
            self._keep(step.name, "NOT RUN", reason=f"{step.after!r} did not pass")
        elif time.monotonic() >= self._ends:
            self._keep(step.name, "NOT RUN", reason="no time was left")
        else:
            self._run(step)

    def _run(self, step: Step) -> None:
        print(f"\n=== {step.name}", flush=True)
        started, verdict = time.monotonic(), "STOPPED"
        left_s, own_s = self._ends - started, 60 * step.minutes
        log = self._folder / "logs" / f"{re.sub(r'[^A-Za-z0-9_]+', '-', step.name)}.txt"
        try:
            environment = os.environ | step.environment
            status = run_limited(step.command, environment, min(left_s, own_s), log)
            if status is None:
                verdict = "TOO LONG" if own_s <= left_s else "CUT OFF"
            else:
                verdict = "FAILED" if status else "passed"
        finally:
            self._keep(step.name, verdict, time.monotonic() - started)

    def _keep(self, name: str, verdict: str, seconds: float = 0.0, reason: str = "") -> None:
        self._verdicts[name] = verdict
        whole = {"name": name, "verdict": verdict, "seconds": round(seconds, 1), "reason": reason}
        with (self._folder / RECORD).open("a", encoding="utf-8") as file:
            file.write(json.dumps(whole) + "\n")
        took = f"{seconds:5.0f}s" if seconds else " " * 6
        self._lines.append(f"{verdict:8} {took}  {name}{f' ({reason})' if reason else ''}")


def read_verdicts(folder: Path) -> dict[str, str]:
    """Return the last verdict on each step of a folder; none where there was no run."""
    path = folder / RECORD
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {step["name"]: step["verdict"] for step in map(json.loads, lines)}


# ---- processes ----
def run_limited(
    command: list[str], environment: dict[str, str], limit_s: float, log: Path
) -> int | None:
    """Run a command, show and keep what it prints, and return its status.

    What takes too long is aborted, so that Python prints where it is, and then killed, with all
    that it started; so it is when this process is asked to end. None is then its status.
    """
    with log.open("wb") as out, log.open(encoding="utf-8", errors="replace") as printed:
        # A file, not a pipe: a process that cannot be killed would hold the pipe for ever.
        process = subprocess.Popen(command, env=environment, cwd=ROOT, process_group=0,
                                   stdin=subprocess.DEVNULL, stdout=out,
                                   stderr=subprocess.STDOUT)  # fmt: skip
        try:
            status = wait(process, limit_s, printed)
            if status is None:
                os.killpg(process.pid, signal.SIGABRT)
                wait(process, LAST_WORDS_S, printed)
        finally:
            end_group(process)
            show(printed)
    return status


def wait(process: subprocess.Popen[bytes], limit_s: float, printed: TextIO) -> int | None:
    """Return the status of a process, None where it does not end; show what it prints till then."""
    ends = time.monotonic() + limit_s
    while (left_s := ends - time.monotonic()) > 0:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(min(LOOK_S, left_s))
        show(printed)
    return None


def show(printed: TextIO) -> None:
    print(printed.read(), end="", flush=True)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill all of a process's group; do not wait for what hangs in the driver even then."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(LAST_WORDS_S)
    except subprocess.TimeoutExpired:
        print(f"[steps] process {process.pid} cannot be killed: it hangs in the driver.")
