"""Reads a folder's tokenizer file into one plain `Vocabulary`, and believes nothing it reads.

Owns the two formats Llama 4 ships: `tokenizer.model` (base64 rank lines; the special names are in
no file, so they are listed here) and `tokenizer.json` (byte-level BPE, turned back into ranks).
Must never know how text is encoded: that is `tokenizer.py`.
"""

from __future__ import annotations

import binascii
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from camelid.bpe_proof import first_disagreement
from camelid.errors import Error, TokenizerError
from camelid.json_file import read_json

# The o200k split pattern.  Source: Meta llama-models models/llama4/tokenizer.py; tokenizer.json of
# the released checkpoints holds the same string.
_WORD_HEAD = r"[^\r\n\p{L}\p{N}]?"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
LLAMA4_PATTERN = "|".join(
    [
        f"{_WORD_HEAD}{_UPPER}*{_LOWER}+{_CONTRACTION}",
        f"{_WORD_HEAD}{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
# What `ByteLevel(use_regex=true)` means.  Source: OpenAI gpt-2 encoder.py, as in tokenizers.
_GPT2_PATTERN = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_LLAMA4_RANKS = 200_000
# 20x the released tokenizer.json (28 MB): room for larger vocabularies, not for a disk image.
_MAX_FILE_BYTES = 512 << 20
# The o200k pattern has 300 characters.
_MAX_PATTERN_CHARS = 1 << 16
# 8x the longest token of Llama 4. The work of checking merges grows with its square.
_MAX_TOKEN_BYTES = 1024
# 80x Llama 4's. Ids size a table, so an id of 2^31 in a file must not become an allocation.
_MAX_ID = 1 << 24


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer file says, checked: unique ids, all 256 single bytes, names apart."""

    source: Path
    pattern: str
    ranks: dict[bytes, int]  # bytes of an ordinary token -> its id, which is its merge rank
    special: dict[str, int]  # control tokens, never produced by a user's text
    added: dict[str, int] = field(default_factory=dict)  # matched in any text, and printed


def read_vocabulary(folder: Path) -> Vocabulary:
    """Read `tokenizer.json`, or else `tokenizer.model`, of a checkpoint folder.

    When both exist `tokenizer.json` decides: fine-tunes add and rename tokens there and leave a
    stale `tokenizer.model` beside it. On the released checkpoints the two agree.
    """
    if (folder / "tokenizer.json").is_file():
        return read_tokenizer_json(folder / "tokenizer.json")
    if (folder / "tokenizer.model").is_file():
        return read_tokenizer_model(folder / "tokenizer.model")
    raise TokenizerError(
        f"[tokenizer] {folder} has neither tokenizer.json nor tokenizer.model. "
        "Copy one of them from the model's repository into the folder."
    )


def read_bytes(path: Path, error: type[Error]) -> bytes:
    """Read a small file, turning whatever the disk says into `error`."""
    try:
        size_bytes = path.stat().st_size
        if size_bytes > _MAX_FILE_BYTES:
            raise error(
                f"[{path.name}] {path} has {size_bytes} bytes, at most {_MAX_FILE_BYTES} are read. "
                "This is not the file its name says; download it again."
            )
        return path.read_bytes()
    except OSError as cause:
        raise error(f"[{path.name}] {path} cannot be read: {cause.strerror or cause}.") from cause


def read_tokenizer_model(path: Path) -> Vocabulary:
    """Read base64 rank lines; 2,048 special tokens follow the last rank, as in Meta's code."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_bytes(path, TokenizerError).splitlines(), start=1):
        if not line.strip():
            continue
        token, rank = _rank_line(path, number, line)
        if token in ranks:
            raise _broken(path, f"line {number} repeats token {token!r}", "each token once")
        if rank != len(ranks):
            raise _broken(path, f"line {number} has rank {rank}", f"rank {len(ranks)}")
        ranks[token] = rank
    _check_bytes(path, ranks)
    names = llama4_special_names()
    special = {name: len(ranks) + place for place, name in enumerate(names)}
    return Vocabulary(path, LLAMA4_PATTERN, ranks, special)


def _rank_line(path: Path, number: int, line: bytes) -> tuple[bytes, int]:
    parts = line.split()
    wanted = "`<base64> <rank>`"
    if len(parts) != 2 or not parts[1].isdigit() or len(parts[1]) > 9:
        shown = line[:40].decode("ascii", "backslashreplace")
        hint = " (a binary SentencePiece model belongs to another family)"
        raise _broken(path, f"line {number} is {shown!r}", wanted + hint)
    try:
        token = binascii.a2b_base64(parts[0], strict_mode=True)
    except ValueError as cause:
        raise _broken(path, f"line {number} is not base64 ({cause})", wanted) from cause
    if not 0 < len(token) <= _MAX_TOKEN_BYTES:
        got = f"line {number} is a token of {len(token)} bytes"
        raise _broken(path, got, f"1 to {_MAX_TOKEN_BYTES}")
    return token, int(parts[1])


def read_tokenizer_json(path: Path) -> Vocabulary:
    """Undo the byte-level alphabet of a tokenizer.json, so its ids are ranks again."""
    document = read_json(path, error=TokenizerError)
    model = document.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), (dict, list)):
        raise _broken(path, "no model.vocab", "a `model` object with a vocabulary")
    # Files older than tokenizers 0.13 leave the type of a BPE out.
    kind = model.get("type", "BPE")
    if kind != "BPE" or not isinstance(model["vocab"], dict):
        raise _refused(path, f"a {kind} model", "byte-level BPE")
    if document.get("normalizer"):
        raise _refused(path, f"normalizer {_kind(document['normalizer'])}", "none")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise _refused(path, f"model.{key} = {str(model[key])[:40]!r}", "none")
    pattern = _split_pattern(path, document.get("pre_tokenizer"))
    special, added = _added_tokens(path, document.get("added_tokens", []))
    ranks = _invert(path, model["vocab"], {**special, **added})
    _check_bytes(path, ranks)
    _check_ids(path, ranks, {**special, **added})
    _check_merges(path, model, {**special, **added})
    return Vocabulary(path, pattern, ranks, _complete_special(ranks, special, added), added)


