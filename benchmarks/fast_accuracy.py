"""Measure what int8 activations cost: KL divergence of next tokens, fast against exact.

Both sides hold the same INT4 or INT8 weights; only `compute` differs, or also head and KV cache
with --defaults. The demo model reads held-out documents with their questions; random checkpoints
read random tokens, whose nearly flat distributions are the hardest to keep.

    python benchmarks/fast_accuracy.py --json benchmarks/results/fast_accuracy.json
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import camelid
from camelid import demo_corpus
from camelid.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # the random checkpoints the tests use

from checkpoints import Quantization, write_checkpoint  # noqa: E402

# Wider than the tests': several groups of 128 inputs to a row, so that blocks matter.
RANDOM_CONFIG = {
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 768,
    "intermediate_size_mlp": 1024,
}


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return log probabilities in float64, [n_tokens, vocab_size]."""
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=1, keepdims=True)))


def compare(
    folder: Path, prompts: list[list[int]], weights: str, fast: dict[str, str]
) -> dict[str, Any]:
    """Return the divergence of `fast` from exact float activations over all positions."""
    with (
        camelid.LLM(folder, device="cpu", weights=weights, compute="exact") as exact,
        camelid.LLM(folder, device="cpu", weights=weights, **fast) as other,
    ):
        divergences, agree, spread = [], [], []
        for prompt in prompts:
            wanted, got = exact.logits(prompt), other.logits(prompt)
            p, q = log_softmax(wanted), log_softmax(got)
            divergences.append((np.exp(p) * (p - q)).sum(axis=1))
            agree.append(wanted.argmax(axis=1) == got.argmax(axis=1))
            spread.append(np.abs(got - wanted).std() / wanted.std())
    kl = np.concatenate(divergences)
    return {
        "positions": len(kl),
        "mean_kl_nats": float(kl.mean()),
        "p99_kl_nats": float(np.quantile(kl, 0.99)),
        "max_kl_nats": float(kl.max()),
        "same_top_token": float(np.concatenate(agree).mean()),
        "logit_error_over_std": float(np.mean(spread)),
    }


def demo_prompts(folder: Path, n: int) -> list[list[int]]:
    """Return held-out documents with a question each, as the demo asks them."""
    tokenizer = Tokenizer.from_folder(str(folder))
    rng = random.Random(3)
    prompts = []
    for _ in range(n):
        document = demo_corpus.make_document(rng, n_tokens_target=rng.randint(1000, 1200))
        question, _ = rng.choice(document.questions)
        content = demo_corpus.user_message(document.text, question)
        text = f"<|begin_of_text|><|header_start|>user<|header_end|>\n\n{content}<|eot|>"
        text += "<|header_start|>assistant<|header_end|>\n\n"
        prompts.append(tokenizer.encode(text, allow_special=True))
    return prompts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=20)
    parser.add_argument("--defaults", action="store_true", help="int8 head and bf16 KV cache too")
    parser.add_argument("--json", type=Path, help="write the result here too")
    args = parser.parse_args()
    fast = {"compute": "fast", "head": "stored", "kv_cache": "f32"}
    if args.defaults:
        fast = {"compute": "fast", "head": "int8", "kv_cache": "bf16"}

    demo = Path(demo_corpus.__file__).parent / "demo_model"
    prompts = demo_prompts(demo, args.documents)
    rows = {
        f"demo model, {weights}": compare(demo, prompts, weights, fast)
        for weights in ("auto", "int8")
    }
    for bits, group_size in ((4, 128), (4, 32), (8, 128)):
        for seed in (1, 2):
            with tempfile.TemporaryDirectory() as folder:
                write_checkpoint(
                    folder,
                    config_overrides=RANDOM_CONFIG,
                    quantization=Quantization(
                        bits=bits, group_size=group_size, ignore=("lm_head", "re:.*router")
                    ),
                    seed=seed,
                )
                rng = np.random.default_rng(seed)
                tokens = rng.integers(0, 200, (8, 100)).tolist()
                name = f"random, INT{bits} group {group_size}, seed {seed}"
                rows[name] = compare(Path(folder), tokens, "auto", fast)
    result = {
        "benchmark": "fast_accuracy",
        "fast": fast,
        "against": "compute=exact, float32 KV cache, head as stored, the same weights",
        "machine": f"{platform.machine()} {platform.system()}",
        "rows": rows,
    }
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print("| | positions | mean KL | 99 % | max | same top token | logit error / std |")
    print("|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        print(
            f"| {name} | {row['positions']} | {row['mean_kl_nats']:.2e} | {row['p99_kl_nats']:.2e} "
            f"| {row['max_kl_nats']:.2e} | {row['same_top_token']:.2%} "
            f"| {row['logit_error_over_std']:.4f} |"
        )


if __name__ == "__main__":
    main()
