"""The GGUF file format, as much of it as measuring against llama.cpp needs.

A streaming writer, a reader of headers, and the two block formats Q4_0 and Q8_0.

Our own instead of the `gguf` package, which wants each tensor whole in memory or a copy on disk and
brings more dependencies than this file has lines of format. Must never know what a tensor means.
Source of the layout: ggml's docs/gguf.md (version 3) and the block structs of ggml-common.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

MAGIC, VERSION = b"GGUF", 3
ALIGNMENT = 32  # the default of a file that states none
BLOCK_VALUES = 32  # of Q4_0 and of Q8_0

Value: TypeAlias = "str | int | float"

_UINT32, _FLOAT32, _STRING = 4, 6, 8


@dataclass(frozen=True)
class TensorType:
    """How values lie: `block_bytes` for each `block_values` of them."""

    code: int
    block_values: int
    block_bytes: int


F32 = TensorType(0, 1, 4)
Q4_0 = TensorType(2, BLOCK_VALUES, 2 + BLOCK_VALUES // 2)
Q8_0 = TensorType(8, BLOCK_VALUES, 2 + BLOCK_VALUES)
_TYPE_OF_CODE = {kind.code: kind for kind in (F32, Q4_0, Q8_0)}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor. `shape` is row-major as NumPy's; the file states it the other way round."""

    name: str
    shape: tuple[int, ...]
    kind: TensorType

    @property
    def nbytes(self) -> int:
        """Bytes of its data, padding apart."""
        n_values = int(np.prod(self.shape, dtype=np.int64))
        if self.shape[-1] % self.kind.block_values:
            raise ValueError(f"{self.name}: rows of {self.shape[-1]} values do not fill blocks")
        return n_values // self.kind.block_values * self.kind.block_bytes


class GgufWriter:
    """Writes one file; tensors arrive in the order announced, each in pieces.

    Leaving the `with` block after an error leaves an unfinished file behind.
    """

    def __init__(
        self, path: Path, metadata: Mapping[str, Value], tensors: Iterable[TensorInfo]
    ) -> None:
        self._tensors = list(tensors)
        self._next = 0
        self._file: BinaryIO = path.open("wb")
        header = MAGIC + struct.pack("<IQQ", VERSION, len(self._tensors), len(metadata))
        header += b"".join(_text(key) + _value(value) for key, value in metadata.items())
        offset = 0
        for tensor in self._tensors:
            sizes = tensor.shape[::-1]
            header += _text(tensor.name) + struct.pack(
                f"<I{len(sizes)}QIQ", len(sizes), *sizes, tensor.kind.code, offset
            )
            offset += _aligned(tensor.nbytes)
        self._file.write(header.ljust(_aligned(len(header)), b"\0"))

    def write(self, name: str, pieces: Iterable[bytes | NDArray[np.uint8]]) -> None:
        """Write the bytes of the next tensor; together they must fill it exactly."""
        tensor = self._tensors[self._next]
        if name != tensor.name:
            raise ValueError(f"{name} arrived, {tensor.name} was announced next")
        n_written = 0
        for piece in pieces:
            n_written += self._file.write(piece)
        if n_written != tensor.nbytes:
            raise ValueError(f"{name} got {n_written} bytes, expected {tensor.nbytes}")
        self._file.write(b"\0" * (_aligned(n_written) - n_written))
        self._next += 1

    def __enter__(self) -> GgufWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if error is None and self._next != len(self._tensors):
            raise ValueError(f"{self._tensors[self._next].name} was never written")


@dataclass(frozen=True)
class GgufHeader:
    """What a file says of itself."""

    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]
    offsets: dict[str, int]  # of each tensor's data, from the start of the file


def read_header(path: Path) -> GgufHeader:
    """Read the header of a file that GgufWriter could have written."""
    with path.open("rb") as file:
        magic, version, n_tensors, n_values = struct.unpack("<4sIQQ", file.read(24))
        if (magic, version) != (MAGIC, VERSION):
            raise ValueError(f"{path} starts with {magic!r}, version {version}")
        metadata = {_read_text(file): _read_value(file) for _ in range(n_values)}
        tensors: dict[str, TensorInfo] = {}
        offsets: dict[str, int] = {}
        for _ in range(n_tensors):
            name = _read_text(file)
            (n_dims,) = struct.unpack("<I", file.read(4))
            *sizes, code, offset = struct.unpack(f"<{n_dims}QIQ", file.read(8 * n_dims + 12))
            tensors[name] = TensorInfo(name, tuple(sizes[::-1]), _TYPE_OF_CODE[code])
            offsets[name] = offset
        start = _aligned(file.tell())
    return GgufHeader(metadata, tensors, {name: start + at for name, at in offsets.items()})


def q4_0_blocks(codes: NDArray[np.uint8], scale: float) -> NDArray[np.uint8]:
    """Return Q4_0 blocks of one scale; value i is scale * (nibble i - 8).

    Args:
        codes: uint8 [n_blocks, 16]; value i < 16 of a block is the low nibble of byte i, and
            value i + 16 the high one.
        scale: Representable in float16.
    """
    return _blocks(codes, scale)


def q8_0_blocks(codes: NDArray[np.int8], scale: float) -> NDArray[np.uint8]:
    """Return Q8_0 blocks of one scale; codes: int8 [n_blocks, 32], scale representable in f16."""
    return _blocks(codes.view(np.uint8), scale)


def _blocks(codes: NDArray[np.uint8], scale: float) -> NDArray[np.uint8]:
    blocks = np.empty((len(codes), 2 + codes.shape[1]), np.uint8)
    blocks[:, :2] = np.array([scale], "<f2").view(np.uint8)
    blocks[:, 2:] = codes
    return blocks


def _aligned(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    return struct.pack("<If", _FLOAT32, value)


def _read_text(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", file.read(8))
    return file.read(length).decode()


def _read_value(file: BinaryIO) -> Value:
    (kind,) = struct.unpack("<I", file.read(4))
    if kind == _STRING:
        return _read_text(file)
    if kind not in (_UINT32, _FLOAT32):
        raise ValueError(f"metadata of type {kind}; text, uint32 and float32 are read here")
    value: Value = struct.unpack("<I" if kind == _UINT32 else "<f", file.read(4))[0]
    return value
