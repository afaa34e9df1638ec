"""The safetensors file format: a checked header, mapped data, and a streaming writer.

Owns the bytes of one file. Reading copies nothing: a tensor is a view of the mapping, and its pages
can be handed back once they are no longer needed. Must never know what a tensor means.
Source of the rules: huggingface/safetensors, README "Format" and `Metadata::validate`.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from camelid.errors import CapacityError, CheckpointError
from camelid.json_file import parse_object, shorten

__all__ = [
    "DTYPE_BYTES",
    "SafetensorsFile",
    "SafetensorsWriter",
    "TensorEntry",
    "TensorSpec",
    "disk_errors",
    "write_safetensors",
]

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "F64": 8, "I64": 8, "U64": 8, "C64": 8,
}  # fmt: skip

Piece: TypeAlias = bytes | bytearray | memoryview

# The reference implementation's own limit.
_MAX_HEADER_BYTES = 100_000_000
_MAX_RANK = 16
_HAS_MADVISE = hasattr(mmap, "MADV_DONTNEED")


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: bytes [begin, begin + nbytes) of `file`."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int

    def describe(self) -> str:
        """Show it as messages do: dtype, then shape."""
        return f"{self.dtype} {list(self.shape)}"


class SafetensorsFile:
    """One open file. Every tensor is checked when it opens; nothing is read until it is viewed."""

    def __init__(self, path: str | Path) -> None:
        """Map the file and check its header.

        Raises:
            CheckpointError: If anything in the header is damaged, absurd or contradicts the size.
        """
        self.path = Path(path)
        self._map, size = _map_file(self.path)
        try:
            self.metadata, self.tensors = _read_header(self._map, size, self.path)
        except BaseException:
            self._map.close()
            raise
        self._bytes: NDArray[np.uint8] | None = np.frombuffer(self._map, dtype=np.uint8)

    def tensor(self, name: str) -> TensorEntry:
        """Return where a tensor lies."""
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"[safetensors] {self.path} holds no tensor {name}.") from None

    def view(self, name: str) -> NDArray[np.uint8]:
        """Return the bytes of a tensor, read-only, without copying them."""
        entry = self.tensor(name)
        if self._bytes is None:
            raise CheckpointError(f"[safetensors] {self.path} is closed.")
        return self._bytes[entry.begin : entry.begin + entry.nbytes]

    def release(self, name: str, first: int = 0, last: int | None = None) -> None:
        """Give back the memory of bytes [first, last) of a tensor; a later view reads it again.

        Only whole pages inside the range go, so neighbours keep theirs.
        """
        entry = self.tensor(name)
        if self._bytes is None or not _HAS_MADVISE:
            return
        stop = entry.nbytes if last is None else min(last, entry.nbytes)
        begin = -(-(entry.begin + first) // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (entry.begin + stop) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin:
            self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def close(self) -> None:
        """Unmap the file, or leave that to the last view of it that still lives."""
        self._bytes = None
        with suppress(BufferError):
            self._map.close()


def _map_file(path: Path) -> tuple[mmap.mmap, int]:
    try:
        info = os.stat(path)  # before open(): opening a pipe would wait for a writer
        if not stat.S_ISREG(info.st_mode):
            raise CheckpointError(f"[safetensors] {path} is not a regular file.")
        if info.st_size < 8:
            raise CheckpointError(
                f"[safetensors] {path} has {info.st_size} bytes, expected at least 8. The download "
                "was cut short; fetch the file again."
            )
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), info.st_size
    except (OSError, ValueError) as error:
        raise CheckpointError(f"[safetensors] cannot map {path}: {error}") from error


def _read_header(
    data: mmap.mmap, size: int, path: Path
) -> tuple[dict[str, str], dict[str, TensorEntry]]:
    (length,) = struct.unpack("<Q", data[:8])
    if length < 2 or length > min(_MAX_HEADER_BYTES, size - 8):
        raise CheckpointError(
            f"[safetensors] {path} says its header has {length} bytes; the file has {size}, and a "
            f"header at most {_MAX_HEADER_BYTES}. Truncated, or not a safetensors file."
        )
    raw = data[8 : 8 + length]
    if raw[:1] != b"{":
        raise CheckpointError(
            f"[safetensors] {path}: the header begins with {shorten(raw[:8])}, expected '{{'."
        )
    header = parse_object(raw, where=f"the header of {path}", unique_keys=True)
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(
            f"[safetensors] {path}: __metadata__ is {shorten(metadata)}, expected strings."
        )
    tensors = {name: _entry(name, value, path, 8 + length, size) for name, value in header.items()}
    _check_cover(tensors, path, 8 + length, size)
    return metadata, tensors


def _entry(name: str, value: Any, path: Path, base: int, size: int) -> TensorEntry:
    def damaged(what: str, got: object, wanted: str) -> CheckpointError:
        return CheckpointError(
            f"[safetensors] {path}: {what} of {shorten(name)} is {shorten(got)}, expected {wanted}."
        )

    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        got = sorted(value) if isinstance(value, dict) else value
        raise damaged("the entry", got, "dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise damaged("the dtype", dtype, f"one of {' '.join(DTYPE_BYTES)}")
    if not isinstance(shape, list) or len(shape) > _MAX_RANK or not _are_sizes(shape):
        raise damaged("the shape", shape, f"at most {_MAX_RANK} integers from 0 to 2^48")
    if not isinstance(offsets, list) or len(offsets) != 2 or not _are_sizes(offsets):
        raise damaged("data_offsets", offsets, "two integers from 0 to 2^48")
    begin, end = offsets
    if begin > end or base + end > size:
        raise damaged("data_offsets", offsets, f"a range within the {size - base} bytes of data")
    nbytes = DTYPE_BYTES[dtype]
    for extent in shape:
        nbytes *= extent
        if nbytes > size and 0 not in shape:  # stop before sixteen factors of 2^48 multiply
            break
    if nbytes != end - begin:
        raise damaged("data_offsets", offsets, f"room for exactly {dtype} {shorten(shape)}")
    return TensorEntry(name, str(path), dtype, tuple(shape), base + begin, nbytes)


def _are_sizes(values: list[Any]) -> bool:
    return all(
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 1 << 48
        for value in values
    )


def _check_cover(tensors: Mapping[str, TensorEntry], path: Path, base: int, size: int) -> None:
    """The data must be covered without gaps or overlaps: anything else hides or tears something."""
    at = base
    previous = "the header"
    for entry in sorted(tensors.values(), key=lambda e: (e.begin, e.nbytes)):
        if entry.begin != at:
            problem = "overlaps" if entry.begin < at else f"leaves {entry.begin - at} bytes after"
            raise CheckpointError(
                f"[safetensors] {path}: {shorten(entry.name)} at byte {entry.begin} {problem} "
                f"{shorten(previous)}, expected it at byte {at}."
            )
        at += entry.nbytes
        previous = entry.name
    if at != size:
        raise CheckpointError(
            f"[safetensors] {path} has {size} bytes, its tensors end at byte {at}."
        )


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor to be written will be."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes it will take."""
        return int(np.prod(self.shape, dtype=object)) * DTYPE_BYTES[self.dtype]


