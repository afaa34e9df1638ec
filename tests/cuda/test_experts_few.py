"""The feed-forward part of a layer for few tokens against NumPy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cuda_cases import (
    BF16,
    NAN_BF16,
    PAIRS,
    Experts,
    assert_norm_begun,
    assert_within,
    exact_experts,
    experts_few_need,
    make_experts,
    make_half_norm,
    make_workspace,
    make_x,
    run_experts_few,
)
from cuda_device import Device, DeviceError, emulated_device, gpu_device


def make_y(rng: np.random.Generator, n_tokens: int, dim: int) -> NDArray[np.float32]:
    y = np.full((n_tokens, dim + 5), np.nan, np.float32)
    y[:, :dim] = rng.standard_normal((n_tokens, dim))
    return y


def check(device: Device, w: Experts, rng: np.random.Generator, n_tokens: int) -> Any:
    """Run, compare, and return y [n_tokens, dim]."""
    x, y = make_x(rng, n_tokens, w.dim), make_y(rng, n_tokens, w.dim)
    found = run_experts_few(device, w, x, y)
    np.testing.assert_array_equal(found[:, w.dim :], y[:, w.dim :])
    assert_within(found[:, : w.dim], *exact_experts(w, x, y))
    return found[:, : w.dim]


@pytest.mark.small
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("scales", "group"), [(BF16, 128), (PAIRS, 128), (PAIRS, 64), (PAIRS, 32)])
def test_every_format(device: Device, bits: int, scales: int, group: int) -> None:
    rng = np.random.default_rng(bits)
    w = make_experts(
        device, rng, dim=200, ffn_dim=72, n_experts=3, bits=bits, scales=scales, group=group
    )
    check(device, w, rng, 5)


@pytest.mark.parametrize("n_tokens", [1, 2, 7, 8, 9, 16, 24, 32, 64])
def test_every_number_of_tokens(device: Device, n_tokens: int) -> None:
    rng = np.random.default_rng(n_tokens)
    w = make_experts(device, rng, dim=136, ffn_dim=40, n_experts=5)
    check(device, w, rng, min(n_tokens, experts_few_need(device, w, 1)[3]))


@pytest.mark.small
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("has_shared", [True, False])
def test_every_number_of_visits(device: Device, top_k: int, has_shared: bool) -> None:
    rng = np.random.default_rng(top_k)
    w = make_experts(
        device, rng, dim=136, ffn_dim=40, n_experts=6, top_k=top_k, has_shared=has_shared
    )
    check(device, w, rng, 6)


@pytest.mark.small
@pytest.mark.parametrize("n_tokens", [1, 9, 40])
@pytest.mark.parametrize("has_shared", [True, False])
@pytest.mark.parametrize("multiprocessors", [2, 9])
def test_one_norm_ends_and_another_begins(
    device: Device, n_tokens: int, has_shared: bool, multiprocessors: int
) -> None:
    """In the same memory: rows of x make place for those of the next norm."""
    device.arrange(seed=n_tokens, multiprocessors=multiprocessors)
    rng = np.random.default_rng(n_tokens)
    w = make_experts(device, rng, dim=264, ffn_dim=72, n_experts=5, has_shared=has_shared)
    n_tokens = min(n_tokens, experts_few_need(device, w, 1)[3])
    x, y = make_x(rng, n_tokens, w.dim), make_y(rng, n_tokens, w.dim)
    before, after = make_half_norm(rng, n_tokens, w.dim), make_half_norm(rng, n_tokens, w.dim)
    rows = device.put(x)
    squares, *_alive = after.begin_in_next_call(device, rows, x.shape[1])
    _alive.append(before.finish_in_next_call(device))
    found = run_experts_few(device, w, x, y, at=rows)[:, : w.dim]
    assert_within(found, *exact_experts(w, x, y, before.factors[:, None]))
    assert_norm_begun(after, found, rows.read()[:, : w.dim], squares.read())


@pytest.mark.parametrize("top_k", [1, 3])
def test_a_norm_of_what_experts_take_ends(device: Device, top_k: int) -> None:
    rng = np.random.default_rng(top_k)
    w = make_experts(device, rng, dim=136, ffn_dim=40, n_experts=6, top_k=top_k)
    x, y = make_x(rng, 6, w.dim), make_y(rng, 6, w.dim)
    norm = make_half_norm(rng, 6, w.dim)
    _alive = norm.finish_in_next_call(device)
    found = run_experts_few(device, w, x, y)[:, : w.dim]
    assert_within(found, *exact_experts(w, x, y, norm.factors[:, None]))


def test_a_norm_after_several_visits_is_refused(device: Device) -> None:
    rng = np.random.default_rng(10)
    w = make_experts(device, rng, dim=40, ffn_dim=16, n_experts=3, top_k=2)
    x, y = make_x(rng, 2, 40), make_y(rng, 2, 40)
    rows = device.put(x)
    _alive = make_half_norm(rng, 2, 40).begin_in_next_call(device, rows, x.shape[1])
    with pytest.raises(DeviceError, match="with several visits none is the last"):
        run_experts_few(device, w, x, y)


@pytest.mark.parametrize("n_experts", [1, 2, 16, 33, 128])
def test_most_experts_may_be_empty(device: Device, n_experts: int) -> None:
    rng = np.random.default_rng(n_experts)
    w = make_experts(device, rng, dim=24, ffn_dim=16, n_experts=n_experts)
    check(device, w, rng, 3)


@pytest.mark.small
@pytest.mark.parametrize("top_k", [1, 2])
def test_all_tokens_on_one_expert(device: Device, top_k: int) -> None:
    """A router of zeros: all experts are equal, and the lower numbers go first."""
    rng = np.random.default_rng(1)
    router = np.zeros((5, 100))
    w = make_experts(device, rng, dim=100, ffn_dim=48, n_experts=5, top_k=top_k, router=router)
    check(device, w, rng, 20)


@pytest.mark.parametrize(("dim", "ffn_dim"), [(1, 1), (7, 9), (64, 8), (129, 130), (260, 5)])
def test_odd_sizes(device: Device, dim: int, ffn_dim: int) -> None:
    rng = np.random.default_rng(dim)
    w = make_experts(device, rng, dim=dim, ffn_dim=ffn_dim, n_experts=4, top_k=2)
    check(device, w, rng, 9)


@pytest.mark.parametrize("multiprocessors", [1, 2, 5, 13])
def test_work_shared_by_any_number_of_blocks(device: Device, multiprocessors: int) -> None:
    device.arrange(seed=multiprocessors, multiprocessors=multiprocessors)
    rng = np.random.default_rng(multiprocessors)
    w = make_experts(device, rng, dim=300, ffn_dim=270, n_experts=4)
    check(device, w, rng, 3)


@pytest.mark.parametrize("seed", range(1, 7))
def test_the_same_bits_in_every_order(device: Device, seed: int) -> None:
    w = make_experts(device, np.random.default_rng(2), dim=150, ffn_dim=140, n_experts=4, top_k=2)
    first = check(device, w, np.random.default_rng(3), 9)
    device.arrange(seed=seed)
    again = check(device, w, np.random.default_rng(3), 9)
    np.testing.assert_array_equal(first.view(np.uint32), again.view(np.uint32))


@pytest.mark.parametrize("top_k", [1, 2])
def test_nan_stays_in_its_token(device: Device, top_k: int) -> None:
    rng = np.random.default_rng(4)
    w = make_experts(device, rng, dim=130, ffn_dim=40, n_experts=4, top_k=top_k)
    x, y = make_x(rng, 10, w.dim), make_y(rng, 10, w.dim)
    x[4, 77] = NAN_BF16
    found = run_experts_few(device, w, x, y)[:, : w.dim]
    assert np.isnan(found[4]).all()
    others = np.arange(10) != 4
    exact, allowed = exact_experts(w, x[others], y[others])
    assert_within(found[others], exact, allowed)


def test_one_workspace_serves_call_after_call(device: Device) -> None:
    rng = np.random.default_rng(5)
    w = make_experts(device, rng, dim=130, ffn_dim=140, n_experts=4)
    sum_bytes, n_counters, _, _ = experts_few_need(device, w, 17)
    workspace = make_workspace(device, sum_bytes, n_counters)
    for n_tokens in (17, 1, 8, 1):
        x, y = make_x(rng, n_tokens, w.dim), make_y(rng, n_tokens, w.dim)
        found = run_experts_few(device, w, x, y, workspace=workspace)
        assert_within(found[:, : w.dim], *exact_experts(w, x, y))


@pytest.mark.parametrize("lacking", ["bytes", "counters"])
def test_too_small_a_workspace_is_refused(device: Device, lacking: str) -> None:
    rng = np.random.default_rng(6)
    w = make_experts(device, rng, dim=40, ffn_dim=16, n_experts=2)
    sum_bytes, n_counters, _, _ = experts_few_need(device, w, 1)
    sizes = [sum_bytes, n_counters]
    sizes[lacking == "counters"] -= 1
    with pytest.raises(DeviceError, match=r"\[cuda\] experts of few tokens: the workspace has"):
        run_experts_few(
            device, w, make_x(rng, 1, 40), make_y(rng, 1, 40),
            workspace=make_workspace(device, *sizes),
        )  # fmt: skip


@pytest.mark.parametrize("kind", [{}, {"bits": 8}, {"scales": PAIRS}])
def test_too_many_tokens_are_refused(device: Device, kind: dict[str, int]) -> None:
    rng = np.random.default_rng(7)
    w = make_experts(device, rng, dim=40, ffn_dim=16, n_experts=2, **kind)
    limit = experts_few_need(device, w, 1)[3]
    with pytest.raises(DeviceError, match=f"{limit + 1} tokens; wanted are .* {limit} tokens"):
        run_experts_few(device, w, make_x(rng, limit + 1, 40), make_y(rng, limit + 1, 40))


# What a block may ask for: of an H100, an A100, and GPUs of sm_86, sm_89 and sm_120.
@pytest.mark.parametrize(("shared_kb", "limit"), [(227, 64), (163, 64), (99, 32)])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scales", [BF16, PAIRS])
def test_every_kind_runs_on_every_gpu(shared_kb: int, limit: int, bits: int, scales: int) -> None:
    device = emulated_device()
    device.arrange(shared_kb=shared_kb)
    rng = np.random.default_rng(bits)
    kind = {"bits": bits, "scales": scales}
    w = make_experts(device, rng, dim=130, ffn_dim=24, n_experts=2, **kind)
    most = experts_few_need(device, w, 1)[3]
    assert most == (limit if (bits, scales) == (4, BF16) else 32)
    for n_tokens in (3, most):
        check(device, w, rng, n_tokens)
    device.arrange()


# What is changed in a call of 2 tokens, to what, and what is said then. "c." is of the weights.
WRONG = [
    ("x_stride", 44, "rows of x every 44 values; wanted are .* 16 bytes"),
    ("x_stride", 32, "rows of x every 32 values; wanted are rows of 40"),
    ("x", None, "rows of x every 48 values of no memory"),
    ("y", None, "rows of y every 45 values of no memory"),
    ("y_stride", 39, "rows of y every 39 values; wanted are rows of 40"),
    ("n_tokens", -1, "-1 tokens; wanted are"),
    ("scratch", None, "scratch, aligned to 16 bytes, must be there"),
    ("sums", None, "a workspace must be there"),
    ("counters", None, "a workspace must be there"),
    ("c.router", None, "rows of the router every 48 values of no memory"),
    ("c.router_stride", 32, "rows of the router every 32 values"),
    ("c.gate_up_table", None, "tables of experts"),
    ("c.down_table", None, "tables of experts"),
    ("c.top_k", 0, "2 experts, top 0"),
    ("c.top_k", 3, "2 experts, top 3"),
    ("c.gate_up.entries", 0, "with 0 scales"),
    ("c.down.inputs", 24, "down is 40 x 24; wanted are"),
    ("c.down.rows", 41, "down is 41 x 16; wanted are"),
    ("c.shared_gate_up.entries", 0, "with 0 scales"),
    ("c.shared_gate_up.order", 0, "a gate beside its up"),
    ("c.shared_down.inputs", 17, "down is 40 x 17; wanted are"),
    ("c.shared_down_scales", None, "tiles and scales must be there"),
]


@pytest.mark.parametrize(("what", "value", "message"), WRONG)
def test_what_cannot_be_is_refused(device: Device, what: str, value: Any, message: str) -> None:
    rng = np.random.default_rng(8)
    w = make_experts(device, rng, dim=40, ffn_dim=16, n_experts=2)
    sum_bytes, n_counters, scratch_bytes, _ = experts_few_need(device, w, 2)
    sums, sum_size, counters, n = make_workspace(device, sum_bytes, n_counters).arguments()
    call = {
        "c": w.c,
        "x": device.put(make_x(rng, 2, 40)),
        "n_tokens": 2,
        "x_stride": 48,
        "y": device.put(make_y(rng, 2, 40)),
        "y_stride": 45,
        "scratch": device.reserve(scratch_bytes),
        "sums": sums,
        "sum_bytes": sum_size,
        "counters": counters,
        "n_counters": n,
    }
    *parts, name = what.split(".")
    if parts:
        part = w.c
        for inner in parts[1:]:
            part = getattr(part, inner)
        setattr(part, name, value)
    else:
        call[name] = value
    with pytest.raises(DeviceError, match=rf"\[cuda\] experts of few tokens: .*{message}"):
        device.call("run_experts_few", *call.values())


def test_no_tokens_are_no_work(device: Device) -> None:
    rng = np.random.default_rng(9)
    w = make_experts(device, rng, dim=40, ffn_dim=16, n_experts=2)
    assert run_experts_few(device, w, make_x(rng, 0, 40), make_y(rng, 0, 40)).shape[0] == 0


@pytest.mark.cuda
@pytest.mark.parametrize("n_tokens", [1, 3, 33])
def test_all_blocks_of_a_gpu_and_many_rounds_of_rings(n_tokens: int) -> None:
    """Scout's experts, two of them and the shared one."""
    device = gpu_device()
    device.arrange(multiprocessors=None)
    rng = np.random.default_rng(n_tokens)
    w = make_experts(device, rng, dim=5120, ffn_dim=8192, n_experts=2)
    check(device, w, rng, min(n_tokens, experts_few_need(device, w, 1)[3]))


@pytest.mark.cuda
@pytest.mark.small
@pytest.mark.parametrize("n_tokens", [1, 9])
def test_all_blocks_of_a_gpu_of_which_most_find_no_work(n_tokens: int) -> None:
    """The whole grid meets as the engine starts it, small enough for a sanitizer."""
    device = gpu_device()
    device.arrange(multiprocessors=None)
    rng = np.random.default_rng(n_tokens)
    w = make_experts(device, rng, dim=136, ffn_dim=40, n_experts=4, top_k=2)
    check(device, w, rng, n_tokens)
