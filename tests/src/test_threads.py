"""The thread pool (src/base/threads): every task runs once, and errors reach the caller."""

from __future__ import annotations

import pytest

from camelid._core import testing


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
