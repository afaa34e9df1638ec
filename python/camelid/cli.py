"""The command line: parses, runs one command, and turns every error into one line.

Owns exit codes (0 done, 1 an error, 2 a wrong command line, 130 stopped by Ctrl-C) and what happens
on Ctrl-C and broken pipes. Each command is a file of `commands/`, imported when it runs.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from camelid.errors import Error

__all__ = ["main"]

# A new command is a new file and a line here.
_COMMANDS = {
    "run": "answer one prompt",
    "chat": "talk with a model",
    "quantize": "write a smaller copy of a checkpoint",
    "inspect": "tell what a model weighs, before loading it",
    "bench": "measure tokens per second",
    "demo": "ask the small model that comes with camelid about a text it never saw",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"camelid: {message} (try {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except Error as error:
        if debug:
            raise
        print(f"camelid: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if debug:
            raise
        return 130
    except BrokenPipeError:
        # Whoever read our output has enough. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if debug:
            raise
        print(f"camelid: {_one_line(error)}", file=sys.stderr)
        return 1
    return code


def _run(arguments: list[str]) -> int:
    parser, commands = _top_parser()
    name = next((argument for argument in arguments if not argument.startswith("-")), "")
    module = importlib.import_module(f"camelid.commands.{name}") if name in _COMMANDS else None
    if module is not None:
        command = commands[name]
        module.add_arguments(command)
        command.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    logging.basicConfig(
        level=logging.DEBUG if options.debug else logging.WARNING,
        format="camelid: %(levelname)s: %(message)s",
    )
    if module is None:
        parser.print_help(sys.stderr)
        return 2
    return int(module.run(options))


def _top_parser() -> tuple[_Parser, dict[str, _Parser]]:
    parser = _Parser(prog="camelid", description="Run Llama 4 models without PyTorch.")
    parser.add_argument("--version", action=_Version)
    parser.add_argument("--debug", action="store_true", help="show tracebacks and log messages")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    commands = {}
    for name, summary in _COMMANDS.items():
        commands[name] = subparsers.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}."
        )
    return parser, commands


class _Version(argparse.Action):
    def __init__(self, option_strings: list[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show the version and stop")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import camelid

        print(f"camelid {camelid.__version__}")
        parser.exit()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
