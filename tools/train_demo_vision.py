"""Teach the demo model to see, and export what ships in the wheel.

Owns the three stages of it: first the tower alone learns to say, in the text model's own words,
what stands in each cell of a picture; then both learn to answer, with documents in between so that
reading is not forgotten; at last the text model learns to say the same with int8 activations.
`demo_vision.py` owns the tower, `train_demo_model.py` the reading.

The shipped weights took 75 minutes on two shared cores. Over the 500 questions each of
`benchmarks/demo_accuracy.py`, with the engine and INT4: 97.8 % about pictures, 94.8 % about
documents of 1,000 to 1,200 tokens. The last stage cut what int8 activations cost from 1.5e-3 to
4.9e-4 nats (`benchmarks/fast_accuracy.py`): nearly all of it were a few tokens in a thousand whose
expert changed.

Needs torch (CPU), transformers, tokenizers, and camelid itself.

    python tools/train_demo_vision.py READING_MODEL --float-folder demo_f32 --check
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention
from torch import Tensor, nn

import demo_check
from camelid import demo_scenes
from demo_export import (
    build_tokenizer,
    export_float,
    export_int4,
    round_to_checkpoint,
    stems,
)
from demo_model import Llama4Demo, set_fake_int4, set_fake_int8, token_code
from demo_vision import DemoVision, Pictures, draw_pictures, image_batch
from train_demo_model import (
    GROUP,
    LONG,
    ROOT,
    SHIPPED_CHUNK,
    Examples,
    exact_match,
    tokenizer_texts,
)

SIDES = (64, 256)  # pixels of training's pictures: larger ones cost time and are reduced anyway
TRAINED_CHUNK = 256  # as train_demo_model.py trains, and for its reasons
SHOWN = (240, 640)  # of those that accuracy is quoted for


class Words(nn.Module):
    """Reads, in features of cells, the words of what stands there: the first stage's target."""

    def __init__(self, examples: Examples, model: Llama4Demo) -> None:
        super().__init__()
        places = ["top", "bottom", "left", "right", "middle"]
        words = [*demo_scenes.COLOURS, *demo_scenes.SHAPES, *places]
        self.words = [*words, "Nothing"]
        tokens = [*(f" {word}" for word in words), "Nothing"]
        self.ids = [examples.tokenizer.token_to_id(_spelled(token)) for token in tokens]
        self.model = [model]  # in a list: its parameters are not this module's
        self.scale = nn.Parameter(torch.tensor(10.0))
        self.shift = nn.Parameter(torch.tensor(-5.0))

    def loss(self, features: Tensor, pictures: Pictures) -> tuple[Tensor, Tensor]:
        """Return the loss and which share of cells is read rightly.

        Args:
            features: Of the overviews, [n_scenes, 9, hidden].
            pictures: What they show.
        """
        wanted = torch.zeros(len(pictures.scenes), 9, len(self.words))
        for row, scene in zip(wanted, pictures.scenes, strict=True):
            names = {thing.place: thing.name.split() for thing in scene.things}
            for cell, place in zip(row, demo_scenes.PLACES, strict=True):
                for word in (*place.split(), *names.get(place, ["Nothing"])):
                    cell[self.words.index(word)] = 1
        table = F.normalize(self.model[0].model.embed_tokens.weight[self.ids].detach(), dim=-1)
        logits = F.normalize(features, dim=-1) @ table.T * self.scale + self.shift
        right = ((logits > 0) == (wanted > 0)).all(-1).float().mean()
        return F.binary_cross_entropy_with_logits(logits, wanted), right


def _spelled(token: str) -> str:
    """Return a token as the byte-level vocabulary writes it."""
    return token.replace(" ", "\u0120")


