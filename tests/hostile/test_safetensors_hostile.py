"""No header, however damaged, gives anything but a CheckpointError or a valid file."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from camelid.errors import CheckpointError
from camelid.safetensors import SafetensorsFile

GOOD: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
    "c": {"dtype": "U8", "shape": [], "data_offsets": [22, 23]},
}
DATA = bytes(range(23))


def raw(header: Any, data: bytes = DATA, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def open_bytes(folder: Path, content: bytes) -> dict[str, bytes]:
    path = folder / "x.safetensors"
    path.write_bytes(content)
    file = SafetensorsFile(path)
    try:
        return {name: file.view(name).tobytes() for name in file.tensors}
    finally:
        file.close()


def changed(name: str, **fields: Any) -> dict[str, Any]:
    return {**GOOD, name: {**GOOD[name], **fields}}


def test_good_file_opens(tmp_path: Path) -> None:
    assert open_bytes(tmp_path, raw(GOOD)) == {"a": DATA[:16], "b": DATA[16:22], "c": DATA[22:]}


HOSTILE = {
    "empty": (b"", "0 bytes"),
    "seven bytes": (b"1234567", "7 bytes"),
    "length zero": (struct.pack("<Q", 0) + b"{}", "header has 0 bytes"),
    "length past the end": (raw(GOOD, length=10_000), "header has 10000"),
    "length 2^64-1": (raw(GOOD, length=2**64 - 1), "18446744073709551615"),
    "not json": (raw(b"not json at all", b""), "begins with"),
    "html": (b"<!DOCTYPE html><html>...", "header has"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "header"),
    "list": (raw(b"[1, 2]", b""), "begins with"),
    "cut json": (raw(b'{"a": {"dtype"', b""), "not valid JSON"),
    "not utf-8": (raw(b'{"\xff": 1}', b""), "not valid JSON"),
    "deep": (raw(b'{"a":' + b"[" * 100_000, b""), "nested too deeply"),
    "many digits": (raw(b'{"a": ' + b"9" * 5000 + b"}", b""), "not valid JSON"),
    "key twice": (raw(b'{"a": {}, "a": {}}', b""), "appears twice"),
    "field twice": (
        raw(b'{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1"), "twice",
    ),
    "truncated data": (raw(GOOD, DATA[:-1]), "within the 22 bytes"),
    "trailing data": (raw(GOOD, DATA + b"x"), "end at byte"),
    "overlap": (raw(changed("b", data_offsets=[14, 20])), "overlaps"),
    "hole": (raw(changed("b", shape=[2], data_offsets=[18, 22])), "leaves 2 bytes"),
    "same range": (raw({"a": GOOD["a"], "z": GOOD["a"]}, DATA[:16]), "overlaps"),
    "offsets reversed": (raw(changed("a", data_offsets=[16, 0])), "data_offsets"),
    "offsets negative": (raw(changed("a", data_offsets=[-16, 0])), "data_offsets"),
    "offsets huge": (raw(changed("a", data_offsets=[0, 2**70])), "data_offsets"),
    "offsets float": (raw(changed("a", data_offsets=[0.0, 16.0])), "data_offsets"),
    "offsets bool": (raw(changed("c", data_offsets=[True, 23])), "data_offsets"),
    "offsets three": (raw(changed("a", data_offsets=[0, 8, 16])), "data_offsets"),
    "offsets null": (raw(changed("a", data_offsets=None)), "data_offsets"),
    "size too small": (raw(changed("a", shape=[2, 3])), "room for exactly"),
    "size too large": (raw(changed("a", shape=[2, 1])), "room for exactly"),
    "shape negative": (raw(changed("a", shape=[-2, -2])), "the shape"),
    "shape overflows": (raw(changed("a", shape=[2**32, 2**32, 4])), "room for exactly"),
    "shape wraps to fit": (raw(changed("a", shape=[2**47, 2**17, 2])), "room for exactly"),
    "shape of zero and huge": (raw(changed("a", shape=[0] + [2**48] * 15)), "room for exactly"),
    "shape too long": (raw(changed("a", shape=[1] * 1000)), "the shape"),
    "shape string": (raw(changed("a", shape="2,2")), "the shape"),
    "shape bool": (raw(changed("c", shape=[True])), "the shape"),
    "dtype unknown": (raw(changed("a", dtype="F31")), "the dtype"),
    "dtype list": (raw(changed("a", dtype=["F32"])), "the dtype"),
    "dtype missing": (raw({"a": {"shape": [1], "data_offsets": [0, 1]}}, b"1"), "the entry"),
    "extra field": (raw(changed("a", surprise=1)), "the entry"),
    "entry is null": (raw({**GOOD, "a": None}), "the entry"),
    "metadata not strings": (raw({**GOOD, "__metadata__": {"a": 1}}), "__metadata__"),
    "metadata list": (raw({**GOOD, "__metadata__": ["a"]}), "__metadata__"),
    "no tensors but data": (raw({}, b"data"), "end at byte"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_damaged_file_is_refused_and_named(tmp_path: Path, case: str) -> None:
    content, named = HOSTILE[case]
    with pytest.raises(CheckpointError) as caught:
        open_bytes(tmp_path, content)
    assert named in str(caught.value)
    assert "x.safetensors" in str(caught.value)
    assert len(str(caught.value)) < 800


def test_huge_names_are_cut_in_messages(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_bytes(tmp_path, raw({"n" * 1_000_000: None}, b""))
    assert len(str(caught.value)) < 800


def test_pipe_folder_and_missing_file_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", ".", "missing"):
        with pytest.raises(CheckpointError):
            SafetensorsFile(tmp_path / name)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=12,
)
PATHS = [
    (name, field, index)
    for name in ("a", "b", "c", "__metadata__")
    for field, index in (("dtype", None), ("shape", None), ("shape", 0), ("data_offsets", None),
                         ("data_offsets", 0), ("data_offsets", 1), (None, None))
]  # fmt: skip


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(changes=st.lists(st.tuples(st.sampled_from(PATHS), JSON), min_size=1, max_size=3))
def test_changed_header_opens_or_is_refused(tmp_path: Path, changes: list[Any]) -> None:
    header = json.loads(json.dumps(GOOD))
    for (name, field, index), value in changes:
        if field is None:
            header[name] = value
        elif isinstance(header.get(name), dict):
            if index is None:
                header[name][field] = value
            elif isinstance(header[name].get(field), list) and len(header[name][field]) > index:
                header[name][field][index] = value
    check(tmp_path, raw(header))


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    edits=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), max_size=4),
    cut=st.integers(0, 400),
)
def test_flipped_bytes_and_cuts_open_or_are_refused(
    tmp_path: Path, edits: list[tuple[int, int]], cut: int
) -> None:
    content = bytearray(raw(GOOD))
    for at, value in edits:
        content[at % len(content)] = value
    check(tmp_path, bytes(content[:cut]))


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(header=JSON | st.binary(max_size=64), data=st.binary(max_size=16))
def test_any_header_opens_or_is_refused(tmp_path: Path, header: Any, data: bytes) -> None:
    check(tmp_path, raw(header, data))


def check(folder: Path, content: bytes) -> None:
    try:
        views = open_bytes(folder, content)
    except CheckpointError:
        return
    (length,) = struct.unpack("<Q", content[:8])
    assert sum(map(len, views.values())) == len(content) - 8 - length
