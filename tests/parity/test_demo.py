"""The shipped model answers as the torch modules that trained it do, through text and template."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import camelid
from backends import quick
from camelid.demo_scenes import make_scene
from engines import open_llm

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "demo_golden.json").read_text())
GREEDY = camelid.SamplingParams(max_tokens=24, temperature=0)


@pytest.fixture(scope="module")
def llm() -> Iterator[camelid.LLM]:
    # As users open it, but for the size of its cache.
    with open_llm(camelid.demo_model_path(), head="auto") as opened:
        yield opened


def name_of(case: dict[str, Any]) -> str:
    return f"{case['n_prompt_tokens']}tokens"


def check(answer: camelid.Completion, case: dict[str, Any]) -> None:
    assert answer.text == case["answer"]
    assert answer.usage.prompt_tokens == case["n_prompt_tokens"]
    assert answer.token_ids[: len(case["answer_ids"])] == case["answer_ids"]
    assert answer.finish_reason == "stop"


def test_there_are_cases_of_both_kinds() -> None:
    assert len(GOLDEN["cases"]) >= 8
    assert len(GOLDEN["scenes"]) >= 8


@pytest.mark.parametrize("case", quick(GOLDEN["cases"], GOLDEN["cases"][:1]), ids=name_of)
def test_the_demo_model_reads_as_its_trainer_says(llm: camelid.LLM, case: dict[str, Any]) -> None:
    check(llm.chat([{"role": "user", "content": case["content"]}], GREEDY), case)


@pytest.mark.parametrize("case", quick(GOLDEN["scenes"], GOLDEN["scenes"][:1]), ids=name_of)
def test_the_demo_model_sees_as_its_trainer_says(llm: camelid.LLM, case: dict[str, Any]) -> None:
    picture = make_scene(random.Random(case["scene_seed"])).draw()
    content = [{"type": "image", "image": picture}, {"type": "text", "text": case["content"]}]
    check(llm.chat([{"role": "user", "content": content}], GREEDY), case)
