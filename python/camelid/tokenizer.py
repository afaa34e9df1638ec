"""Text to token ids and back, for one vocabulary; safe to share between threads.

Owns encoding, decoding and the incremental detokeniser. Must never know about messages or
templates (`chat.py`) or about file formats (`tokenizer_files.py`).
"""

from __future__ import annotations

import codecs
import operator
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import tiktoken

from camelid.errors import TokenizerError
from camelid.json_file import read_json
from camelid.tokenizer_files import (
    Vocabulary,
    read_tokenizer_json,
    read_tokenizer_model,
    read_vocabulary,
)

__all__ = ["StreamDecoder", "Tokenizer"]

# Unicode White_Space without the line ends, i.e. the split regex's `\s` without `[\r\n]`; Python's
# own `\s` also holds U+001C..U+001F.
_BLANK = r"[\t\x0b\x0c \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
# tiktoken's regex engine keeps one stack frame per blank for `\s+(?!\S)` and panics near 10^6.
_LONG_BLANKS = 100_000
_LONG_BLANK_RUN = re.compile(rf"(?<!{_BLANK}){_BLANK}{{{_LONG_BLANKS},}}+(?![\r\n])")
# Patterns that end like this cut a blank run the same way, see `_encode_ordinary`.
_BLANK_TAIL = r"|\s*[\r\n]+|\s+(?!\S)|\s+"

# The names that end a turn.  Source: generation_config.json of the instruct checkpoints.
_END_NAMES = ("<|end_of_text|>", "<|eom|>", "<|eot|>")


class Tokenizer:
    """The vocabulary of a checkpoint, with exact Llama 4 splitting and byte-pair merging.

    Example:
        tokenizer = Tokenizer.from_folder("Llama-4-Scout-17B-16E-Instruct")
        tokenizer.decode(tokenizer.encode("Hola")) == "Hola"
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        bos: str = "<|begin_of_text|>",
        eos: str | None = None,
        pad: str = "<|finetune_right_pad|>",
    ) -> None:
        special = vocabulary.special
        self._special = special
        self._special_ids = frozenset(special.values())
        self._by_id = _table(vocabulary)
        self._encoding = _build_encoding(vocabulary)
        self._splits_blanks = vocabulary.pattern.endswith(_BLANK_TAIL)
        self._any_name = _matcher([*special, *vocabulary.added])
        self._added_name = _matcher(vocabulary.added)
        self._named = {**special, **vocabulary.added}
        self._bos_id = special.get(bos)
        self._pad_id = special.get(pad, special.get("<|finetune_right_pad|>"))
        ends = (*_END_NAMES, eos) if eos else _END_NAMES
        self._eos_ids = frozenset(special[name] for name in ends if name in special)

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Read the tokenizer of a checkpoint folder, or one tokenizer file.

        `tokenizer.json` is preferred where both files exist. `tokenizer_config.json`, if there,
        names the BOS, EOS and padding tokens.

        Raises:
            TokenizerError: If a file is missing, damaged or of another kind; it says which.
        """
        path = Path(path)
        if path.is_file():
            read = read_tokenizer_json if path.suffix == ".json" else read_tokenizer_model
            return cls(read(path))
        vocabulary = read_vocabulary(path)
        config = path / "tokenizer_config.json"
        names = _configured_names(config) if config.is_file() else {}
        return cls(vocabulary, **names)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id. The model's own table may be larger, never smaller."""
        return len(self._by_id)

    @property
    def bos_id(self) -> int | None:
        """The id that begins a text, None in a vocabulary without one."""
        return self._bos_id

    @property
    def pad_id(self) -> int | None:
        """The id that fills unused places, None in a vocabulary without one."""
        return self._pad_id

    @property
    def eos_ids(self) -> frozenset[int]:
        """The ids that end a turn or a text. A checkpoint's config may name more."""
        return self._eos_ids

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Every special token's name and id."""
        return MappingProxyType(self._special)

    @property
    def encoding(self) -> tiktoken.Encoding:
        """The same vocabulary as a `tiktoken.Encoding`, as llguidance wants it."""
        return self._encoding

    def special_id(self, name: str) -> int:
        """Return the id of a special token.

        Raises:
            TokenizerError: If the vocabulary has no special token of this name.
        """
        try:
            return self._special[name]
        except KeyError:
            raise TokenizerError(
                f"[tokenizer] no special token is named {name!r} among {len(self._special)}. "
                "Names look like '<|eot|>'; `special_tokens` lists them."
            ) from None

    def is_special(self, token_id: int) -> bool:
        """Say whether an id is a special token."""
        return token_id in self._special_ids

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token; a special token's are its name.

        Raises:
            TokenizerError: If no token has this id.
        """
        token = self._find(token_id)
        if token is None:
            raise TokenizerError(
                f"[tokenizer] no token has id {token_id!r}, expected 0 to {self.vocab_size - 1}. "
                "Check that model and tokenizer belong together."
            )
        return token

    def encode(self, text: str, *, allow_special: bool = False, add_bos: bool = False) -> list[int]:
        """Return the token ids of `text`.

        Half a surrogate pair, which no UTF-8 text can hold, becomes U+FFFD.

        Args:
            text: Any string, of any length.
            allow_special: Read names such as `<|eot|>` as the tokens they name. Only for text
                a program wrote: with the default they are ordinary characters.
            add_bos: Put the BOS id first. A rendered chat already begins with it.

        Raises:
            TokenizerError: If `text` is no string, or BOS is asked of a vocabulary without one.
        """
        if not isinstance(text, str):
            raise TokenizerError(f"[tokenizer] got {type(text).__name__} to encode, expected str.")
        ids = []
        if add_bos:
            if self._bos_id is None:
                raise TokenizerError(
                    "[tokenizer] this vocabulary names no BOS token. Encode with add_bos=False."
                )
            ids.append(self._bos_id)
        for part in self._split(text, self._any_name if allow_special else self._added_name):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids.extend(self._encode_ordinary(part))
        return ids

    def split_special(self, text: str) -> Iterator[int | str]:
        """Cut `text` at special tokens: their ids, and the ordinary text between, in order."""
        return self._split(text, self._any_name)

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Return the text of `ids`; bytes that are no UTF-8 become U+FFFD.

        Special tokens print as their names unless skipped, so `decode(encode(text)) == text` for
        every text, with special tokens allowed or not.

        Raises:
            TokenizerError: If an id belongs to no token.
        """
        skipped = self._special_ids if skip_special else frozenset()
        tokens = [self.token_bytes(token_id) for token_id in ids if token_id not in skipped]
        return b"".join(tokens).decode("utf-8", "replace")

    def _find(self, token_id: int) -> bytes | None:
        try:
            place = operator.index(token_id)
        except TypeError:
            return None
        return self._by_id[place] if 0 <= place < len(self._by_id) else None

    def _split(self, text: str, names: re.Pattern[str] | None) -> Iterator[int | str]:
        start = 0
        for match in names.finditer(text) if names else ():
            if match.start() > start:
                yield text[start : match.start()]
            yield self._named[match.group()]
            start = match.end()
        if start < len(text):
            yield text[start:]

    def _encode_ordinary(self, text: str) -> list[int]:
        r"""Encode text without names, cutting very long blank runs where the pattern cuts them.

        A run of blanks that no line end follows is one piece, but for its last blank when text
        follows, which joins that text: `\s+(?!\S)`. Pieces are encoded one by one, so cutting
        there by hand changes nothing.
        """
        ids: list[int] = []
        start = 0
        if self._splits_blanks and len(text) > _LONG_BLANKS:
            for run in _LONG_BLANK_RUN.finditer(text):
                end = run.end() if run.end() == len(text) else run.end() - 1
                ids += self._merge(text[start : run.start()])
                ids += self._encoding._encode_single_piece(text[run.start() : end])
                start = end
        return ids + self._merge(text[start:])

    def _merge(self, text: str) -> list[int]:
        try:
            return self._encoding.encode_ordinary(text)
        except BaseException as cause:
            # The engine's panics do not derive from Exception, and have no importable class.
            if type(cause).__name__ != "PanicException":
                raise
            raise TokenizerError(
                f"[tokenizer] the split pattern of this vocabulary gave up on a text of "
                f"{len(text)} characters. Shorten its longest run of one kind of character."
            ) from None


