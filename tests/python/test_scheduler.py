"""Who runs next, with plain numbers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from camelid.scheduler import Scheduler, Turn


def make(**options: int) -> Scheduler:
    return Scheduler(**{"limit_bytes": 100, "max_step_tokens": 10, "max_running": 4} | options)


def test_nothing_to_do_gives_no_turns() -> None:
    assert make().next_step() == []


def test_a_prompt_is_cut_at_the_budget_and_then_generates() -> None:
    scheduler = make()
    scheduler.add(1, 23, reserved_bytes=10)
    steps = [scheduler.next_step() for _ in range(5)]
    assert steps == [[Turn(1, 10)], [Turn(1, 10)], [Turn(1, 3)], [Turn(1, 1)], [Turn(1, 1)]]


def test_those_that_generate_come_first_and_prompts_take_the_rest() -> None:
    scheduler = make()
    scheduler.add(1, 2, reserved_bytes=10)
    scheduler.next_step()
    scheduler.add(2, 30, reserved_bytes=10)
    scheduler.add(3, 3, reserved_bytes=10)
    assert scheduler.next_step() == [Turn(1, 1), Turn(2, 9)]
    assert scheduler.next_step() == [Turn(1, 1), Turn(2, 9)]
    assert scheduler.next_step() == [Turn(1, 1), Turn(2, 9)]
    assert scheduler.next_step() == [Turn(1, 1), Turn(2, 3), Turn(3, 3)]
    assert scheduler.next_step() == [Turn(1, 1), Turn(2, 1), Turn(3, 1)]


def test_a_request_may_ask_for_small_steps() -> None:
    scheduler = make()
    scheduler.add(1, 9, reserved_bytes=1, step_tokens=4)
    scheduler.add(2, 5, reserved_bytes=1)
    assert scheduler.next_step() == [Turn(1, 4), Turn(2, 5)]
    assert scheduler.next_step() == [Turn(2, 1), Turn(1, 4)]


def test_a_request_waits_until_its_reservation_fits() -> None:
    scheduler = make()
    scheduler.add(1, 1, reserved_bytes=60)
    scheduler.add(2, 1, reserved_bytes=60)
    scheduler.add(3, 1, reserved_bytes=10)  # would fit, but may not overtake
    assert scheduler.next_step() == [Turn(1, 1)]
    assert (scheduler.n_running, scheduler.n_waiting, scheduler.reserved_bytes) == (1, 2, 60)
    scheduler.remove(1)
    assert scheduler.next_step() == [Turn(2, 1), Turn(3, 1)]
    assert scheduler.reserved_bytes == 70


def test_no_more_run_at_once_than_allowed() -> None:
    scheduler = make(max_running=2)
    for key in range(3):
        scheduler.add(key, 1, reserved_bytes=0)
    assert [turn.key for turn in scheduler.next_step()] == [0, 1]
    scheduler.remove(0)
    assert [turn.key for turn in scheduler.next_step()] == [1, 2]


def test_a_waiting_request_can_be_removed() -> None:
    scheduler = make(max_running=1)
    for key in range(3):
        scheduler.add(key, 1, reserved_bytes=0)
    scheduler.next_step()
    scheduler.remove(1)
    scheduler.remove(1)
    scheduler.remove(99)
    scheduler.remove(0)
    assert scheduler.next_step() == [Turn(2, 1)]


def test_what_can_never_run_is_refused_at_once() -> None:
    scheduler = make()
    for n_tokens, reserved_bytes in ((0, 1), (1, 101), (1, -1)):
        with pytest.raises(ValueError, match="never"):
            scheduler.add(1, n_tokens, reserved_bytes=reserved_bytes)
    scheduler.add(1, 1, reserved_bytes=100)
    for name in ("max_step_tokens", "max_running"):
        with pytest.raises(ValueError, match="at least one"):
            make(**{name: 0})


def test_a_small_step_starves_nobody() -> None:
    scheduler = make(max_step_tokens=3, max_running=5)
    for key in range(5):
        scheduler.add(key, 4, reserved_bytes=0)
    seen = [turn for _ in range(12) for turn in scheduler.next_step()]
    assert {turn.key for turn in seen} == {0, 1, 2}
    scheduler.remove(0)
    scheduler.remove(1)
    assert [turn.key for turn in scheduler.next_step()] == [2, 3]


requests = st.tuples(
    st.integers(1, 60), st.integers(0, 100), st.integers(1, 8), st.none() | st.integers(1, 12)
)


@settings(max_examples=200, deadline=None)
@given(st.lists(requests, max_size=12), st.integers(1, 20), st.integers(1, 6))
def test_everyone_is_served_within_the_limits(
    wanted: list[tuple[int, int, int, int | None]], budget: int, max_running: int
) -> None:
    scheduler = make(max_step_tokens=budget, max_running=max_running)
    left = {}
    caps = {}
    for key, (n_prompt, n_bytes, n_answer, cap) in enumerate(wanted):
        scheduler.add(key, n_prompt, reserved_bytes=n_bytes, step_tokens=cap)
        left[key] = [n_prompt, n_answer]
        caps[key] = cap
    for _ in range(5000):
        turns = scheduler.next_step()
        assert sum(turn.n_tokens for turn in turns) <= budget
        assert len({turn.key for turn in turns}) == len(turns) <= max_running
        assert scheduler.reserved_bytes <= 100
        if not turns:
            break
        for turn in turns:
            prompt, answer = left[turn.key]
            if prompt:
                assert turn.n_tokens <= min(prompt, caps[turn.key] or budget)
                left[turn.key][0] -= turn.n_tokens
            else:
                assert turn.n_tokens == 1
                left[turn.key][1] = answer - 1
            if left[turn.key] == [0, 0]:
                scheduler.remove(turn.key)
    assert all(rest == [0, 0] for rest in left.values())
    assert (scheduler.n_running, scheduler.n_waiting, scheduler.reserved_bytes) == (0, 0, 0)
