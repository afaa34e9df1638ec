"""Checkpoints of tests/variants.py, each written once per run."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

import backends
from checkpoints import Weights
from variants import VARIANTS

Written = tuple[Path, Weights]


@pytest.fixture(autouse=True)
def _in_an_order_of_its_own(request: pytest.FixtureRequest) -> None:
    """Let each test see copies and work of an emulated GPU come early, late or mixed."""
    backends.arrange(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Written]:
    """Return a variant's folder and the float32 weights it stands for, by the variant's name."""
    written: dict[str, Written] = {}
    variants = {variant.name: variant for variant in VARIANTS}

    def get(name: str) -> Written:
        if name not in written:
            folder = tmp_path_factory.mktemp("checkpoint") / name
            written[name] = (folder, variants[name].write(folder))
        return written[name]

    return get
