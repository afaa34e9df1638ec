"""Every error a caller can cause, as one small tree.

    Error                  anything below; catch this one
    |-- InvalidRequest     a prompt, parameter or option that cannot be served as given
    |-- CheckpointError    a model folder: config, safetensors header, tensor, quantisation
    |-- TokenizerError     a tokenizer file, or text / ids it cannot encode / decode
    |-- TemplateError      a chat template that fails, escapes its sandbox or grows without bound
    |-- CapacityError      memory or KV pages that do not suffice; the message says what would fit
    |-- Unsupported        a feature, format or device this build does not have, refused by name
    |-- Cancelled          the request was cancelled before it had a result
    `-- InternalError      a bug of ours; please report it

A message says where, what was got, what was wanted and what to do. The C++ core throws the same
classes: `csrc/convert.h` maps its error codes to them by name.
"""

from __future__ import annotations

__all__ = [
    "Cancelled",
    "CapacityError",
    "CheckpointError",
    "Error",
    "InternalError",
    "InvalidRequest",
    "TemplateError",
    "TokenizerError",
    "Unsupported",
]


class Error(Exception):
    """Base of every error camelid raises on purpose."""


class InvalidRequest(Error, ValueError):
    """A prompt, sampling parameter or option is outside what can be served."""


class CheckpointError(Error):
    """A model folder is damaged, incomplete or contradicts its own config."""


class TokenizerError(Error):
    """A tokenizer file is unusable, or text or ids cannot be converted with it."""


class TemplateError(Error):
    """A chat template failed, or did what a template must not do."""


class CapacityError(Error):
    """Memory or KV pages do not suffice for what was asked."""


class Unsupported(Error):
    """A feature, file format or device that this build does not have."""


class Cancelled(Error):
    """The request was cancelled before it had a result."""


class InternalError(Error):
    """An invariant of camelid itself broke."""
