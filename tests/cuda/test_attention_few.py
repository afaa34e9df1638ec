"""Attention of few queries against NumPy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from attention_cases import (
    BF16,
    E4M3,
    INT8,
    Case,
    check_attention,
    e4m3_values,
    exact_attention,
    make_case,
    plan_case,
    run_attention,
)
from cuda_cases import NAN_BF16, assert_within, bf16, from_bf16
from cuda_device import Device, DeviceError

FORMATS = [BF16, E4M3, INT8]


def case_of(device: Device, seed: int, spans: list[tuple[int, int]], **kind: Any) -> Case:
    return make_case(device, np.random.default_rng(seed), spans, **kind)


def tokens(*n_keys: int) -> list[tuple[int, int]]:
    """Sequences of so many keys, each with a query of its last token."""
    return [(n - 1, 1) for n in n_keys]


@pytest.mark.small
@pytest.mark.parametrize("head_dim", [8, 24, 64, 88, 128, 256])
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_and_head_dim(device: Device, form: int, head_dim: int) -> None:
    case = case_of(device, head_dim, [(64, 2), (270, 1), (6, 1)], form=form, head_dim=head_dim)
    check_attention(device, case)


@pytest.mark.parametrize("group", [1, 2, 5, 7, 16, 20])
@pytest.mark.parametrize("form", FORMATS)
def test_every_group(device: Device, form: int, group: int) -> None:
    case = case_of(device, group, [(70, 1), (300, 3), (0, 2)], form=form, group=group)
    check_attention(device, case)


@pytest.mark.parametrize("page_size", [16, 64, 80])
@pytest.mark.parametrize("form", FORMATS)
def test_every_page_size(device: Device, form: int, page_size: int) -> None:
    spans = tokens(1, 79, 80, 81, 159, 700)
    check_attention(device, case_of(device, 1, spans, form=form, page_size=page_size, group=3))


def test_more_pages_than_a_warp_has_lanes(device: Device) -> None:
    case = case_of(device, 2, tokens(1300), page_size=16, group=2, n_kv_heads=1)
    items = plan_case(device, case).few[:1].copy()  # undivided, as from 64 Ki keys on
    items["first_key"], items["last_key"], items["n_parts"] = 0, 1300, 1
    y = run_attention(device, case, items=items)
    assert_within(from_bf16(y), *exact_attention(case, case.spans[0]))


@pytest.mark.parametrize("form", FORMATS)
def test_lengths_around_borders(device: Device, form: int) -> None:
    spans = tokens(1, 15, 16, 17, 63, 64, 65, 255, 256, 257)
    check_attention(device, case_of(device, 3, spans, form=form, n_kv_heads=1))


def test_lengths_of_several_thousand(device: Device) -> None:
    """More than 16 pieces are combined in groups."""
    spans = [(4096, 1), (5000, 1), (4094, 4)]
    check_attention(device, case_of(device, 4, spans, n_kv_heads=1, group=4))


@pytest.mark.small
@pytest.mark.parametrize("n_rows", [1, 2, 3, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_several_rows_of_a_span(device: Device, causal: bool, n_rows: int) -> None:
    spans = [(0, n_rows), (15, n_rows), (255, n_rows), (254, n_rows), (62, n_rows)]
    check_attention(device, case_of(device, n_rows, spans, causal=causal, group=7))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("form", [E4M3, INT8])
def test_bytes_with_and_without_the_causal_rule(device: Device, form: int, causal: bool) -> None:
    spans = [(254, 4), (0, 3), (97, 2)]
    check_attention(device, case_of(device, 5, spans, form=form, causal=causal, head_dim=128))


# ---- the same bits ----
@pytest.mark.parametrize("form", FORMATS)
def test_the_same_bits_in_every_order_and_grid(device: Device, form: int) -> None:
    spans = [(4200, 1), (1100, 2), (256, 1), (3, 1), *tokens(*range(1, 12))]
    case = case_of(device, 6, spans, form=form, n_kv_heads=2, group=3, head_dim=64)
    first = check_attention(device, case)
    for seed, multiprocessors in [(1, 1), (2, 3), (3, 16), (4, 7), (5, 40)]:
        device.arrange(seed=seed, multiprocessors=multiprocessors)
        case.c.multiprocessors = multiprocessors
        np.testing.assert_array_equal(run_attention(device, case), first)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("form", FORMATS)
def test_every_instance_in_other_orders(
    device: Device, form: int, head_dim: int, seed: int
) -> None:
    device.arrange(seed=seed, multiprocessors=1)
    spans = [(330, 1), (64, 1), *tokens(3, 90, 17)]
    kind = {"n_kv_heads": 1, "group": 9 if seed == 1 else 5}
    case = case_of(device, 7, spans, form=form, head_dim=head_dim, multiprocessors=1, **kind)
    check_attention(device, case)


def test_a_span_has_the_same_bits_in_any_company(device: Device) -> None:
    case = case_of(device, 8, [(700, 2), (30, 1), (256, 4), (900, 1)])
    together = run_attention(device, case)
    for span in case.spans:
        few = plan_case(device, case).few
        alone = run_attention(device, case, items=few[few["first_row"] == span.first_row])
        rows = slice(span.first_row, span.first_row + span.n_rows)
        np.testing.assert_array_equal(alone[rows], together[rows])
        alone[rows] = NAN_BF16
        assert (alone == NAN_BF16).all()


@pytest.mark.parametrize("form", FORMATS)
def test_a_token_has_the_same_bits_with_its_successors(device: Device, form: int) -> None:
    """Where drafts are verified, and where a prompt's end is cut otherwise."""
    case = case_of(device, 9, [(254, 4)], form=form, group=5)
    together = run_attention(device, case)
    span = case.spans[0]
    for row in range(4):
        case.spans = [type(span)(span.first_index + row, 1, first_row=row, page_list=1)]
        np.testing.assert_array_equal(run_attention(device, case)[row], together[row])