def _split_pattern(path: Path, pre_tokenizer: Any) -> str:
    """Return the split regex, in a form whose plain matches are the pieces."""
    steps: Any = [pre_tokenizer]
    if _kind(pre_tokenizer) == "Sequence":
        steps = pre_tokenizer.get("pretokenizers")
    kinds = [_kind(step) for step in steps] if isinstance(steps, list) else []
    if kinds not in (["ByteLevel"], ["Split", "ByteLevel"]):
        raise _refused(path, f"pre_tokenizer {kinds}", "[Split, ByteLevel] or [ByteLevel]")
    if steps[-1].get("add_prefix_space", True):
        raise _refused(path, "ByteLevel.add_prefix_space = true", "false")
    # A missing use_regex means true. Source: tokenizers, pre_tokenizers/byte_level.rs.
    if steps[-1].get("use_regex", True) is not (len(steps) == 1):
        raise _refused(path, f"ByteLevel.use_regex beside {kinds}", "one regex, not two or none")
    if len(steps) == 1:
        return _GPT2_PATTERN
    split = steps[0]
    regex = split["pattern"].get("Regex") if isinstance(split.get("pattern"), dict) else None
    if not isinstance(regex, str) or not regex or len(regex) > _MAX_PATTERN_CHARS:
        raise _refused(path, "a Split pattern that is no regex", "a Regex of usual length")
    behaviour = (split.get("behavior"), bool(split.get("invert")))
    if behaviour == ("Removed", True) or regex in (LLAMA4_PATTERN, _GPT2_PATTERN):
        return regex
    if behaviour != ("Isolated", False):
        raise _refused(path, f"Split behavior {behaviour}", "Isolated, not inverted")
    # Isolated keeps what lies between two matches as a piece of its own; a plain search drops it.
    return rf"{regex}|(?:(?!{regex})[\s\S])+"


def _added_tokens(path: Path, entries: Any) -> tuple[dict[str, int], dict[str, int]]:
    special: dict[str, int] = {}
    added: dict[str, int] = {}
    if not isinstance(entries, list):
        raise _broken(path, "added_tokens is no list", "a list")
    for entry in entries:
        content = entry.get("content") if isinstance(entry, dict) else None
        token_id = entry.get("id") if isinstance(entry, dict) else None
        if not isinstance(content, str) or not content or not _is_id(token_id):
            raise _broken(path, f"added token {str(entry)[:80]}", "`id` and `content`")
        if content in special or content in added:
            raise _broken(path, f"added token {content!r} twice", "each once")
        if any(entry.get(flag) for flag in ("single_word", "lstrip", "rstrip")):
            raise _refused(path, f"{content!r} with single_word, lstrip or rstrip", "none of them")
        (special if entry.get("special", False) else added)[content] = token_id
    return special, added


def _invert(path: Path, vocab: Mapping[str, Any], apart: Mapping[str, int]) -> dict[bytes, int]:
    """Turn byte-level token strings into bytes, leaving added tokens out."""
    table = _Strict({ord(char): byte for char, byte in byte_alphabet().items()})
    ranks: dict[bytes, int] = {}
    for text, token_id in vocab.items():
        if not _is_id(token_id):
            raise _broken(path, f"token {text[:40]!r} has id {str(token_id)[:40]}", "an integer id")
        if text in apart:
            if apart[text] != token_id:
                raise _broken(path, f"{text[:40]!r} has two ids", "one")
            continue
        try:
            # Maps every character to one below 256; anything else fails the latin-1 step.
            token = text.translate(table).encode("latin-1")
        except UnicodeEncodeError as cause:
            raise _refused(path, f"token {text[:40]!r}", "byte-level characters only") from cause
        if not 0 < len(token) <= _MAX_TOKEN_BYTES:
            raise _broken(path, f"a token of {len(token)} bytes", f"1 to {_MAX_TOKEN_BYTES}")
        ranks[token] = token_id
    return ranks


