"""Templates that attack: each must give a `TemplateError`, soon and without taking the machine."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

import camelid.template_sandbox as sandbox
from camelid.chat import ChatTemplate
from camelid.errors import TemplateError
from camelid.template_sandbox import Template
from camelid.tokenizer import Tokenizer
from camelid.tokenizer_files import LLAMA4_PATTERN, Vocabulary

GROW = "{% set ns = namespace(x='aaaaaaaaaa') %}{% for i in range(60) %}"
SIZE_ATTACKS = {
    "string times": "{{ 'a' * 10000000000 }}",
    "list times": "{{ [1] * 10000000000 }}",
    "times string": "{{ 10000000000 * 'a' }}",
    "tilde": GROW + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "plus": GROW + "{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "capture": GROW + "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "captured data": "{% macro f() %}" + "a" * 5000 + "{% endmacro %}" + GROW + "{% set y = f() %}"
    "{% for j in range(999) %}{% set z = f() %}{% endfor %}{% endfor %}",
    "nested lists as JSON": GROW + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x|tojson }}",
    "nested lists as text": GROW + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "nested lists upper": GROW + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x|upper }}",
    "replace filter": GROW + "{% set ns.x = ns.x|replace('a', ns.x) %}{% endfor %}",
    "replace method": GROW + "{% set ns.x = ns.x.replace('a', ns.x) %}{% endfor %}",
    "join filter": "{{ range(99999)|join('a' * 99999) }}",
    "join of a list": "{{ (range(99999)|list)|join('a' * 99999) }}",
    "join method": "{{ ('a' * 99999).join(('b' * 99999)|list) }}",
    "join of a map": "{% set b = 'a' * 99999 %}{{ range(99999)|map('replace', '1', b)|join }}",
    "list of a map": "{% set b = 'a' * 99999 %}{{ range(99999)|map('replace', '1', b)|list }}",
    "keeping lists": GROW + "{% for j in range(99999) %}{% set ns.x = [ns.x, range(99999)|list] %}"
    "{% endfor %}{% endfor %}",
    "center filter": "{{ 'a'|center(10000000000) }}",
    "indent filter": "{{ ('\n' * 99999)|indent(9999) }}",
    "json indent": "{{ [1]|tojson(indent=10000000000) }}",
    "ljust": "{{ 'a'.ljust(10000000000) }}",
    "tabs": "{{ '\t'.expandtabs(10000000000) }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (10000000000, 1) }}",
    "format": "{{ '{:10000000000}'.format(1) }}",
    "format nested": "{{ '{:{w}}'.format(1, w=10000000000) }}",
    "format filter": "{{ '%10000000000d'|format(1) }}",
    "power": "{{ 10 ** 10000000000 }}",
    "squares": "{% set ns = namespace(x=9) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}"
    "{% endfor %}{{ ns.x }}",
    "much output": "{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}",
    "much data": "{% for i in range(99999) %}" + "a" * 999 + "{% endfor %}",
    "long range": "{{ range(10000000)|list }}",
    "lipsum": "{{ lipsum(n=1000000) }}",
}
ESCAPES = {
    "class": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "format string": "{{ '{0.__class__.__mro__}'.format(1) }}",
    "import": "{% import 'os' as os %}",
    "include": "{% include '/etc/passwd' %}",
    "extends": "{% extends '/etc/passwd' %}",
    "mutate messages": "{{ messages.append(1) }}",
    "namespace": "{% set ns = namespace(__class__=1) %}",
    "namespace later": "{% set ns = namespace() %}{% set ns.__x = 1 %}",
    "the meter": "{{ x|count output }}",
}
FAILURES = {
    "syntax": "{% if %}",
    "unclosed": "{% for x in y %}",
    "unknown tag": "{% nope %}",
    "unknown filter": "{{ x|nope }}",
    "undefined": "{{ x.y.z }}",
    "type": "{{ none + 1 }}",
    "raised": "{{ raise_exception('no ' + 'tools') }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "deep expression": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep blocks": "{% for a in b %}" * 60 + "{% endfor %}" * 60,
    "division": "{{ 1 // 0 }}",
}


def render(source: str, **variables: Any) -> str:
    return Template(source, where="chat_template.jinja").render(variables, max_chars=1 << 20)


@pytest.mark.parametrize("source", SIZE_ATTACKS.values(), ids=SIZE_ATTACKS.keys())
def test_growth_is_bounded(source: str) -> None:
    start = time.monotonic()
    with pytest.raises(TemplateError, match=r"chat_template\.jinja failed"):
        render(source)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("source", ESCAPES.values(), ids=ESCAPES.keys())
def test_escapes_are_refused(source: str) -> None:
    with pytest.raises(TemplateError, match=r"chat_template\.jinja"):
        render(source, messages=[])


@pytest.mark.parametrize("source", FAILURES.values(), ids=FAILURES.keys())
def test_failures_name_the_template(source: str) -> None:
    with pytest.raises(TemplateError, match=r"chat_template\.jinja (failed|does not)") as caught:
        render(source)
    assert len(str(caught.value)) < 1000


def test_failures_name_the_line() -> None:
    with pytest.raises(TemplateError, match="at line 3: no tools"):
        render("a\nb\n{{ raise_exception('no tools') }}\n")


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n - 1) if n }}{{ f(n - 1) if n }}{% endmacro %}{{ f(60) }}",
        "{% for x in [[[[1] * 99] * 99] * 99] * 99 recursive %}"
        "{% if x is sequence %}{{ loop(x) }}{% endif %}{% endfor %}",
    ],
    ids=["loops", "macros", "recursive loop"],
)
def test_endless_work_is_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_MAX_STEPS", 2_000)
    with pytest.raises(TemplateError, match="ran for more than"):
        render(source)


def test_time_is_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_MAX_SECONDS", -1.0)
    with pytest.raises(TemplateError, match="ran for more than"):
        render("{% for i in range(999) %}{% endfor %}")


def test_a_huge_template_is_refused() -> None:
    with pytest.raises(TemplateError, match="no chat template"):
        Template("a" * (2 << 20), where="x")


def test_ordinary_work_passes_the_meter() -> None:
    source = (
        "{% for x in [3, 1, 2]|sort if x > 1 %}{{ loop.index }}/{{ loop.length }} {% endfor %}"
        "{{ 'a' ~ 1 ~ none ~ undefined_name }} {{ [1, [2]]|string }} {{ 'x'|center(3) }}|"
        "{{ ['a', 'b']|map('upper')|join(', ') }} {{ 'a\nb'|indent(2) }} {{ '%s-%d' % ('q', 7) }} "
        "{{ '{:>3}'.format(5) }} {{ 2 ** 10 }} {{ {'k': 1}.items()|list }} {{ dict(a=1).a }}"
    )
    expected = "1/2 2/2 a1None [1, [2]]  x |A, B a\n  b q-7   5 1024 [('k', 1)] 1"
    assert render(source) == expected


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    ranks = {bytes([byte]): byte for byte in range(256)}
    return Tokenizer(Vocabulary(Path("memory"), LLAMA4_PATTERN, ranks, {"<|eot|>": 256}))


BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "not UTF-8": ("chat_template.jinja", b"\xff\xfe", "not UTF-8"),
    "does not compile": ("chat_template.jinja", b"{% if %}", "does not compile"),
    "truncated": ("chat_template.json", b'{"chat_template": "x', "not valid JSON"),
    "a list": ("chat_template.json", b"[]", "expected an object"),
    "no template": ("chat_template.json", b"{}", "no `chat_template`"),
    "number": ("tokenizer_config.json", b'{"chat_template": 7}', "is int"),
    "list of junk": ("tokenizer_config.json", b'{"chat_template": [1]}', "a template is"),
    "no default": ("tokenizer_config.json", b'{"chat_template": []}', "named 'default'"),
    "deep": ("tokenizer_config.json", b"[" * 100_000, "nested too deeply"),
    "no template at all": ("other.json", b"{}", "lacks"),
}


@pytest.mark.parametrize(("name", "content", "match"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_damaged_template_files_are_refused(
    tmp_path: Path, tokenizer: Tokenizer, name: str, content: bytes, match: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TemplateError, match=match) as caught:
        ChatTemplate.from_folder(tmp_path, tokenizer)
    assert str(tmp_path) in str(caught.value)


def test_template_for_tools_only_refuses_a_plain_chat(tmp_path: Path, tokenizer: Tokenizer) -> None:
    named = {"chat_template": {"tool_use": "x"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    template = ChatTemplate.from_folder(tmp_path, tokenizer)
    with pytest.raises(TemplateError, match="named 'default'"):
        template.render([{"role": "user", "content": "x"}])


def test_quoting_a_long_prompt_fits_the_bound(tokenizer: Tokenizer) -> None:
    template = ChatTemplate({"default": "{{ messages|tojson(ensure_ascii=true) }}"}, tokenizer)
    text = "\x00" * 500_000
    assert len(template.encode([{"role": "user", "content": text}])) > 3_000_000
