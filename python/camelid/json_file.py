"""Reads JSON files that strangers wrote.

Owns the bounds (size, depth, digits) that keep a hostile file from costing more than it weighs, and
typed access to the fields of an object with errors that say where, what was got and what was
wanted. Must never know what the fields mean.
"""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

from camelid.errors import CheckpointError, Error

# The largest file a released Llama 4 folder holds as JSON is tokenizer.json (27 MB); an index of a
# per-expert Maverick checkpoint is 4 MB.
MAX_JSON_BYTES = 256 << 20


def read_json(
    path: Path, *, error: type[Error] = CheckpointError, max_bytes: int = MAX_JSON_BYTES
) -> dict[str, Any]:
    """Return the object a JSON file holds.

    Raises:
        Error: The class `error`, if the file is missing, not a regular file, too large, not JSON,
            nested without end, or not an object.
    """
    try:
        info = os.stat(path)  # before open(): opening a pipe would wait for a writer
        if not stat.S_ISREG(info.st_mode):
            raise error(f"[json] {path} is not a regular file.")
        if info.st_size > max_bytes:
            raise error(f"[json] {path} has {info.st_size} bytes, expected at most {max_bytes}.")
        data = path.read_bytes()
    except (OSError, ValueError) as cause:
        raise error(f"[json] cannot read {path}: {cause}") from cause
    return parse_object(data, where=str(path), error=error)


def parse_object(
    data: bytes,
    *,
    where: str,
    unique_keys: bool = False,
    error: type[Error] = CheckpointError,
) -> dict[str, Any]:
    """Parse bytes that must be one JSON object.

    Args:
        data: UTF-8 text.
        where: What messages call it.
        unique_keys: Refuse an object that names a key twice, at any depth.
        error: What is raised.
    """
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_object_of_unique_keys if unique_keys else None
        )
    except RecursionError:
        raise error(f"[json] {where} is nested too deeply.") from None
    except ValueError as cause:  # JSON, UTF-8, numbers of thousands of digits, repeated keys
        raise error(
            f"[json] {where} is not valid JSON: {shorten(cause)}. It is truncated or damaged; "
            "download it again."
        ) from None
    if not isinstance(value, dict):
        raise error(f"[json] {where} holds {shorten(value)}, expected an object.")
    return value


def _object_of_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} appears twice")
    return result


def shorten(value: object, limit: int = 120) -> str:
    """Show a value in a message, cut to `limit` characters; never fails on what JSON can hold."""
    if isinstance(value, str):
        value = value[: limit + 1]
    elif isinstance(value, (list, tuple)):
        value = value[: limit // 2]  # repr of a million entries is not free
    elif isinstance(value, dict):
        return f"an object with {len(value)} keys"
    try:
        text = str(value) if isinstance(value, BaseException) else repr(value)
    except (ValueError, RecursionError):  # an int of more than 4300 digits; lists in lists
        text = f"a {type(value).__name__}"
    return text if len(text) <= limit else text[: limit - 3] + "..."


class Fields:
    """Typed access to one JSON object; `where` starts every message."""

    def __init__(self, data: dict[str, Any], where: str) -> None:
        self.data = data
        self.where = where

    def __contains__(self, key: str) -> bool:
        return key in self.data

    def get(self, key: str, default: Any = None) -> Any:
        """Return the raw value."""
        return self.data.get(key, default)

    def error(self, key: str, wanted: str) -> CheckpointError:
        """Say what the value is and what it should be."""
        got = shorten(self.data[key]) if key in self.data else "missing"
        return CheckpointError(f"[config] {self.where}: {key} is {got}, expected {wanted}.")

    def integer(self, key: str, default: int, low: int, high: int) -> int:
        """Return an integer within bounds."""
        value = self.data.get(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, f"an integer from {low} to {high}")
        return value

    def optional_integer(self, key: str, default: int | None, low: int, high: int) -> int | None:
        """Return an integer within bounds, None when null."""
        if self.data.get(key, default) is None:
            return None
        return self.integer(key, low if default is None else default, low, high)

    def number(self, key: str, default: float, low: float, high: float) -> float:
        """Return a finite number within bounds."""
        value = self.data.get(key, default)
        wanted = f"a number from {low:g} to {high:g}"
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(key, wanted)
        if not low <= value <= high or not math.isfinite(value):
            raise self.error(key, wanted)
        return float(value)

    def optional_number(self, key: str, low: float, high: float) -> float | None:
        """Return a number within bounds, None when absent or null."""
        return None if self.data.get(key) is None else self.number(key, low, low, high)

    def boolean(self, key: str, default: bool) -> bool:
        """Return true or false, also written 1 or 0."""
        value = self.data.get(key, default)
        if isinstance(value, bool):
            return value
        if isinstance(value, int) and value in (0, 1):
            return bool(value)
        raise self.error(key, "true or false")

    def text(self, key: str, default: str) -> str:
        """Return a string."""
        value = self.data.get(key, default)
        if not isinstance(value, str):
            raise self.error(key, "a string")
        return value

    def section(self, key: str) -> Fields:
        """Return the object under `key`, empty when it is absent or null."""
        value = self.data.get(key)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self.error(key, "an object")
        return Fields(value, f"{self.where}: {key}")

    def strings(self, key: str) -> tuple[str, ...]:
        """Return a list of strings, empty when absent or null."""
        value = self.data.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(key, "a list of strings")
        return tuple(value)

    def integers(self, key: str, wanted: str) -> list[int]:
        """Return a list of integers."""
        value = self.data.get(key)
        if not isinstance(value, list) or not all(isinstance(item, int) for item in value):
            raise self.error(key, wanted)
        return [int(item) for item in value]
