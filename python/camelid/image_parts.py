"""What an image part of a message names, in the forms OpenAI's clients and transformers write.

Must never open what is named.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from camelid.errors import InvalidRequest

__all__ = ["IMAGE_KINDS", "ImagePart", "is_pillow", "read_image_part"]

IMAGE_KINDS = ("image_url", "input_image", "image")
_FORMS = {
    "image_url": '{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}',
    "input_image": '{"type": "input_image", "image_url": "data:image/png;base64,..."}',
    "image": '{"type": "image"} with one of "image", "url" or "path"',
}
_SOURCES = ("image", "url", "path")  # keys of transformers' parts
_BYTES = bytes | bytearray | memoryview


@dataclass(frozen=True)
class ImagePart:
    """An image where it stands in a conversation."""

    where: str  # such as "messages[2].content[1]"
    source: Any  # what `image_files.load_image` takes, or an http(s) URL


def read_image_part(part: Mapping[str, Any], where: str) -> ImagePart:
    """Return what a part of one of IMAGE_KINDS names.

    OpenAI's `detail` changes nothing: Llama 4 has one way to look at an image.

    Raises:
        InvalidRequest: If it names nothing, or several images.
    """
    kind = part["type"]
    if kind == "image":
        source = _transformers_source(part)
        is_source = isinstance(source, _BYTES | str | os.PathLike) or is_pillow(source)
    else:
        source = part.get("image_url")
        source = source.get("url") if isinstance(source, Mapping) else source
        is_source = isinstance(source, str | os.PathLike)
    if not is_source or source == "":
        raise InvalidRequest(
            f"[chat] {where} names no image, expected {_FORMS[kind]}.{_advice(kind, source)}"
        )
    return ImagePart(where, source)


def is_pillow(value: Any) -> bool:
    """Say whether a value is a Pillow image, without importing Pillow."""
    module = sys.modules.get("PIL.Image")  # who has such an image has imported this
    return module is not None and isinstance(value, module.Image)


def _advice(kind: str, source: Any) -> str:
    if kind != "image" and (isinstance(source, _BYTES) or is_pillow(source)):
        return ' Send an open image or bytes as {"type": "image", "image": ...}.'
    return ""


def _transformers_source(part: Mapping[str, Any]) -> Any:
    given = [key for key in _SOURCES if part.get(key) is not None]
    if len(given) != 1:
        return None
    source = part[given[0]]
    # A path is a path, whatever its name begins with.
    return Path(source) if given[0] == "path" and isinstance(source, str) else source