class StreamDecoder:
    """Turns ids into text as they arrive; the pieces joined equal `Tokenizer.decode` of them all.

    A character whose bytes are spread over several tokens is held back until it is whole.
    An id the vocabulary lacks adds nothing: a model's table may have rows beyond it, and a running
    answer must not die of one.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Take one id, return the text that became certain, often one word, sometimes ''."""
        if self._skip_special and self._tokenizer.is_special(token_id):
            return ""
        return self._utf8.decode(self._tokenizer._find(token_id) or b"")

    def flush(self) -> str:
        """Return what was held back, as U+FFFD, and begin anew."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def _table(vocabulary: Vocabulary) -> list[bytes | None]:
    named = {**vocabulary.special, **vocabulary.added}
    size = 1 + max(*vocabulary.ranks.values(), *named.values())
    by_id: list[bytes | None] = [None] * size
    for token, token_id in vocabulary.ranks.items():
        by_id[token_id] = token
    for name, token_id in named.items():
        by_id[token_id] = name.encode("utf-8", "replace")
    return by_id


def _matcher(names: Iterable[str]) -> re.Pattern[str] | None:
    """Match any of `names`, the longest where one begins another."""
    ordered = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def _build_encoding(vocabulary: Vocabulary) -> tiktoken.Encoding:
    try:
        return tiktoken.Encoding(
            vocabulary.source.parent.name or "camelid",
            pat_str=vocabulary.pattern,
            mergeable_ranks=vocabulary.ranks,
            special_tokens={**vocabulary.special, **vocabulary.added},
        )
    except BaseException as cause:
        if not isinstance(cause, Exception) and type(cause).__name__ != "PanicException":
            raise
        raise TokenizerError(
            f"[tokenizer] {vocabulary.source}: the split pattern {vocabulary.pattern[:80]!r} "
            f"cannot be used ({str(cause)[:200]}). Use the model's original tokenizer file."
        ) from cause


def _configured_names(path: Path) -> dict[str, str]:
    """Read the token names of tokenizer_config.json, each a string or an object with `content`."""
    config = read_json(path, error=TokenizerError)
    names = {}
    for key in ("bos", "eos", "pad"):
        value = config.get(f"{key}_token")
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            names[key] = value
    return names
