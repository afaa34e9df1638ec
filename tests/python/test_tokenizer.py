from __future__ import annotations

import base64
import json
import random
import re
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import camelid.tokenizer as module
from camelid.errors import TokenizerError
from camelid.tokenizer import StreamDecoder, Tokenizer
from camelid.tokenizer_files import LLAMA4_PATTERN, byte_alphabet, llama4_special_names

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "llama4-tokenizer"
needs_golden = pytest.mark.skipif(
    not (GOLDEN / "golden.jsonl").is_file(), reason="shared/llama4-tokenizer is not here"
)
WORDS = [b"he", b"ll", b"llo", b"hello", b" w", b"or", b" wor", b"  ", b"\n\n", b"aa", b"aaaa"]
WORDS += [b"    ", "é".encode(), b"<|", b"|>", b"00", b"000"]
N_RANKS = 256 + len(WORDS)


def ranks() -> list[bytes]:
    return [bytes([byte]) for byte in range(256)] + WORDS


def write_model(folder: Path) -> Path:
    lines = [b"%s %d" % (base64.b64encode(token), rank) for rank, token in enumerate(ranks())]
    (folder / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    return folder


def write_json(folder: Path, **changes: object) -> Path:
    """Write the same vocabulary as tokenizers does, with every possible merge."""
    stand_in = {byte: char for char, byte in byte_alphabet().items()}
    vocab = {"".join(stand_in[byte] for byte in token): i for i, token in enumerate(ranks())}
    merges = [
        [token[:cut], token[cut:]]
        for token in vocab
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    split = {"type": "Split", "pattern": {"Regex": LLAMA4_PATTERN}, "behavior": "Isolated"}
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    document: dict[str, object] = {
        "added_tokens": [
            {"id": N_RANKS + place, "content": name, "special": True}
            for place, name in enumerate(llama4_special_names()[:20])
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "model": {"type": "BPE", "ignore_merges": True, "vocab": vocab, "merges": merges},
    }
    (folder / "tokenizer.json").write_text(json.dumps({**document, **changes}))
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def golden() -> Tokenizer:
    return Tokenizer.from_folder(GOLDEN)


@needs_golden
def test_golden_texts_encode_and_decode_exactly(golden: Tokenizer) -> None:
    lines = (GOLDEN / "golden.jsonl").read_text().splitlines()
    for line in lines:
        case = json.loads(line)
        assert golden.encode(case["text"], allow_special=True) == case["ids"], case["text"]
        assert golden.decode(case["ids"]) == case["text"]
        decoder = StreamDecoder(golden, skip_special=False)
        streamed = "".join(map(decoder.push, case["ids"])) + decoder.flush()
        assert streamed == case["text"]
    assert len(lines) == 160


@needs_golden
def test_released_vocabulary_has_its_known_ids(golden: Tokenizer) -> None:
    known = {
        "<|begin_of_text|>": 200000,
        "<|header_start|>": 200005,
        "<|eom|>": 200007,
        "<|eot|>": 200008,
        "<|python_start|>": 200016,
        "<|finetune_right_pad|>": 200018,
        "<|text_post_train_reserved_special_token_8|>": 200019,
        "<|image_start|>": 200080,
        "<|tile_y_separator|>": 200085,
        "<|image|>": 200090,
        "<|patch|>": 200092,
        "<|vision_reserved_special_token_1047|>": 201133,
        "<|reasoning_thinking_end|>": 201143,
        "<|reserved_special_token_903|>": 202047,
    }
    assert {name: golden.special_id(name) for name in known} == known
    assert golden.vocab_size == 202048
    assert golden.eos_ids == {200001, 200007, 200008}
    assert (golden.bos_id, golden.pad_id) == (200000, 200018)


@needs_golden
@pytest.mark.parametrize("char", ["a", " ", "1", "\n"], ids=repr)
def test_golden_vocabulary_takes_200000_equal_characters(golden: Tokenizer, char: str) -> None:
    text = char * 200_000
    assert golden.decode(golden.encode(text)) == text


def test_special_names_are_2048_and_differ() -> None:
    assert len(set(llama4_special_names())) == len(llama4_special_names()) == 2048


def test_json_and_model_agree(tiny: Tokenizer, tmp_path: Path) -> None:
    other = Tokenizer.from_folder(write_json(tmp_path))
    for text in ["hello world, aaaaa 00000\n\n  é<|eot|>x", "", " ", "😀\x00\n"]:
        assert other.encode(text) == tiny.encode(text)
        assert other.encode(text, allow_special=True) == tiny.encode(text, allow_special=True)
    assert other.eos_ids == tiny.eos_ids


def test_json_is_preferred_when_both_files_exist(tmp_path: Path) -> None:
    added = [{"id": N_RANKS, "content": "<|mine|>", "special": True}]
    folder = write_json(write_model(tmp_path), added_tokens=added)
    assert dict(Tokenizer.from_folder(folder).special_tokens) == {"<|mine|>": N_RANKS}
    assert "<|eot|>" in Tokenizer.from_folder(folder / "tokenizer.model").special_tokens


def test_encode_applies_ranks_and_pattern(tiny: Tokenizer) -> None:
    named = {token: rank for rank, token in enumerate(ranks())}
    assert tiny.encode("hello") == [named[b"hello"]]
    assert tiny.encode("0000") == [named[b"000"], named[b"0"]]  # digits are cut in threes
    assert tiny.encode("hello wor") == [named[b"hello"], named[b" wor"]]


def test_encode_adds_bos_only_when_asked(tiny: Tokenizer) -> None:
    assert tiny.encode("a", add_bos=True) == [tiny.bos_id, ord("a")]
    assert tiny.encode("a") == [ord("a")]
    assert tiny.encode("") == []


def test_typed_special_names_stay_text_unless_allowed(tiny: Tokenizer) -> None:
    text = "a<|eot|>b"
    ids = tiny.encode(text)
    assert not any(map(tiny.is_special, ids))
    assert tiny.decode(ids) == text
    eot = tiny.special_id("<|eot|>")
    assert tiny.encode(text, allow_special=True) == [ord("a"), eot, ord("b")]


def test_longest_special_name_wins(tmp_path: Path) -> None:
    names = ["<s>", "<s>long"]
    added = [{"id": N_RANKS + i, "content": name, "special": True} for i, name in enumerate(names)]
    tokenizer = Tokenizer.from_folder(write_json(tmp_path, added_tokens=added))
    assert tokenizer.encode("<s><s>long", allow_special=True) == [N_RANKS, N_RANKS + 1]


def test_added_tokens_that_are_not_special_match_any_text(tmp_path: Path) -> None:
    added = [{"id": N_RANKS, "content": "<think>", "special": False}]
    tokenizer = Tokenizer.from_folder(write_json(tmp_path, added_tokens=added))
    assert tokenizer.encode("a<think>") == [ord("a"), N_RANKS]
    assert not tokenizer.is_special(N_RANKS)
    assert tokenizer.decode([N_RANKS], skip_special=True) == "<think>"


@given(text=st.text(max_size=40))
def test_ordinary_text_survives_the_round_trip(text: str) -> None:
    # st.text() makes no surrogates; those are tested by name below.
    tokenizer = _shared()
    for allow_special in (False, True):
        ids = tokenizer.encode(text, allow_special=allow_special)
        assert tokenizer.decode(ids) == text


@given(ids=st.lists(st.integers(0, N_RANKS + 30), max_size=30), skip=st.booleans())
def test_stream_equals_decode_for_any_ids(ids: list[int], skip: bool) -> None:
    decoder = StreamDecoder(_shared(), skip_special=skip)
    pieces = [decoder.push(token_id) for token_id in ids]
    assert "".join(pieces) + decoder.flush() == _shared().decode(ids, skip_special=skip)


_CACHE: list[Tokenizer] = []


def _shared() -> Tokenizer:
    if not _CACHE:
        with tempfile.TemporaryDirectory() as folder:
            _CACHE.append(Tokenizer.from_folder(write_model(Path(folder))))
    return _CACHE[0]


def test_stream_holds_a_character_back_until_it_is_whole(tiny: Tokenizer) -> None:
    decoder = StreamDecoder(tiny)
    pieces = [decoder.push(byte) for byte in "😀".encode()]
    assert pieces == ["", "", "", "😀"]
    assert decoder.push(0xF0) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.push(ord("a")) == "a"


def test_stream_skips_specials_and_survives_unknown_ids(tiny: Tokenizer) -> None:
    decoder = StreamDecoder(tiny)
    assert decoder.push(tiny.special_id("<|eot|>")) == ""
    assert decoder.push(10**9) == ""


@pytest.mark.parametrize("token_id", [-1, 10**9, 2**70, "1", None, 1.5], ids=repr)
def test_decode_refuses_ids_that_do_not_exist(tiny: Tokenizer, token_id: int) -> None:
    with pytest.raises(TokenizerError, match="expected 0 to"):
        tiny.decode([token_id])


def test_token_bytes_and_names(tiny: Tokenizer) -> None:
    assert tiny.token_bytes(256) == b"he"
    assert tiny.token_bytes(tiny.special_id("<|eot|>")) == b"<|eot|>"
    with pytest.raises(TokenizerError, match="no special token"):
        tiny.special_id("<|finetune_right_pad_id|>")


def test_lone_surrogates_become_replacement_characters(tiny: Tokenizer) -> None:
    assert tiny.decode(tiny.encode("a\ud800b")) == "a\ufffdb"
    assert tiny.decode(tiny.encode("\ud83d\ude00")) == "😀"


@pytest.mark.parametrize("char", ["a", " ", "1", "\n", "\u3000", "!", " \n"], ids=repr)
def test_long_runs_take_linear_time(tiny: Tokenizer, char: str) -> None:
    text = char * (200_000 // len(char))
    start = time.monotonic()
    assert tiny.decode(tiny.encode(text)) == text
    # Measured 0.1 s; quadratic work would be minutes.
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("tail", ["", " x", "\nx"], ids=repr)
def test_a_million_blanks_do_not_break_the_regex_engine(tiny: Tokenizer, tail: str) -> None:
    text = "x" + " " * 1_000_000 + tail
    assert tiny.decode(tiny.encode(text)) == text


def test_cutting_long_blank_runs_changes_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = _shared()
    monkeypatch.setattr(module, "_LONG_BLANKS", 3)
    run = re.compile(rf"(?<!{module._BLANK}){module._BLANK}{{3,}}+(?![\r\n])")
    monkeypatch.setattr(module, "_LONG_BLANK_RUN", run)
    alphabet = [" ", "   ", "\t", "\n", "\r", "a", "B", "1", "!", "/", "\u0301", "\u3000", "\x1c"]
    choose = random.Random(7)
    for _ in range(2000):
        text = "".join(choose.choices(alphabet, k=choose.randint(1, 30)))
        assert tokenizer.encode(text) == tokenizer.encoding.encode_ordinary(text), repr(text)


def test_split_regex_that_skips_text_loses_none(tmp_path: Path) -> None:
    split = {"type": "Split", "pattern": {"Regex": r"\p{L}+"}, "behavior": "Isolated"}
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    steps = {"type": "Sequence", "pretokenizers": [split, level]}
    tokenizer = Tokenizer.from_folder(write_json(tmp_path, pre_tokenizer=steps))
    assert tokenizer.decode(tokenizer.encode("ab 00-cd\n\n")) == "ab 00-cd\n\n"
    # One piece of four digits merges as 00|00; the usual pattern would cut 000|0.
    assert tokenizer.encode("0000") == [N_RANKS - 2, N_RANKS - 2]


def test_bare_byte_level_uses_the_gpt2_pattern(tmp_path: Path) -> None:
    level = {"type": "ByteLevel", "add_prefix_space": False}
    tokenizer = Tokenizer.from_folder(write_json(tmp_path, pre_tokenizer=level))
    assert tokenizer.decode(tokenizer.encode("hello  world's 0000")) == "hello  world's 0000"


def test_config_names_bos_and_eos(tmp_path: Path) -> None:
    added = [
        {"id": N_RANKS + i, "content": c, "special": True} for i, c in enumerate(["<b>", "<e>"])
    ]
    folder = write_json(tmp_path, added_tokens=added)
    config = {"bos_token": {"content": "<b>"}, "eos_token": "<e>", "pad_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.bos_id, set(tokenizer.eos_ids)) == (N_RANKS, {N_RANKS + 1})


def test_vocabulary_without_bos_refuses_to_add_one(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_json(tmp_path, added_tokens=[]))
    assert tokenizer.bos_id is None
    with pytest.raises(TokenizerError, match="add_bos=False"):
        tokenizer.encode("a", add_bos=True)
