"""Compiles and renders one chat template as Hugging Face does, and bounds what it may consume.

A template comes with a model folder and is as foreign as any download. Jinja's sandbox stops it
from reaching Python; this file stops it from running or growing without end. Must never know
about messages or tokens.
"""

from __future__ import annotations

import functools
import json
import re
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

from camelid.errors import TemplateError

# 200x the Llama 4 template (5 KB).
_MAX_SOURCE_CHARS = 1 << 20
# A conversation takes a few dozen steps per message; this ends a runaway loop within seconds.
_MAX_STEPS = 2_000_000
_MAX_SECONDS = 10.0
# A template may pass each text through so many filters; what it keeps of them is bounded with it.
_MAX_COPIES = 32
# Widths, indents and precisions a prompt may ask for.
_MAX_WIDTH = 10_000
# 2^4096 prints 1233 digits: more than any prompt computes, less than any harm.
_MAX_INT_BITS = 4096
# Cannot be written as a name in a template, so a template cannot reach it.
_BUDGET = "the budget"


class Template:
    """A compiled template. Rendering shares nothing between calls, so threads may share one."""

    def __init__(self, source: str, *, where: str) -> None:
        self._where = where
        if len(source) > _MAX_SOURCE_CHARS:
            raise TemplateError(
                f"[template] {where} has {len(source)} characters, at most {_MAX_SOURCE_CHARS} are "
                "accepted. This is no chat template."
            )
        try:
            self._template = _ENVIRONMENT.from_string(source)
        except Exception as cause:
            raise self._failure("does not compile", cause) from cause

    def render(self, variables: Mapping[str, Any], *, max_chars: int) -> str:
        """Render with `variables`, which must be plain JSON values.

        Raises:
            TemplateError: If the template fails, refuses the conversation with `raise_exception`,
                leaves its sandbox, or exceeds `max_chars` or the time allowed.
        """
        budget = _Budget(max_chars)
        try:
            return self._template.render({**variables, _BUDGET: budget})
        except Exception as cause:
            raise self._failure("failed", cause) from cause

    def _failure(self, what: str, cause: Exception) -> TemplateError:
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(cause.__traceback__)
            if frame.filename == "<template>"
        ]
        line = getattr(cause, "lineno", None) or (lines[-1] if lines else None)
        at = f" at line {line}" if line else ""
        kind = "" if isinstance(cause, jinja2.TemplateError) else f"{type(cause).__name__}: "
        return TemplateError(
            f"[template] {self._where} {what}{at}: {kind}{str(cause)[:500]}. "
            "Check the messages against what the model's template accepts, or replace the template."
        )


class _Budget:
    """What one rendering may still use."""

    def __init__(self, max_chars: int) -> None:
        self.max_chars = max_chars
        self._chars_left = max_chars
        self._work_left = _MAX_COPIES * max_chars
        self._steps_left = _MAX_STEPS
        self._deadline = time.monotonic() + _MAX_SECONDS

    def step(self) -> None:
        self._steps_left -= 1
        out_of_time = self._steps_left % 64 == 0 and time.monotonic() > self._deadline
        if self._steps_left < 0 or out_of_time:
            raise SecurityError(f"it ran for more than {_MAX_STEPS} steps or {_MAX_SECONDS:.0f} s")

    def emit(self, n_chars: int) -> None:
        self._chars_left -= n_chars
        if self._chars_left < 0:
            self.refuse_size()

    def made(self, result: Any) -> None:
        """Charge a text or list just made; a template could keep it alive to the end."""
        if isinstance(result, str | bytes | list | tuple):
            # A list's place and its number weigh 36 bytes in CPython, a character one to four.
            weight = 16 if isinstance(result, list | tuple) else 1
            self.check(len(result))
            self._work_left -= len(result) * weight
            if self._work_left < 0:
                self.refuse_size()

    def collect(self, items: Any) -> list[Any]:
        """Return an iterable as a list, stopping when its texts together are too long."""
        collected = []
        n_chars = 0
        for item in items:
            n_chars += len(item) if isinstance(item, str) else 2
            self.check(n_chars)
            collected.append(item)
        return collected

    def check(self, n_chars: int) -> None:
        if n_chars > self.max_chars:
            self.refuse_size()

    def check_value(self, value: Any) -> None:
        """Refuse a value whose text would be too long, without making that text.

        Lists may hold each other many times, so a small structure can print without end.
        """
        n_chars = 0
        pending = [value]
        while pending:
            item = pending.pop()
            n_chars += len(item) if isinstance(item, str | bytes) else 2
            if isinstance(item, Mapping):
                pending.extend(item.keys())
                pending.extend(item.values())
            elif isinstance(item, list | tuple | set | frozenset):
                pending.extend(item)
            self.check(n_chars)

    def refuse_size(self) -> None:
        raise SecurityError(f"it made more than {self.max_chars} characters of these messages")


