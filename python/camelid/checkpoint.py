"""A model folder: its config, and its tensors mapped from safetensors, all accounted for.

Owns the way from files to named views: which files, which tensors, whether all are there and of the
right shape. Must never quantise, pack or compute.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from camelid.config import ModelConfig, load_config
from camelid.errors import CheckpointError, Unsupported
from camelid.json_file import read_json, shorten
from camelid.layout import Expected, expected_tensors, iter_expected
from camelid.safetensors import SafetensorsFile, TensorEntry

__all__ = ["Checkpoint", "Expected", "account", "expected_tensors"]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MAX_SHARDS = 4096
_MAX_PROBLEMS = 10  # listed in one message
# Written by old exporters, computed by every loader.
_HARMLESS = re.compile(r"(?:[\w.]+\.)?rotary_emb\.inv_freq\Z")
# Weights in formats people try, and what they are.
OTHER_WEIGHTS = {
    ".gguf": "GGUF",
    ".pth": "PyTorch pickles",
    ".bin": "PyTorch pickles",
    ".pt": "PyTorch pickles",
    ".npz": "NumPy archives",
}


class Checkpoint:
    """An open model folder. Use as a context manager, or call `close()`."""

    def __init__(
        self, folder: Path, config: ModelConfig, files: dict[str, SafetensorsFile]
    ) -> None:
        self.folder = folder
        self.config = config
        self._files = files
        self.tensors: dict[str, TensorEntry] = {}
        for file in files.values():
            self.tensors.update(file.tensors)
        self._file_of = {
            entry.name: file for file in files.values() for entry in file.tensors.values()
        }

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Read the config and map every shard; nothing of the weights is read yet.

        Raises:
            CheckpointError: If the folder is damaged, incomplete or contradicts itself.
            Unsupported: If it holds something camelid does not run, by name.
        """
        folder = Path(folder)
        if not os.path.isdir(folder):
            raise CheckpointError(f"[checkpoint] {folder} is not a folder.")
        config = load_config(folder)
        index = _read_index(folder)
        names = sorted(set(index.values())) if index is not None else [_SINGLE]
        files: dict[str, SafetensorsFile] = {}
        try:
            for name in names:
                files[name] = SafetensorsFile(folder / name)
            if index is not None:
                _check_index(folder, index, files)
            return cls(folder, config, files)
        except BaseException:
            for file in files.values():
                file.close()
            raise

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, as stored."""
        return sum(entry.nbytes for entry in self.tensors.values())

    def entry(self, name: str) -> TensorEntry:
        """Return where a tensor lies."""
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"[checkpoint] {self.folder} holds no tensor {name}.") from None

    def view(self, name: str) -> NDArray[np.uint8]:
        """Return the bytes of a tensor, read-only, mapped."""
        entry = self.entry(name)
        return self._file_of[entry.name].view(name)

    def release(self, names: str | Iterable[str]) -> None:
        """Give back the memory of tensors that have been packed; a later view reads them again."""
        for name in (names,) if isinstance(names, str) else names:
            self.entry(name)
            self._file_of[name].release(name)

    def release_range(self, name: str, first: int, last: int) -> None:
        """Give back the memory of bytes [first, last) of a tensor."""
        self.entry(name)
        self._file_of[name].release(name, first, last)

    def close(self) -> None:
        """Unmap every file; views still held keep theirs."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _read_index(folder: Path) -> dict[str, str] | None:
    """Return tensor -> file name of a sharded folder, None for a single file."""
    if os.path.exists(folder / _SINGLE):  # as transformers: a whole file goes before an index
        return None
    path = folder / _INDEX
    if not os.path.exists(path):
        raise _no_weights(folder)
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"[checkpoint] {path}: weight_map is {shorten(weight_map)}, expected tensor: file."
        )
    for name, file in weight_map.items():
        # A plain name cannot leave the folder. (A link in the folder may: the hub's cache does.)
        if (
            not isinstance(file, str)
            or not file.endswith(".safetensors")
            or not set("/\\\0").isdisjoint(file)
        ):
            raise CheckpointError(
                f"[checkpoint] {path} puts {shorten(name)} into {shorten(file)}, expected the name "
                "of a .safetensors file in the same folder."
            )
    shards = sorted(set(weight_map.values()))
    if len(shards) > _MAX_SHARDS:
        raise CheckpointError(f"[checkpoint] {path} names {len(shards)} files, at most 4096 are.")
    missing = [shard for shard in shards if not os.path.exists(folder / shard)]
    if missing:
        raise CheckpointError(
            f"[checkpoint] {path} names {len(shards)} files, {len(missing)} are missing: "
            f"{_some([shorten(name) for name in missing])}. Download them again."
        )
    return weight_map


