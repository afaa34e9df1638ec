"""Answers as they grow: stop strings, end tokens, limits, half characters, log probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from camelid.options import SamplingParams
from camelid.request import Delta, GenerateRequest, LogitsRequest, StopScanner, Usage
from camelid.tokenizer import Tokenizer
from checkpoints import SPECIAL_IDS, write_tokenizer
from fake_core import FakeSampled

EOT = SPECIAL_IDS["<|eot|>"]
PYTHON_START = SPECIAL_IDS["<|python_start|>"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.from_folder(folder)


class Answer:
    """A request fed by hand; the tokenizer's ids are bytes."""

    def __init__(self, tokenizer: Tokenizer, *, max_tokens: int = 100, **params: Any) -> None:
        self.events: list[Delta] = []
        self.request = GenerateRequest(
            np.array([1, 2, 3], np.int32),
            SamplingParams(**params).resolve(),
            lambda event: None,
            max_tokens=max_tokens,
            end_ids=frozenset({EOT}),
            tokenizer=tokenizer,
        )

    def feed(self, tokens: bytes | list[int]) -> Answer:
        for token in tokens:
            if not self.request.finished:
                self.take(FakeSampled(token))
        return self

    def take(self, sampled: FakeSampled) -> None:
        self.events.append(self.request.take_sampled(sampled))

    @property
    def texts(self) -> list[str]:
        return [event.text for event in self.events]

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def last(self) -> Delta:
        return self.events[-1]


def test_text_arrives_token_by_token(tokenizer: Tokenizer) -> None:
    answer = Answer(tokenizer).feed(b"hello")
    assert answer.texts == list("hello")
    assert [event.token_ids for event in answer.events] == [[b] for b in b"hello"]
    assert answer.last.finish_reason is None
    assert answer.last.usage is None


def test_an_end_token_ends_the_answer_without_text(tokenizer: Tokenizer) -> None:
    answer = Answer(tokenizer).feed([*b"hi", EOT, *b"never"])
    assert answer.text == "hi"
    assert answer.last.finish_reason == "stop"
    assert answer.last.token_ids == [EOT]
    assert answer.last.usage == Usage(3, 3)
    assert answer.last.usage.total_tokens == 6


def test_ignore_eos_goes_on_but_not_past_a_stop_token(tokenizer: Tokenizer) -> None:
    answer = Answer(tokenizer, ignore_eos=True, stop_token_ids=[ord("!")])
    answer.feed([*b"a", EOT, *b"b!c"])
    assert answer.text == "ab"
    assert answer.last.finish_reason == "stop"


def test_the_limit_ends_the_answer(tokenizer: Tokenizer) -> None:
    answer = Answer(tokenizer, max_tokens=3).feed(b"abcdef")
    assert answer.text == "abc"
    assert answer.last.finish_reason == "length"
    assert answer.last.usage == Usage(3, 3)


def test_half_a_character_is_held_back_until_whole(tokenizer: Tokenizer) -> None:
    answer = Answer(tokenizer).feed("é€😀".encode())
    assert answer.texts == ["", "é", "", "", "€", "", "", "", "😀"]


def test_half_a_character_at_the_end_shows_as_a_replacement(tokenizer: Tokenizer) -> None:
    answer = Answer(tokenizer, max_tokens=3).feed(b"a\xe2\x82\xac")
    assert answer.text == "a\ufffd"
    assert Answer(tokenizer).feed([0xE2, EOT]).text == "\ufffd"


def test_special_tokens_are_no_text(tokenizer: Tokenizer) -> None:
    assert Answer(tokenizer).feed([*b"a", PYTHON_START, *b"b"]).text == "ab"


def test_a_stop_string_ends_the_answer_across_tokens(tokenizer: Tokenizer) -> None:
    answer = Answer(tokenizer, stop=["\n\nUser:"]).feed(b"one\ntwo\n\nUser: three")
    assert answer.text == "one\ntwo"
    assert answer.last.finish_reason == "stop"
    assert answer.last.usage == Usage(3, len(b"one\ntwo\n\nUser:"))


def test_what_only_looked_like_a_stop_string_is_passed_on(tokenizer: Tokenizer) -> None:
    answer = Answer(tokenizer, stop=["STOP"]).feed(b"xSTxSTSTOK")
    assert answer.texts == ["x", "", "", "STx", "", "", "ST", "", "", "STOK"]


def test_what_is_held_back_comes_at_the_end(tokenizer: Tokenizer) -> None:
    assert Answer(tokenizer, stop="STOP", max_tokens=3).feed(b"aST").text == "aST"
    assert Answer(tokenizer, stop="STOP").feed([*b"aST", EOT]).text == "aST"
    answer = Answer(tokenizer, stop="STOP").feed(b"aST")
    answer.events.append(answer.request.cancel())
    assert answer.text == "aST"
    assert answer.last.finish_reason == "cancelled"
    assert answer.last.usage == Usage(3, 3)


def test_a_stop_string_on_the_last_token_counts_as_stop(tokenizer: Tokenizer) -> None:
    answer = Answer(tokenizer, stop="b", max_tokens=2).feed(b"ab")
    assert (answer.text, answer.last.finish_reason) == ("a", "stop")


def test_logprobs_come_with_each_token(tokenizer: Tokenizer) -> None:
    answer = Answer(tokenizer, logprobs=2)
    answer.take(FakeSampled(ord("a"), -0.25, [(ord("a"), -0.25), (0xE2, -2.0)]))
    answer.take(FakeSampled(EOT, -1.0, []))
    entries = [entry for event in answer.events for entry in event.logprobs or ()]
    assert [(e.token_id, e.token, e.logprob) for e in entries] == [
        (ord("a"), "a", -0.25), (EOT, "<|eot|>", -1.0),
    ]  # fmt: skip
    assert [(e.token_id, e.token, e.logprob) for e in entries[0].top] == [
        (ord("a"), "a", -0.25), (0xE2, "\ufffd", -2.0),
    ]  # fmt: skip
    assert Answer(tokenizer).feed(b"a").last.logprobs is None


def test_a_token_beyond_the_vocabulary_is_no_text(tokenizer: Tokenizer) -> None:
    answer = Answer(tokenizer, logprobs=0).feed([ord("a"), 300, ord("b")])
    assert answer.text == "ab"


def test_logits_land_in_their_rows() -> None:
    logits = np.zeros((5, 4), np.float32)
    request = LogitsRequest(
        np.arange(5, dtype=np.int32), SamplingParams().resolve(), lambda event: None, logits=logits
    )
    assert request.wanted_output(2) == 2
    assert request.take_logits(np.ones((2, 4), np.float32)) is None
    request.advance(2)
    assert not request.finished
    last = request.take_logits(np.full((3, 4), 2, np.float32))
    assert logits[:, 0].tolist() == [1, 1, 2, 2, 2]
    assert request.finished
    assert last is not None
    assert last.finish_reason == "length"


def first_stop(text: str, stops: list[str]) -> str:
    """Return the text before the first stop string to be complete, character by character."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


words = st.text("ab\n", min_size=1, max_size=4)


@given(st.text("ab\n", max_size=30), st.lists(words, max_size=4), st.data())
def test_stop_strings_do_not_depend_on_how_text_is_cut(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    scanner = StopScanner(stops)
    got = ""
    rest = text
    while rest:
        n = data.draw(st.integers(1, len(rest)))
        got += scanner.push(rest[:n])
        assert first_stop(text, stops).startswith(got), "text was let out too early"
        rest = rest[n:]
    got += scanner.flush()
    assert got == first_stop(text, stops)
