"""Finds the chat template of a checkpoint folder, in any of the places and forms it is kept.

Must never know how a template is compiled or what it is given.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from camelid.errors import TemplateError
from camelid.json_file import read_json
from camelid.tokenizer_files import read_bytes


def find_templates(folder: Path) -> tuple[dict[str, str], Any, str]:
    """Return the token names, the template (text, named list, or None) and the file it is from."""
    config: dict[str, Any] = {}
    if (folder / "tokenizer_config.json").is_file():
        config = read_json(folder / "tokenizer_config.json", error=TemplateError)
    names = {}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = config.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            names[key] = value
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return names, read_bytes(path, TemplateError).decode("utf-8"), str(path)
        except UnicodeDecodeError as cause:
            raise TemplateError(
                f"[template] {path} is not UTF-8 ({cause}). Download it again."
            ) from cause
    path = folder / "chat_template.json"
    if path.is_file():
        source = read_json(path, error=TemplateError).get("chat_template")
        if source is None:
            raise TemplateError(f"[template] {path} has no `chat_template`. Download it again.")
        return names, source, str(path)
    return names, config.get("chat_template"), str(folder / "tokenizer_config.json")


def named_templates(source: Any, where: str) -> dict[str, str]:
    """Bring the three ways to write templates (text, list of named ones, object) into one."""
    if isinstance(source, str):
        return {"default": source}
    if isinstance(source, dict):
        source = [{"name": name, "template": text} for name, text in source.items()]
    if not isinstance(source, list):
        raise TemplateError(
            f"[template] {where}: chat_template is {type(source).__name__}, expected text or "
            "a list of named templates."
        )
    named: dict[str, str] = {}
    for entry in source:
        name = entry.get("name") if isinstance(entry, dict) else None
        text = entry.get("template") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not isinstance(text, str):
            raise TemplateError(
                f"[template] {where}: a template is {str(entry)[:80]!r}, expected "
                '{"name": ..., "template": ...}.'
            )
        named[name] = text
    return named
