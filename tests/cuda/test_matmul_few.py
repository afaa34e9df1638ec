"""Products with a few tokens against NumPy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cuda_cases import (
    ADD,
    BF16,
    BF16_ROUNDING,
    FLOAT32_ROUNDING,
    GATE_UP,
    NAN_BF16,
    PAIRS,
    STORE,
    STORE_BF16,
    SWIGLU,
    Matrix,
    assert_norm_begun,
    assert_sums,
    assert_within,
    empty_y,
    from_bf16,
    gated,
    make_half_norm,
    make_matrix,
    make_workspace,
    make_x,
    matmul_few_workspace,
    run_matmul_few,
)
from cuda_device import Device, DeviceError, gpu_device

# Scales, group: None for one scale a row.
GROUPS = [(BF16, 128), (BF16, 256), (BF16, None)]
GROUPS += [(PAIRS, group) for group in (32, 64, 96, 128, 256, None)]


def check(device: Device, w: Matrix, rng: np.random.Generator, n_tokens: int, output: int) -> Any:
    """Run, compare, and return y."""
    x, columns = make_x(rng, n_tokens, w.shape.inputs), w.shape.columns
    y = empty_y(n_tokens, columns, output)
    if output == ADD:
        y[:, :columns] = rng.standard_normal((n_tokens, columns))
    found = run_matmul_few(device, w, x, output, y=y)
    np.testing.assert_array_equal(found[:, columns:], y[:, columns:])
    found, values = found[:, :columns], from_bf16(x)[:, : w.shape.inputs]
    if output == SWIGLU:
        exact, off = gated(values, w.w, 1.0, 0.0)
        assert_within(from_bf16(found), exact, off + BF16_ROUNDING * np.abs(exact))
    else:
        assert_sums(found, values, w.w, y[:, :columns] if output == ADD else 0.0)
    return found


@pytest.mark.small
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("scales", "group"), GROUPS)
def test_every_format(device: Device, bits: int, scales: int, group: int | None) -> None:
    rng = np.random.default_rng(bits)
    rows, inputs = 133, 391
    w = make_matrix(device, rng, rows, inputs, bits=bits, scales=scales, group=group or inputs)
    check(device, w, rng, 5, STORE)


@pytest.mark.parametrize("n_tokens", [1, 2, 7, 8, 9, 16, 17, 32, 33, 63, 64, 65, 130])
@pytest.mark.parametrize("scales", [BF16, PAIRS])
def test_every_number_of_tokens(device: Device, n_tokens: int, scales: int) -> None:
    rng = np.random.default_rng(n_tokens)
    w = make_matrix(device, rng, 40, 200, bits=8 if n_tokens % 2 else 4, scales=scales)
    check(device, w, rng, n_tokens, STORE)


@pytest.mark.parametrize("inputs", [1, 7, 8, 63, 64, 65, 127, 128, 129, 640])
@pytest.mark.parametrize("rows", [1, 15, 16, 130, 257])
def test_odd_sizes(device: Device, rows: int, inputs: int) -> None:
    rng = np.random.default_rng(rows * inputs)
    w = make_matrix(device, rng, rows, inputs)
    check(device, w, rng, 3, STORE)


@pytest.mark.small
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scales", [BF16, PAIRS])
@pytest.mark.parametrize("output", [STORE_BF16, ADD, SWIGLU])
def test_every_output(device: Device, bits: int, scales: int, output: int) -> None:
    rng = np.random.default_rng(output)
    order = GATE_UP if output == SWIGLU else 0
    w = make_matrix(device, rng, 150, 300, bits=bits, scales=scales, order=order)
    check(device, w, rng, 11, output)


def begin_norm(device: Device, w: Matrix, rng: np.random.Generator, n_tokens: int) -> Any:
    """Return y, h and squares of a call that begins a norm, and hold them to each other."""
    norm, dim = make_half_norm(rng, n_tokens, w.shape.rows), w.shape.rows
    h = device.put(np.full((n_tokens, dim + 3), NAN_BF16, np.uint16))
    squares, *_alive = norm.begin_in_next_call(device, h, dim + 3)
    y = check(device, w, rng, n_tokens, ADD)
    found = h.read()
    assert (found[:, dim:] == NAN_BF16).all()
    assert_norm_begun(norm, y, found[:, :dim], squares.read())
    return y, found, squares.read()


@pytest.mark.small
@pytest.mark.parametrize(("bits", "n_tokens"), [(4, 1), (4, 9), (4, 64), (4, 65), (8, 40)])
def test_a_norm_of_what_is_completed_begins(device: Device, bits: int, n_tokens: int) -> None:
    rng = np.random.default_rng(n_tokens)
    begin_norm(device, make_matrix(device, rng, 270, 200, bits=bits), rng, n_tokens)


@pytest.mark.parametrize("rows", [1, 15, 16, 128, 129])
def test_a_norm_of_any_width_begins(device: Device, rows: int) -> None:
    rng = np.random.default_rng(rows)
    begin_norm(device, make_matrix(device, rng, rows, 130), rng, 3)


@pytest.mark.parametrize("seed", range(1, 4))
def test_a_norm_has_the_same_bits_in_every_order(device: Device, seed: int) -> None:
    w = make_matrix(device, np.random.default_rng(3), 300, 900)
    first = begin_norm(device, w, np.random.default_rng(4), 9)
    device.arrange(seed=seed)
    again = begin_norm(device, w, np.random.default_rng(4), 9)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


@pytest.mark.small
@pytest.mark.parametrize(("bits", "n_tokens"), [(4, 1), (4, 9), (4, 64), (4, 65), (8, 40)])
@pytest.mark.parametrize("output", [STORE, STORE_BF16, SWIGLU])
def test_a_norm_of_what_is_multiplied_ends(
    device: Device, bits: int, n_tokens: int, output: int
) -> None:
    rng = np.random.default_rng(n_tokens)
    order = GATE_UP if output == SWIGLU else 0
    w = make_matrix(device, rng, 40, 200, bits=bits, order=order)
    x = make_x(rng, n_tokens, 200)
    norm = make_half_norm(rng, n_tokens, 200)
    _alive = norm.finish_in_next_call(device)
    found = run_matmul_few(device, w, x, output)[:, : w.shape.columns]
    values = from_bf16(x)[:, :200] * norm.factors[:, None]
    if output == SWIGLU:
        exact, off = gated(values, w.w, 1.0, 4 * FLOAT32_ROUNDING)
        assert_within(from_bf16(found), exact, off + BF16_ROUNDING * np.abs(exact))
    else:
        assert_sums(found, values, w.w)


@pytest.mark.parametrize("dim", [128, 5120, 8192, 8193, 20000])
def test_a_norm_of_any_width_ends(device: Device, dim: int) -> None:
    """More parts than are read at once, and some that are no multiple of those a lane reads."""
    rng = np.random.default_rng(dim)
    w, x = make_matrix(device, rng, 16, 128), make_x(rng, 2, 128)
    norm = make_half_norm(rng, 2, dim)
    _alive = norm.finish_in_next_call(device)
    found = run_matmul_few(device, w, x)[:, :16]
    assert_sums(found, from_bf16(x)[:, :128] * norm.factors[:, None], w.w)


@pytest.mark.parametrize(
    ("output", "message"), [(STORE, "a norm follows what is added"), (ADD, "as wide as y")]
)
def test_a_norm_that_cannot_begin_is_refused(device: Device, output: int, message: str) -> None:
    rng = np.random.default_rng(13)
    w = make_matrix(device, rng, 16, 128)
    norm, h = make_half_norm(rng, 2, 16), device.put(np.zeros((2, 16), np.uint16))
    _alive = norm.begin_in_next_call(device, h, 15 if output == ADD else 16)
    with pytest.raises(DeviceError, match=message):
        run_matmul_few(device, w, make_x(rng, 2, 128), output)


def test_one_call_does_not_begin_and_end_a_norm(device: Device) -> None:
    rng = np.random.default_rng(14)
    w = make_matrix(device, rng, 16, 128)
    norm, h = make_half_norm(rng, 2, 16), device.put(np.zeros((2, 16), np.uint16))
    _alive = norm.begin_in_next_call(device, h, 16), norm.finish_in_next_call(device)
    with pytest.raises(DeviceError, match="begins a norm or finishes one"):
        run_matmul_few(device, w, make_x(rng, 2, 128), ADD)


@pytest.mark.parametrize("rows", [2, 14, 16, 18, 146])
def test_gate_and_up_meet_whatever_their_number(device: Device, rows: int) -> None:
    rng = np.random.default_rng(rows)
    w = make_matrix(device, rng, rows, 130, order=GATE_UP)
    check(device, w, rng, 3, SWIGLU)


@pytest.mark.small
@pytest.mark.parametrize("multiprocessors", [1, 2, 3, 7, 16, 40])
def test_row_blocks_shared_by_any_number_of_blocks(device: Device, multiprocessors: int) -> None:
    device.arrange(seed=multiprocessors, multiprocessors=multiprocessors)
    rng = np.random.default_rng(multiprocessors)
    w = make_matrix(device, rng, 270, 1100)  # 3 row blocks of 9 chunks
    check(device, w, rng, 2, ADD)


@pytest.mark.parametrize("seed", range(1, 7))
def test_the_same_bits_in_every_order(device: Device, seed: int) -> None:
    rng = np.random.default_rng(3)
    w = make_matrix(device, rng, 140, 900, scales=PAIRS, group=64)
    first = check(device, w, np.random.default_rng(4), 9, STORE)
    device.arrange(seed=seed)
    again = check(device, w, np.random.default_rng(4), 9, STORE)
    np.testing.assert_array_equal(first.view(np.uint32), again.view(np.uint32))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_token_has_the_same_bits_in_any_company(device: Device, bits: int) -> None:
    """Among as many others as one pass takes, that is: the grid and so the split stay."""
    rng = np.random.default_rng(5)
    w = make_matrix(device, rng, 100, 700, bits=bits)
    x = make_x(rng, 8, 700)
    all_of_them = run_matmul_few(device, w, x)
    alone = run_matmul_few(device, w, x[5:6])
    np.testing.assert_array_equal(alone[0].view(np.uint32), all_of_them[5].view(np.uint32))


def test_nan_stays_in_its_token(device: Device) -> None:
    rng = np.random.default_rng(6)
    w = make_matrix(device, rng, 70, 500)
    x = make_x(rng, 10, 500)
    clean = run_matmul_few(device, w, x)[:, :70]
    x[4, 77] = NAN_BF16
    y = run_matmul_few(device, w, x)[:, :70]
    others = np.arange(10) != 4
    assert np.isnan(y[4]).all()
    np.testing.assert_array_equal(y[others], clean[others])


def test_extremes_are_exact(device: Device) -> None:
    """Every value a weight can have, one at a time."""
    for bits in (4, 8):
        values = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
        w = make_matrix(device, np.random.default_rng(7), len(values), 128, bits=bits)
        x = make_x(np.random.default_rng(8), 1, 128)
        x[:] = 0
        x[0, 9] = 0x3F80  # 1
        y = run_matmul_few(device, w, x)
        np.testing.assert_array_equal(y[0, : len(values)], w.w[:, 9])


def test_one_workspace_serves_call_after_call(device: Device) -> None:
    rng = np.random.default_rng(9)
    large, small = (make_matrix(device, rng, *size) for size in [(300, 640), (30, 384)])
    workspace = matmul_few_workspace(device, large, 16)
    for w, n_tokens in [(large, 16), (small, 1), (large, 3), (small, 9)]:
        x = make_x(rng, n_tokens, w.shape.inputs)
        y = run_matmul_few(device, w, x, workspace=workspace)
        assert_sums(y[:, : w.shape.rows], from_bf16(x)[:, : w.shape.inputs], w.w)


@pytest.mark.parametrize("lacking", ["bytes", "counters"])
def test_too_small_a_workspace_is_refused(device: Device, lacking: str) -> None:
    rng = np.random.default_rng(10)
    w = make_matrix(device, rng, 300, 128)
    full = matmul_few_workspace(device, w, 1)
    sizes = [full.sums.n_bytes, full.counters.n_bytes // 4]
    sizes[lacking == "counters"] -= 1
    with pytest.raises(DeviceError, match=r"\[cuda\] matmul of few tokens: the workspace has"):
        run_matmul_few(device, w, make_x(rng, 1, 128), workspace=make_workspace(device, *sizes))


# Of a call of 2 tokens by 16 x 128 weights: what is changed, to what, and what is said then.
WRONG = [
    ("entries", 0, "with 0 scales for 128 inputs"),
    ("entries", 3, "with 3 scales for 128 inputs"),
    ("entries", 2, "with 2 scales for 128 inputs"),  # of bf16
    ("rows", 0, "0 x 128 weights"),
    ("rows", 17, "rows of y every 16 values; wanted are rows of 17 values"),
    ("order", GATE_UP, "gates and ups in one matrix are for SwiGLU"),
    ("output", SWIGLU, "gates and ups in one matrix are for SwiGLU"),
    ("output", 4, "an output that nobody knows"),
    ("n_tokens", -1, "no fewer than 0 tokens"),
    ("tiles", None, "tiles and scales must be there"),
    ("w_scales", None, "tiles and scales must be there"),
    ("x", None, "rows of x every 136 values of no memory"),
    ("x_stride", 120, "rows of x every 120 values; wanted are rows of 128 values"),
    ("x_stride", 132, "rows of x every 132 values; wanted are .* aligned to 16 bytes"),
    ("y", None, "rows of y every 16 values of no memory"),
    ("y_stride", 15, "rows of y every 15 values; wanted are rows of 16 values"),
    ("sums", None, "a workspace must be there"),
    ("counters", None, "a workspace must be there"),
]


@pytest.mark.parametrize(("what", "value", "message"), WRONG)
def test_what_cannot_be_is_refused(device: Device, what: str, value: Any, message: str) -> None:
    rng = np.random.default_rng(11)
    w = make_matrix(device, rng, 16, 128)
    sums, sum_bytes, counters, n_counters = matmul_few_workspace(device, w, 2).arguments()
    call = {
        "shape": w.shape,
        "tiles": w.tiles,
        "w_scales": w.scales,
        "x": device.put(make_x(rng, 2, 128)),
        "n_tokens": 2,
        "x_stride": 136,
        "y": device.put(np.zeros((2, 16), np.float32)),
        "y_stride": 16,
        "output": STORE,
        "sums": sums,
        "sum_bytes": sum_bytes,
        "counters": counters,
        "n_counters": n_counters,
    }
    if what in call:
        call[what] = value
    else:
        setattr(w.shape, what, value)
    with pytest.raises(DeviceError, match=rf"\[cuda\] matmul of few tokens: .*{message}"):
        device.call("run_matmul_few", *call.values())


def test_gates_without_ups_are_refused(device: Device) -> None:
    rng = np.random.default_rng(12)
    w = make_matrix(device, rng, 18, 128, order=GATE_UP)
    w.shape.rows = 17
    with pytest.raises(DeviceError, match="as many gates as ups"):
        run_matmul_few(device, w, make_x(rng, 2, 128), SWIGLU)


def test_no_tokens_are_no_work(device: Device) -> None:
    w = make_matrix(device, np.random.default_rng(12), 16, 128)
    assert run_matmul_few(device, w, np.zeros((0, 128), np.uint16)).shape[0] == 0


@pytest.mark.cuda
@pytest.mark.parametrize("n_tokens", [1, 9, 64])
@pytest.mark.parametrize("kind", [{}, {"bits": 8, "scales": PAIRS, "group": 32}])
def test_all_blocks_of_a_gpu_and_many_rounds_of_rings(n_tokens: int, kind: dict[str, int]) -> None:
    """Scout's queries, keys and values, some 8 units for each block of an H100."""
    device = gpu_device()
    device.arrange(multiprocessors=None)
    rng = np.random.default_rng(n_tokens)
    check(device, make_matrix(device, rng, 7168, 5120, **kind), rng, n_tokens, STORE)
