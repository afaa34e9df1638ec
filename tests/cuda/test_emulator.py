"""What the emulator of CUDA promises the tests of kernels, mistakes it must catch included."""

from __future__ import annotations

import ctypes
import re
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from emulated_build import EmulatorError, build, call, device_array

SELFTEST = "tests/cuda/emulated/selftest.cu"
SEEDS = range(12)
NO_BUG, NO_WAIT, NO_SYNC_BEFORE, NO_SYNC_AFTER = range(4)


# Kernels whose accesses are not checked: what mistakes do.
@pytest.fixture
def plain() -> Iterator[ctypes.CDLL]:
    yield from selftest(watch=False)


# Kernels that report each access: that mistakes are named.
@pytest.fixture
def watched() -> Iterator[ctypes.CDLL]:
    yield from selftest(watch=True)


@pytest.fixture(params=["plain", "watched"])
def emulated(request: pytest.FixtureRequest) -> Iterator[ctypes.CDLL]:
    yield from selftest(watch=request.param == "watched")


def selftest(*, watch: bool) -> Iterator[ctypes.CDLL]:
    library = build(SELFTEST, watch=watch)
    yield library
    library.emulated_multiprocessors(5)
    assert library.check_guards() == 0, library.device_error()


def error_of(library: ctypes.CDLL, name: str, *arguments: Any, seed: int = 0) -> str:
    with pytest.raises(EmulatorError) as caught:
        call(library, name, *arguments, seed=seed)
    return str(caught.value)


