"""Tiles of many queries over the keys and values of attention_cases."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from attention_cases import ITEM, Array, Case, Span, exact_attention
from cuda_cases import NAN_BF16, assert_within, from_bf16
from cuda_device import Device

MANY_QUERIES = {False: 64, True: 128}  # of an item, without and with Hopper


def hopper_fits(case: Case) -> bool:
    return bool(case.c.head_dim <= 128)


def tiles_of(case: Case, *, size: int, skip: int = 0) -> Array:
    """Return tiles of all queries but the first `skip` of each span, as the plan makes them."""
    items = []
    for span in case.spans:
        n_queries = span.n_rows * case.group
        for first in range(skip, n_queries, size):
            n = min(size, n_queries - first)
            rows_seen = (first + n - 1) // case.group + 1 if case.c.causal else span.n_rows
            items.append((span.first_row, span.first_index, span.page_list, first, n, 0,
                          span.first_index + rows_seen, 0, 1, 0, 0, 0))  # fmt: skip
    items.sort(key=lambda item: -item[6])
    return np.array(items, ITEM)


def run_many(
    device: Device, case: Case, *, hopper: bool = False, seed: int = 0, items: Array | None = None
) -> NDArray[np.uint16]:
    """Return y [n_tokens, n_heads, head_dim], NaN where no item has the query."""
    device.arrange(seed=seed, multiprocessors=case.c.multiprocessors)
    items = tiles_of(case, size=MANY_QUERIES[hopper]) if items is None else items
    y = device.put(np.full((len(case.q), case.c.y_stride), NAN_BF16, np.uint16))
    device.call(
        "case_attend_many",
        case.c,
        int(hopper),
        len(items),
        device.put(case.pool),
        device.put(items.view(np.int32)),
        device.put(case.page_table),
        device.put(case.q),
        y,
    )
    found = y.read()
    columns = case.c.n_heads * case.c.head_dim
    assert (found[:, columns:] == NAN_BF16).all()
    return found[:, :columns].reshape(len(case.q), case.c.n_heads, case.c.head_dim)


def check_span(case: Case, span: Span, y: NDArray[np.uint16], *, skip: int = 0) -> None:
    """Compare all queries of a span but the first `skip`, which must be untouched."""
    rows = slice(span.first_row, span.first_row + span.n_rows)
    shape = (span.n_rows, case.c.n_kv_heads, case.group, case.c.head_dim)
    # The queries of a kv head side by side, as they are numbered.
    got, exact, allowed = (
        values.reshape(shape).swapaxes(1, 2).reshape(-1, shape[1] * shape[3])
        for values in (from_bf16(y[rows]), *exact_attention(case, span))
    )
    assert np.isnan(got[:skip]).all()
    assert_within(got[skip:], exact[skip:], allowed[skip:])


def check_many(case: Case, y: NDArray[np.uint16], *, skip: int = 0) -> None:
    for span in case.spans:
        check_span(case, span, y, skip=skip)
