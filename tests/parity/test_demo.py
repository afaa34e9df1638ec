"""The shipped model answers as the torch modules that trained it do, through text and template."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import camelid
from camelid.demo_scenes import make_scene

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "demo_golden.json").read_text())
GREEDY = camelid.SamplingParams(max_tokens=24, temperature=0)


@pytest.fixture(scope="module")
def llm() -> Iterator[camelid.LLM]:
    with camelid.LLM(camelid.demo_model_path(), device="cpu") as opened:
        yield opened


def check(answer: camelid.Completion, case: dict[str, Any]) -> None:
    assert answer.text == case["answer"]
    assert answer.usage.prompt_tokens == case["n_prompt_tokens"]
    assert answer.token_ids[: len(case["answer_ids"])] == case["answer_ids"]
    assert answer.finish_reason == "stop"


def test_the_demo_model_reads_as_its_trainer_says(llm: camelid.LLM) -> None:
    assert len(GOLDEN["cases"]) >= 8
    for case in GOLDEN["cases"]:
        check(llm.chat([{"role": "user", "content": case["content"]}], GREEDY), case)


def test_the_demo_model_sees_as_its_trainer_says(llm: camelid.LLM) -> None:
    assert len(GOLDEN["scenes"]) >= 8
    for case in GOLDEN["scenes"]:
        picture = make_scene(random.Random(case["scene_seed"])).draw()
        content = [{"type": "image", "image": picture}, {"type": "text", "text": case["content"]}]
        check(llm.chat([{"role": "user", "content": content}], GREEDY), case)