def _budget(context: Context) -> _Budget:
    budget = context.parent.get(_BUDGET)
    if not isinstance(budget, _Budget):
        raise SecurityError("a template step ran outside a rendering")
    return budget


class _Counted:
    """An iterable that pays one step for each item, and keeps its length for `loop.length`."""

    def __init__(self, items: Any, budget: _Budget) -> None:
        self._items = items
        self._budget = budget

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            self._budget.step()
            yield item

    def __len__(self) -> int:
        return len(self._items)


@pass_context
def _count(context: Context, items: Any) -> _Counted:
    return _Counted(items, _budget(context))


@pass_context
def _emit(context: Context, value: Any) -> str:
    text = value if isinstance(value, str) else _text(_budget(context), value)
    _budget(context).emit(len(text))
    return text


@pass_context
def _concat(context: Context, values: list[Any]) -> str:
    budget = _budget(context)
    texts = [_text(budget, value) for value in values]
    budget.check(sum(map(len, texts)))
    joined = "".join(texts)
    budget.made(joined)
    return joined


def _text(budget: _Budget, value: Any) -> str:
    if not isinstance(value, str):
        budget.check_value(value)
    return str(value)


class _Meter(NodeTransformer):
    """Rewrites a parsed template: loops, joins and output pass through the functions above."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 (the visitor's naming)
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "count items")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "count joined")

    def visit_Output(self, node: nodes.Output) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.nodes = [_filtered(_as_constant(part), "count output") for part in node.nodes]
        return node


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    # Built by keyword order of jinja's `fields`: node, name, args, kwargs, dyn_args, dyn_kwargs.
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _as_constant(node: nodes.Expr) -> nodes.Expr:
    if isinstance(node, nodes.TemplateData):
        return nodes.Const(node.data, lineno=node.lineno)
    return node


class _Generation(jinja2.ext.Extension):
    """Accepts `{% generation %}`, which marks what is trained on, and prints its content."""

    tags = {"generation"}  # noqa: RUF012 (declared so by the base class)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Environment(ImmutableSandboxedEnvironment):
    """Hugging Face's environment with a meter in it.  Source: transformers chat_template_utils."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        metered: nodes.Template = _Meter().visit(tree)
        return metered

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = _budget(context)
        numbers = isinstance(left, int) and isinstance(right, int)
        if operator == "+" and isinstance(left, str | list | tuple):
            budget.check(len(left) + (len(right) if hasattr(right, "__len__") else 0))
        elif operator == "*" and not numbers:
            for sequence, times in ((left, right), (right, left)):
                if isinstance(sequence, str | bytes | list | tuple) and isinstance(times, int):
                    budget.check(len(sequence) * times)
        elif operator == "%" and isinstance(left, str | bytes):
            _check_format(left)
            budget.check_value(right)
        if numbers and operator in ("*", "**"):
            bits = right if operator == "**" else right.bit_length()
            if left.bit_length() + bits > _MAX_INT_BITS or left.bit_length() * bits > 1 << 22:
                raise SecurityError("it computes with numbers of thousands of digits")
        result = super().call_binop(context, operator, left, right)
        budget.made(result)
        return result

    # Positional names as jinja has them: a template may pass `self=` or `context=` by keyword.
    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        budget = _budget(__context)
        budget.step()
        # str.format arrives wrapped by jinja; the method itself is then in __wrapped__.
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        if isinstance(owner, str | bytes):
            _check_method(budget, owner, getattr(__obj, "__name__", ""), args, kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        budget.made(result)
        return result


def _check_method(
    budget: _Budget, owner: str | bytes, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Refuse a string method that could make a very long string out of short arguments."""
    values = [*args, *kwargs.values()]
    # Other methods (find, split) take positions, which may be anywhere in a long text.
    sized = ("ljust", "rjust", "center", "zfill", "expandtabs", "format", "format_map")
    if name in sized and any(isinstance(value, int) and value > _MAX_WIDTH for value in values):
        raise SecurityError(f"{name} with a width over {_MAX_WIDTH}")
    if name in ("format", "format_map"):
        _check_format(owner)
        budget.check_value(values)
    elif name in ("translate", "maketrans"):
        raise SecurityError(f"{name} is not available to chat templates")
    elif name == "replace" and len(args) >= 2:
        _check_replace(budget, owner, args[0], args[1])
    elif name == "join" and args:
        budget.check_value(args[0])
        if isinstance(args[0], list | tuple | str):
            budget.check(len(owner) * len(args[0]))


def _check_replace(budget: _Budget, text: Any, old: Any, new: Any) -> None:
    if isinstance(text, str) and isinstance(old, str) and isinstance(new, str):
        times = text.count(old) if len(new) > len(old) else 0
        budget.check(len(text) + times * len(new))


def _check_format(template: str | bytes) -> None:
    text = template.decode("latin-1") if isinstance(template, bytes) else template
    if re.search(r"\d{5}|%[^a-zA-Z%]*\*", text):
        raise SecurityError(f"a format with a width over {_MAX_WIDTH} or taken from an argument")


_SIZED_FILTERS = ("batch", "center", "indent", "round", "slice", "truncate", "wordwrap")
_LIST_FILTERS = ("batch", "list", "slice", "sort", "unique")
_TEXT_FILTERS = (
    *("capitalize", "center", "e", "escape", "forceescape", "format", "indent", "join", "lower"),
    *("pprint", "replace", "safe", "string", "striptags", "title", "trim", "truncate", "upper"),
    *("urlencode", "urlize", "wordcount", "wordwrap", "xmlattr"),
)


def _metered_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a built-in filter so that it checks sizes before it works and is charged after.

    Some filters want jinja's context, evaluation context or environment first; all are given the
    context here, because the budget is found in it, and pass on what the filter wants.
    """
    wanted = str(getattr(function, "jinja_pass_arg", ""))

    @functools.wraps(function)
    def metered(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget(context)
        if name in ("join", *_LIST_FILTERS):
            value = budget.collect(value)
        _check_filter(budget, name, value, [*args, *kwargs.values()])
        leading: list[Any] = []
        if "eval_context" in wanted:
            leading = [context.eval_ctx]
        elif "environment" in wanted:
            leading = [context.environment]
        elif wanted:
            leading = [context]
        result = function(*leading, value, *args, **kwargs)
        if isinstance(result, Iterator):
            result = budget.collect(result)
        budget.made(result)
        return result

    return pass_context(metered)


def _check_filter(budget: _Budget, name: str, value: Any, arguments: list[Any]) -> None:
    """Refuse a filter whose result would be far longer than what goes in."""
    numbers = [item for item in arguments if isinstance(item, int)]
    texts = [item for item in arguments if isinstance(item, str)]
    if name in _SIZED_FILTERS and any(abs(number) > _MAX_WIDTH for number in numbers):
        raise SecurityError(f"filter {name} with a width over {_MAX_WIDTH}")
    if name in _TEXT_FILTERS:
        budget.check_value([value, *arguments])
    longest = max(map(len, texts), default=0)
    if name == "replace" and len(texts) >= 2:
        _check_replace(budget, str(value), texts[0], texts[1])
    elif name in ("indent", "wordwrap"):
        # Both put something at each line: a given text, or at most the width in blanks.
        width = max(longest, *numbers, 4)
        n_lines = str(value).count("\n") if name == "indent" else len(str(value))
        budget.check(n_lines * width if name == "indent" or texts else 0)
    elif name == "join":
        budget.check(len(value) * longest)
    elif name == "format":
        _check_format(str(value))


@pass_context
def _tojson(
    context: Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which would put \u003c into prompts.
    if (len(indent) if isinstance(indent, str) else indent or 0) > 64:
        raise SecurityError("filter tojson with an indent over 64")
    _budget(context).check_value(value)
    text = json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    _budget(context).made(text)
    return text


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    # Local time, because that is what the reference prints.
    return datetime.now().strftime(pattern)  # noqa: DTZ005


def _plain_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


class _Namespace(Namespace):
    """A namespace without underscore names, which are the way to Python's internals."""

    # Without a named `self`, a template may store an attribute of that name.
    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"namespace attribute {name!r} begins with an underscore")


def _build_environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    for name in {*_SIZED_FILTERS, *_LIST_FILTERS, *_TEXT_FILTERS}:
        environment.filters[name] = _metered_filter(name, environment.filters[name])
    # Names with a blank: the rewritten tree can call them, a template cannot.
    environment.filters |= {
        "tojson": _tojson,
        "count items": _count,
        "count joined": _concat,
        "count output": _emit,
    }
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _plain_dict,
        "namespace": _Namespace,
    }
    del environment.globals["lipsum"]
    return environment


_ENVIRONMENT = _build_environment()
