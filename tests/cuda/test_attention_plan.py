"""How spans become items: every query meets every key once."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from attention_cases import Plan, plan_spans
from cuda_device import Device, emulated_device

FEW_QUERIES, MANY_QUERIES, KEY_TILE, COMBINED = 16, 64, 64, 16


@pytest.fixture
def device() -> Device:
    return emulated_device()  # for its library: nothing is launched


def spans_of(*spans: tuple[int, int]) -> NDArray[np.int32]:
    """Spans of (first_index, n_rows), one behind the other."""
    rows, first_row = [], 0
    for i, (first_index, n_rows) in enumerate(spans):
        rows.append((first_row, n_rows, first_index, 1000 * i))
        first_row += n_rows
    return np.array(rows, np.int32).reshape(-1, 4)


def check(device: Device, spans: NDArray[np.int32], group: int, causal: bool) -> Plan:
    plan = plan_spans(device, spans, group, causal)
    assert_borders(plan)
    for first_row, n_rows, first_index, page_list in spans:
        few = n_rows * group <= MANY_QUERIES
        items = plan.few if few else plan.many
        items = items[items["first_row"] == first_row]
        assert (items["first_index"] == first_index).all()
        assert (items["page_list"] == page_list).all()
        met = np.zeros((n_rows * group, first_index + n_rows), np.int32)
        for item in items:
            queries = slice(item["first_query"], item["first_query"] + item["n_queries"])
            assert item["first_query"] + item["n_queries"] <= len(met)
            met[queries, item["first_key"] : item["last_key"]] += 1
        own = first_index + np.arange(n_rows * group)[:, None] // group
        seen = (np.arange(met.shape[1]) <= own) | (not causal)
        assert (met[seen] == 1).all()
        assert (met <= 1).all()
    rows_met = {*plan.few["first_row"].tolist(), *plan.many["first_row"].tolist()}
    assert rows_met == {int(row[0]) for row in spans if row[1] > 0}
    assert_parts(plan)
    return plan


def assert_borders(plan: Plan) -> None:
    for items, n_queries in ((plan.few, FEW_QUERIES), (plan.many, MANY_QUERIES)):
        assert (items["n_queries"] >= 1).all()
        assert (items["n_queries"] <= n_queries).all()
        assert (items["first_query"] % n_queries == 0).all()
        assert (items["first_key"] % KEY_TILE == 0).all()
        lengths = items["last_key"] - items["first_key"]
        assert (lengths > 0).all()
        assert (np.diff(lengths) <= 0).all()
    assert (plan.many["first_key"] == 0).all()
    assert (plan.many["n_parts"] == 1).all()


def assert_parts(plan: Plan) -> None:
    """Parts and counters are somebody's alone, and all of them."""
    parts = np.zeros(plan.n_parts, np.int32)
    counters = np.zeros(plan.n_counters, np.int32)
    tiles = {(i["first_row"], i["first_query"]): i for i in plan.few}
    for tile, item in tiles.items():
        same = plan.few[(plan.few["first_row"] == tile[0]) & (plan.few["first_query"] == tile[1])]
        n = int(item["n_parts"])
        assert sorted(same["part"]) == list(range(n))
        order = same[np.argsort(same["part"])]
        assert (order["first_key"][1:] == order["last_key"][:-1]).all()
        if n == 1:
            continue
        assert len(set(same["first_part"])) == len(set(same["counter"])) == 1
        parts[item["first_part"] : item["first_part"] + n] += 1
        groups = -(-n // COMBINED)
        counters[item["counter"] : item["counter"] + groups + (groups > 1)] += 1
    assert (parts == 1).all()
    assert (counters == 1).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("group", [1, 2, 5, 7, 16, 20, 64, 65])
def test_every_query_meets_every_key_once(device: Device, group: int, causal: bool) -> None:
    lengths = [1, 15, 16, 17, 63, 64, 65, 255, 256, 257, 511, 512, 513, 4097]
    spans = [(n - 1, 1) for n in lengths]
    spans += [(n, rows) for n in (0, 1, 255, 256, 700) for rows in (2, 3, 4, 13, 64, 65, 200)]
    check(device, spans_of(*spans), group, causal)


@pytest.mark.parametrize("n_keys", [16384, 16385, 65536, 65537, 1000003, 10485760])
def test_long_spans_have_few_pieces(device: Device, n_keys: int) -> None:
    few = plan_spans(device, spans_of((n_keys - 1, 1)), 5, True).few
    assert len(few) <= 256
    ends = np.sort(few["last_key"])
    np.testing.assert_array_equal(np.sort(few["first_key"])[1:], ends[:-1])
    assert ends[-1] == n_keys
    lengths = few["last_key"] - few["first_key"]
    assert (lengths[:-1] == lengths[0]).all()
    assert lengths[0] % KEY_TILE == 0
    if n_keys <= 65536:
        assert lengths[0] == 256


def test_a_span_is_divided_alike_in_any_company(device: Device) -> None:
    names = ["first_query", "n_queries", "first_key", "last_key", "part", "n_parts"]
    alone = plan_spans(device, spans_of((3000, 3)), 7, True).few
    company = plan_spans(device, spans_of((9, 4), (80000, 1), (3000, 3), (7, 100)), 7, True).few
    same = company[company["first_index"] == 3000]
    np.testing.assert_array_equal(same[names], alone[names])


def test_tiles_that_read_the_same_keys_are_neighbours(device: Device) -> None:
    few = plan_spans(device, spans_of((2047, 1)), 40, True).few
    np.testing.assert_array_equal(few["first_query"], [0, 16, 32] * 8)
    np.testing.assert_array_equal(few["first_key"], np.repeat(np.arange(8) * 256, 3))


def test_nothing_is_no_items(device: Device) -> None:
    for spans in (spans_of(), spans_of((5, 0))):
        plan = check(device, spans, 5, True)
        assert len(plan.few) == len(plan.many) == plan.n_parts == plan.n_counters == 0
