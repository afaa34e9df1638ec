"""How weights lie in tiles, and how work is dealt, as host and device share it."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from cuda_cases import (
    BF16,
    GATE_UP,
    PAIRS,
    PLAIN,
    Shape,
    from_bf16,
    pack,
    quantized,
)
from cuda_device import Device, emulated_device


@pytest.fixture(scope="module")
def host() -> Device:
    """What no device has a part in."""
    return emulated_device()


# ---- tiles ----


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("order", [PLAIN, GATE_UP])
@pytest.mark.parametrize(("rows", "inputs"), [(16, 64), (2, 1), (34, 130), (130, 257)])
def test_a_value_is_read_where_it_was_written(
    host: Device, bits: int, order: int, rows: int, inputs: int
) -> None:
    q = quantized(np.random.default_rng(rows), rows, inputs, bits=bits)
    shape, tiles, _ = pack(host, q, bits=bits, order=order)
    found = np.zeros((rows, inputs), np.int32)
    n_padding = host.library.read_tiles(
        ctypes.byref(shape), ctypes.c_void_p(tiles.ctypes.data), ctypes.c_void_p(found.ctypes.data)
    )
    np.testing.assert_array_equal(found, q.values)
    n_chunks, half = -(-inputs // 128), 8 if order == GATE_UP else 16
    n_row_tiles = -(-(rows // 2 if order == GATE_UP else rows) // half)
    assert n_padding == n_row_tiles * 16 * n_chunks * 128 - rows * inputs
    assert tiles.nbytes == n_row_tiles * 16 * n_chunks * 128 * bits // 8


def test_int4_lies_as_documented(host: Device) -> None:
    """Lane 0's word of the first step: rows 0 and 8 at inputs 0, 1, then at inputs 8, 9."""
    q = quantized(np.random.default_rng(0), 16, 64)
    _, tiles, _ = pack(host, q)
    word = int(tiles[:4].view(np.uint32)[0])
    nibbles = [word >> 4 * i & 15 for i in range(8)]
    at = [(0, 0), (8, 0), (0, 8), (8, 8), (0, 1), (8, 1), (0, 9), (8, 9)]
    assert nibbles == [q.values[place] + 8 for place in at]


def test_int8_lies_as_documented(host: Device) -> None:
    q = quantized(np.random.default_rng(0), 16, 64, bits=8)
    _, tiles, _ = pack(host, q, bits=8)
    # Lane 1: rows 0 and 8 at inputs 2, 3, then at 10, 11; then the second step.
    found = tiles[16:28].view(np.int8)
    at = [(r, k + i) for k in (2, 10, 18) for i in (0, 1) for r in (0, 8)]
    np.testing.assert_array_equal(found, [q.values[place] for place in at])


@pytest.mark.parametrize(("group", "entries"), [(32, 4), (64, 2), (96, 4), (128, 1), (256, 1)])
@pytest.mark.parametrize("order", [PLAIN, GATE_UP])
def test_scales_stand_beside_their_chunks(
    host: Device, group: int, entries: int, order: int
) -> None:
    rows, inputs = 36, 300
    q = quantized(np.random.default_rng(1), rows, inputs, scales=PAIRS, group=group)
    shape, _, scales = pack(host, q, scales=PAIRS, order=order)
    pairs = scales.view(np.float32).reshape(-1, 3, entries, 16, 2)  # [row tile][chunk]...
    assert shape.entries == entries
    for row in (0, 7, 8, 17, 18, 35):
        channel = row % 18 if order == GATE_UP else row
        tile, r = divmod(channel, 8 if order == GATE_UP else 16)
        r += 8 * (row // 18) if order == GATE_UP else 0
        for entry in range(3 * entries):
            first = entry * 128 // entries
            found = tuple(pairs[tile, entry // entries, entry % entries, r])
            place = (row, first // group)
            assert found == ((q.scales[place], q.zeros[place]) if first < inputs else (0, 0))


def test_bf16_scales_are_one_a_chunk(host: Device) -> None:
    q = quantized(np.random.default_rng(2), 20, 256)
    _, _, scales = pack(host, q, scales=BF16)
    found = from_bf16(scales.view(np.uint16)).reshape(2, 2, 16)  # [row tile][chunk][row]
    np.testing.assert_array_equal(found[0], q.scales[:16].T)
    np.testing.assert_array_equal(found[1, :, :4], q.scales[16:].T)
    assert not found[1, :, 4:].any()


def test_gate_and_up_of_a_channel_share_a_tile(host: Device) -> None:
    shape = Shape(rows=20, inputs=64, entries=1, bits=0, scales=BF16, order=GATE_UP)
    rows = [[host.library.source_row_of(ctypes.byref(shape), tile, r) for r in range(16)]
            for tile in (0, 1)]  # fmt: skip
    assert rows[0] == [*range(8), *range(10, 18)]
    assert rows[1] == [8, 9, *[20] * 6, 18, 19, *[20] * 6]  # 20: past the matrix


# ---- shares ----


@pytest.mark.parametrize("n_blocks", [1, 2, 3, 7, 64, 132, 264, 512])
@pytest.mark.parametrize("extra", [0, 1, 5, 131, 1000, 100_000])
def test_shares_are_even_and_known(host: Device, n_blocks: int, extra: int) -> None:
    n_units = n_blocks + extra
    bounds = np.zeros((n_blocks, 2), np.int32)
    owners = np.zeros(n_units, np.int32)
    host.library.deal(
        n_blocks,
        n_units,
        ctypes.c_void_p(bounds.ctypes.data),
        ctypes.c_void_p(owners.ctypes.data),
    )
    sizes = bounds[:, 1] - bounds[:, 0]
    assert bounds[0, 0] == 0
    assert bounds[-1, 1] == n_units
    np.testing.assert_array_equal(bounds[1:, 0], bounds[:-1, 1])
    assert sizes.max() - sizes.min() <= 1
    np.testing.assert_array_equal(owners, np.repeat(np.arange(n_blocks), sizes))
