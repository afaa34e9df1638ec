"""From what callers pass as prompts to token ids, with every mistake named.

Must never know the engine or a request's state.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from camelid.errors import InvalidRequest

if TYPE_CHECKING:
    from camelid.tokenizer import Tokenizer

__all__ = ["Prompt", "encode_prompt", "images_of", "is_one_prompt", "token_array"]

# A text, token ids, or {"prompt_token_ids": ids}, where "images" may name a list of images, too.
Prompt: TypeAlias = "str | Sequence[int] | NDArray[np.integer[Any]] | Mapping[str, Any]"

_WANTED = 'text, a list of token ids, or {"prompt_token_ids": [...]} with "images" or without'


def is_one_prompt(prompts: Any) -> bool:
    """Tell one prompt from a list of them: a list that begins with a number is token ids."""
    if isinstance(prompts, (str, Mapping)):
        return True
    if isinstance(prompts, np.ndarray):
        return prompts.ndim < 2 and prompts.dtype != object
    if isinstance(prompts, Sequence) and not isinstance(prompts, (bytes, bytearray, memoryview)):
        return len(prompts) > 0 and _is_number(prompts[0])
    raise InvalidRequest(f"[prompt] got {type(prompts).__name__}, expected {_WANTED}, or a list.")


def encode_prompt(prompt: Any, tokenizer: Tokenizer | None, vocab_size: int) -> NDArray[np.int32]:
    """Return the token ids of one prompt, at least one, all inside the vocabulary.

    A text gets the BOS token in front, once, where the tokenizer has one: a text that begins with
    its name keeps a single one. Other names of special tokens are ordinary text; encode with
    `allow_special=True` and pass ids to use them.

    Raises:
        InvalidRequest: If it is empty, of another type, or holds ids that are none.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise InvalidRequest(
                "[prompt] got text, but this folder has no tokenizer.json or tokenizer.model. Pass "
                "token ids, or add the tokenizer's file."
            )
        ids = _encode_text(prompt, tokenizer)
        return token_array(ids, vocab_size)
    if isinstance(prompt, Mapping):
        unknown = [key for key in prompt if key not in ("prompt_token_ids", "images")]
        if unknown or "prompt_token_ids" not in prompt:
            raise InvalidRequest(f"[prompt] got keys {list(prompt)!r:.80}, expected {_WANTED}.")
        prompt = prompt["prompt_token_ids"]
    return token_array(prompt, vocab_size)


def images_of(prompt: Any) -> Any:
    """Return what a prompt gives as images, None where it gives none."""
    return prompt.get("images") if isinstance(prompt, Mapping) else None


def _encode_text(text: str, tokenizer: Tokenizer) -> list[int]:
    if not text:
        raise InvalidRequest("[prompt] the prompt is empty, expected at least one character.")
    bos_id = tokenizer.bos_id
    if bos_id is None:
        return tokenizer.encode(text)
    name = tokenizer.token_bytes(bos_id).decode("utf-8", "replace")
    return tokenizer.encode(text.removeprefix(name), add_bos=True)


def token_array(ids: Any, vocab_size: int) -> NDArray[np.int32]:
    """Return token ids as int32, copied.

    Raises:
        InvalidRequest: If there is none, one is no whole number, or one is outside the vocabulary.
    """
    if isinstance(ids, np.ndarray):
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise InvalidRequest(
                f"[prompt] got an array of {ids.dtype} {list(ids.shape)}, expected token ids: "
                "whole numbers in one dimension."
            )
        values = ids
    elif isinstance(ids, Sequence) and not isinstance(ids, (str, bytes, bytearray, memoryview)):
        values = _integers(ids)
    else:
        raise InvalidRequest(f"[prompt] got {type(ids).__name__}, expected {_WANTED}.")
    if len(values) == 0:
        raise InvalidRequest("[prompt] the prompt is empty, expected at least one token.")
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise InvalidRequest(
            f"[prompt] token id {wrong} is outside the vocabulary, expected 0 to "
            f"{vocab_size - 1}. Was the text encoded with this model's tokenizer?"
        )
    return values.astype(np.int32)


def _integers(ids: Sequence[Any]) -> NDArray[np.int64]:
    # The common case, by type alone, at a few nanoseconds each: prompts have millions of tokens.
    if not all(type(item) is int for item in ids):
        for place, item in enumerate(ids):
            if not _is_number(item):
                raise InvalidRequest(
                    f"[prompt] token id {place} is {item!r:.80}, expected a whole number."
                )
        ids = [operator.index(item) for item in ids]
    try:
        return np.array(ids, np.int64)
    except OverflowError:
        raise InvalidRequest("[prompt] a token id exceeds 64 bits, expected small ones.") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