# ---- numbers at the edge ----
@pytest.mark.parametrize("form", FORMATS)
def test_large_scores_do_not_overflow(device: Device, form: int) -> None:
    """Scores up to 1e4, of one product each, so that they are exact enough to compare."""
    case = case_of(device, 10, [(300, 2), (40, 1)], form=form)
    rows = case.q[:, :-8].reshape(len(case.q), -1, 64)
    rows[..., 1:] = 0
    rows[..., 0] = bf16(np.where(rows[..., 0] >= 0x8000, -1, 1) * 2.0**15)
    check_attention(device, case)


def test_equal_scores_average(device: Device) -> None:
    case = case_of(device, 11, tokens(1000), group=1, n_kv_heads=1)
    case.q[:, :-8] = 0
    check_attention(device, case)


@pytest.mark.parametrize("form", FORMATS)
def test_nan_stays_in_its_sequence(device: Device, form: int) -> None:
    case = case_of(device, 12, [(70, 1), (300, 1), (15, 1)], form=form)
    clean = run_attention(device, case)
    case.q[1, 3] = NAN_BF16  # of head 0
    y = run_attention(device, case)
    assert np.isnan(from_bf16(y[1, :64])).all()
    y[1, :64] = clean[1, :64]
    np.testing.assert_array_equal(y, clean)
    # Of the second sequence's first page: all that it has, scales included.
    case.pool[case.page_table[case.spans[1].page_list]] = 0xFF
    y = run_attention(device, case)
    assert np.isnan(from_bf16(y[1])).all()
    np.testing.assert_array_equal(y[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("form", [E4M3, INT8])
def test_every_byte_is_exact(device: Device, form: int) -> None:
    """One key alone is its values: every byte of each, at every dim of a run of 16."""
    spans = tokens(*[1] * 16)
    case = case_of(device, 13, spans, form=form, n_kv_heads=1, group=1, head_dim=256)
    means = e4m3_values() if form == E4M3 else np.arange(256).astype(np.uint8).view(np.int8)
    bytes_ = np.arange(256, dtype=np.uint8)
    if form == E4M3:
        bytes_[np.isnan(means)] = 0
    page_bytes = case.pool.shape[1]
    for i, span in enumerate(case.spans):
        page = case.pool[case.page_table[span.page_list]]
        values = page_bytes - (256 + 4) * 64  # of the last layer's last head
        page[values : values + 256] = np.roll(bytes_, i)
        page[values + 256 * 64 :][:4] = np.array([1], np.float32).view(np.uint8)
    y = from_bf16(run_attention(device, case))
    for i in range(16):
        np.testing.assert_array_equal(y[i], means[np.roll(bytes_, i)])


# ---- calls ----
def test_an_empty_list_is_no_work(device: Device) -> None:
    case = case_of(device, 14, tokens(20))
    y = run_attention(device, case, items=plan_case(device, case).few[:0])
    assert (y == NAN_BF16).all()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ({"head_dim": 12}, "head_dim 12"),
        ({"head_dim": 264}, "head_dim 264"),
        ({"page_size": 24}, "pages of 24"),
    ],
)
def test_other_shapes_are_refused(device: Device, kind: dict[str, int], message: str) -> None:
    case = case_of(device, 15, tokens(20), **kind)
    with pytest.raises(DeviceError, match=rf"\[cuda\] attention of few queries: .*{message}"):
        run_attention(device, case)


def test_misaligned_rows_are_refused(device: Device) -> None:
    case = case_of(device, 16, tokens(20))
    case.c.q_stride -= 4
    with pytest.raises(DeviceError, match=r"rows of q and y every .*aligned to 16 bytes"):
        run_attention(device, case)
