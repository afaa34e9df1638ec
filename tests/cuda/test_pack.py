"""Packing on the device: the same bits that the host packs, from what checkpoints hold."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cuda_cases import (
    BF16,
    DTYPE_BF16,
    GATE_UP,
    PAIRS,
    PLAIN,
    CSource,
    Quantized,
    Shape,
    bf16,
    from_bf16,
    pack,
)
from cuda_device import Device, DeviceError

F32, F16 = range(2)  # as DType counts, and DTYPE_BF16
PIECE = 1 << 16


@dataclass
class Source:
    """A linear as a checkpoint holds it, and what it means."""

    bits: int
    dtype: int
    words: NDArray[np.uint32]
    scales: NDArray[Any]
    zero_points: NDArray[np.uint32] | None
    q: Quantized

    def c(self) -> CSource:
        zeros = None if self.zero_points is None else self.zero_points.ctypes.data
        return CSource(
            self.words.ctypes.data, self.scales.ctypes.data, zeros,
            self.bits, self.q.group, self.dtype, *self.q.values.shape,
        )  # fmt: skip


def packed_words(values: NDArray[Any], bits: int) -> NDArray[np.uint32]:
    """Pack signed values along the last axis: offset-binary, the lowest bits first."""
    n = 32 // bits
    padded = np.zeros((len(values), -(-values.shape[1] // n) * n), np.uint64)
    padded[:, : values.shape[1]] = values + 2 ** (bits - 1)
    parts = padded.reshape(len(values), -1, n) << (np.arange(n, dtype=np.uint64) * bits)
    return np.ascontiguousarray(parts.sum(axis=2).astype(np.uint32))


def make_source(
    rng: np.random.Generator,
    rows: int,
    inputs: int,
    *,
    bits: int = 4,
    group: int = 128,
    dtype: int = DTYPE_BF16,
    zeros: bool = False,
) -> Source:
    limit, n_groups = 2 ** (bits - 1), -(-inputs // group)
    values = rng.integers(-limit, limit, (rows, inputs), dtype=np.int32)
    scales: NDArray[Any] = rng.uniform(0.001, 1, (rows, n_groups)).astype(np.float32)
    if dtype == F16:
        scales = scales.astype(np.float16)
        scales[0, 0] = 3e-7  # no normal half
    means = scales.astype(np.float32)
    if dtype == DTYPE_BF16:
        scales = bf16(scales)
        means = from_bf16(scales).astype(np.float32)
    z = rng.integers(-limit, limit, (rows, n_groups), dtype=np.int32) if zeros else None
    return Source(
        bits,
        dtype,
        packed_words(values, bits),
        scales,
        None if z is None else np.ascontiguousarray(packed_words(z.T, bits).T),
        Quantized(values, means, None if z is None else z.astype(np.float32), group),
    )


def run_pack(
    device: Device, stack: list[Source], order: int = PLAIN, piece: int = PIECE
) -> tuple[Shape, NDArray[np.uint8], NDArray[np.uint8]]:
    sources, shape = (CSource * len(stack))(*(source.c() for source in stack)), Shape()
    arguments = (sources, len(stack), order, ctypes.c_int64(piece))
    device.call("run_pack", *arguments, None, None, shape)
    sizes = (ctypes.c_int64 * 2)()
    device.library.tile_sizes(ctypes.byref(shape), sizes)
    tiles, scales = (device.reserve(size) for size in sizes)
    device.call("run_pack", *arguments, tiles, scales, shape)
    return shape, tiles.read(), scales.read()


def expected(device: Device, stack: list[Source], shape: Shape) -> Any:
    """Return what the host packs: the parts as one matrix, with groups as fine as the layout's."""
    fine = 128 // shape.entries
    first = np.arange(0, shape.inputs, fine)
    scales = np.concatenate([s.q.scales[:, first // s.q.group] for s in stack])
    zeros = np.concatenate(
        [np.zeros((len(s.q.values), len(first)), np.float32) if s.q.zeros is None
         else s.q.zeros[:, first // s.q.group] for s in stack]
    )  # fmt: skip
    values = np.concatenate([s.q.values for s in stack])
    q = Quantized(values, *map(np.ascontiguousarray, (scales, zeros)), fine)
    bits = stack[0].bits
    return pack(device, q, bits=bits, scales=shape.scales, order=shape.order)[1:]


def check(device: Device, stack: list[Source], order: int = PLAIN, piece: int = PIECE) -> Shape:
    shape, *found = run_pack(device, stack, order, piece)
    for array, wanted in zip(found, expected(device, stack, shape), strict=True):
        np.testing.assert_array_equal(array, wanted)
    return shape


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [F32, F16, DTYPE_BF16])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group", [32, 64, 96, 128, 256, 391])
def test_every_format(device: Device, bits: int, dtype: int, zeros: bool, group: int) -> None:
    rng = np.random.default_rng(group)
    source = make_source(rng, 37, 391, bits=bits, group=group, dtype=dtype, zeros=zeros)
    shape = check(device, [source])
    fast = dtype == DTYPE_BF16 and not zeros and group in (128, 256, 391)
    assert shape.scales == (BF16 if fast else PAIRS)
    assert shape.entries == {32: 4, 64: 2, 96: 4}.get(group, 1)


@pytest.mark.small
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 8, 13, 40])
def test_gate_and_up_meet_in_tiles(device: Device, bits: int, rows: int) -> None:
    rng = np.random.default_rng(rows)
    stack = [make_source(rng, rows, 200, bits=bits, zeros=True) for _ in range(2)]
    check(device, stack, GATE_UP)


def test_a_stack_of_unlike_parts(device: Device) -> None:
    """Borders within tiles and within words of zero points; groups and types of their own."""
    rng = np.random.default_rng(1)
    kinds: list[dict[str, Any]] = [
        {"group": 128}, {"group": 64, "zeros": True}, {"group": 300, "dtype": F32}
    ]  # fmt: skip
    rows = [21, 5, 30]
    stack = [make_source(rng, n, 300, **kind) for n, kind in zip(rows, kinds, strict=True)]
    shape = check(device, stack)
    assert (shape.rows, shape.entries, shape.scales) == (56, 2, PAIRS)


@pytest.mark.small
@pytest.mark.parametrize("seed", range(7))
@pytest.mark.parametrize("order", [PLAIN, GATE_UP])
def test_in_many_pieces(device: Device, seed: int, order: int) -> None:
    """As small as they may be: a row tile each. Copies arrive at once or late."""
    device.arrange(seed=seed)
    rng = np.random.default_rng(2)
    stack = [make_source(rng, 80, 136) for _ in range(2)]
    check(device, stack, order, piece=16 * (136 // 2 + 4))


def refusal(device: Device, stack: list[Source], piece: int = PIECE) -> str:
    with pytest.raises(DeviceError) as caught:
        run_pack(device, stack, piece=piece)
    return str(caught.value)


def test_groups_that_chunks_cannot_have_are_refused(device: Device) -> None:
    message = refusal(device, [make_source(np.random.default_rng(3), 16, 300, group=48)])
    assert message == (
        "[cuda] layers.0.part0 in model.safetensors has groups of 48 values; the GPU takes "
        "multiples of 32, or one group for a row."
    )


def test_unlike_neighbours_are_refused(device: Device) -> None:
    rng = np.random.default_rng(4)
    message = refusal(device, [make_source(rng, 16, 256), make_source(rng, 16, 256, bits=8)])
    assert "part1 in model.safetensors has 8 bits and 256 inputs" in message
    assert "layers.0.part0 beside it 4 and 256" in message


def test_rows_longer_than_a_piece_are_refused(device: Device) -> None:
    message = refusal(device, [make_source(np.random.default_rng(5), 16, 256)], piece=1024)
    assert "16 rows of 256 inputs are 2112 bytes; at most 1024 go to the GPU at once" in message