class SafetensorsWriter:
    """Writes one file whose tensors arrive in any order, each in pieces.

    Tensors are laid out by falling element size, so each starts at a multiple of its own: readers
    view the data in place. The space is reserved at once, so a full disk is met at the beginning.
    """

    def __init__(
        self,
        path: str | Path,
        specs: Iterable[TensorSpec],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        ordered = sorted(specs, key=lambda spec: -DTYPE_BYTES[spec.dtype])
        header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
        at = 0
        self._ranges: dict[str, tuple[int, int]] = {}
        for spec in ordered:
            if spec.name in self._ranges or spec.name == "__metadata__":
                raise ValueError(f"{spec.name} is written twice")
            header[spec.name] = {
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "data_offsets": [at, at + spec.nbytes],
            }
            self._ranges[spec.name] = (at, spec.nbytes)
            at += spec.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._base = 8 + len(text)
        with disk_errors(self.path):
            self._file = open(self.path, "wb")  # noqa: SIM115  closed by finish() and abort()
        try:
            with disk_errors(self.path):
                self._file.write(struct.pack("<Q", len(text)) + text)
                if hasattr(os, "posix_fallocate") and at:
                    _reserve(self._file.fileno(), self._base + at)
                self._file.truncate(self._base + at)
        except BaseException:
            self.abort()
            raise

    def write(self, name: str, pieces: Iterable[Piece]) -> None:
        """Write the bytes of one tensor; together they must fill it exactly."""
        begin, nbytes = self._ranges.pop(name)
        with disk_errors(self.path):
            self._file.seek(self._base + begin)
            left = nbytes
            for piece in pieces:
                data = memoryview(piece).cast("B")
                left -= data.nbytes
                if left < 0:
                    break
                self._file.write(data)
        if left:
            raise ValueError(f"{name} got {nbytes - left} bytes, expected {nbytes}")

    def finish(self) -> None:
        """Make the file durable and close it."""
        if self._ranges:
            raise ValueError(f"never written: {', '.join(sorted(self._ranges)[:10])}")
        with disk_errors(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def abort(self) -> None:
        """Close the file as it is; whoever owns the folder removes it."""
        with suppress(OSError):
            self._file.close()


def _reserve(descriptor: int, size: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise  # a file system that cannot reserve is fine, one that is full is not


@contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Turn what a disk can do to a writer into errors that say where and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise CapacityError(
                f"[write] no space left for {path}: {error.strerror}. Free some, or write to "
                "another disk."
            ) from error
        raise CheckpointError(f"[write] cannot write {path}: {error}") from error


def write_safetensors(
    path: str | Path,
    tensors: Iterable[tuple[str, str, tuple[int, ...], Any]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one file.

    Args:
        path: File to create.
        tensors: (name, dtype, shape, data); data is bytes-like, an array, or an iterable of them.
        metadata: Strings for `__metadata__`; `{"format": "pt"}` when absent.

    Raises:
        CapacityError: If the disk is full.
        CheckpointError: If the file cannot be written.
    """
    items = list(tensors)
    writer = SafetensorsWriter(path, [TensorSpec(n, d, tuple(s)) for n, d, s, _ in items], metadata)
    try:
        for name, _, _, data in items:
            writer.write(name, _pieces(data))
        writer.finish()
    except BaseException:
        writer.abort()
        raise


def _pieces(data: Any) -> Iterable[Piece]:
    if isinstance(data, np.ndarray):
        return [np.ascontiguousarray(data).reshape(-1).view(np.uint8).data]
    if isinstance(data, (bytes, bytearray, memoryview)):
        return [data]
    return data  # type: ignore[no-any-return]
