"""The arguments of what works row by row, as tests/cuda/rows_case.cu has them."""

from __future__ import annotations

import ctypes


class CRows(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("n_rows", "dim")),
        ("stride", ctypes.c_int64),
        ("bf16", ctypes.c_int32),
    ]


class CKv(ctypes.Structure):
    _fields_ = [
        ("base", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("page_size", "n_layers", "n_kv_heads", "head_dim",
                                              "format", "kv_layer", "n_heads", "n_tokens",
                                              "qk_norm")),
        ("eps", ctypes.c_float),
        ("qkv", ctypes.c_void_p),
        ("qkv_stride", ctypes.c_int64),
        ("q", ctypes.c_void_p),
        ("q_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("places", "rotation", "query_scale")),
    ]  # fmt: skip
