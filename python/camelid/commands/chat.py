'''`camelid chat`: a conversation in the terminal.

/image FILE, /set NAME VALUE, /system TEXT, /clear, /bye and """ for several lines. Ctrl-C ends an
answer first and the program second.
'''

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camelid.commands.common import (
    SAMPLING_TYPES,
    Printer,
    add_load_flags,
    add_sampling_flags,
    load_model,
    paint,
    sampling_params,
    shows_progress,
)
from camelid.errors import Error, InvalidRequest

if TYPE_CHECKING:
    from camelid.llm import LLM
    from camelid.options import SamplingParams

_HELP = '''/image FILE       show an image with the next message; may be repeated
/set NAME VALUE   change sampling: temperature, top_p, max_tokens ...; /set shows it
/system TEXT      set the system message, and begin anew
/clear            forget the conversation
/bye              end (so does Ctrl-D)
"""               begin and end a message of several lines'''


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("model", help="folder of a checkpoint, or a hub id")
    parser.add_argument("--system", metavar="TEXT", help="a system message")
    add_sampling_flags(parser)
    add_load_flags(parser)


def run(options: argparse.Namespace) -> int:
    """Talk until the user has enough."""
    params = sampling_params(options)
    if sys.stdin.isatty():
        import readline  # noqa: F401  # gives input() history and editing
    with load_model(options) as llm:
        return Conversation(llm, params, options.system).run()


class Conversation:
    """What was said so far, and how to go on."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None) -> None:
        self._llm = llm
        self._params = params
        self._system = system
        self._messages: list[dict[str, Any]] = []
        self._images: list[dict[str, Any]] = []  # for the next message

    def run(self) -> int:
        """Read and answer lines until the end of input, /bye, or Ctrl-C at the prompt."""
        if sys.stdin.isatty():
            print("/help shows the commands, /bye ends.", file=sys.stderr)
        try:
            while True:
                message = _read_message()
                if message.strip() in ("/bye", "/exit", "/quit"):
                    return 0
                try:
                    self._handle(message)
                except Error as error:  # the conversation goes on
                    print(f"camelid: {error}", file=sys.stderr)
        except (EOFError, KeyboardInterrupt):
            if sys.stdin.isatty():
                print()
            return 0

    def _handle(self, message: str) -> None:
        command, _, rest = message.strip().partition(" ")
        if not command:
            return
        if command == "/help":
            print(_HELP, file=sys.stderr)
        elif command == "/clear":
            self._messages, self._images = [], []
        elif command == "/system":
            self._system, self._messages, self._images = rest.strip() or None, [], []
        elif command == "/image":
            self._show(rest.strip())
        elif command == "/set":
            self._set(*rest.split(None, 1))
        elif command.startswith("/") and command[1:].isalpha():
            raise InvalidRequest(f"[chat] there is no command {command:.40}; /help shows them.")
        else:
            self._answer(message)

    def _set(self, name: str = "", value: str = "") -> None:
        if not name:
            for known in SAMPLING_TYPES:
                shown = getattr(self._params, known)
                print(f"{known} {'(default)' if shown is None else shown}", file=sys.stderr)
            return
        kind = SAMPLING_TYPES.get(name)
        if kind is None:
            raise InvalidRequest(
                f"[chat] nothing is called {name:.40}; expected {', '.join(SAMPLING_TYPES)}."
            )
        try:
            change: dict[str, Any] = {name: kind(value) if value else None}
        except ValueError:
            raise InvalidRequest(f"[chat] {name} is {value:.40}, expected a number.") from None
        self._params = replace(self._params, **change)

    def _show(self, path: str) -> None:
        if not path:
            raise InvalidRequest("[chat] /image needs the path of a file.")
        if not self._llm.config.has_vision:
            raise InvalidRequest("[chat] this model has no vision tower; it cannot see images.")
        from camelid.images import load_image

        # Read now: mistakes show at once, and the file may change before it is talked about.
        image = load_image(Path(path).expanduser())
        self._images.append({"type": "image", "image": image})
        print(
            f"{path}: {image.width} x {image.height} pixels, goes with the next message",
            file=sys.stderr,
        )

    def _answer(self, message: str) -> None:
        content: Any = message
        if self._images:
            content = [*self._images, {"type": "text", "text": message}]
        messages = [*self._messages, {"role": "user", "content": content}]
        system = [{"role": "system", "content": self._system}] if self._system else []
        printer = Printer()
        printer.print(
            self._llm.stream_chat([*system, *messages], self._params, progress=shows_progress())
        )
        if sys.stderr.isatty():
            print(paint(printer.speeds(), "2"), file=sys.stderr)
        self._images = []
        # What was said so far stays said, even where Ctrl-C cut it short.
        self._messages = [*messages, {"role": "assistant", "content": printer.text}]


def _read_message() -> str:
    shows_prompt = sys.stdin.isatty()
    line = input(paint("> ", "1") if shows_prompt else "")
    if not line.lstrip().startswith('"""'):
        return line
    lines = [line.lstrip()[3:]]
    while not lines[-1].rstrip().endswith('"""'):
        lines.append(input(". " if shows_prompt else ""))
    lines[-1] = lines[-1].rstrip()[:-3]
    return "\n".join(lines).strip("\n")
