"""Reading without copying, giving memory back, and writing what others read."""

from __future__ import annotations

import errno
import json
import mmap
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from camelid.errors import CapacityError, CheckpointError
from camelid.safetensors import (
    DTYPE_BYTES,
    SafetensorsFile,
    SafetensorsWriter,
    TensorSpec,
    write_safetensors,
)
from checkpoints import write_file


def test_reads_every_dtype_and_shape(tmp_path: Path) -> None:
    stored = {
        f"{dtype}.{rank}": (dtype, (3,) * rank, bytes(range(size)) * 3**rank)
        for dtype, size in DTYPE_BYTES.items()
        for rank in range(3)
    }
    write_file(tmp_path / "a.safetensors", {**stored, "empty": ("F32", (0, 4), b"")})
    file = SafetensorsFile(tmp_path / "a.safetensors")
    for name, (dtype, shape, data) in stored.items():
        entry = file.tensor(name)
        assert (entry.dtype, entry.shape, entry.nbytes) == (dtype, shape, len(data))
        assert file.view(name).tobytes() == data
    assert file.view("empty").size == 0
    assert file.metadata == {"format": "pt"}
    file.close()


def test_view_is_mapped_and_read_only(tmp_path: Path) -> None:
    write_file(tmp_path / "a.safetensors", {"x": ("U8", (4,), b"abcd")})
    file = SafetensorsFile(tmp_path / "a.safetensors")
    view = file.view("x")
    assert not view.flags.owndata
    assert not view.flags.writeable
    file.close()
    assert view.tobytes() == b"abcd"  # a view outlives close()
    with pytest.raises(CheckpointError, match="is closed"):
        file.view("x")


def test_unknown_tensor_is_named(tmp_path: Path) -> None:
    write_file(tmp_path / "a.safetensors", {"x": ("U8", (4,), b"abcd")})
    with pytest.raises(CheckpointError, match="no tensor y"):
        SafetensorsFile(tmp_path / "a.safetensors").view("y")


def resident_pages(address: int, n_bytes: int) -> int:
    """Count the pages of a mapping that this process holds, from /proc/self/smaps."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    for number, line in enumerate(lines):
        span = line.split(" ")[0].split("-")
        if len(span) == 2 and int(span[0], 16) <= address < int(span[1], 16):
            rss = next(item for item in lines[number:] if item.startswith("Rss:"))
            return int(rss.split()[1]) * 1024 // mmap.PAGESIZE
    raise AssertionError("not mapped")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc/self/smaps")
def test_release_gives_back_whole_pages_inside_the_tensor_only(tmp_path: Path) -> None:
    page = mmap.PAGESIZE
    data = os.urandom(64 * page)
    write_file(
        tmp_path / "a.safetensors",
        {"before": ("U8", (page,), data[:page]), "x": ("U8", (64 * page,), data)},
    )
    file = SafetensorsFile(tmp_path / "a.safetensors")
    before, view = file.view("before"), file.view("x")
    assert before.sum() + view.sum() > 0
    held = resident_pages(view.ctypes.data, view.size)
    file.release("x")
    assert resident_pages(view.ctypes.data, view.size) <= held - 62
    assert view.tobytes() == data  # read again from the file
    held = resident_pages(view.ctypes.data, view.size)
    file.release("x", 10 * page, 20 * page)
    assert held - 10 <= resident_pages(view.ctypes.data, view.size) <= held - 9
    file.release("before")  # less than a page inside: nothing to give
    assert before.tobytes() == data[:page]
    file.close()


def test_writer_takes_any_order_and_aligns_every_tensor(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    specs = [
        TensorSpec("u8", "U8", (3,)),
        TensorSpec("i64", "I64", (2,)),
        TensorSpec("bf16", "BF16", (5, 1)),
        TensorSpec("none", "F32", (0,)),
        TensorSpec("f32", "F32", (3,)),
    ]
    writer = SafetensorsWriter(path, specs, {"made": "here"})
    writer.write("f32", [b"a" * 6, b"b" * 6])
    writer.write("u8", [np.array([1, 2, 3], np.uint8).data])
    writer.write("none", [])
    writer.write("bf16", iter([b"x" * 10]))
    writer.write("i64", [np.array([7, 8], "<i8").data])
    writer.finish()
    file = SafetensorsFile(path)
    assert file.metadata == {"made": "here"}
    for spec in specs:
        assert file.tensor(spec.name).begin % DTYPE_BYTES[spec.dtype] == 0
        assert file.tensor(spec.name).shape == spec.shape
    assert file.view("i64").view("<i8").tolist() == [7, 8]
    assert file.view("f32").tobytes() == b"a" * 6 + b"b" * 6
    assert file.view("u8").tolist() == [1, 2, 3]
    file.close()


def test_write_safetensors_takes_arrays_bytes_and_pieces(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_safetensors(
        path,
        [
            ("array", "F32", (3, 2), array.T),
            ("bytes", "U8", (2,), b"ab"),
            ("pieces", "U8", (3,), (bytes([i]) for i in range(3))),
        ],
    )
    file = SafetensorsFile(path)
    assert file.view("array").view(np.float32).reshape(3, 2).tolist() == array.T.tolist()
    assert file.view("bytes").tobytes() == b"ab"
    assert file.view("pieces").tolist() == [0, 1, 2]
    file.close()


@pytest.mark.parametrize("data", [b"abc", b"abcde"])
def test_writer_refuses_a_wrong_number_of_bytes(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ValueError, match="expected 4"):
        write_safetensors(tmp_path / "a.safetensors", [("x", "F32", (1,), data)])


def test_writer_refuses_to_finish_early_and_twice_the_same(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "a.safetensors", [TensorSpec("x", "U8", (1,))])
    with pytest.raises(ValueError, match="never written: x"):
        writer.finish()
    writer.abort()
    with pytest.raises(ValueError, match="twice"):
        SafetensorsWriter(tmp_path / "b.safetensors", [TensorSpec("x", "U8", (1,))] * 2)


def test_full_disk_is_a_capacity_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CapacityError, match="no space left"):
        write_safetensors(tmp_path / "a.safetensors", [("x", "U8", (1,), b"a")])


def test_file_system_that_cannot_reserve_is_fine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(os, "posix_fallocate", cannot)
    write_safetensors(tmp_path / "a.safetensors", [("x", "U8", (1,), b"a")])
    SafetensorsFile(tmp_path / "a.safetensors").close()


def test_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot write"):
        write_safetensors(tmp_path / "no" / "a.safetensors", [("x", "U8", (1,), b"a")])


def test_header_is_what_the_reference_writes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, [("x", "BF16", (1, 2), b"abcd")])
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    assert length % 8 == 0
    assert json.loads(raw[8 : 8 + length]) == {
        "__metadata__": {"format": "pt"},
        "x": {"dtype": "BF16", "shape": [1, 2], "data_offsets": [0, 4]},
    }
    assert raw[8 + length :] == b"abcd"