class _Strict(dict[int, int]):
    """A translation table in which a character it lacks is an error, not itself."""

    def __missing__(self, key: int) -> int:
        raise UnicodeEncodeError("byte-level", chr(key), 0, 1, "not in the byte-level alphabet")


def byte_alphabet() -> dict[str, int]:
    """Return GPT-2's printable stand-in for each byte.  Source: gpt-2 encoder.py."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    stand_ins = {chr(byte): byte for byte in printable}
    return stand_ins | {chr(256 + place): byte for place, byte in enumerate(others)}


def _check_bytes(path: Path, ranks: Mapping[bytes, int]) -> None:
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise _broken(path, f"no token for byte 0x{missing[0]:02x}", "all 256 single bytes")


def _check_ids(path: Path, ranks: Mapping[bytes, int], apart: Mapping[str, int]) -> None:
    seen: set[int] = set()
    for token_id in [*ranks.values(), *apart.values()]:
        if token_id in seen:
            raise _broken(path, f"id {token_id} twice", "one token for each id")
        seen.add(token_id)


def _check_merges(path: Path, model: Mapping[str, Any], apart: Mapping[str, int]) -> None:
    """Refuse merges that ranks cannot express: such a file would be tokenised silently wrong."""
    ranks = {text: rank for text, rank in model["vocab"].items() if text not in apart}
    merges = model.get("merges", [])
    if not isinstance(merges, list):
        raise _broken(path, "model.merges is no list", "a list of pairs")
    if merges and isinstance(merges[0], str):  # "a b" until tokenizers 0.20, ["a", "b"] since
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    try:
        wrong = first_disagreement(ranks, merges, whole_words=model.get("ignore_merges") is True)
    except (TypeError, ValueError) as cause:
        raise _broken(path, "a merge that is no pair", "two tokens in each") from cause
    if wrong:
        raise _refused(path, wrong, "merges in the order of their ids")


def _complete_special(
    ranks: Mapping[bytes, int], special: dict[str, int], added: Mapping[str, int]
) -> dict[str, int]:
    """Name the reserved ids a Llama 4 tokenizer.json leaves out, as Meta's code names them."""
    if len(ranks) != _LLAMA4_RANKS or special.get("<|begin_of_text|>") != _LLAMA4_RANKS:
        return special
    taken = {*special.values(), *added.values(), *ranks.values()}
    completed = dict(special)
    for place, name in enumerate(llama4_special_names()):
        if name not in special and name not in added and _LLAMA4_RANKS + place not in taken:
            completed[name] = _LLAMA4_RANKS + place
    return completed


def llama4_special_names() -> list[str]:
    """Return the 2,048 names in id order.  Source: Meta llama-models, models/llama4/tokenizer.py.

    There is no text_post_train 6 or 7: Meta counts past the python and padding names.
    """

    def reserved(group: str, numbers: Iterable[int]) -> list[str]:
        return [f"<|{group}reserved_special_token_{number}|>" for number in numbers]

    text = ["begin_of_text", "end_of_text", "fim_prefix", "fim_middle", "fim_suffix"]
    text += ["header_start", "header_end", "eom", "eot", "step"]
    names = [f"<|{name}|>" for name in text] + reserved("text_post_train_", range(6))
    names += ["<|python_start|>", "<|python_end|>", "<|finetune_right_pad|>"]
    names += reserved("text_post_train_", range(8, 69))
    names += ["<|image_start|>", "<|image_end|>", *reserved("vision_", range(2))]
    names += ["<|tile_x_separator|>", "<|tile_y_separator|>", *reserved("vision_", range(2, 6))]
    names += ["<|image|>", *reserved("vision_", [6]), "<|patch|>"]
    names += reserved("vision_", range(7, 1048)) + reserved("reasoning_", range(8))
    names += ["<|reasoning_thinking_start|>", "<|reasoning_thinking_end|>"]
    return names + reserved("", range(2048 - len(names)))


def _kind(value: Any) -> str:
    return str(value.get("type")) if isinstance(value, dict) else type(value).__name__


def _is_id(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < _MAX_ID


def _broken(path: Path, got: str, wanted: str) -> TokenizerError:
    return TokenizerError(
        f"[tokenizer] {path}: {got}, expected {wanted}. The file is damaged; download it again."
    )


def _refused(path: Path, got: str, wanted: str) -> TokenizerError:
    return TokenizerError(
        f"[tokenizer] {path}: {got} is not supported, expected {wanted}. "
        "Use the model's original tokenizer.json or tokenizer.model."
    )
