"""`camelid demo`: the model that comes with camelid answers about what it never saw before.

A document it reads, or with --image a picture it looks at; both are made up on the spot.
"""

from __future__ import annotations

import argparse
import io
import random
import secrets
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from camelid.commands.common import Printer, add_load_flags, load_model, paint

_N_PICTURE_QUESTIONS = 3


@dataclass(frozen=True)
class _Case:
    """A question as a message, for people, and its right answer."""

    content: Any  # of the user's message
    question: str
    truth: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed, the same questions")
    parser.add_argument(
        "--tokens",
        type=int,
        default=600,
        metavar="N",
        help="about how long the document is (default 600, 50 to 4000)",
    )
    parser.add_argument(
        "--image",
        nargs="?",
        const="",
        metavar="FILE",
        help="draw a picture instead, save it as PNG (default camelid-demo-SEED.png), ask about it",
    )
    add_load_flags(parser)


def run(options: argparse.Namespace) -> int:
    """Make something up, ask about it, and judge the answers."""
    import camelid

    if not 50 <= options.tokens <= 4000:
        raise camelid.InvalidRequest(f"[demo] --tokens is {options.tokens}, expected 50 to 4000.")
    seed = secrets.randbelow(10**6) if options.seed is None else options.seed
    rng = random.Random(seed)
    if options.image is None:
        kind, cases = "", _write_document(rng, options.tokens)
    else:
        kind = " with --image"
        cases = _draw_picture(rng, Path(options.image or f"camelid-demo-{seed}.png"))
    options.model = camelid.demo_model_path()
    params = camelid.SamplingParams(max_tokens=32, temperature=0)
    with load_model(options) as llm:
        for case in cases:
            print(paint("Question: ", "1") + case.question)
            sys.stdout.write(paint("Answer:   ", "1"))
            sys.stdout.flush()
            printer = Printer()
            printer.print(llm.stream_chat([{"role": "user", "content": case.content}], params))
            if printer.interrupted:
                return 130
            if printer.text.strip() == case.truth:
                print(paint("Right.", "32"))
            else:
                print(paint("Wrong.", "31") + f" Expected: {case.truth}")
    print(f"{printer.speeds()}; --seed {seed}{kind} repeats this", file=sys.stderr)
    return 0


def _write_document(rng: random.Random, n_tokens: int) -> list[_Case]:
    from camelid.demo_corpus import make_document, user_message

    document = make_document(rng, n_tokens_target=n_tokens)
    question, truth = rng.choice(document.questions)
    print(paint("The document, made up a moment ago:", "1"))
    for paragraph in document.text.split("\n"):
        print(textwrap.fill(paragraph, 96))
    print()
    return [_Case(user_message(document.text, question), question, truth)]


def _draw_picture(rng: random.Random, path: Path) -> list[_Case]:
    from camelid.demo_scenes import make_scene

    scene = make_scene(rng)
    questions = rng.sample(scene.questions, _N_PICTURE_QUESTIONS)
    encoded = io.BytesIO()
    scene.draw().save(encoded, "PNG")
    _save(path, encoded.getvalue())
    print(paint("The picture, drawn a moment ago: ", "1") + str(path) + "\n")
    image = {"type": "image_url", "image_url": {"url": str(path)}}
    return [
        _Case([image, {"type": "text", "text": question}], question, truth)
        for question, truth in questions
    ]


def _save(path: Path, data: bytes) -> None:
    """Write a file, but never over another one."""
    from camelid.errors import InvalidRequest

    try:
        with open(path, "xb") as file:
            file.write(data)
    except FileExistsError:
        if not path.is_file() or path.read_bytes() != data:
            raise InvalidRequest(
                f"[demo] {path} exists and is not this picture. Name another --image FILE."
            ) from None
    except OSError as cause:
        raise InvalidRequest(
            f"[demo] cannot write {path}: {cause.strerror}. Name another --image FILE."
        ) from cause
