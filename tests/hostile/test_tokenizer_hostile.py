"""Tokenizer files that lie: each must give a `TokenizerError` that names the file."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from camelid.errors import TokenizerError
from camelid.tokenizer import Tokenizer
from camelid.tokenizer_files import LLAMA4_PATTERN, byte_alphabet


def model_lines() -> list[bytes]:
    return [b"%s %d" % (base64.b64encode(bytes([byte])), byte) for byte in range(256)]


def document() -> dict[str, Any]:
    chars = [char for char, _ in sorted(byte_alphabet().items(), key=lambda item: item[1])]
    vocab = {char: byte for byte, char in enumerate(chars)} | {"he": 256, "hel": 257}
    split = {"type": "Split", "pattern": {"Regex": LLAMA4_PATTERN}, "behavior": "Isolated"}
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    return {
        "added_tokens": [{"id": 258, "content": "<|eot|>", "special": True}],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "model": {"type": "BPE", "vocab": vocab, "merges": ["h e", "he l"]},
    }


def refused(folder: Path, match: str) -> None:
    with pytest.raises(TokenizerError, match=match) as caught:
        Tokenizer.from_folder(folder)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 1500


BAD_LINES: dict[str, tuple[Callable[[list[bytes]], list[bytes]], str]] = {
    "gap": (lambda rows: [*rows, b"YWE= 300"], "expected rank 256"),
    "backwards": (lambda rows: rows[::-1], "rank 255"),
    "duplicate": (lambda rows: [*rows, b"YQ== 256"], "repeats token"),
    "not base64": (lambda rows: [*rows, b"YW!= 256"], "not base64"),
    "bad padding": (lambda rows: [*rows, b"YWE 256"], "not base64"),
    "no rank": (lambda rows: [*rows, b"YWE="], "expected `<base64> <rank>`"),
    "negative": (lambda rows: [*rows, b"YWE= -1"], "expected `<base64> <rank>`"),
    "huge rank": (lambda rows: [*rows, b"YWE= " + b"9" * 5000], "expected `<base64> <rank>`"),
    "huge token": (lambda rows: [*rows, b"YWFh" * 5000 + b" 256"], "15000 bytes"),
    "empty": (lambda rows: [], "byte 0x00"),
    "missing byte": (lambda rows: rows[:-1], "byte 0xff"),
    "sentencepiece": (lambda rows: [b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02"], "Sentence"),
    "binary": (lambda rows: [bytes(range(256)) * 9], "line"),
}


@pytest.mark.parametrize(("change", "match"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_damaged_rank_lines_are_refused(
    tmp_path: Path, change: Callable[[list[bytes]], list[bytes]], match: str
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(change(model_lines())))
    refused(tmp_path, match)


def put(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(target: Any) -> None:
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value

    return change


SPLIT = ("pre_tokenizer", "pretokenizers", 0)
LEVEL = ("pre_tokenizer", "pretokenizers", 1)
BAD_DOCUMENTS = {
    "unigram": (put("model", value={"type": "Unigram", "vocab": [["a", 0.5]]}), "a Unigram model"),
    "wordpiece": (put("model", "type", value="WordPiece"), "a WordPiece model"),
    "no model": (put("model", value=None), "no model.vocab"),
    "vocab is a number": (put("model", "vocab", value=7), "no model.vocab"),
    "text id": (put("model", "vocab", "he", value="256"), "integer id"),
    "bool id": (put("model", "vocab", "he", value=True), "integer id"),
    "negative id": (put("model", "vocab", "he", value=-5), "integer id"),
    "enormous id": (put("model", "vocab", "he", value=2**62), "integer id"),
    "repeated id": (put("model", "vocab", "he", value=3), "id 3 twice"),
    "not byte level": (put("model", "vocab", "日本", value=300), "byte-level"),
    "a space": (put("model", "vocab", "a b", value=300), "byte-level"),
    "empty token": (put("model", "vocab", "", value=300), "0 bytes"),
    "long token": (put("model", "vocab", "a" * 5000, value=300), "5000 bytes"),
    "normalizer": (put("normalizer", value={"type": "NFC"}), "normalizer NFC"),
    "prefix": (put("model", "continuing_subword_prefix", value="##"), "continuing_subword"),
    "dropout": (put("model", "dropout", value=0.1), "dropout"),
    "no pre_tokenizer": (put("pre_tokenizer", value=None), "pre_tokenizer"),
    "metaspace": (put("pre_tokenizer", value={"type": "Metaspace"}), "Metaspace"),
    "steps of junk": (put("pre_tokenizer", "pretokenizers", value=[1, None]), "pre_tokenizer"),
    "prefix space": (put(*LEVEL, "add_prefix_space", value=True), "add_prefix_space"),
    "two regexes": (put(*LEVEL, "use_regex", value=True), "use_regex"),
    "literal split": (put(*SPLIT, "pattern", value={"String": " "}), "no regex"),
    "broken regex": (put(*SPLIT, "pattern", value={"Regex": "(((("}), "cannot be used"),
    "unknown class": (put(*SPLIT, "pattern", value={"Regex": r"\p{Nope}"}), "cannot be used"),
    "giant regex": (put(*SPLIT, "pattern", value={"Regex": "a" * 70_000}), "usual length"),
    "exploding regex": (
        put(*SPLIT, "pattern", value={"Regex": "(?:(?:(?:a{1000}){1000}){1000}){9}"}),
        "cannot be used",
    ),
    "other behaviour": (
        put(*SPLIT, value={"type": "Split", "pattern": {"Regex": "a"}, "behavior": "Removed"}),
        "Removed",
    ),
    "added is a number": (put("added_tokens", value=3), "no list"),
    "added without id": (put("added_tokens", value=[{"content": "x"}]), "`id` and `content`"),
    "added empty": (put("added_tokens", 0, "content", value=""), "`id` and `content`"),
    "added takes an id": (put("added_tokens", 0, "id", value=5), "id 5 twice"),
    "added twice": (
        put("added_tokens", value=[{"id": 300 + i, "content": "x"} for i in range(2)]),
        "twice",
    ),
    "added strips": (put("added_tokens", 0, "lstrip", value=True), "lstrip"),
    "merge of nothing": (put("model", "merges", value=["h e", "he l", "x y"]), "no token"),
    "merges reversed": (put("model", "merges", value=["he l", "h e"]), "out of the order"),
    "merge missing": (put("model", "merges", value=["h e"]), "without the merge"),
    "merge wrong": (put("model", "merges", value=["h e", "h el"]), "no token"),
    "merge of three": (put("model", "merges", value=["h e", "h e l"]), "other than two"),
    "merge of numbers": (put("model", "merges", value=[[1, 2]]), "no pair"),
    "merges are text": (put("model", "merges", value="h e"), "no list"),
}


@pytest.mark.parametrize(("change", "match"), BAD_DOCUMENTS.values(), ids=BAD_DOCUMENTS.keys())
def test_wrong_tokenizer_json_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], match: str
) -> None:
    content = document()
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    refused(tmp_path, match)


def test_the_unchanged_document_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(document()))
    assert Tokenizer.from_folder(tmp_path).encode("hello") == [257, ord("l"), ord("o")]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b'"text"', b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 10_000 + b"}"],
    ids=["empty", "truncated", "list", "string", "binary", "deep", "digits"],
)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_files_that_are_no_json_objects_are_refused(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(document()))
    (tmp_path / name).write_bytes(content)
    refused(tmp_path, name)


def test_truncated_json_is_refused_at_any_cut(tmp_path: Path) -> None:
    text = json.dumps(document())
    for cut in range(0, len(text), 97):
        (tmp_path / "tokenizer.json").write_text(text[:cut])
        refused(tmp_path, "not valid JSON")


def test_odd_token_names_in_the_config_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(document()))
    config = {"bos_token": 7, "eos_token": ["x"], "pad_token": {"content": None}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.from_folder(tmp_path).bos_id is None


def test_folder_without_a_tokenizer_says_what_to_copy(tmp_path: Path) -> None:
    refused(tmp_path, "neither tokenizer.json nor tokenizer.model")
    refused(tmp_path / "missing", "neither")


@pytest.mark.parametrize("value", [None, 7, b"bytes", ["a"]], ids=repr)
def test_encoding_what_is_no_string_is_refused(tmp_path: Path, value: Any) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(model_lines()))
    with pytest.raises(TokenizerError, match="expected str"):
        Tokenizer.from_folder(tmp_path).encode(value)


def test_a_regex_that_gives_up_is_an_error_not_a_panic(tmp_path: Path) -> None:
    content = document()
    # Back-references need the backtracking engine; this one doubles its work per character.
    put(*SPLIT, "pattern", value={"Regex": r"(a|aa)+\1$|[\s\S]"})(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.from_folder(tmp_path)
    with pytest.raises(TokenizerError, match="gave up"):
        tokenizer.encode("a" * 200 + "b")
