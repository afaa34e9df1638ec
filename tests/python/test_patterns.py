"""The linear-time matcher answers what `re.match` answers, and never takes long."""

from __future__ import annotations

import re
import time
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from camelid.errors import Unsupported
from camelid.patterns import Patterns

NAME = "language_model.model.layers.17.feed_forward.experts.103.gate_proj"


@pytest.mark.parametrize(
    "pattern",
    [
        ".*lm_head", ".*self_attn", ".*router", ".*vision_model.*", r".*layers\.17\..*",
        r".*experts\.\d+\.(gate|up)_proj$", r"^(?!.*lm_head).*proj", r"(?!.*experts).*",
        r"(?=.*gate)(?!.*up).*\Z", "language_model", "^language", "anguage", "", "$", "^$",
        r"[a-z_]+\.[^.]*\.", r"(a|b|)*x", r"(?:.*\.){3}17", ".{10,20}layers", ".{,5}m", "l{0}l",
        r".+?proj", r"[]a]", r"[^]a]", r"[\w.]+", r"[a\-z]+", r"x{2", r"{", r"a{,}", r"\.",
        r"[-a]l",
    ],
)  # fmt: skip
@pytest.mark.parametrize("text", [NAME, "lm_head", "", "language_model.model.layers.3.self_attn.q"])
def test_agrees_with_re(pattern: str, text: str) -> None:
    assert Patterns([pattern]).match(text) == (re.match(pattern, text) is not None)


_ATOM = st.sampled_from(["a", "b", ".", "[ab]", "[^a]", r"\w", r"\.", "^", "$"])
_PATTERN = st.recursive(
    _ATOM,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(
            inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{,2}", "{2,}", "*?"])
        ).map(lambda pair: f"({pair[0]}){pair[1]}"),
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(pattern=_PATTERN, text=st.text("ab.c", max_size=8))
def test_agrees_with_re_on_drawn_patterns(pattern: str, text: str) -> None:
    assert Patterns([pattern]).match(text) == (re.match(pattern, text) is not None)


@settings(max_examples=200, deadline=None)
@given(patterns=st.lists(_PATTERN, max_size=4), texts=st.lists(st.text("ab.c", max_size=8)))
def test_a_list_agrees_with_any_of_it(patterns: list[str], texts: list[str]) -> None:
    united = Patterns([*patterns, "(?!a)b"])
    for text in texts:
        wanted = any(re.match(pattern, text) for pattern in [*patterns, "(?!a)b"])
        assert united.match(text) == wanted


def test_a_hundred_patterns_and_ten_thousand_names_end_soon() -> None:
    patterns = [rf".*layers\.{layer}\.feed_forward\.(gate|up)_proj$" for layer in range(100)]
    names = [
        f"model.layers.{i}.feed_forward.experts.{j}.up_proj" for i in range(99) for j in range(99)
    ]
    start = time.perf_counter()
    united = Patterns(patterns)
    assert not any(map(united.match, names))
    assert united.match("model.layers.7.feed_forward.up_proj")
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$", "(a*)*b", "(a|a)*b", "(a|aa)+$", ".*.*.*.*.*.*.*.*.*.*b", "(.*)(.*)(.*)(.*)(.*)b",
        "(a?){60}a{60}b", "((a*)*)*b", "(?:(?:a{1,9}){1,9})+b",
    ],
)  # fmt: skip
def test_catastrophic_pattern_ends_soon(pattern: str) -> None:
    start = time.perf_counter()
    with suppress(Unsupported):  # larger than the engine takes: refused by name is as good
        assert not Patterns([pattern]).match("a" * 120 + "!")
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        (r"(a)\1", "escape"), (r"a(?=b)", "unknown group"), (r"(?<=a)b", "unknown group"),
        (r"(?i)a", "unknown group"), (r"(?P<n>a)", "unknown group"), (r"\bx", "escape"),
        ("a**", "repetition"), ("a{1}{2}", "repetition"), ("*a", "repeats nothing"),
        ("(a", "lacks"), ("a)", "unmatched"), ("[a", "too early"), ("a\\", "too early"),
        ("[b-a]", "empty range"), ("a" * 513, "characters"), ("(((a{99}){99}){99}){99}", "states"),
        ("(" * 40 + ")" * 40, "nests"), ("a{99999}", "repeats"), ("(?!a)b|c", "lookahead"),
        ("^*", "anchor"),
    ],
)  # fmt: skip
def test_what_it_cannot_do_is_refused_by_name(pattern: str, named: str) -> None:
    with pytest.raises(Unsupported, match=named):
        Patterns([pattern])


@settings(max_examples=200, deadline=None)
@given(st.text(r"ab.*+?{}[]()|^$\\,0123-:!=", max_size=30))
def test_any_text_is_a_pattern_or_refused(pattern: str) -> None:
    with suppress(Unsupported):
        Patterns([pattern]).match(NAME)
