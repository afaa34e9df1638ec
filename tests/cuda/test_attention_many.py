"""Attention of many queries against NumPy in float64, on any GPU and on Hopper."""

from __future__ import annotations

import numpy as np
import pytest

from attention_many_cases import BF16, E4M3, INT8, Case, Span
from cuda_cases import NAN_BF16, from_bf16
from cuda_device import Device, DeviceError

KINDS = [
    pytest.param(BF16, id="bf16"),
    pytest.param(E4M3, id="e4m3"),
    pytest.param(INT8, id="int8"),
]


@pytest.fixture(params=[False], ids=["sm80"])
def hopper(request: pytest.FixtureRequest, device: Device) -> bool:
    if request.param and not device.is_hopper():
        pytest.skip("needs a Hopper GPU")
    return bool(request.param)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [8, 24, 64, 88, 128, 256])
def test_every_format_and_head_dim(device: Device, hopper: bool, kind: int, head_dim: int) -> None:
    case = Case([Span(23, before=70)], head_dim=head_dim, kind=kind, n_kv_heads=1, group=5)
    case.check(case.run(device, hopper=hopper, seed=head_dim % 7))


# Batches of spans: prefixes in the cache, tiles that begin in the middle of a token, tails of tiles
# and pages, borders of tiles exactly met.
BATCHES = [
    pytest.param({"group": 1, "spans": [Span(130)], "n_kv_heads": 2}, id="group-1"),
    pytest.param(
        {"group": 5, "spans": [Span(3), Span(14, before=50), Span(1, before=64)]}, id="mixed"
    ),
    pytest.param(
        {"group": 7, "spans": [Span(11, before=117), Span(10, first_query=30)]}, id="group-7"
    ),
    pytest.param({"group": 16, "spans": [Span(5, before=60)], "n_kv_heads": 1}, id="group-16"),
    pytest.param(
        {"group": 1, "spans": [Span(64), Span(64, before=64)], "n_kv_heads": 1}, id="borders"
    ),
]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("page_size", [16, 64, 80])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_batches_over_pages(
    device: Device, hopper: bool, batch: dict, page_size: int, causal: bool
) -> None:
    kind = [BF16, E4M3, INT8][page_size % 3]
    case = Case(head_dim=64, page_size=page_size, causal=causal, kind=kind, **batch)
    case.check(case.run(device, hopper=hopper, seed=page_size))


@pytest.mark.parametrize("kind", KINDS)
def test_large_scores(device: Device, hopper: bool, kind: int) -> None:
    case = Case([Span(20, before=100)], key_scale=40, kind=kind, n_kv_heads=1)
    case.check(case.run(device, hopper=hopper))


@pytest.mark.parametrize("kind", KINDS)
def test_every_order_gives_the_same(device: Device, hopper: bool, kind: int) -> None:
    case = Case([Span(20, before=200), Span(9)], head_dim=64, kind=kind, n_kv_heads=1)
    results = [case.run(device, hopper=hopper, seed=seed) for seed in range(5)]
    case.check(results[0])
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_nan_stays_in_its_sequence(device: Device, hopper: bool) -> None:
    case = Case([Span(20, before=30), Span(20, before=30), Span(5)], head_dim=64)
    clean = case.run(device, hopper=hopper)
    case.check(clean)
    values = np.array(case.values[1])
    values[7] = np.nan
    case.write(1, 1, values)
    dirty = case.run(device, hopper=hopper)
    assert np.isnan(from_bf16(dirty[20:40])).all()
    np.testing.assert_array_equal(dirty[:20], clean[:20])
    np.testing.assert_array_equal(dirty[40:], clean[40:])


def test_pieces_of_a_prompt_give_the_same_bits(device: Device, hopper: bool) -> None:
    whole = Case([Span(150)], head_dim=64, n_kv_heads=1, group=2)
    together = whole.run(device, hopper=hopper)
    for first, last in ((0, 37), (37, 101), (101, 150)):
        piece = Case([Span(last - first, before=first)], head_dim=64, n_kv_heads=1, group=2)
        piece.q = whole.q[first:last].copy()
        piece.write(0, 0, whole.keys[0][:last])
        piece.write(0, 1, whole.values[0][:last])
        np.testing.assert_array_equal(piece.run(device, hopper=hopper), together[first:last])


def test_what_cannot_be_is_refused(device: Device, hopper: bool) -> None:
    with pytest.raises(DeviceError, match="head_dim is 264"):
        Case([Span(1)], head_dim=264).run(device, hopper=hopper)
    with pytest.raises(DeviceError, match="multiple of 16 tokens"):
        Case([Span(1)], page_size=24).run(device, hopper=hopper)
    untouched = Case([], head_dim=64).run(device, hopper=hopper)
    assert np.all(untouched == NAN_BF16)
