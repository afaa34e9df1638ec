"""`camelid run`: one prompt, one answer, printed as it grows."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camelid.commands.common import (
    Printer,
    add_load_flags,
    add_sampling_flags,
    load_model,
    sampling_params,
    shows_progress,
)
from camelid.errors import InvalidRequest

if TYPE_CHECKING:
    from camelid.llm import LLM
    from camelid.options import SamplingParams
    from camelid.request import Delta


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("model", help="folder of a checkpoint, or a hub id")
    parser.add_argument("prompt", help="the prompt; - reads it from standard input")
    parser.add_argument("--system", metavar="TEXT", help="a system message to go before it")
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="an image to go before the prompt; may be repeated",
    )
    parser.add_argument(
        "--raw",
        action="store_true",
        help="continue the prompt as plain text, even where the folder has a chat template",
    )
    parser.add_argument("--json", action="store_true", help="print the completion as JSON")
    add_sampling_flags(parser)
    add_load_flags(parser)


def run(options: argparse.Namespace) -> int:
    """Answer the prompt."""
    params = sampling_params(options)
    if options.raw and options.system is not None:
        raise InvalidRequest("[run] --system has no place in --raw text. Leave one of them out.")
    if options.raw and options.image:
        raise InvalidRequest("[run] --image has no place in --raw text. Leave one of them out.")
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    with load_model(options) as llm:
        chat = not options.raw and (
            options.system is not None or options.image or _has_template(options.model)
        )
        messages = _messages(prompt, options.system, options.image) if chat else None
        if options.json:
            return _print_json(llm, prompt, messages, params)
        printer = Printer()
        printer.print(_deltas(llm, prompt, messages, params))
        print(printer.speeds(), file=sys.stderr)
        return 130 if printer.interrupted else 0


def _has_template(model: str) -> bool:
    from camelid.loading import find_folder
    from camelid.template_files import find_templates

    return find_templates(Path(find_folder(model)))[1] is not None


def _messages(prompt: str, system: str | None, images: Sequence[str]) -> list[dict[str, Any]]:
    content: Any = prompt
    if images:
        parts = [{"type": "image_url", "image_url": {"url": image}} for image in images]
        content = [*parts, {"type": "text", "text": prompt}]
    messages = [] if system is None else [{"role": "system", "content": system}]
    return [*messages, {"role": "user", "content": content}]


def _deltas(
    llm: LLM, prompt: str, messages: list[dict[str, Any]] | None, params: SamplingParams
) -> Iterator[Delta]:
    if messages is not None:
        return llm.stream_chat(messages, params, progress=shows_progress())
    return llm.stream(prompt, params, progress=shows_progress())


def _print_json(
    llm: LLM, prompt: str, messages: list[dict[str, Any]] | None, params: SamplingParams
) -> int:
    if messages is not None:
        completion = llm.chat(messages, params)
    else:
        (completion,) = llm.generate(prompt, params)
    record = asdict(completion)
    record["usage"]["total_tokens"] = completion.usage.total_tokens
    print(json.dumps(record, ensure_ascii=False))
    return 0