def start(folder: Path, tokenizer_json: dict[str, Any], *, seed: int) -> Llama4Demo:
    """Return the reading model of a folder with the vocabulary of `tokenizer_json`.

    Words it did not have get codes like the others' and their middle elsewhere.
    """
    old, _ = demo_check.load_folder(folder)
    known = _ids(json.loads((folder / "tokenizer.json").read_text()))
    names = _ids(tokenizer_json)
    model = Llama4Demo(dataclasses.replace(old.config, vocab_size=len(names)))
    weights = old.state_dict()
    embedding = weights.pop("model.embed_tokens.weight")
    model.load_state_dict(weights, strict=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        table = model.model.embed_tokens.weight
        table.copy_(embedding[256:].mean(0).expand_as(table))
        codes: dict[str, Tensor] = {}
        for token, stem in enumerate(stems(tokenizer_json)):
            token_code(table[token], stem.removesuffix("es").removesuffix("s"), codes, generator)
        for name, token in names.items():
            if name in known:
                table[token] = embedding[known[name]]
    return model


def _ids(tokenizer_json: dict[str, Any]) -> dict[str, int]:
    added = {token["content"]: token["id"] for token in tokenizer_json["added_tokens"]}
    return {**tokenizer_json["model"]["vocab"], **added}


def look(vision: DemoVision, words: Words, args: argparse.Namespace) -> None:
    """Train the tower alone, on overviews."""
    optimiser = torch.optim.AdamW(
        [*vision.parameters(), *words.parameters()], lr=1e-3, betas=(0.9, 0.98), weight_decay=0.02
    )
    start_time = time.monotonic()
    for step in range(args.look_steps):
        rng = random.Random(f"{args.seed}/look/{step}")
        pictures = draw_pictures(rng, 48, split="train", sides=(64, 160))
        features = vision(pictures.pixels[pictures.overviews()])
        loss, right = words.loss(features, pictures)
        _step(optimiser, loss, [1e-3], step, args.look_steps)
        if (step + 1) % args.log_every == 0:
            print(
                f"{time.monotonic() - start_time:6.0f} s  look {step + 1}  loss {loss.item():.4f}  "
                f"cells right {right.item():.3f}",
                flush=True,
            )


def answer(
    model: Llama4Demo,
    vision: DemoVision,
    words: Words,
    examples: Examples,
    args: argparse.Namespace,
) -> None:
    """Train both on questions about pictures, with documents in between."""
    rates = [args.lr, 1e-3]
    optimiser = torch.optim.AdamW(
        [
            {"params": list(model.parameters()), "weight_decay": 0.02},
            {"params": [*vision.parameters(), *words.parameters()], "weight_decay": 0.02},
        ],
        betas=(0.9, 0.98),
    )
    set_fake_int4(model, GROUP)
    start_time, mean_loss, mean_reading = time.monotonic(), 0.0, 0.0
    for step in range(args.answer_steps):
        rng = random.Random(f"{args.seed}/answer/{step}")
        pictures = draw_pictures(rng, 16, split="train", sides=SIDES)
        features = vision(pictures.pixels)
        batch = image_batch(examples, rng, pictures, n_questions=8)
        batch = dataclasses.replace(batch, features=features.flatten(0, 1))
        logits, balance = model(batch)
        answers = F.cross_entropy(logits, batch.targets[batch.targets >= 0])
        cells, _ = words.loss(features[pictures.overviews()], pictures)
        loss = answers + 0.01 * balance + 0.2 * cells
        mean_loss += answers.item() / args.log_every
        if step % args.read_every == 0:
            n_tokens = rng.choice([(48, 128), (128, 500), (500, 1100)])
            reading = examples.batch(
                rng, n_tokens=rng.randint(*n_tokens), n_documents=2, n_questions=24, split="train"
            )
            logits, balance = model(reading)
            read = F.cross_entropy(logits, reading.targets[reading.targets >= 0])
            loss = loss + read + 0.01 * balance
            mean_reading += read.item() / args.log_every * args.read_every
        _step(optimiser, loss, rates, step, args.answer_steps)
        if (step + 1) % args.log_every == 0:
            seen = exact_match_of_pictures(model, vision, examples, seed=1, n_questions=100)
            read_share = exact_match(model, examples, seed=2, n_questions=50, n_tokens=(300, 600))
            print(
                f"{time.monotonic() - start_time:6.0f} s  answer {step + 1}  loss {mean_loss:.4f}  "
                f"reading {mean_reading:.4f}  held-out pictures {seen:.3f}, "
                f"documents {read_share:.3f}",
                flush=True,
            )
            mean_loss = mean_reading = 0.0
            save(model, vision, args.checkpoint)
    set_fake_int4(model, 0)


def settle(
    model: Llama4Demo, vision: DemoVision, examples: Examples, args: argparse.Namespace
) -> None:
    """Train the text model to say with int8 activations what it says with exact ones.

    A router whose choice hangs on a rounding error costs more than all other errors together.
    """
    set_fake_int4(model, GROUP)
    optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    start_time, mean_divergence, mean_loss = time.monotonic(), 0.0, 0.0
    log_every = max(1, args.settle_steps // 10)
    for step in range(args.settle_steps):
        rng = random.Random(f"{args.seed}/settle/{step}")
        batch = examples.batch(
            rng, n_tokens=rng.randint(500, 1200), n_documents=2, n_questions=12, split="train"
        )
        real = torch.arange(batch.document.shape[1]) < batch.document_lengths[:, None]
        with torch.no_grad():
            wanted = model.head(model.hidden(batch)[0][0][real]).log_softmax(-1)
        set_fake_int8(model, GROUP)
        (document, branches), balance = model.hidden(batch)
        divergence = F.kl_div(
            model.head(document[real]).log_softmax(-1),
            wanted,
            log_target=True,
            reduction="batchmean",
        )
        learned = batch.targets >= 0
        read = F.cross_entropy(model.head(branches[learned]), batch.targets[learned])
        pictures = draw_pictures(rng, 8, split="train", sides=SIDES)
        seen = image_batch(examples, rng, pictures, n_questions=8)
        with torch.no_grad():
            features = vision(pictures.pixels).flatten(0, 1)
        logits, _ = model(dataclasses.replace(seen, features=features))
        see = F.cross_entropy(logits, seen.targets[seen.targets >= 0])
        set_fake_int8(model, 0)
        loss = 10 * divergence + read + see + 0.01 * balance
        mean_divergence += divergence.item() / log_every
        mean_loss += (read.item() + see.item()) / log_every
        _step(optimiser, loss, [args.settle_lr], step, args.settle_steps)
        if (step + 1) % log_every == 0:
            print(
                f"{time.monotonic() - start_time:6.0f} s  settle {step + 1}  "
                f"divergence {mean_divergence:.5f}  loss {mean_loss:.4f}",
                flush=True,
            )
            mean_divergence = mean_loss = 0.0
    set_fake_int4(model, 0)


def _step(
    optimiser: torch.optim.Optimizer, loss: Tensor, rates: list[float], step: int, total: int
) -> None:
    share = min(1.0, (step + 1) / 100) * (
        0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / total))
    )
    for group, rate in zip(optimiser.param_groups, rates, strict=True):
        group["lr"] = rate * share
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    for group in optimiser.param_groups:
        torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimiser.step()


