"""Measure the demo model's exact-match accuracy on held-out questions.

Uses camelid's public API alone.

Every question is about a fact of a document of 1,000 to 1,200 tokens; no fact in these documents
was stated in training (see `camelid.demo_corpus`). An answer counts when the whole text is right,
character for character.

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
from pathlib import Path

import camelid
from camelid import demo_corpus
from camelid.tokenizer import Tokenizer

FRAME = (
    "<|begin_of_text|><|header_start|>user<|header_end|>\n\n{}<|eot|>"
    "<|header_start|>assistant<|header_end|>\n\n"
)


def write_questions(
    seed: int, n_questions: int, n_tokens: tuple[int, int]
) -> list[tuple[str, str, str]]:
    """Return (user message, right answer, relation), ten questions to a document."""
    rng = random.Random(seed)
    cases: list[tuple[str, str, str]] = []
    while len(cases) < n_questions:
        document = demo_corpus.make_document(rng, n_tokens_target=rng.randint(*n_tokens))
        for i in rng.sample(range(len(document.questions)), 10):
            question, answer = document.questions[i]
            content = demo_corpus.user_message(document.text, question)
            cases.append((content, answer, document.facts[i].relation))
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
    parser.add_argument("--batch", type=int, default=20, help="prompts handed over at once")
    parser.add_argument("--json", type=Path, help="write the result here too")
    args = parser.parse_args()

    llm = camelid.LLM(str(args.folder), weights=args.weights, device=args.device)
    tokenizer = Tokenizer.from_folder(str(args.folder))
    params = camelid.SamplingParams(max_tokens=24, temperature=0)
    cases = write_questions(args.seed, args.questions, tuple(args.tokens))
    prompts = [
        tokenizer.encode(FRAME.format(content), allow_special=True) for content, _, _ in cases
    ]
    start = time.monotonic()
    answers: list[str] = []
    for first in range(0, len(prompts), args.batch):
        completions = llm.generate(prompts[first : first + args.batch], params)
        answers += [completion.text for completion in completions]
    seconds = time.monotonic() - start

    right = [given == wanted for given, (_, wanted, _) in zip(answers, cases, strict=True)]
    asked = Counter(relation for _, _, relation in cases)
    hits = Counter(relation for (_, _, relation), hit in zip(cases, right, strict=True) if hit)
    wrong = [
        {"wanted": wanted, "given": given}
        for given, (_, wanted, _), hit in zip(answers, cases, right, strict=True)
        if not hit
    ]
    result = {
        "benchmark": "demo_accuracy",
        "weights": args.weights,
        "device": args.device,
        "questions": len(cases),
        "mean_prompt_tokens": round(sum(map(len, prompts)) / len(prompts), 1),
        "seed": args.seed,
        "exact_match": sum(right) / len(right),
        "by_relation": {name: hits[name] / n for name, n in sorted(asked.items())},
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
