"""load.py on a tiny checkpoint: everything is run and written down, and no copy stays behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import load
from camelid import _core
from checkpoints import write_checkpoint

RUNS = {
    "camelid.LLM", "copy, same file system", "copy, file system in memory",
    "read into fresh memory",
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_checkpoint(tmp_path / "model", shards=2)
    (tmp_path / "shm").mkdir()
    monkeypatch.setattr(load, "SHM", tmp_path / "shm")
    return tmp_path / "model"


def measured(model: Path) -> tuple[dict[str, Any], str]:
    """Run the program; return its record and its report."""
    out = model.parent / "out"
    load.main([str(model), "-t", "1", "-r", "2", "--note", "tiny", "--out", str(out)])
    (path,) = out.glob("*.json")
    assert path.name.endswith("-load-tiny.json")
    record: dict[str, Any] = json.loads(path.read_text())
    return record, path.with_suffix(".md").read_text()


def test_everything_is_run_and_copies_are_removed(model: Path) -> None:
    files = sorted(model.glob("*.safetensors"))
    before = {*model.parent.rglob("*")}
    record, report = measured(model)
    assert record["benchmark"] == "load"
    assert record["machine"]["threads"] == 1
    assert record["model"] == {"files": 2, "bytes": sum(file.stat().st_size for file in files)}
    assert {row["what"] for row in record["rows"]} == RUNS
    for row in record["rows"]:
        assert len(row["seconds"]) == 2
        assert min(row["seconds"]) > 0
        assert row["not_measured"] is None
        assert f"| {row['what']} |" in report
    assert str(model.parent) not in report + json.dumps(record)
    out = model.parent / "out"
    assert {*model.parent.rglob("*")} - before == {out, *out.iterdir()}


def test_what_has_no_room_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "SHM", model.parent / "absent")
    monkeypatch.setattr(_core, "available_memory", lambda: 1000)
    record, report = measured(model)
    found = {row["what"]: row for row in record["rows"]}
    assert {what for what, row in found.items() if row["seconds"]} == {"camelid.LLM"}
    assert "1,000 are available" in found["read into fresh memory"]["not_measured"]
    assert "Not measured: copy, file system in memory: its folder cannot be written." in report


def test_pieces_are_the_whole(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "PIECE_BYTES", 4096)
    (file, _) = sorted(model.glob("*.safetensors"))
    data = np.fromfile(file, np.uint8)
    assert data.size > 3 * 4096
    memory = np.zeros_like(data)
    with file.open("rb", buffering=0) as reader:
        for first in range(0, data.size, 4096):
            load.read_piece(reader.fileno(), memory, first)
    np.testing.assert_array_equal(memory, data)
    assert load.read([file], 2) > 0
    load.copy_file(file, model / "copy")
    assert (model / "copy").read_bytes() == file.read_bytes()


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="holds no safetensors"):
        load.main([str(tmp_path)])
