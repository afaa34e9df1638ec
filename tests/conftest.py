"""The option that says which device tests of whole models run on."""

from __future__ import annotations

import signal

import pytest

import backends


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=backends.NAMES,
        default="cpu",
        help="what tests/parity runs on: the CPU, a GPU that the CPU emulates, or a GPU",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Where a shell starts tests in the background Ctrl-C is ignored, and tests of it would hang.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        backends.select(config.getoption("--device"))
    except pytest.skip.Exception as missing:  # of a test that needs the emulator; here it is all
        raise pytest.UsageError(f"--device emulated: {missing}") from None


@pytest.hookimpl(tryfirst=True)  # before -m "not slow" looks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    name = "cpu_only" if backends.is_gpu() else "gpu_only"
    for item in items:
        if marker := item.get_closest_marker(name):
            reason = ": ".join([name.replace("_", " "), *marker.args])
            item.add_marker(pytest.mark.skip(reason=reason))
        if backends.is_emulated() and item.get_closest_marker("slow_emulated"):
            item.add_marker(pytest.mark.slow)
