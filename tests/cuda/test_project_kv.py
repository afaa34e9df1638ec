"""Projection and storing in one launch against the two one after the other, which have their own
tests: nothing may differ."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from cuda_cases import (
    ADD,
    BF16,
    NAN_BF16,
    PAIRS,
    STORE,
    Matrix,
    Workspace,
    make_half_norm,
    make_matrix,
    make_workspace,
    make_x,
    matmul_few_workspace,
)
from cuda_device import Device, DeviceError, gpu_device
from kv_cases import E4M3, INT8, Case, make_case

HEAD_DIMS = [8, 16, 32, 64, 128]


def project_workspace(device: Device, w: Matrix) -> Workspace:
    need = (ctypes.c_int64 * 2)()
    device.library.project_kv_need(ctypes.byref(w.shape), need)
    return make_workspace(device, *need)


def new_case(device: Device, n_tokens: int, n_heads: int, n_kv_heads: int, head_dim: int,
             **kind: Any) -> Case:  # fmt: skip
    sums = np.full((n_tokens, n_heads + 2 * n_kv_heads, head_dim), np.nan, np.float32)
    return make_case(device, sums, n_heads=n_heads, **kind)


def check(
    device: Device,
    rng: np.random.Generator,
    *,
    n_tokens: int = 3,
    heads: tuple[int, int, int] = (5, 2, 16),
    inputs: int = 200,
    weights: dict[str, int] | None = None,
    normed: bool = True,
    **kind: Any,
) -> None:
    n_heads, n_kv_heads, head_dim = heads
    w = make_matrix(device, rng, (n_heads + 2 * n_kv_heads) * head_dim, inputs, **(weights or {}))
    x, norm = make_x(rng, n_tokens, inputs), make_half_norm(rng, n_tokens, inputs)
    rows = device.put(x)
    apart, fused = (new_case(device, n_tokens, *heads, **kind) for _ in range(2))

    def arguments(case: Case, workspace: Workspace) -> list[Any]:
        y = case.keep[0]
        return [w.shape, w.tiles, w.scales, rows, n_tokens, x.shape[1], y, case.c.qkv_stride,
                STORE, *workspace.arguments()]  # fmt: skip

    alive: list[Any] = []
    if normed:
        alive.append(norm.finish_in_next_call(device))
    device.call("run_matmul_few", *arguments(apart, matmul_few_workspace(device, w, n_tokens)))
    device.call("case_store_kv", apart.c)
    if normed:
        alive.append(norm.finish_in_next_call(device))
    workspace = project_workspace(device, w)
    device.call("run_project_kv", fused.c, *arguments(fused, workspace))
    assert not workspace.counters.read().any()
    assert np.isfinite(fused.stored_q()).all()
    for one, other in [
        (apart.q, fused.q), (apart.pages, fused.pages), (apart.keep[0], fused.keep[0])
    ]:  # fmt: skip
        np.testing.assert_array_equal(one.read().view(np.uint8), other.read().view(np.uint8))


@pytest.mark.small
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scales", [BF16, PAIRS])
@pytest.mark.parametrize("kind", [BF16, E4M3, INT8])
def test_every_format(device: Device, bits: int, scales: int, kind: int) -> None:
    weights = {"bits": bits, "scales": scales}
    check(device, np.random.default_rng(bits), weights=weights, kind=kind, rotated=True)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("n_tokens", [1, 5, 8])
def test_every_head(device: Device, head_dim: int, n_tokens: int) -> None:
    """Heads of which several lie in 128 rows, and of which the last rows have fewer."""
    rng = np.random.default_rng(head_dim)
    check(device, rng, n_tokens=n_tokens, heads=(5, 1, head_dim), kind=E4M3, rotated=True)


@pytest.mark.small
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    "layer", [{"rotated": True, "qk_norm": True}, {"scaled": True}, {"rotated": True}]
)
def test_every_layer(device: Device, layer: dict[str, bool], normed: bool) -> None:
    check(device, np.random.default_rng(1), normed=normed, **layer)


@pytest.mark.small
@pytest.mark.parametrize("multiprocessors", [1, 3, 8, 40])
def test_heads_shared_by_any_number_of_blocks(device: Device, multiprocessors: int) -> None:
    device.arrange(seed=multiprocessors, multiprocessors=multiprocessors)
    rng = np.random.default_rng(multiprocessors)
    check(device, rng, heads=(5, 2, 64), inputs=1000, kind=INT8, rotated=True, qk_norm=True)


# What is changed in a call of 2 tokens, to what.
WRONG = [
    ("head_dim", 48), ("n_heads", 4), ("n_tokens", 1), ("tokens", 9), ("qkv", None),
    ("output", ADD), ("qkv_stride", 7),
]  # fmt: skip


@pytest.mark.parametrize(("what", "value"), WRONG)
def test_what_cannot_be_is_refused(device: Device, what: str, value: Any) -> None:
    rng = np.random.default_rng(2)
    w = make_matrix(device, rng, 9 * 16, 136)
    case = new_case(device, 2, 5, 2, 16)
    n_tokens, stride, y = (9 if what == "tokens" else 2), case.c.qkv_stride, case.keep[0]
    if hasattr(case.c, what):
        setattr(case.c, what, value)
    x = device.put(np.full((9, 144), NAN_BF16, np.uint16))
    output = value if what == "output" else STORE
    with pytest.raises(DeviceError, match=r"projection to queries, keys and values: .* wanted are"):
        device.call("run_project_kv", case.c, w.shape, w.tiles, w.scales, x, n_tokens, 144, y,
                    stride, output, *project_workspace(device, w).arguments())  # fmt: skip


@pytest.mark.parametrize("lacking", ["bytes", "counters"])
def test_too_small_a_workspace_is_refused(device: Device, lacking: str) -> None:
    rng = np.random.default_rng(3)
    w = make_matrix(device, rng, 9 * 16, 136)
    case, full = new_case(device, 2, 5, 2, 16), project_workspace(device, w)
    sizes = [full.sums.n_bytes, full.counters.n_bytes // 4]
    sizes[lacking == "counters"] -= 1
    x, y, workspace = device.put(make_x(rng, 2, 136)), case.keep[0], make_workspace(device, *sizes)
    with pytest.raises(DeviceError, match="the workspace has"):
        device.call("run_project_kv", case.c, w.shape, w.tiles, w.scales, x, 2, 144, y,
                    case.c.qkv_stride, STORE, *workspace.arguments())  # fmt: skip


@pytest.mark.cuda
@pytest.mark.parametrize("n_tokens", [1, 8])
def test_all_blocks_of_a_gpu(n_tokens: int) -> None:
    """Scout's."""
    device = gpu_device()
    device.arrange(multiprocessors=None)
    rng = np.random.default_rng(n_tokens)
    check(device, rng, n_tokens=n_tokens, heads=(40, 8, 128), inputs=5120, kind=E4M3, rotated=True,
          qk_norm=True)  # fmt: skip
