"""Calls that store queries, keys and values, with pages and places to store them in."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuda_cases import NAN_BF16, from_bf16
from cuda_device import Device, Memory
from rows_cases import CKv

Array = NDArray[Any]
BF16, E4M3, INT8 = range(3)
EPS = 1e-5
POISON = 0xFE  # of bytes of pages


@dataclass
class Case:
    """One call, what it is given, and what memory it writes."""

    c: CKv
    qkv: Array  # [n_tokens, n_heads + 2 * n_kv_heads, head_dim]
    places: NDArray[np.int32]  # page, slot
    rotation: Array | None
    query_scale: Array | None
    pages: Memory
    q: Memory
    keep: list[Memory]

    def stored_q(self) -> Array:
        c, rows = self.c, self.q.read().reshape(self.c.n_tokens, self.c.q_stride)
        assert (rows[:, c.n_heads * c.head_dim :] == NAN_BF16).all(), "written beside queries"
        return from_bf16(rows[:, : c.n_heads * c.head_dim]).reshape(-1, c.n_heads, c.head_dim)


def make_case(
    device: Device,
    qkv: Array,
    *,
    n_heads: int,
    kind: int = BF16,
    rotated: bool = False,
    qk_norm: bool = False,
    scaled: bool = False,
    padding: int = 4,
    seed: int = 0,
) -> Case:
    n_tokens, n_all, head_dim = qkv.shape
    rng = np.random.default_rng(seed)
    rows = np.full((n_tokens, n_all * head_dim + padding), np.nan, np.float32)
    rows[:, : n_all * head_dim] = qkv.reshape(n_tokens, n_all * head_dim)
    c = CKv(page_size=16, n_layers=2, n_kv_heads=(n_all - n_heads) // 2, head_dim=head_dim,
            format=kind, kv_layer=1, n_heads=n_heads, n_tokens=n_tokens, qk_norm=qk_norm,
            eps=EPS, qkv_stride=rows.shape[1], q_stride=n_heads * head_dim + 8)  # fmt: skip
    slots = rng.permutation(3 * c.page_size)[:n_tokens]
    places = np.stack([slots // c.page_size, slots % c.page_size], axis=1).astype(np.int32)
    angles = rng.uniform(-np.pi, np.pi, (n_tokens, head_dim // 2))
    rotation = np.stack([np.cos(angles), np.sin(angles)], axis=2).astype(np.float32)
    query_scale = rng.uniform(0.5, 2, n_tokens).astype(np.float32)
    pages = device.put(np.full(3 * sizes_of(device, c)[0], POISON, np.uint8))
    q = device.put(np.full((n_tokens, c.q_stride), NAN_BF16, np.uint16))
    keep = [device.put(values) for values in (rows, places, rotation, query_scale)]
    c.base, c.q, c.qkv, c.places = pages.address, q.address, keep[0].address, keep[1].address
    c.rotation = keep[2].address if rotated else None
    c.query_scale = keep[3].address if scaled else None
    return Case(c, qkv, places, rotation if rotated else None, query_scale if scaled else None,
                pages, q, keep)  # fmt: skip


def sizes_of(device: Device, c: CKv) -> list[int]:
    """Return bytes of a page, of a side, of a row, and from a side to its scales."""
    sizes = (ctypes.c_int64 * 4)()
    device.library.case_store_kv_sizes(ctypes.byref(c), sizes)
    return list(sizes)
