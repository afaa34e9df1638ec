"""Who waits for room, who goes first, and that nothing keeps others out for ever."""

from __future__ import annotations

import threading
import time

from camelid.feature_room import FeatureRoom, Ticket


def enter(room: FeatureRoom, n_bytes: int) -> Ticket:
    ticket = Ticket(room, n_bytes)
    assert room.enter(ticket, lambda: True)
    return ticket


def until_waiting(room: FeatureRoom, n: int) -> None:
    while len(room._waiting) < n:
        time.sleep(0.001)


def test_what_fits_enters_and_one_alone_always_does() -> None:
    room = FeatureRoom(10)
    tickets = [enter(room, 4), enter(room, 6)]
    assert room.used_bytes == 10
    for ticket in [*tickets, *tickets]:  # leaving twice is harmless
        ticket.leave()
    assert room.used_bytes == 0
    enter(room, 1000)
    Ticket(room, 5).leave()  # as is leaving without having entered
    assert room.used_bytes == 1000


def test_a_large_one_is_not_passed_by_small_ones() -> None:
    room = FeatureRoom(10)
    first, second = enter(room, 5), enter(room, 5)
    order: list[int] = []

    def wait(n_bytes: int) -> None:
        enter(room, n_bytes)
        order.append(n_bytes)

    threads = []
    for n_bytes in (9, 1):
        threads.append(threading.Thread(target=wait, args=(n_bytes,)))
        threads[-1].start()
        until_waiting(room, len(threads))
    first.leave()
    assert not order  # the small one would fit
    second.leave()
    for thread in threads:
        thread.join()
    assert order[0] == 9 or set(order) == {9, 1}
    assert room.used_bytes == 10


def test_who_no_longer_wants_to_leaves_the_queue() -> None:
    room = FeatureRoom(10)
    first = enter(room, 10)
    assert not room.enter(Ticket(room, 1), lambda: False)
    assert not room._waiting
    first.leave()
    enter(room, 1)
