"""Checks a conversation as OpenAI clients send it and brings it into the form templates can render.

Every way in which a template would fail, drop or garble something is settled here, before it runs.
Must never know about templates' text or tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from camelid.errors import InvalidRequest, Unsupported
from camelid.image_parts import IMAGE_KINDS, ImagePart, read_image_part

# "developer" is OpenAI's newer word for "system"; "ipython" is Llama's for "tool".
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "ipython": "ipython",
}
# JSON nests this deep at most: Python's own stack is the limit beyond.
_MAX_DEPTH = 200


@dataclass
class Conversation:
    """Messages and tools of plain JSON types, ready for a template, and the images left out."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    images: list[ImagePart] = field(default_factory=list)  # in order


def read_conversation(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
) -> Conversation:
    """Check and normalise a conversation; the caller's objects are not touched.

    Text parts are joined (templates print a list as Python, or use its first part only), missing
    content becomes "" where tool calls stand for it, and arguments that arrive as a JSON string,
    as OpenAI clients send them, become objects so that they are not quoted twice.

    Raises:
        InvalidRequest: If a message or tool is malformed; the message names its place.
        Unsupported: If images stand where the model takes none.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        raise InvalidRequest(
            f"[chat] messages is {type(messages).__name__}, expected a list of messages such as "
            '{"role": "user", "content": "Hello"}.'
        )
    conversation = Conversation([], _read_tools(tools))
    for place, message in enumerate(messages):
        conversation.messages.append(_read_message(message, f"messages[{place}]", conversation))
    if not conversation.messages:
        raise InvalidRequest("[chat] messages is empty. Send at least one message.")
    if conversation.tools:
        _check_first_turn(conversation.messages)
    return conversation


def _read_message(message: Any, where: str, conversation: Conversation) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequest(
            f"[chat] {where} is {type(message).__name__}, expected an object with role and content."
        )
    plain: dict[str, Any] = _plain(message, where, skip=("content", "tool_calls"))
    role = plain.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise InvalidRequest(
            f"[chat] {where}.role is {role!r:.80}, expected one of {', '.join(_ROLES)}."
        )
    plain["role"] = _ROLES[role]
    if plain.pop("function_call", None):
        raise Unsupported(f"[chat] {where}.function_call: not supported. Send tool_calls instead.")
    calls = message.get("tool_calls")
    # Templates test for the key alone, and drop a message whose list of calls is empty.
    if calls:
        if role != "assistant":
            raise InvalidRequest(f"[chat] {where}.tool_calls: only an assistant calls tools.")
        plain["tool_calls"] = _read_calls(calls, f"{where}.tool_calls")
    content = message.get("content")
    if content is None and role != "assistant":
        raise InvalidRequest(f"[chat] {where}.content is missing, expected text.")
    plain["content"] = _read_content(content, f"{where}.content", plain["role"], conversation)
    return plain


def _read_content(content: Any, where: str, role: str, conversation: Conversation) -> Any:
    """Return text, or a list of parts where images stand between the texts."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list | tuple):
        raise InvalidRequest(
            f"[chat] {where} is {type(content).__name__}, expected text or a list of parts."
        )
    parts: list[dict[str, Any]] = []
    for place, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif kind in IMAGE_KINDS:
            if role != "user":
                raise Unsupported(f"[chat] {where}[{place}]: images belong in user messages.")
            conversation.images.append(read_image_part(part, f"{where}[{place}]"))
            parts.append({"type": "image"})
        else:
            raise InvalidRequest(
                f"[chat] {where}[{place}] is of type {kind!r:.80}, expected "
                '{"type": "text", "text": "..."} or {"type": "image_url", ...}.'
            )
    if any(part["type"] == "image" for part in parts):
        return parts
    return "".join(part["text"] for part in parts)


def _read_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list | tuple):
        raise InvalidRequest(f"[chat] {where} is {type(calls).__name__}, expected a list.")
    plain_calls = []
    for place, call in enumerate(calls):
        plain = _plain(call, f"{where}[{place}]")
        function = plain.get("function") if isinstance(plain, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidRequest(f"[chat] {where}[{place}] has no function.name.")
        function["arguments"] = _read_arguments(
            function.get("arguments"), f"{where}[{place}].function.arguments"
        )
        plain_calls.append(plain)
    return plain_calls


def _read_arguments(arguments: Any, where: str) -> dict[str, Any]:
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = _plain(json.loads(arguments), where)
        except (ValueError, RecursionError) as cause:
            raise InvalidRequest(
                f"[chat] {where} is not JSON ({str(cause)[:120]}), expected an object in JSON."
            ) from cause
    if not arguments:
        return {}
    if not isinstance(arguments, dict):
        raise InvalidRequest(
            f"[chat] {where} is {type(arguments).__name__}, expected an object of names and values."
        )
    return arguments


def _read_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Return the tools, or None for none: templates take an empty list for an announcement."""
    if tools is None:
        return None
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Iterable):
        raise InvalidRequest(f"[chat] tools is {type(tools).__name__}, expected a list.")
    plain_tools = []
    for place, tool in enumerate(tools):
        plain = _plain(tool, f"tools[{place}]")
        if not isinstance(plain, dict) or not tool_name(plain):
            raise InvalidRequest(
                f"[chat] tools[{place}] has no function.name, expected "
                '{"type": "function", "function": {"name": ..., "parameters": ...}}.'
            )
        plain_tools.append(plain)
    return plain_tools or None


def tool_name(tool: Mapping[str, Any]) -> str:
    """Return a tool's name, whether it is wrapped as OpenAI does or bare; '' if it has none."""
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else ""


def _check_first_turn(messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuse what templates that put tools into the first user message would garble in silence.

    They take the first message after the system's for it, whoever speaks, and its content for text.
    """
    first = messages[1:] if messages[0]["role"] == "system" else messages
    if not first or first[0]["role"] != "user":
        raise InvalidRequest(
            "[chat] with tools the first message after the system's must be the user's, got "
            f"{first[0]['role'] if first else 'none'}."
        )
    if not isinstance(first[0]["content"], str):
        raise Unsupported(
            "[chat] images in the first user message together with tools: not supported by chat "
            "templates. Put the images into a later message, or leave the tools out."
        )


def _plain(value: Any, where: str, *, skip: Sequence[str] = (), depth: int = 0) -> Any:
    """Copy a value as plain JSON types: a template must meet no object with methods of its own."""
    if depth > _MAX_DEPTH:
        raise InvalidRequest(f"[chat] {where} is nested deeper than {_MAX_DEPTH} levels.")
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return value if type(value) is kind else kind(value)
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise InvalidRequest(f"[chat] {where} has a key that is no string.")
        return {
            str(key): _plain(item, where, depth=depth + 1)
            for key, item in value.items()
            if key not in skip
        }
    if isinstance(value, list | tuple):
        return [_plain(item, where, depth=depth + 1) for item in value]
    raise InvalidRequest(
        f"[chat] {where} holds a {type(value).__name__}, expected only what JSON can hold."
    )
