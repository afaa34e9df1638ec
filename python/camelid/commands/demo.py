"""`camelid demo`: the model that comes with camelid answers about a text it never saw."""

from __future__ import annotations

import argparse
import random
import secrets
import sys
import textwrap

from camelid.commands.common import Printer, add_load_flags, load_model, paint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed, the same document")
    parser.add_argument(
        "--tokens",
        type=int,
        default=600,
        metavar="N",
        help="about how long the document is (default 600, 50 to 4000)",
    )
    add_load_flags(parser)


def run(options: argparse.Namespace) -> int:
    """Write a document, ask about it, and judge the answer."""
    import camelid
    from camelid.demo_corpus import make_document, user_message

    if not 50 <= options.tokens <= 4000:
        raise camelid.InvalidRequest(f"[demo] --tokens is {options.tokens}, expected 50 to 4000.")
    seed = secrets.randbelow(10**6) if options.seed is None else options.seed
    rng = random.Random(seed)
    document = make_document(rng, n_tokens_target=options.tokens)
    question, truth = rng.choice(document.questions)
    print(paint("The document, made up a moment ago:", "1"))
    for paragraph in document.text.split("\n"):
        print(textwrap.fill(paragraph, 96))
    print()
    print(paint("Question: ", "1") + question)
    sys.stdout.write(paint("Answer:   ", "1"))
    sys.stdout.flush()
    options.model = camelid.demo_model_path()
    with load_model(options) as llm:
        message = {"role": "user", "content": user_message(document.text, question)}
        printer = Printer()
        params = camelid.SamplingParams(max_tokens=32, temperature=0)
        printer.print(llm.stream_chat([message], params))
    if printer.interrupted:
        return 130
    if printer.text.strip() == truth:
        print(paint("Right.", "32"))
    else:
        print(paint("Wrong.", "31") + f" The document says: {truth}")
    print(f"{printer.speeds()}; --seed {seed} repeats this", file=sys.stderr)
    return 0