@torch.no_grad()
def exact_match_of_pictures(
    model: Llama4Demo,
    vision: DemoVision,
    examples: Examples,
    *,
    seed: int,
    n_questions: int,
    sides: tuple[int, int] = SIDES,
) -> float:
    """Return the share of questions about held-out scenes answered exactly, as `exact_match`."""
    rng = random.Random(seed)
    right: list[bool] = []
    while len(right) < n_questions:
        pictures = draw_pictures(rng, 10, split="heldout", sides=sides)
        batch = image_batch(examples, rng, pictures, n_questions=5)
        batch = dataclasses.replace(batch, features=vision(pictures.pixels).flatten(0, 1))
        best = model(batch)[0].argmax(-1)
        learned = batch.targets >= 0
        wrong = torch.zeros_like(learned)
        wrong[learned] = best != batch.targets[learned]
        for row, ids in zip(wrong, batch.branch_ids, strict=True):
            right += [not bool(row[ids == branch].any()) for branch in range(int(ids.max()) + 1)]
    return sum(right[:n_questions]) / n_questions


def save(model: Llama4Demo, vision: DemoVision, path: Path) -> None:
    """Write both modules' weights."""
    torch.save({"model": model.state_dict(), "vision": vision.state_dict()}, path)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reading", type=Path, help="folder of the model that reads")
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--lr", type=float, default=7e-4, help="of the text model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--look-steps", type=int, default=1000)
    parser.add_argument("--answer-steps", type=int, default=3000)
    parser.add_argument("--settle-steps", type=int, default=150)
    parser.add_argument("--settle-lr", type=float, default=1e-4)
    parser.add_argument("--read-every", type=int, default=4)
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--checkpoint", type=Path, default=Path("demo_vision.pt"))
    parser.add_argument("--float-folder", type=Path, help="where the float32 model goes")
    parser.add_argument(
        "--int4-folder", type=Path, default=ROOT / "python" / "camelid" / "demo_model"
    )
    parser.add_argument(
        "--from-stage",
        choices=["look", "settle", "export"],
        default="look",
        help="start from the checkpoint here (look: from the reading model)",
    )
    parser.add_argument(
        "--check", action="store_true", help="compare the exported folders with transformers"
    )
    parser.add_argument("--golden", type=Path, help="write golden prompts and answers here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer_json = build_tokenizer(tokenizer_texts())
    examples = Examples(tokenizer_json)
    model = start(args.reading, tokenizer_json, seed=args.seed)
    vision = DemoVision(model.config.hidden_size)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} + "
        f"{sum(p.numel() for p in vision.parameters()):,} parameters",
        flush=True,
    )
    if args.from_stage == "look":
        model.config = dataclasses.replace(model.config, attention_chunk_size=TRAINED_CHUNK)
        words = Words(examples, model)
        look(vision, words, args)
        answer(model, vision, words, examples, args)
        save(model, vision, args.checkpoint)
    else:
        saved = torch.load(args.checkpoint)
        model.load_state_dict(saved["model"])
        vision.load_state_dict(saved["vision"])
    model.config = dataclasses.replace(model.config, attention_chunk_size=SHIPPED_CHUNK)
    if args.from_stage != "export":
        settle(model, vision, examples, args)
        save(model, vision, args.checkpoint)
    export(model, vision, tokenizer_json, args)
    scores = {"float32": _scores(model, vision, examples)}
    round_to_checkpoint(model, vision, group=GROUP)
    scores["int4"] = _scores(model, vision, examples)
    print(json.dumps(scores), flush=True)


def export(
    model: Llama4Demo, vision: DemoVision, tokenizer_json: dict[str, Any], args: argparse.Namespace
) -> None:
    """Write the folders, and check what was written."""
    if args.float_folder is not None:
        export_float(model, vision, tokenizer_json, args.float_folder)
    export_int4(model, vision, tokenizer_json, args.int4_folder, group=GROUP)
    if args.check:
        for folder in filter(None, (args.float_folder, args.int4_folder)):
            worst = demo_check.compare_with_transformers(folder)
            print(f"{folder.name}: logits within {worst:.1e} standard deviations of transformers")
    if args.golden is not None:
        demo_check.write_golden(args.int4_folder, args.golden)


def _scores(model: Llama4Demo, vision: DemoVision, examples: Examples) -> dict[str, float]:
    return {
        "pictures": exact_match_of_pictures(
            model, vision, examples, seed=3, n_questions=500, sides=SHOWN
        ),
        "documents": exact_match(model, examples, seed=3, n_questions=500, n_tokens=LONG),
    }


if __name__ == "__main__":
    main()
