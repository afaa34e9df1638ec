"""Measure the demo model's exact-match accuracy on held-out questions.

Uses camelid's public API alone.

Every question is about a fact of a document of 1,000 to 1,200 tokens, or with --pictures about a
picture; no fact in these documents was stated in training, and nothing in the pictures was shown
where it stands (see `camelid.demo_corpus` and `camelid.demo_scenes`). An answer counts when the
whole text is right, character for character.

    python benchmarks/demo_accuracy.py FOLDER --weights int4 \\
        --json benchmarks/results/demo_accuracy_int4.json
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import camelid
from camelid import demo_corpus, demo_scenes

Case = tuple[Any, str, str]  # the user message's content, the right answer, the kind of question


def write_questions(seed: int, n_questions: int, n_tokens: tuple[int, int]) -> list[Case]:
    """Ask ten questions of each document; their kind is the relation."""
    rng = random.Random(seed)
    cases: list[Case] = []
    while len(cases) < n_questions:
        document = demo_corpus.make_document(rng, n_tokens_target=rng.randint(*n_tokens))
        for i in rng.sample(range(len(document.questions)), 10):
            question, answer = document.questions[i]
            content = demo_corpus.user_message(document.text, question)
            cases.append((content, answer, document.facts[i].relation))
    return cases[:n_questions]


def draw_questions(seed: int, n_questions: int) -> list[Case]:
    """Ask five questions of each picture; their kind is their first two words."""
    rng = random.Random(seed)
    cases: list[Case] = []
    while len(cases) < n_questions:
        scene = demo_scenes.make_scene(rng)
        image = {"type": "image", "image": scene.draw()}
        for question, answer in rng.sample(scene.questions, 5):
            content = [image, {"type": "text", "text": question}]
            cases.append((content, answer, " ".join(question.split()[:2])))
    return cases[:n_questions]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(demo_corpus.__file__).parent / "demo_model"
    parser.add_argument("folder", nargs="?", type=Path, default=default)
    parser.add_argument("--weights", default="auto", help="auto, bf16, int8 or int4")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument(
        "--tokens", type=int, nargs=2, default=(1000, 1200), help="shortest and longest document"
    )
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--pictures", action="store_true", help="ask about pictures")
    parser.add_argument("--batch", type=int, default=20, help="questions asked at once")
    parser.add_argument("--json", type=Path, help="write the result here too")
    args = parser.parse_args()

    llm = camelid.LLM(str(args.folder), weights=args.weights, device=args.device)
    params = camelid.SamplingParams(max_tokens=24, temperature=0)
    if args.pictures:
        cases = draw_questions(args.seed, args.questions)
    else:
        cases = write_questions(args.seed, args.questions, tuple(args.tokens))
    start = time.monotonic()
    with ThreadPoolExecutor(args.batch) as threads:
        completions = list(
            threads.map(
                lambda case: llm.chat([{"role": "user", "content": case[0]}], params), cases
            )
        )
    seconds = time.monotonic() - start
    answers = [completion.text for completion in completions]
    n_prompt_tokens = sum(completion.usage.prompt_tokens for completion in completions)

    right = [given == wanted for given, (_, wanted, _) in zip(answers, cases, strict=True)]
    asked = Counter(kind for _, _, kind in cases)
    hits = Counter(kind for (_, _, kind), hit in zip(cases, right, strict=True) if hit)
    wrong = [
        {"wanted": wanted, "given": given}
        for given, (_, wanted, _), hit in zip(answers, cases, right, strict=True)
        if not hit
    ]
    result = {
        "benchmark": "demo_accuracy",
        "about": "pictures" if args.pictures else "documents",
        "weights": args.weights,
        "device": args.device,
        "questions": len(cases),
        "mean_prompt_tokens": round(n_prompt_tokens / len(cases), 1),
        "seed": args.seed,
        "exact_match": sum(right) / len(right),
        "by_kind": {name: hits[name] / n for name, n in sorted(asked.items())},
        "wrong": wrong[:20],
        "seconds": round(seconds, 1),
        "machine": f"{platform.machine()} {platform.system()}",
    }
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print("| weights | questions | prompt tokens | exact match | seconds |")
    print("|---|---|---|---|---|")
    print(
        f"| {args.weights} | {len(cases)} | {result['mean_prompt_tokens']} | "
        f"{result['exact_match']:.1%} | {seconds:.0f} |"
    )


if __name__ == "__main__":
    main()
