"""The shipped model answers as the torch module that trained it does, through text and template."""

from __future__ import annotations

import json
from pathlib import Path

import camelid

GOLDEN = Path(__file__).parents[1] / "data" / "demo_golden.json"
GREEDY = camelid.SamplingParams(max_tokens=24, temperature=0)


def test_the_demo_model_answers_as_its_trainer_says() -> None:
    cases = json.loads(GOLDEN.read_text())["cases"]
    assert len(cases) >= 8
    with camelid.LLM(camelid.demo_model_path(), device="cpu") as llm:
        for case in cases:
            answer = llm.chat([{"role": "user", "content": case["content"]}], GREEDY)
            assert answer.text == case["answer"]
            assert answer.usage.prompt_tokens == case["n_prompt_tokens"]
            assert answer.token_ids[: len(case["answer_ids"])] == case["answer_ids"]
            assert answer.finish_reason == "stop"
