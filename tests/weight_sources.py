"""Weight sources for tests: arrays dressed as the checkpoint's `LinearSource`, and their values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Formats a matrix can be packed in, with values per 32-bit word.
FORMATS = {"f32": 1, "f16": 2, "bf16": 2, "int8": 4, "int4": 8}


@dataclass
class Source:
    """The fields of camelid.sources.LinearSource that the extension reads."""

    name: str = "layers.7.wo"
    file: str = "model-00001.safetensors"
    out_dim: int = 0
    in_dim: int = 0
    dtype: str = "F32"
    data: NDArray[np.uint8] | None = None
    row_stride: int = 0
    col_stride: int = 0
    bits: int = 0
    group_size: int = 0
    words: NDArray[np.uint8] | None = None
    scales: NDArray[np.uint8] | None = None
    scale_dtype: str = "F32"
    zero_points: NDArray[np.uint8] | None = None


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to nearest even, as bits."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _bytes(array: NDArray[np.generic], *, misaligned: bool = False) -> NDArray[np.uint8]:
    raw = np.frombuffer(array.tobytes(), np.uint8)
    if not misaligned:
        return raw
    shifted = np.empty(raw.size + 1, np.uint8)  # a tensor may begin at any byte of a file
    shifted[1:] = raw
    return shifted[1:]


def plain(
    values: NDArray[np.float32], dtype: str = "F32", *, transposed: bool = False
) -> tuple[Source, NDArray[np.float32]]:
    """Return a source holding `values` in `dtype`, and what it holds after rounding."""
    if dtype == "BF16":
        stored: NDArray[np.generic] = to_bf16(values)
        exact = from_bf16(to_bf16(values))
    else:
        stored = values.astype({"F32": np.float32, "F16": np.float16}[dtype])
        exact = stored.astype(np.float32)
    out_dim, in_dim = values.shape
    source = Source(out_dim=out_dim, in_dim=in_dim, dtype=dtype)
    source.row_stride, source.col_stride = (1, out_dim) if transposed else (in_dim, 1)
    source.data = _bytes(stored.T if transposed else stored, misaligned=True)
    return source, exact


def pack_words(q: NDArray[np.int64], bits: int) -> NDArray[np.int32]:
    """Pack offset-binary values [rows, n] along the last axis, lowest bits first, zero tail."""
    per_word = 32 // bits
    rows, n = q.shape
    padded = np.zeros((rows, -(-n // per_word) * per_word), np.uint64)
    padded[:, :n] = q
    shifts = np.arange(per_word, dtype=np.uint64) * np.uint64(bits)
    words = (padded.reshape(rows, -1, per_word) << shifts).sum(axis=2)
    return words.astype(np.uint32).view(np.int32)


def quantised(
    rng: np.random.Generator,
    out_dim: int,
    in_dim: int,
    bits: int,
    group_size: int,
    *,
    scale_dtype: str = "BF16",
    asymmetric: bool = False,
) -> tuple[Source, NDArray[np.float32]]:
    """Return a random compressed-tensors matrix and its dequantised values."""
    n_groups = -(-in_dim // group_size)
    q = rng.integers(0, 1 << bits, (out_dim, in_dim))
    zeros = np.full((out_dim, n_groups), 1 << (bits - 1))
    if asymmetric:
        zeros = rng.integers(0, 1 << bits, (out_dim, n_groups))
    scale_values = rng.uniform(0.01, 0.1, (out_dim, n_groups)).astype(np.float32)
    scales, exact = plain(scale_values, scale_dtype)
    source = Source(out_dim=out_dim, in_dim=in_dim, bits=bits, group_size=group_size)
    source.words = _bytes(pack_words(q, bits), misaligned=True)
    source.scales = scales.data
    source.scale_dtype = scale_dtype
    if asymmetric:
        source.zero_points = _bytes(np.ascontiguousarray(pack_words(zeros.T, bits).T))
    group_of = np.arange(in_dim) // group_size
    return source, ((q - zeros[:, group_of]) * exact[:, group_of]).astype(np.float32)
