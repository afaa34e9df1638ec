"""Train the demo model to read: what `train_demo_vision.py` then teaches to see.

Owns the curriculum and the optimisation; `demo_model.py` owns the network, `demo_export.py` the
files and `python/camelid/demo_corpus.py` the language. Needs torch (CPU), transformers, tokenizers,
and camelid itself.

The weights took about 50 minutes on two shared cores (700 steps, 4.9 M parameters): stages
0 and 1 in one run, stages 2 and 3 from its checkpoint with a fresh optimiser (`--from-stage 2`),
while the first run's cosine was laid out for 1,200 steps: a rerun lands near these numbers, not on
them. Stage 0 leaves the plateau within 50 steps.

Held-out exact match over 500 questions to documents of 1,000 to 1,200 tokens, as `exact_match`
counts: 98.0 % in float32, 97.8 % in INT4; over the 500 of `benchmarks/demo_accuracy.py`, with the
engine: 95.0 % in float32 and INT8, 95.2 % in INT4. Most errors are answers that a chunk edge cuts
in two: of questions placed on an edge on purpose (with chunks of 256) 71 % were right.

    python tools/train_demo_model.py READING_MODEL
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention

import demo_check
from camelid import demo_corpus, demo_scenes
from demo_export import build_tokenizer, export_float, load_tokenizer, stems
from demo_model import Batch, DemoConfig, Llama4Demo, construct_lookup, set_fake_int4

ROOT = Path(__file__).resolve().parents[1]
GROUP = 32  # INT4 group: small, because the model is
# Trained with chunks of 256, so that edges are met often; shipped with 384: a third fewer edges,
# none near 1,024 tokens. An answer that straddles an edge is the model's known weakness.
SHIPPED_CHUNK = 384
LONG = (1000, 1200)  # tokens of the documents that accuracy is quoted for
EDGE = (995, 1010)  # their questions are cut by the chunk edge at 1024: the hardest case
FRAME = (
    "<|begin_of_text|><|header_start|>user<|header_end|>\n\n",
    "<|eot|><|header_start|>assistant<|header_end|>\n\n",
    "<|eot|>",
)
NEXT_TURN = "<|header_start|>user<|header_end|>\n\n"


@dataclass(frozen=True)
class Stage:
    """One part of the curriculum."""

    steps: int
    n_tokens: tuple[int, int]  # document length, drawn once per step
    n_documents: int
    n_questions: int
    edge_share: float = 0.0  # share of steps whose documents end just before a chunk edge
    int4: bool = False

    def draw_length(self, rng: random.Random, chunk: int) -> int:
        """Return the length of this step's documents."""
        n_tokens = rng.randint(*self.n_tokens)
        if rng.random() >= self.edge_share:
            return n_tokens
        # Question, frame and answer are 15 to 30 tokens: this far from the edge it cuts them.
        return max(1, round(n_tokens / chunk)) * chunk - rng.randint(8, 40)


# Short documents first: with ten facts to choose from, the constructed lookup gets a gradient at
# once, and long documents then only sharpen it. Half of the longer documents end just before a
# chunk edge, where the RoPE layers lose sight of the question in mid-answer and the NoPE layers
# alone must carry it over: by chance that is one case in ten, and it was the last to be learned.
# The last stage trains through INT4 rounding.
CURRICULUM = (
    Stage(150, (48, 128), 32, 10),
    Stage(150, (128, 384), 12, 20),
    Stage(250, (128, 1100), 4, 32, edge_share=0.5),
    Stage(150, (384, 1100), 4, 32, edge_share=0.5, int4=True),
)


class Examples:
    """Turns documents into token batches."""

    def __init__(self, tokenizer_json: dict[str, Any]) -> None:
        self.tokenizer = load_tokenizer(tokenizer_json)
        self.pad = self.tokenizer.token_to_id("<|finetune_right_pad|>")

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, specials included where their names are written."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def batch(
        self,
        rng: random.Random,
        *,
        n_tokens: int,
        n_documents: int,
        n_questions: int,
        split: str,
        two_turns: float = 0.15,
    ) -> Batch:
        """Write documents and ask up to `n_questions` of each, some in pairs as two turns."""
        documents = [
            demo_corpus.make_document(rng, n_tokens_target=n_tokens, split=split)
            for _ in range(n_documents)
        ]
        prefixes = [self.encode(f"{FRAME[0]}{document.text}\n\n") for document in documents]
        questions = [
            rng.sample(document.questions, min(n_questions, len(document.questions)))
            for document in documents
        ]
        return self.assemble(rng, prefixes, questions, two_turns=two_turns)

    def assemble(
        self,
        rng: random.Random,
        prefixes: list[list[int]],
        questions: list[list[tuple[str, str]]],
        *,
        two_turns: float,
    ) -> Batch:
        """Lay questions and answers beside the prefixes that they are about."""
        rows: list[list[tuple[int, int, int, int]]] = []
        for asked in questions:
            row: list[tuple[int, int, int, int]] = []
            branch, left = 0, list(asked)
            while left:
                turns = [left.pop()] + ([left.pop()] if left and rng.random() < two_turns else [])
                row += self._branch(turns, branch)
                branch += 1
            rows.append(row)
        length, width = max(map(len, prefixes)), max(map(len, rows))
        length += -length % 8
        padding = (self.pad, -1, 0, -100)
        columns = torch.tensor([row + [padding] * (width - len(row)) for row in rows]).unbind(-1)
        prefix = torch.tensor([p + [self.pad] * (length - len(p)) for p in prefixes])
        return Batch(prefix, torch.tensor([len(p) for p in prefixes]), *columns)

    def _branch(self, turns: list[tuple[str, str]], branch: int) -> list[tuple[int, int, int, int]]:
        """Return (token, branch, offset, target) of one conversation; only answers are learned."""
        tokens: list[int] = []
        targets: list[int] = []
        for i, (question, answer) in enumerate(turns):
            asked = self.encode((NEXT_TURN if i else "") + question + FRAME[1])
            answered = self.encode(answer + FRAME[2])
            tokens += asked + answered
            # The target of a position is the token after it.
            targets += [-100] * (len(asked) - 1) + answered + [-100]
        return [
            (token, branch, offset, target)
            for offset, (token, target) in enumerate(zip(tokens, targets, strict=True))
        ]


