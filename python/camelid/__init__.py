"""Run Llama 4 models without PyTorch.

    import camelid

    with camelid.LLM(camelid.demo_model_path()) as llm:
        print(llm.chat([{"role": "user", "content": "Hello"}]).text)

Everything heavy is imported when it is first used.
"""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camelid.errors import (
    Cancelled,
    CapacityError,
    CheckpointError,
    Error,
    InternalError,
    InvalidRequest,
    TemplateError,
    TokenizerError,
    Unsupported,
)

if TYPE_CHECKING:
    from camelid.llm import LLM
    from camelid.options import SamplingParams
    from camelid.request import Completion, Delta, LogprobEntry, Usage

__all__ = [
    "LLM",
    "Cancelled",
    "CapacityError",
    "CheckpointError",
    "Completion",
    "Delta",
    "Error",
    "InternalError",
    "InvalidRequest",
    "LogprobEntry",
    "SamplingParams",
    "TemplateError",
    "TokenizerError",
    "Unsupported",
    "Usage",
    "__version__",
    "demo_model_path",
]

logging.getLogger("camelid").addHandler(logging.NullHandler())

_HOMES = {
    "LLM": "camelid.llm",
    "Completion": "camelid.request",
    "Delta": "camelid.request",
    "LogprobEntry": "camelid.request",
    "SamplingParams": "camelid.options",
    "Usage": "camelid.request",
}


def demo_model_path() -> Path:
    """Return the folder of the small model that comes with camelid."""
    return Path(__file__).with_name("demo_model")


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name == "__version__":
        value = _version()
    else:
        raise AttributeError(f"module 'camelid' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("camelid")
    except PackageNotFoundError:  # a source tree on PYTHONPATH
        from camelid import _core

        return _core.__version__