def bf16(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The upper halves of float32 values."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


# ---- a whole kernel ----


def product(library: ctypes.CDLL, bug: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The kernel's product of small integers, which is exact in float32, and NumPy's."""
    rng = np.random.default_rng(0)
    m, n, k = 128, 256, 64
    x = rng.integers(-8, 9, (m, k)).astype(np.float32)
    w = rng.integers(-8, 9, (n, k)).astype(np.float32)
    y = np.full((m, n), np.nan, np.float32)
    x_bits, w_bits = (device_array(library, bf16(values)) for values in (x, w))
    call(
        library,
        "test_matmul",
        bug,
        y,
        x_bits,
        w_bits,
        m,
        n,
        k,
        seed=seed,
    )
    return y, x @ w.T


@pytest.mark.parametrize("seed", SEEDS)
def test_matmul_is_exact_in_every_order(emulated: ctypes.CDLL, seed: int) -> None:
    y, expected = product(emulated, NO_BUG, seed)
    np.testing.assert_array_equal(y, expected)


def test_matmul_is_quick(emulated: ctypes.CDLL) -> None:
    start = time.process_time()
    product(emulated, NO_BUG, 0)
    assert time.process_time() - start < 1


@pytest.mark.parametrize("bug", [NO_WAIT, NO_SYNC_BEFORE, NO_SYNC_AFTER])
def test_matmul_with_a_bug_is_wrong_under_some_seed(plain: ctypes.CDLL, bug: int) -> None:
    results = [product(plain, bug, seed) for seed in SEEDS]
    assert not all(np.array_equal(y, expected) for y, expected in results)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("bug", "message"),
    [
        (NO_WAIT, "reads 4 bytes at byte .* nothing orders this and the copy in flight by"),
        (NO_SYNC_BEFORE, "nothing orders this and the (write|read|copy in flight) by"),
        (NO_SYNC_AFTER, "writes 16 bytes at byte .* nothing orders this and the read by"),
    ],
)
def test_matmul_with_a_bug_is_named_under_every_seed(
    watched: ctypes.CDLL, bug: int, message: str, seed: int
) -> None:
    with pytest.raises(EmulatorError, match=message) as error:
        product(watched, bug, seed)
    assert len(re.findall(r"block \d, thread \d+ \(selftest.cu:\d+\)", str(error.value))) == 2


# ---- meetings ----


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shuffles_exchange_within_warps(emulated: ctypes.CDLL, seed: int) -> None:
    from_next, sums = np.zeros(96, np.int32), np.zeros(96, np.float32)
    call(emulated, "test_exchange", 96, from_next, sums, seed=seed)
    threads = np.arange(96).reshape(3, 32)
    np.testing.assert_array_equal(from_next.reshape(3, 32), np.roll(threads, -1, axis=1))
    np.testing.assert_array_equal(sums.reshape(3, 32), threads.sum(axis=1)[:, None].repeat(32, 1))


def test_load_matrices_gives_pairs_of_rows(emulated: ctypes.CDLL) -> None:
    x, y = np.arange(32 * 8, dtype=np.uint16).reshape(4, 8, 8), np.zeros((32, 4), np.uint32)
    call(emulated, "test_load_fragments", 0, x, y, seed=1)
    pairs = x.view(np.uint32)  # [matrix][row][4]
    np.testing.assert_array_equal(y, pairs.reshape(4, 32).T)
    call(emulated, "test_load_fragments", 1, x, y, seed=1)
    pairs = np.ascontiguousarray(x.swapaxes(1, 2)).view(np.uint32)  # [matrix][column][4]
    np.testing.assert_array_equal(y, pairs.reshape(4, 32).T)


def test_warp_that_comes_in_part_is_named(emulated: ctypes.CDLL) -> None:
    message = error_of(emulated, "test_exchange", 80, *[np.zeros(80)] * 2)
    assert "block 0, thread 79" in message
    assert "shuffle needs 32 threads, and only 16 of its warp came" in message


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shuffle_in_a_divergent_warp_is_named(emulated: ctypes.CDLL, seed: int) -> None:
    message = error_of(emulated, "test_shuffle_by_half", seed=seed)
    assert message.startswith("[cuda] by_half: block ")
    assert "shuffle needs 32 threads, and only 16 of its warp came" in message


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_lanes_at_two_shuffles_are_named(emulated: ctypes.CDLL, seed: int) -> None:
    message = error_of(emulated, "test_shuffle_at_two_places", seed=seed)
    assert "came to shuffle while thread" in message
    assert message.count("selftest.cu:") == 2


def test_ended_threads_are_missing_at_shuffles_alone(emulated: ctypes.CDLL) -> None:
    call(emulated, "test_shuffle_without_some", 0)
    message = error_of(emulated, "test_shuffle_without_some", 7)
    assert "shuffle needs 32 threads, and only 25 of its warp came" in message


def test_lanes_at_different_meetings_are_named(emulated: ctypes.CDLL) -> None:
    message = error_of(emulated, "test_sync_block_by_some")
    assert "thread 40" in message
    assert "came to sync_warp while thread 32 of its warp waits at sync_block" in message


def test_sync_block_waits_for_those_that_did_not_end(emulated: ctypes.CDLL) -> None:
    call(emulated, "test_meet_across_warps")


@pytest.mark.parametrize("seed", SEEDS)
def test_missing_sync_block_reads_what_is_not_there(plain: ctypes.CDLL, seed: int) -> None:
    y = np.zeros(128, np.int32)
    call(plain, "test_reverse", 1, y, seed=seed)
    np.testing.assert_array_equal(y, np.arange(128)[::-1])
    call(plain, "test_reverse", 0, y, seed=seed)
    assert (y == -1).any()


@pytest.mark.parametrize("seed", SEEDS)
def test_missing_sync_block_is_named(watched: ctypes.CDLL, seed: int) -> None:
    y = np.zeros(128, np.int32)
    call(watched, "test_reverse", 1, y, seed=seed)
    assert "nothing orders this and the " in error_of(watched, "test_reverse", 0, y, seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_constants_of_the_grid_outlive_their_thread(emulated: ctypes.CDLL, seed: int) -> None:
    y = np.zeros(64, np.int32)
    call(emulated, "test_tell_address", y, seed=seed)
    np.testing.assert_array_equal(y, np.arange(64))


# ---- copies ----


@pytest.mark.parametrize("seed", range(6))
def test_copies_arrive_when_their_group_is_waited_for(plain: ctypes.CDLL, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = device_array(plain, rng.integers(0, 255, (64, 32), np.uint8))
    y = np.zeros((3, 64, 32), np.uint8)
    call(plain, "test_copy_and_look", x, y, 12, seed=seed)
    expected = x.copy()
    expected[:, 12:16] = 0
    arrived = (y == expected).reshape(3, 64, 2, 16).all(axis=3)
    nothing = (y == 0xFF).reshape(3, 64, 2, 16).all(axis=3)
    assert (arrived | nothing).all()
    assert arrived[1:, :, 0].all()
    assert arrived[2, :, 1].all()
    some = {0: [False], 1: [True], 2: [False, True]}[seed % 3]
    for in_flight in (arrived[0, :, 0], arrived[0, :, 1], arrived[1, :, 1]):
        assert np.unique(in_flight).tolist() == some


@pytest.mark.parametrize(
    ("source", "to", "n_bytes", "message"),
    [
        (0, 64, 16, "copy_async at byte 64 of 64 bytes of shared memory"),
        (0, 56, 16, "copy_async at byte 56 of 64 bytes of shared memory"),
        (0, -16, 16, "copy_async at byte -16 of 64 bytes of shared memory"),
        (0, 8, 16, "no multiple of 16"),
        (8, 0, 16, "no multiple of 16"),
        (0, 0, 17, "copy_async of 17 bytes"),
        (0, 0, -1, "copy_async of -1 bytes"),
        (96, 0, 5, "copy_async from byte 96 of 100 bytes of device memory"),
        (-16, 0, 16, "copy_async from byte -16 of 100 bytes of device memory"),
    ],
)
def test_copy_of_wrong_places_is_named(
    emulated: ctypes.CDLL, source: int, to: int, n_bytes: int, message: str
) -> None:
    x = device_array(emulated, np.zeros(100, np.uint8))
    call(emulated, "test_copy_between", x, 96, 0, 4)
    call(emulated, "test_copy_between", x, 4096, 0, 0)  # is not read
    assert message in error_of(emulated, "test_copy_between", x, source, to, n_bytes)


# ---- memory ----


@pytest.mark.parametrize("offset", [100, 101, 4095, -1, -1024])
def test_write_beside_shared_memory_is_named(emulated: ctypes.CDLL, offset: int) -> None:
    call(emulated, "test_write_shared", 100, 99)
    message = error_of(emulated, "test_write_shared", 100, offset)
    assert message.startswith("[cuda] write: block 0")
    assert f"byte {offset} of 100 bytes of shared memory" in message


@pytest.mark.parametrize("offset", [100, 4000, -1])
def test_write_beside_device_memory_is_named(emulated: ctypes.CDLL, offset: int) -> None:
    memory = device_array(emulated, np.zeros(100, np.uint8))
    call(emulated, "test_write_device", memory, 0)
    assert memory[:2].tolist() == [1, 0]
    message = error_of(emulated, "test_write_device", memory, offset)
    assert f"byte {offset} of 100 bytes of device memory" in message
    call(emulated, "test_write_device", memory, 99)  # is told once


def test_write_beside_device_memory_by_the_host_is_told_when_asked(emulated: ctypes.CDLL) -> None:
    memory = device_array(emulated, np.zeros(100, np.uint8))
    ctypes.memset(memory.ctypes.data + 100, 0, 1)
    assert emulated.check_guards() == 1
    assert b"something wrote to byte 100 of 100 bytes of device memory" in emulated.device_error()
    assert emulated.check_guards() == 0


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("which", "what"),
    [(0, "a copy to the host"), (1, "a copy to the device"), (2, "a fill")],
)
def test_what_the_host_asks_for_beside_device_memory_is_named(
    plain: ctypes.CDLL, which: int, what: str, seed: int
) -> None:
    call(plain, "test_host_copy", which, 0, 100, seed=seed)
    call(plain, "test_host_copy", which, 60, 40, seed=seed)
    for offset, n_bytes in ((0, 101), (60, 41), (-4, 8)):
        message = error_of(plain, "test_host_copy", which, offset, n_bytes, seed=seed)
        assert f"{what} of {n_bytes} bytes at byte {offset} of 100 bytes" in message


def test_memory_begins_as_nans(emulated: ctypes.CDLL) -> None:
    memory = emulated.device_alloc(64)
    assert bytes((ctypes.c_ubyte * 64).from_address(memory)) == b"\xff" * 64
    assert emulated.device_free(memory) == 0
    assert emulated.device_free(memory) == 1
    y = np.zeros(64, np.uint8)
    call(emulated, "test_read_shared", y, 64)
    assert (y == 0xFF).all()


@pytest.mark.parametrize(
    ("blocks", "threads", "shared_bytes", "together", "message"),
    [
        (0, 32, 0, 0, "0 blocks"),
        (1, 1025, 0, 0, "1025 threads"),
        (1, 0, 0, 0, "0 threads"),
        (1, 32, 232449, 0, "232449 bytes of shared memory"),
        (6, 32, 232448, 1, "6 blocks together, but only 5 fit"),
        (11, 1024, 0, 1, "11 blocks together, but only 10 fit"),
    ],
)
def test_launch_beyond_the_hardware_is_refused(
    emulated: ctypes.CDLL, blocks: int, threads: int, shared_bytes: int, together: int, message: str
) -> None:
    call(emulated, "test_launch", 5, 1024, 232448, 1)
    refused = error_of(emulated, "test_launch", blocks, threads, shared_bytes, together)
    assert refused.startswith(f"[cuda] nothing: {message}")


def test_blocks_that_fit_follow_the_device(emulated: ctypes.CDLL) -> None:
    assert emulated.test_blocks_that_fit(256, 0) == 5 * 8
    emulated.emulated_multiprocessors(132)
    assert emulated.test_blocks_that_fit(256, 100 * 1024) == 132 * 2


# ---- blocks ----


@pytest.mark.parametrize("seed", SEEDS)
def test_grid_barrier_waits_for_all_blocks(emulated: ctypes.CDLL, seed: int) -> None:
    state, values, sums = np.zeros(2, np.uint32), np.zeros(7, np.int32), np.zeros(7, np.int32)
    call(emulated, "test_grid_barrier", 7, 1, *(state, values, sums), seed=seed)
    assert (sums == 28).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_grid_barrier_of_blocks_that_are_not_together_is_named(
    emulated: ctypes.CDLL, seed: int
) -> None:
    state, values, sums = np.zeros(2, np.uint32), np.zeros(7, np.int32), np.zeros(7, np.int32)
    message = error_of(emulated, "test_grid_barrier", 7, 0, *(state, values, sums), seed=seed)
    assert "threads wait for memory that nobody changes" in message
    assert "1 thread at load_acquire" in message
    assert "63 threads at sync_block" in message or "31 threads at sync_block" in message
    assert "need Launch.together" in message


def test_blocks_run_in_an_order_of_the_seed(emulated: ctypes.CDLL) -> None:
    orders = []
    for seed in [0, 1, 2, 1]:
        n_came, order = np.zeros(1, np.uint32), np.zeros(8, np.int32)
        call(emulated, "test_log_order", 8, n_came, order, seed=seed)
        orders.append(order.tolist())
    assert orders[0] == list(range(8))
    assert orders[1] == orders[3] != orders[2]
    assert sorted(orders[1]) == orders[0] != orders[1]


def test_flag_before_its_value_is_seen_under_some_seed(plain: ctypes.CDLL) -> None:
    values = set()
    for seed in SEEDS:
        flag, value, seen = np.zeros(1, np.uint32), np.zeros(1, np.int32), np.zeros(1, np.int32)
        call(plain, "test_flag_too_early", *(flag, value, seen), seed=seed)
        values.add(int(seen[0]))
    assert values == {0, 7}


@pytest.mark.parametrize("seed", SEEDS)
def test_flag_before_its_value_is_named(watched: ctypes.CDLL, seed: int) -> None:
    flag, value, seen = np.zeros(1, np.uint32), np.zeros(1, np.int32), np.zeros(1, np.int32)
    message = error_of(watched, "test_flag_too_early", flag, value, seen, seed=seed)
    assert "nothing orders this and the " in message


# ---- accesses ----


@pytest.mark.parametrize(
    "missing", ["nothing", "release", "acquire", "sync_before", "sync_after", "order"]
)
@pytest.mark.parametrize("seed", range(6))
def test_values_handed_to_the_last_block_need_fences(
    watched: ctypes.CDLL, missing: str, seed: int
) -> None:
    steps = {
        "nothing": 15,
        "release": 14,
        "acquire": 13,
        "sync_before": 11,
        "sync_after": 7,
        "order": 30,
    }
    values, n_came, sum_of_all = (
        np.zeros((6, 64), np.int32),
        np.zeros(1, np.uint32),
        np.zeros(64, np.int32),
    )
    arguments = ("test_hand_over", steps[missing], values, n_came, sum_of_all)
    if missing == "nothing":
        call(watched, *arguments, seed=seed)
        np.testing.assert_array_equal(sum_of_all, 15 + 6 * np.arange(64))
    else:
        assert "nothing orders this and the " in error_of(watched, *arguments, seed=seed)


@pytest.mark.parametrize("offset", [64, 3000, -4])
def test_read_beside_memory_is_named(watched: ctypes.CDLL, offset: int) -> None:
    x, y = np.zeros(16, np.float32), np.zeros(1, np.float32)
    call(watched, "test_read_at", x, 60, y)
    message = error_of(watched, "test_read_at", x, offset, y)
    assert "block 0, thread 0 (selftest.cu:" in message
    assert f"reads 4 bytes at byte {offset} of 64 bytes of device memory" in message


def test_access_that_is_not_aligned_is_named(watched: ctypes.CDLL) -> None:
    x, y = np.zeros(16, np.float32), np.zeros(4, np.float32)
    call(watched, "test_read_four_at", x, 48, y)
    message = error_of(watched, "test_read_four_at", x, 8, y)
    assert "(selftest.cu:" in message
    assert message.endswith("uses an address that is no multiple of 16")


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (0, 4, "an index beside its array"),
        (1, 32, "a shift by less than 0 or by too much"),
        (2, 2**31 - 1, "a sum that overflows"),
        (3, 2**16, "a product that overflows"),
        (4, 0, "a division by 0, or that overflows"),
        (5, 2**30, "a float that does not fit the integer"),
    ],
)
def test_what_is_undefined_is_named(
    watched: ctypes.CDLL, kind: int, value: int, message: str
) -> None:
    y = np.zeros(1, np.int32)
    call(watched, "test_undefined", kind, 1, y)
    assert error_of(watched, "test_undefined", kind, value, y).endswith(message)


def test_shuffle_orders_no_accesses(watched: ctypes.CDLL) -> None:
    y = np.zeros(32, np.int32)
    call(watched, "test_neighbour", 1, y)
    np.testing.assert_array_equal(y, np.roll(np.arange(32), -1))
    assert "nothing orders this and the " in error_of(watched, "test_neighbour", 0, y)


def test_plain_write_of_two_blocks_is_named(watched: ctypes.CDLL) -> None:
    y = np.zeros(4, np.uint8)
    call(watched, "test_write_by_blocks", y, 1)
    assert y.tolist() == [1, 1, 1, 1]  # bytes beside one another
    assert "block 1, thread 0" in error_of(watched, "test_write_by_blocks", y, 0)