def _no_weights(folder: Path) -> CheckpointError | Unsupported:
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        return CheckpointError(f"[checkpoint] cannot list {folder}: {error}")
    shards = [name for name in names if name.endswith(".safetensors")]
    if shards:
        return CheckpointError(
            f"[checkpoint] {folder} holds {_some(shards)} but neither {_SINGLE} nor {_INDEX}. "
            "Download the index too."
        )
    for name in names:
        kind = OTHER_WEIGHTS.get(Path(name).suffix)
        if kind is not None:
            return Unsupported(
                f"[checkpoint] {folder} holds {kind} ({name}). Supported: Hugging Face safetensors."
            )
    return CheckpointError(
        f"[checkpoint] {folder} holds no weights. Expected {_SINGLE}, or {_INDEX} and its files."
    )


def _check_index(folder: Path, index: dict[str, str], files: dict[str, SafetensorsFile]) -> None:
    """Every tensor lies in exactly one file, and the index says in which."""
    found: dict[str, str] = {}
    problems = []
    for file_name, file in files.items():
        for name in file.tensors:
            if name in found:
                problems.append(f"{shorten(name)} is in {found[name]} and in {file_name}")
            elif name not in index:
                problems.append(f"{shorten(name)} is in {file_name} but not in the index")
            found.setdefault(name, file_name)
    for name, file_name in index.items():
        actual = found.get(name)
        if actual is None:
            problems.append(f"{shorten(name)} is missing from {file_name}")
        elif actual != file_name:
            problems.append(f"{shorten(name)} is in {actual}, the index says {file_name}")
    if problems:
        raise CheckpointError(
            f"[checkpoint] {folder / _INDEX} and its files disagree: {_some(problems, '; ')}. "
            "Download them again."
        )


def _some(items: list[str], separator: str = ", ") -> str:
    more = len(items) - _MAX_PROBLEMS
    text = separator.join(items[:_MAX_PROBLEMS])
    return f"{text} and {more} more" if more > 0 else text


def account(checkpoint: Checkpoint) -> None:
    """Check that the folder holds exactly the tensors its config asks for.

    Raises:
        CheckpointError: Naming up to ten that are missing, unexpected, of the wrong shape or dtype,
            each with its file, what was got and what was wanted.
    """
    tensors = checkpoint.tensors
    problems: list[str] = []
    known = set()
    for name, expected in iter_expected(checkpoint.config, tensors):
        entry = tensors.get(name)
        known.add(name)
        if entry is None:
            problems.append(f"{name} is missing, expected {expected.describe()}")
        elif entry.shape != expected.shape or entry.dtype not in expected.dtypes:
            problems.append(
                f"{name} in {Path(entry.file).name} is {entry.describe()}, "
                f"expected {expected.describe()}"
            )
        if len(problems) > _MAX_PROBLEMS:  # a hostile config can promise names without end
            break
    else:
        problems += _unexpected(checkpoint, known)
    if problems:
        raise CheckpointError(
            f"[checkpoint] {checkpoint.folder} and its config.json disagree: "
            f"{_some(problems, '; ')}."
        )


def _unexpected(checkpoint: Checkpoint, known: set[str]) -> list[str]:
    problems = []
    for name, entry in checkpoint.tensors.items():
        if name in known or _HARMLESS.match(name):
            continue
        if name.endswith(".weight_g_idx"):
            raise Unsupported(
                f"[quantization] {name} in {Path(entry.file).name} permutes columns (actorder "
                "group). Supported: files without weight_g_idx."
            )
        problems.append(
            f"{shorten(name)} in {Path(entry.file).name} is unexpected ({entry.describe()})"
        )
    return problems
