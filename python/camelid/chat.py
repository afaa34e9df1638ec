"""Turns a conversation into the prompt its model was trained on, as text or as token ids.

Owns finding the folder's chat template, and the promise that nothing a user writes becomes a
special token. Must never know how a template is run (`template_sandbox.py`) or how an image becomes
tokens: a caller's handler says so.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from camelid.errors import InvalidRequest, TemplateError, Unsupported
from camelid.image_parts import ImagePart
from camelid.messages import Conversation, read_conversation, tool_name
from camelid.template_files import find_templates, named_templates
from camelid.template_sandbox import Template
from camelid.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "ImageHandler"]

ImageHandler = Callable[[ImagePart], Sequence[int]]
"""Given one image of a conversation, returns the token ids that stand for it in the prompt."""

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]

# A rendering may be this much longer than its messages: the frame and the tools' instructions
# are a few KB, and JSON quoting turns one control character into six.
_FRAME_CHARS = 4 << 20
_GROWTH = 16

# For folders without a template: the published prompt format, with tools announced to the system.
# Source: Meta llama-models, models/llama4/prompt_format.md.
_BUILT_IN = """{{- bos_token }}
{%- macro turn(role) -%}
<|header_start|>{{ role }}<|header_end|>{{ '\n\n' }}{{ caller() }}<|eot|>
{%- endmacro %}
{%- macro announce() %}
    {{- 'You can call these functions:\n\n' }}
    {%- for tool in tools %}{{ tool | tojson(indent=4) }}{{ '\n\n' }}{% endfor %}
    {{- 'To call one, answer only with {"name": its name, "parameters": its arguments}.' }}
{%- endmacro %}
{%- if tools and messages[0].role != 'system' %}
    {%- call turn('system') %}{{ announce() }}{% endcall %}
{%- endif %}
{%- for message in messages %}
    {%- call turn('ipython' if message.role == 'tool' else message.role) %}
        {%- if tools and loop.first and message.role == 'system' %}
            {{- announce() }}{{ '\n\n' }}
        {%- endif %}
        {%- if message.content is string %}
            {{- message.content }}
        {%- else %}
            {%- for part in message.content %}
                {{- '<|image|>' if part.type == 'image' else part.text }}
            {%- endfor %}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '{"name": ' ~ (call.function.name | tojson) ~ ', "parameters": ' }}
            {{- (call.function.arguments | tojson) ~ '}' }}
        {%- endfor %}
    {%- endcall %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|header_start|>assistant<|header_end|>\n\n' }}
{%- endif %}
"""
_BUILT_IN_NEEDS = ("<|header_start|>", "<|header_end|>", "<|eot|>")


class ChatTemplate:
    """The chat template of one checkpoint, bound to its tokenizer; safe to share between threads.

    Example:
        template = ChatTemplate.from_folder(folder, Tokenizer.from_folder(folder))
        ids = template.encode([{"role": "user", "content": "Hello"}])
    """

    def __init__(
        self,
        templates: Mapping[str, str],
        tokenizer: Tokenizer,
        *,
        token_names: Mapping[str, str] | None = None,
        where: str = "chat template",
    ) -> None:
        """Compile named templates, of which "default" and "tool_use" are used.

        Args:
            templates: Source by name.
            tokenizer: Encodes what is rendered.
            token_names: What `bos_token`, `eos_token` ... print; BOS and EOT of the tokenizer
                unless given.
            where: Names the source in errors.
        """
        self._tokenizer = tokenizer
        self._where = where
        self._firsts = sorted({name[0] for name in tokenizer.special_tokens})
        self._token_names = {**_default_names(tokenizer), **(token_names or {})}
        self._templates = {
            name: Template(source, where=f"{where} ({name})")
            for name, source in templates.items()
            if name in ("default", "tool_use")
        }
        if not self._templates:
            raise TemplateError(
                f"[template] {where} names {sorted(templates)[:8]}, expected one named 'default'."
            )

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str], tokenizer: Tokenizer) -> ChatTemplate:
        """Read the template of a checkpoint folder.

        Looks at `chat_template.jinja`, `chat_template.json` and `tokenizer_config.json`, in this
        order. A folder without any gets the built-in Llama 4 format.

        Raises:
            TemplateError: If a file is damaged or a template does not compile.
        """
        folder = Path(path)
        names, source, where = find_templates(folder)
        if source is None:
            missing = [name for name in _BUILT_IN_NEEDS if name not in tokenizer.special_tokens]
            if missing:
                raise TemplateError(
                    f"[template] {folder} has no chat template, and its vocabulary lacks "
                    f"{missing[0]}, which the Llama 4 format needs. Add a chat_template.jinja."
                )
            source, where = _BUILT_IN, "the built-in template"
        return cls(named_templates(source, where), tokenizer, token_names=names, where=where)

    def render(
        self, messages: Messages, *, tools: Tools | None = None, add_generation_prompt: bool = True
    ) -> str:
        """Return the prompt as text, for people to read; an image shows as `<|image|>`.

        Do not encode this text: what a user wrote is no longer apart in it. See `encode`.

        Raises:
            InvalidRequest: If a message or tool is malformed.
            TemplateError: If the template fails, or refuses or drops what it was given.
        """
        conversation = read_conversation(messages, tools)
        return self._render(conversation, add_generation_prompt, _Veil.for_nothing())

    def encode(
        self,
        messages: Messages,
        *,
        tools: Tools | None = None,
        add_generation_prompt: bool = True,
        image_handler: ImageHandler | None = None,
    ) -> list[int]:
        """Return the prompt as token ids, BOS included where the template prints it.

        Special tokens come from the template alone. A user's `<|eot|>` is ordinary text.

        Args:
            messages: OpenAI message objects.
            tools: OpenAI tool objects.
            add_generation_prompt: End with the header of the assistant's answer.
            image_handler: Called for each image part, in the order in which they are printed.

        Raises:
            InvalidRequest: If a message or tool is malformed.
            TemplateError: If the template fails, or refuses or drops what it was given.
            Unsupported: If there are images but no handler.
        """
        conversation = read_conversation(messages, tools)
        if conversation.images and image_handler is None:
            raise Unsupported(
                f"[chat] {len(conversation.images)} image(s) in messages, and no image_handler "
                "that says how they become tokens. Pass one, or send text only."
            )
        veil = _Veil(self._firsts, conversation)
        text = self._render(conversation, add_generation_prompt, veil)
        parts = list(self._tokenizer.split_special(text))
        if not conversation.images or image_handler is None:
            return self._encode(parts, veil)
        self._check_places(parts, len(conversation.images))
        order = self._image_order(conversation, add_generation_prompt, veil)
        images = iter([conversation.images[n] for n in order])
        return self._encode(parts, veil, lambda: image_handler(next(images)))

    def _render(self, conversation: Conversation, add_prompt: bool, veil: _Veil) -> str:
        variables = {
            "messages": veil.cover(conversation.messages),
            "tools": veil.cover(conversation.tools),
            "documents": None,
            "add_generation_prompt": add_prompt,
        }
        n_chars = _n_chars(variables)
        text = self._choose(conversation).render(
            {**self._token_names, **variables}, max_chars=_FRAME_CHARS + _GROWTH * n_chars
        )
        for tool in conversation.tools or ():
            if veil.cover(tool_name(tool)) not in text:
                raise TemplateError(
                    f"[template] {self._where} left out tool {tool_name(tool)!r:.80}. It shows "
                    "tools only in some conversations; add a system message, or leave them out."
                )
        return text

    def _choose(self, conversation: Conversation) -> Template:
        names = ("tool_use", "default") if conversation.tools else ("default",)
        for name in names:
            if name in self._templates:
                return self._templates[name]
        raise TemplateError(
            f"[template] {self._where} has a template for tools only. Add one named 'default'."
        )

    def _image_order(
        self, conversation: Conversation, add_prompt: bool, veil: _Veil
    ) -> Sequence[int]:
        """Return the images' numbers in the order in which the template prints them.

        Templates print every image as the same `<|image|>`. So the conversation is rendered once
        more, each image a text that names it; what prints texts elsewhere than images tells little,
        and is believed to print images as they come.
        """
        in_order = range(len(conversation.images))
        if len(in_order) < 2:
            return in_order
        numbers = iter(in_order)
        messages = [_with_marks(message, veil.mark, numbers) for message in conversation.messages]
        try:
            text = self._render(Conversation(messages, conversation.tools), add_prompt, veil)
        except TemplateError:  # it wants images
            return in_order
        order = [int(n) for n in re.findall(f"{veil.mark}([0-9]+){veil.mark}", text)]
        if len(order) == len(in_order) == len(set(order)):
            return order
        if order != sorted(set(order)):
            raise TemplateError(
                f"[template] {self._where} prints parts of messages in another order, or twice, so "
                "which image belongs where is unknown. Send one image, or use the model's own "
                "template."
            )
        return in_order

    def _check_places(self, parts: Sequence[str | int], n_images: int) -> None:
        n_places = parts.count(self._tokenizer.special_tokens.get("<|image|>", -1))
        if n_places != n_images:
            raise TemplateError(
                f"[template] {self._where} placed {n_places} of {n_images} images. It is for text "
                "only, or prints <|image|> where there is none; send no images, or use the "
                "model's own template."
            )

    def _encode(
        self,
        parts: Sequence[str | int],
        veil: _Veil,
        next_image: Callable[[], Sequence[int]] | None = None,
    ) -> list[int]:
        """Return the ids of texts and special tokens, each `<|image|>` replaced by an image's."""
        image_id = self._tokenizer.special_tokens.get("<|image|>")
        ids: list[int] = []
        for part in parts:
            if isinstance(part, str):
                ids += self._tokenizer.encode(veil.uncover(part))
            elif part == image_id and next_image is not None:
                ids += next_image()
            else:
                ids.append(part)
        return ids


def _with_marks(message: dict[str, Any], mark: str, numbers: Iterator[int]) -> dict[str, Any]:
    """Copy a message with each image a text: its number among all images, between marks."""
    if not isinstance(message["content"], list):
        return message
    content = [
        {"type": "text", "text": f"{mark}{next(numbers)}{mark}"}
        if part["type"] == "image"
        else part
        for part in message["content"]
    ]
    return {**message, "content": content}


class _Veil:
    """Replaces, in what users write, every character that could begin a special token.

    The stand-in is one character from a private plane, drawn anew for each prompt. Being one for
    one, it survives whatever templates do to text (trimming, slicing, joining, JSON quoting), and
    pieces of a name that a template puts together again still begin with a stand-in. It is taken
    back after the special tokens were split off, so ordinary text is encoded exactly as written.
    """

    def __init__(self, firsts: Iterable[str], conversation: Conversation) -> None:
        used = set(_characters([conversation.messages, conversation.tools]))
        self._cover: dict[int, str] = {}
        self._uncover: dict[str, str] = {}
        for first in firsts:
            stand_in = _unused(used)
            used.add(stand_in)
            self._cover[ord(first)] = stand_in
            self._uncover[stand_in] = first
            # How JSON writes the stand-in when a template asks for ASCII.
            units = stand_in.encode("utf-16-be").hex()
            self._uncover[f"\\u{units[:4]}\\u{units[4:]}"] = first
        self.mark = _unused(used)  # a character that stands nowhere

    @classmethod
    def for_nothing(cls) -> _Veil:
        """Return a veil that covers nothing."""
        return cls((), Conversation([], None))

    def cover(self, value: Any) -> Any:
        """Copy a JSON value with its texts covered; roles, types and plain keys stay."""
        if isinstance(value, str):
            return value.translate(self._cover)
        if isinstance(value, list):
            return [self.cover(item) for item in value]
        if isinstance(value, dict):
            return {
                # Names of fields are what templates look for. Only the model's own tools and
                # arguments hold other keys, and none that is an identifier spells `<|eot|>`.
                (key if key.isidentifier() else self.cover(key)): (
                    item if key in ("role", "type") and _is_word(item) else self.cover(item)
                )
                for key, item in value.items()
            }
        return value

    def uncover(self, text: str) -> str:
        """Put the characters back that `cover` replaced."""
        for stand_in, first in self._uncover.items():
            text = text.replace(stand_in, first)
        return text


def _unused(used: set[str]) -> str:
    for _ in range(256):
        # Plane 15, for private use: no template, vocabulary name or font gives it a meaning.
        stand_in = chr(0xF0000 + secrets.randbelow(0xFFFE))
        if stand_in not in used:
            return stand_in
    raise InvalidRequest(
        "[chat] the messages use nearly every character of Unicode's private plane 15. "
        "Send text, not binary data."
    )


def _characters(value: Any) -> set[str]:
    if isinstance(value, str):
        return set(value)
    parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
    if isinstance(parts, list):
        return set().union(*map(_characters, parts))
    return set()


def _n_chars(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(_n_chars, [*value.keys(), *value.values()]))
    if isinstance(value, list):
        return sum(map(_n_chars, value))
    return len(value) if isinstance(value, str) else 8


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and value.isidentifier()


def _default_names(tokenizer: Tokenizer) -> dict[str, str]:
    by_id = {token_id: name for name, token_id in tokenizer.special_tokens.items()}
    ids = {"bos_token": tokenizer.bos_id, "pad_token": tokenizer.pad_id}
    names = {key: by_id[token_id] for key, token_id in ids.items() if token_id in by_id}
    for name in ("<|eot|>", "<|end_of_text|>"):
        if name in tokenizer.special_tokens:
            return {**names, "eos_token": name}
    return names