def tokenizer_texts() -> list[str]:
    """Return texts that between them hold every pre-token the vocabulary should have whole."""
    frames = [
        "user",
        "assistant",
        "system",
        "\n\n",
        "\n",
        "Mira.\n\nMira?\n\nMira, Mira: Mira; Mira!\n",
    ]
    return [*demo_corpus.vocabulary_texts(), *demo_scenes.vocabulary_texts(), *frames]


@torch.no_grad()
def exact_match(
    model: Llama4Demo,
    examples: Examples,
    *,
    seed: int,
    n_questions: int,
    n_tokens: tuple[int, int],
) -> float:
    """Return the share of held-out questions answered exactly under greedy decoding.

    Computed with the answer given: if every position's best token is the answer's, greedy decoding
    writes the answer.
    """
    model.eval()
    rng = random.Random(seed)
    right: list[bool] = []
    while len(right) < n_questions:
        batch = examples.batch(
            rng,
            n_tokens=rng.randint(*n_tokens),
            n_documents=1,
            n_questions=10,
            split="heldout",
            two_turns=0.0,
        )
        best = model(batch)[0].argmax(-1)
        learned = batch.targets >= 0
        wrong = torch.zeros_like(batch.targets, dtype=torch.bool)
        wrong[learned] = best != batch.targets[learned]
        for row, ids in zip(wrong, batch.branch_ids, strict=True):
            right += [not bool(row[ids == branch].any()) for branch in range(int(ids.max()) + 1)]
    model.train()
    return sum(right[:n_questions]) / n_questions


def train(model: Llama4Demo, examples: Examples, args: argparse.Namespace) -> None:
    """Run the curriculum, logging loss, speed and held-out accuracy."""
    decay = [p for p in model.parameters() if p.dim() > 1]
    other = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.02}, {"params": other, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), eps=1e-8)
    total = sum(stage.steps for stage in CURRICULUM)
    done, warm, start = 0, 0, time.monotonic()
    tokens_since, since, mean_loss = 0, start, 0.0
    for number, stage in enumerate(CURRICULUM):
        if number < args.from_stage:
            done += stage.steps
            continue
        set_fake_int4(model, GROUP if stage.int4 else 0)
        for step in range(stage.steps):
            rng = random.Random(f"{args.seed}/{number}/{step}")
            batch = examples.batch(
                rng,
                n_tokens=stage.draw_length(rng, model.config.attention_chunk_size),
                n_documents=stage.n_documents,
                n_questions=stage.n_questions,
                split="train",
            )
            cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done / total))
            rate = args.lr * min(1.0, (warm + 1) / 50) * cosine
            for group in optimiser.param_groups:
                group["lr"] = rate
            logits, balance = model(batch)
            answer_loss = F.cross_entropy(logits, batch.targets[batch.targets >= 0])
            loss = answer_loss + 0.01 * balance
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            done, warm = done + 1, warm + 1
            tokens_since += batch.document.numel() + batch.branches.numel()
            mean_loss += answer_loss.item()
            if done % args.log_every == 0:
                now = time.monotonic()
                short = exact_match(model, examples, seed=1, n_questions=50, n_tokens=(64, 128))
                long = exact_match(model, examples, seed=2, n_questions=50, n_tokens=EDGE)
                print(
                    f"{now - start:6.0f} s  stage {number}  step {done}/{total}  "
                    f"loss {mean_loss / args.log_every:.4f}  balance {balance.item():.2f}  "
                    f"held-out short {short:.3f}, at an edge {long:.3f}  "
                    f"{tokens_since / (now - since):.0f} tokens/s",
                    flush=True,
                )
                tokens_since, since, mean_loss = 0, time.monotonic(), 0.0
                torch.save({"model": model.state_dict(), "step": done}, args.checkpoint)
    set_fake_int4(model, 0)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the model goes, in float32")
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--checkpoint", type=Path, default=Path("demo_checkpoint.pt"))
    parser.add_argument(
        "--from-stage", type=int, default=0, help="go on from the checkpoint at this stage"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer_json = build_tokenizer(tokenizer_texts())
    examples = Examples(tokenizer_json)
    model = Llama4Demo(DemoConfig(vocab_size=examples.tokenizer.get_vocab_size()))
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{model.config.vocab_size} tokens",
        flush=True,
    )
    if args.from_stage:
        model.load_state_dict(torch.load(args.checkpoint)["model"])
    else:
        construct_lookup(model, stems(tokenizer_json), seed=args.seed)
    train(model, examples, args)
    model.config = dataclasses.replace(model.config, attention_chunk_size=SHIPPED_CHUNK)
    export_float(model, None, tokenizer_json, args.folder)
    worst = demo_check.compare_with_transformers(args.folder)
    print(f"{args.folder.name}: logits within {worst:.1e} standard deviations of transformers")
    score = exact_match(model, examples, seed=3, n_questions=500, n_tokens=LONG)
    print(f"held-out documents: {score:.1%}", flush=True)


if __name__ == "__main__":
    main()
