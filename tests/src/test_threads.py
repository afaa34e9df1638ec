"""The thread pool (src/base/threads): every task runs once, and errors reach the caller."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from camelid._core import default_threads, testing


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("n_tasks", [0, 1, 2, 7, 1000])
def test_pool_runs_every_task_once(threads: int, n_tasks: int) -> None:
    assert testing.run_tasks(threads, n_tasks, repeats=20) == [20] * n_tasks


@pytest.mark.parametrize("threads", [1, 4])
def test_pool_passes_an_error_to_the_caller(threads: int) -> None:
    with pytest.raises(Exception, match="task 5 fails"):
        testing.run_tasks(threads, 100, failing=5)


def test_pool_survives_many_short_jobs() -> None:
    assert testing.run_tasks(4, 3, repeats=20000) == [20000] * 3


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity here")
def test_default_threads_follows_affinity() -> None:
    # In a process of its own: a mask cannot be widened again everywhere.
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
        "from camelid import _core; print(_core.default_threads())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "1"
    assert 1 <= default_threads() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_option_is_honoured(threads: int) -> None:
    assert f"{threads} thread" in testing.Ops(threads=threads).describe()
