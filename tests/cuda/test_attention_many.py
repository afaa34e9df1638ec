"""Attention of many queries against NumPy in float64, on any GPU and on Hopper."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from attention_cases import BF16, E4M3, INT8, Case, kv_sizes, make_case, write_pages
from attention_many_cases import MANY_QUERIES, check_many, hopper_fits, run_many, tiles_of
from cuda_cases import from_bf16
from cuda_device import Device, DeviceError

FORMS = [
    pytest.param(BF16, id="bf16"),
    pytest.param(E4M3, id="e4m3"),
    pytest.param(INT8, id="int8"),
]


@pytest.fixture(params=[False, True], ids=["sm80", "sm90"])
def hopper(request: pytest.FixtureRequest, device: Device) -> bool:
    if request.param and not device.is_hopper():
        pytest.skip("needs a Hopper GPU")
    return bool(request.param)


def case_of(
    device: Device, hopper: bool, spans: list[tuple[int, int]], seed: int = 0, **kind: Any
) -> Case:
    case = make_case(device, np.random.default_rng(seed), spans, **kind)
    if hopper and not hopper_fits(case):
        pytest.skip("Hopper's own has head_dim up to 128")
    return case


@pytest.mark.small
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("head_dim", [8, 24, 64, 88, 128, 256])
def test_every_format_and_head_dim(device: Device, hopper: bool, form: int, head_dim: int) -> None:
    case = case_of(device, hopper, [(70, 29)], head_dim=head_dim, form=form, n_kv_heads=1)
    check_many(case, run_many(device, case, hopper=hopper, seed=head_dim % 7))


# Prefixes in the cache, tiles that begin in the middle of a token, tails of tiles and of pages,
# borders of tiles exactly met.
BATCHES = [
    pytest.param({"spans": [(0, 130)], "group": 1}, id="group-1"),
    pytest.param({"spans": [(0, 3), (50, 14), (64, 1)], "group": 5}, id="mixed"),
    pytest.param({"spans": [(117, 31), (0, 10)], "group": 7}, id="group-7"),
    pytest.param({"spans": [(60, 9)], "group": 16}, id="group-16"),
    pytest.param({"spans": [(0, 64), (64, 64)], "group": 1}, id="borders"),
]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("page_size", [16, 64, 80])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_batches_over_pages(
    device: Device, hopper: bool, batch: dict[str, Any], page_size: int, causal: bool
) -> None:
    form = {16: E4M3, 64: BF16, 80: INT8}[page_size]
    case = case_of(device, hopper, page_size=page_size, causal=causal, form=form, **batch)
    check_many(case, run_many(device, case, hopper=hopper, seed=page_size))


@pytest.mark.small
@pytest.mark.parametrize("skip", [3, 64, 101])
def test_tiles_may_begin_anywhere(device: Device, hopper: bool, skip: int) -> None:
    case = case_of(device, hopper, [(40, 23)], group=7)
    y = run_many(
        device, case, hopper=hopper, items=tiles_of(case, size=MANY_QUERIES[hopper], skip=skip)
    )
    check_many(case, y, skip=skip)


@pytest.mark.parametrize("form", FORMS)
def test_large_scores(device: Device, hopper: bool, form: int) -> None:
    case = case_of(device, hopper, [(100, 20)], size=100, form=form, head_dim=128, n_kv_heads=1)
    check_many(case, run_many(device, case, hopper=hopper))


@pytest.mark.parametrize("form", FORMS)
def test_every_order_gives_the_same(device: Device, hopper: bool, form: int) -> None:
    case = case_of(device, hopper, [(200, 20), (0, 9)], form=form, n_kv_heads=1)
    results = [run_many(device, case, hopper=hopper, seed=seed) for seed in range(6)]
    check_many(case, results[0])
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("head_dim", "form"), [(128, BF16), (64, E4M3)])
def test_rings_go_round_across_jobs(
    device: Device, hopper: bool, head_dim: int, form: int, seed: int
) -> None:
    spans = [(600, 30), (0, 50), (300, 1), (390, 27)]
    case = case_of(device, hopper, spans, head_dim=head_dim, form=form, multiprocessors=2)
    check_many(case, run_many(device, case, hopper=hopper, seed=seed))


def test_nan_stays_in_its_sequence(device: Device, hopper: bool) -> None:
    case = case_of(device, hopper, [(30, 20), (30, 20), (0, 5)])
    clean = run_many(device, case, hopper=hopper)
    check_many(case, clean)
    span = case.spans[1]
    span.values[7] = np.nan
    pages = case.page_table[span.page_list :][: -(-span.n_keys // case.c.page_size)]
    write_pages(case.c, kv_sizes(device, case.c), case.pool, pages, span.values, 1)
    dirty = run_many(device, case, hopper=hopper)
    assert np.isnan(from_bf16(dirty[20:40])).all()
    np.testing.assert_array_equal(dirty[:20], clean[:20])
    np.testing.assert_array_equal(dirty[40:], clean[40:])


def test_results_do_not_depend_on_tiles(device: Device, hopper: bool) -> None:
    case = case_of(device, hopper, [(90, 150)], n_kv_heads=1, group=2)
    together = run_many(device, case, hopper=hopper)
    for size in (17, 50, 64):
        items = tiles_of(case, size=size)
        np.testing.assert_array_equal(run_many(device, case, hopper=hopper, items=items), together)


def test_what_cannot_be_is_refused(device: Device, hopper: bool) -> None:
    with pytest.raises(DeviceError, match="head_dim is 264"):
        run_many(device, case_of(device, hopper, [(0, 1)], head_dim=264), hopper=hopper)
    with pytest.raises(DeviceError, match="multiple of 16 tokens"):
        run_many(device, case_of(device, hopper, [(0, 1)], page_size=24), hopper=hopper)
    case = case_of(device, hopper, [(0, 5)])
    y = run_many(device, case, hopper=hopper, items=tiles_of(case, size=1)[:0])
    assert np.isnan(from_bf16(y)).all()
