"""Requests nobody should send: each gets one `camelid.Error`, and the model goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from camelid import LLM, SamplingParams
from camelid.errors import Error, InvalidRequest, Unsupported
from checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder: Path = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, config_overrides={"vocab_size": 271})
    with LLM(folder, device="cpu", threads=1, memory="128MiB") as loaded:
        wanted = loaded.generate("still here", SamplingParams(max_tokens=4, temperature=0))
        yield loaded
        assert loaded.generate("still here", SamplingParams(max_tokens=4, temperature=0)) == wanted
        loaded._loop._core.check_invariants()
        assert loaded._loop._core.memory()["kv_used_bytes"] == 0


def nested() -> list[Any]:
    inner: list[Any] = []
    inner.append(inner)
    return inner


PROMPTS: list[Any] = [
    None, 5, 1.5, object(), b"bytes", bytearray(b"x"), "", [""], ["fine", ""], [[]], [None],
    [1, "two"], [1, 2.0], [1, None], [True], [1, True], [-1], [271], [2**31], [2**63], [10**400],
    [1, -(2**70)], [[1], [2, 271]], np.array([1.0, 2.0]), np.array([True]), np.array(3),
    np.zeros((2, 2, 2), np.int64), np.array([], np.int64), np.array([2**40]), np.array(["a"]),
    np.array([1, None], object), {}, {"prompt": "x"}, {"prompt_token_ids": []},
    {"prompt_token_ids": "text"}, {"prompt_token_ids": [1], "more": 1}, {"prompt_token_ids": None},
    {1: 2}, {"a"}, iter([1]), (token for token in [1]), nested(), [nested()], [{"x": 1}, [1]],
    [b"x"], memoryview(b"x"),
]  # fmt: skip


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda value: type(value).__name__)
def test_a_bad_prompt_is_refused_before_anything_runs(llm: LLM, prompt: Any) -> None:
    for call in (llm.generate, llm.stream):
        with pytest.raises(InvalidRequest) as caught:
            call(prompt)
        message = str(caught.value)
        assert message.startswith("[prompt] ")
        assert len(message) < 400
    if not isinstance(prompt, (str, dict)):
        with pytest.raises(InvalidRequest):
            llm.logits(prompt)


@pytest.mark.parametrize("images", [[], [1], "x", 0])
def test_images_are_refused_by_name(llm: LLM, images: Any) -> None:
    with pytest.raises(Unsupported, match="images"):
        llm.generate({"prompt_token_ids": [1], "images": images})


@pytest.mark.parametrize(
    "params", [5, "greedy", {"temperature": 0}, [5], [], [None, None], (SamplingParams(),) * 2]
)
def test_bad_params_are_refused(llm: LLM, params: Any) -> None:
    with pytest.raises(InvalidRequest, match="params"):
        llm.generate("x", params)
    with pytest.raises(InvalidRequest, match="params"):
        llm.stream("x", params)
    with pytest.raises(InvalidRequest, match="params"):
        llm.chat([{"role": "user", "content": "x"}], params)


def test_ids_outside_the_vocabulary_in_params_are_refused(llm: LLM) -> None:
    for params in (SamplingParams(stop_token_ids=[271]), SamplingParams(logit_bias={271: 1.0})):
        with pytest.raises(InvalidRequest, match="271"):
            llm.generate("x", params)


def test_banning_every_token_is_an_error_of_one_request(llm: LLM) -> None:
    extreme = SamplingParams(
        max_tokens=5,
        temperature=1e-40,
        top_p=1e-30,
        min_p=1.0,
        repetition_penalty=1000.0,
        presence_penalty=-2,
        frequency_penalty=2,
        logit_bias=dict.fromkeys(range(271), -100.0),
    )
    with contextlib.suppress(Error):
        (answer,) = llm.generate("x", extreme)
        assert 1 <= len(answer.token_ids) <= 5


@pytest.mark.parametrize("temperature", [1e-45, 1e-10, 1e-3, 100.0])
def test_extreme_temperatures_give_tokens(llm: LLM, temperature: float) -> None:
    (answer,) = llm.generate(
        "x", SamplingParams(max_tokens=6, temperature=temperature, ignore_eos=True)
    )
    assert len(answer.token_ids) == 6


MESSAGES: list[Any] = [
    None, 5, "hi", [], [None], ["hi"], [{}], [{"role": "user"}], [{"role": 5, "content": "x"}],
    [{"role": "wizard", "content": "x"}], [{"role": "user", "content": 5}],
    {"role": "user", "content": "x"}, [{"role": "user", "content": [{"type": "video"}]}], nested(),
]  # fmt: skip


@pytest.mark.parametrize("messages", MESSAGES, ids=lambda value: str(value)[:40])
def test_bad_messages_are_refused(llm: LLM, messages: Any) -> None:
    for call in (llm.chat, llm.stream_chat):
        with pytest.raises(Error):
            call(messages)


def test_lone_surrogates_nulls_and_controls_are_text(llm: LLM) -> None:
    for text in ("\ud800", "\x00", "a\udfff" * 10, "\x1b[31m", "\u202e", "\U0010ffff"):
        (answer,) = llm.generate(text, SamplingParams(max_tokens=2, ignore_eos=True))
        assert len(answer.token_ids) == 2


def test_too_long_prompts_are_refused_quickly(llm: LLM) -> None:
    for prompt in ("x" * 1_000_000, [1] * 1_000_000, np.ones(1_000_000, np.int32)):
        with pytest.raises(Error, match="context"):
            llm.generate(prompt)
        with pytest.raises(Error):
            llm.stream(prompt)
    with pytest.raises(Error, match="context"):
        llm.generate("x", SamplingParams(max_tokens=2**40))


def test_many_small_requests_at_once(llm: LLM) -> None:
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    answers = llm.generate([[i % 271] for i in range(500)], params)
    assert all(len(answer.token_ids) == 2 for answer in answers)


token_lists = st.lists(
    st.integers(-5, 280) | st.sampled_from([None, 1.5, "x", True, 2**70, np.int64(5)]), max_size=8
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(token_lists)
def test_any_list_is_served_or_refused(llm: LLM, tokens: list[Any]) -> None:
    try:
        shape = llm.logits(tokens).shape
    except InvalidRequest:
        return
    assert shape == (len(tokens), 271)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text(max_size=12), st.lists(st.text(min_size=1, max_size=3), max_size=3), st.integers())
def test_any_text_and_stop_strings_are_served(
    llm: LLM, text: str, stops: list[str], seed: int
) -> None:
    if not text or not -(2**63) <= seed < 2**64:
        return
    params = SamplingParams(max_tokens=8, stop=stops, seed=seed)
    (answer,) = llm.generate(text, params)
    assert "".join(delta.text for delta in llm.stream(text, params)) == answer.text
    assert not any(stop in answer.text for stop in stops)
