"""What callers may ask for: how to sample, and how to load. Checks every value at the door.

A sampling field left at None is *unset*: `resolve` fills it with the model's own recommendation
(chat) or with the neutral value (generate), so a default is never mistaken for a wish.
Must never know the engine's types, files or text.
"""

from __future__ import annotations

import numbers
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from camelid.errors import InvalidRequest, Unsupported

if TYPE_CHECKING:
    from camelid.config import GenerationDefaults

__all__ = [
    "LoadOptions",
    "ResolvedSampling",
    "SamplingParams",
    "params_for",
    "parse_count",
    "parse_size",
]

MAX_LOGPROBS = 20  # as OpenAI's top_logprobs
MAX_STOPS = 64
MAX_STOP_CHARS = 1000  # each token's text is compared with every prefix of every stop string
_MAX_ID = (1 << 31) - 1
_MAX_BIASES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose the tokens of one request; a field left at None is unset.

    Unset fields are neutral in `LLM.generate` and `LLM.stream` (temperature 1, nothing cut off),
    and follow the folder's generation_config.json in `LLM.chat` and `LLM.stream_chat`.

    Args:
        max_tokens: Most tokens to generate; unset, 256 or what the context still holds.
        temperature: 0 is greedy, 1 is the model's own distribution; at most 100.
        top_p: Keep the likeliest tokens that together reach this probability; 1 keeps all.
        top_k: Keep this many of the likeliest tokens; 0 or -1 keeps all.
        min_p: Keep tokens at least this times as likely as the likeliest; 0 keeps all.
        repetition_penalty: Divide positive logits of tokens seen in prompt or answer by this, and
            multiply negative ones; 1 is neutral.
        presence_penalty: Subtract from the logits of tokens already in the answer, -2 to 2.
        frequency_penalty: Subtract for each time a token is in the answer, -2 to 2.
        seed: The same seed gives the same text whatever else runs; unset, each request draws one.
        stop: A string, or strings, at which the answer ends; they are not part of the text.
        stop_token_ids: Ids at which the answer ends, besides the model's own.
        ignore_eos: Go on past the model's own end tokens.
        logprobs: Report each token's log probability and those of this many best, 0 to 20.
        logit_bias: Added to the logits of these token ids, -100 to 100.
        json_schema: Not supported by this version.

    Raises:
        InvalidRequest: If a value has the wrong type or lies outside its range.
        Unsupported: If `json_schema` is given.

    Example:
        camelid.SamplingParams(max_tokens=64, temperature=0)
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    json_schema: Any = field(default=None, hash=False)

    def __post_init__(self) -> None:
        if self.json_schema is not None:
            raise Unsupported(
                "[options] json_schema: structured output is not supported by this version. "
                "Leave it out and check the answer, or ask for JSON in the prompt."
            )
        checked = {
            "max_tokens": _integer("max_tokens", self.max_tokens, 1, 1 << 40),
            "temperature": _number("temperature", self.temperature, 0.0, 100.0),
            "top_p": _number("top_p", self.top_p, 0.0, 1.0, above_low=True),
            "top_k": _integer("top_k", self.top_k, -1, _MAX_ID),
            "min_p": _number("min_p", self.min_p, 0.0, 1.0),
            "repetition_penalty": _number(
                "repetition_penalty", self.repetition_penalty, 0.001, 1000.0
            ),
            "presence_penalty": _number("presence_penalty", self.presence_penalty, -2.0, 2.0),
            "frequency_penalty": _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0),
            "seed": _integer("seed", self.seed, -(1 << 63), (1 << 64) - 1),
            "stop": _stops(self.stop),
            "stop_token_ids": _ids(self.stop_token_ids),
            "ignore_eos": _flag("ignore_eos", self.ignore_eos),
            "logprobs": _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS),
            "logit_bias": _biases(self.logit_bias),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def resolve(self, defaults: GenerationDefaults | None = None) -> ResolvedSampling:
        """Fill in every unset field, from `defaults` where given; an unset seed is drawn."""
        advised = _advice(defaults)

        def pick(name: str, neutral: float) -> float:
            value = getattr(self, name)
            if value is None:
                value = advised.get(name)
            return neutral if value is None else value

        seed = secrets.randbits(64) if self.seed is None else self.seed
        return ResolvedSampling(
            max_tokens=self.max_tokens,
            temperature=pick("temperature", 1.0),
            top_p=pick("top_p", 1.0),
            top_k=max(int(pick("top_k", 0)), 0),
            min_p=pick("min_p", 0.0),
            repetition_penalty=pick("repetition_penalty", 1.0),
            presence_penalty=pick("presence_penalty", 0.0),
            frequency_penalty=pick("frequency_penalty", 0.0),
            seed=seed & ((1 << 64) - 1),
            stop=tuple(self.stop or ()),
            stop_token_ids=frozenset(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
            logprobs=self.logprobs,
            logit_bias=dict(self.logit_bias or {}),
        )


@dataclass(frozen=True)
class ResolvedSampling:
    """`SamplingParams` with nothing left open but max_tokens, which depends on the prompt."""

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None
    logit_bias: dict[int, float] = field(default_factory=dict, hash=False)

    def largest_id(self) -> int:
        """Return the largest token id named anywhere, -1 if none is."""
        return max([*self.stop_token_ids, *self.logit_bias, -1])


def _advice(defaults: GenerationDefaults | None) -> dict[str, float | None]:
    if defaults is None:
        return {}
    advised: dict[str, float | None] = {
        name: getattr(defaults, name)
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    }
    if defaults.do_sample is False:  # transformers then ignores the temperature
        advised["temperature"] = 0.0
    if advised["top_p"] == 0.0:  # no set of tokens reaches it; transformers refuses it
        advised["top_p"] = None
    return advised


def params_for(params: Any, n_prompts: int) -> list[SamplingParams]:
    """Return one SamplingParams for each prompt.

    Raises:
        InvalidRequest: If `params` is none, nor a list of as many.
    """
    each = list(params) if isinstance(params, (list, tuple)) else [params] * n_prompts
    if len(each) != n_prompts:
        raise InvalidRequest(
            f"[options] got {len(each)} params for {n_prompts} prompts, expected one for all or "
            "one for each."
        )
    for item in each:
        if item is not None and not isinstance(item, SamplingParams):
            raise InvalidRequest(
                f"[options] params is {type(item).__name__}, expected camelid.SamplingParams."
            )
    return [SamplingParams() if item is None else item for item in each]


_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")
_WEIGHTS = ("auto", "bf16", "int8", "int4")
_KV_CACHES = ("auto", "f32", "bf16", "fp8", "int8")


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How to load a model; see `camelid.LLM` for what each option means."""

    device: str = "auto"
    weights: str = "auto"
    kv_cache: str = "auto"
    compute: str = "auto"
    head: str = "auto"
    max_context: int | None = None  # tokens
    memory: int | None = None  # bytes
    threads: int | None = None
    image_files: bool = True
    fetch_images: bool = False
    image_cache: int | None = None  # bytes; 0: none; None: what fits

    @classmethod
    def parse(
        cls,
        *,
        device: str = "auto",
        weights: str = "auto",
        kv_cache: str = "auto",
        compute: str = "auto",
        head: str = "auto",
        max_context: int | str | None = None,
        memory: int | str | None = None,
        threads: int | None = None,
        image_files: bool = True,
        fetch_images: bool = False,
        image_cache: int | str | None = None,
    ) -> LoadOptions:
        """Check options as callers write them: "20GiB", "32K", 4.

        Raises:
            InvalidRequest: If a value has the wrong type, form or range.
            Unsupported: If it names something this version does not have.
        """
        if not isinstance(device, str) or not _DEVICE.fullmatch(device):
            raise _wrong("device", device, 'auto, cpu, cuda or cuda:N, for example "cpu"')
        return cls(
            device=device,
            weights=_choice("weights", weights, _WEIGHTS, planned=("fp8",)),
            kv_cache=_choice("kv_cache", kv_cache, _KV_CACHES, planned=("int4",)),
            compute=_choice("compute", compute, ("auto", "exact", "fast")),
            head=_choice("head", head, ("auto", "stored", "int8")),
            max_context=None if max_context is None else parse_count("max_context", max_context),
            memory=None if memory is None else parse_size("memory", memory),
            threads=_integer("threads", threads, 1, 1024),
            image_files=_flag("image_files", image_files),
            fetch_images=_flag("fetch_images", fetch_images),
            image_cache=(
                None if image_cache is None else parse_size("image_cache", image_cache, least=0)
            ),
        )


# 32k is 32,000 and 32K is 32,768, as in vLLM; m and g likewise. KB and KiB differ only in sizes.
_COUNT = re.compile(r"(\d+(?:\.\d+)?)([kKmMgG]?)")
_COUNT_UNITS = {"": 1, "k": 10**3, "K": 2**10, "m": 10**6, "M": 2**20, "g": 10**9, "G": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?)b?|b)?", re.IGNORECASE)


def parse_count(name: str, value: int | str) -> int:
    """Return a positive number of tokens from 4096, "4096", "32K" (32,768) or "32k" (32,000)."""
    wanted = 'a positive number of tokens, 2^40 at most, such as 32768 or "32K"'
    if isinstance(value, str):
        match = _COUNT.fullmatch(value.strip())
        if match is None or len(value) > 40 or ("." in match[1] and not match[2]):
            raise _wrong(name, value, wanted)
        value = _scaled(match[1], _COUNT_UNITS[match[2]])
    number = _whole(value)
    if number is None or not 0 < number <= 1 << 40:
        raise _wrong(name, value, wanted)
    return number


def parse_size(name: str, value: int | str, *, least: int = 1) -> int:
    """Return a number of bytes from 1000, "1000", "20GiB" (2**30), "20GB" (10**9)."""
    wanted = 'a positive number of bytes such as 20000000000 or "20GiB"'
    if least == 0:
        wanted = f"0 or {wanted}"
    if isinstance(value, str):
        match = _SIZE.fullmatch(value.strip())
        if match is None or len(value) > 40:
            raise _wrong(name, value, wanted)
        power = " kmgt".index((match[2] or " ").lower())
        value = _scaled(match[1], (1024 if match[3] else 1000) ** power)
    number = _whole(value)
    if number is None or not least <= number <= 1 << 60:
        raise _wrong(name, value, wanted)
    return number


def _scaled(digits: str, unit: int) -> int:
    return int(digits) * unit if digits.isdigit() else int(float(digits) * unit)


def _wrong(name: str, got: object, wanted: str) -> InvalidRequest:
    try:
        shown = repr(got)
    except Exception:  # a caller's object may do anything
        shown = f"a {type(got).__name__}"
    if len(shown) > 80:
        shown = f"{shown[:77]}..."
    return InvalidRequest(f"[options] {name} is {shown}, expected {wanted}.")


def _whole(value: Any) -> int | None:
    """Return an int for Python's and NumPy's integers, None for all else, True and 1.0 included."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        return None
    return int(value)


def _integer(name: str, value: Any, low: int, high: int) -> int | None:
    if value is None:
        return None
    number = _whole(value)
    if number is None or not low <= number <= high:
        raise _wrong(name, value, f"a whole number from {low} to {high}, or None")
    return number


def _number(
    name: str, value: Any, low: float, high: float, *, above_low: bool = False
) -> float | None:
    if value is None:
        return None
    wanted = f"a number {'above' if above_low else 'from'} {low:g} {'up ' * above_low}to {high:g}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise _wrong(name, value, wanted)
    try:
        number = float(value)
    except OverflowError:  # an integer of 400 digits
        raise _wrong(name, value, wanted) from None
    # NaN fails every comparison.
    if not (low < number if above_low else low <= number) or not number <= high:
        raise _wrong(name, value, wanted)
    return number


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong(name, value, "True or False")
    return value


def _choice(name: str, value: Any, known: Sequence[str], *, planned: Sequence[str] = ()) -> str:
    wanted = f"{', '.join(known[:-1])} or {known[-1]}"
    if isinstance(value, str):
        if value in known:
            return value
        if value in planned:
            raise Unsupported(
                f'[options] {name}="{value}" is not supported by this version, expected {wanted}.'
            )
    raise _wrong(name, value, wanted)


def _stops(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    stops = (value,) if isinstance(value, str) else value
    wanted = f"a string, or at most {MAX_STOPS} strings, of 1 to {MAX_STOP_CHARS} characters"
    if not isinstance(stops, Sequence) or isinstance(stops, (bytes, bytearray, memoryview)):
        raise _wrong("stop", value, wanted)
    if len(stops) > MAX_STOPS:
        raise _wrong("stop", f"a list of {len(stops)}", wanted)
    for stop in stops:
        if not isinstance(stop, str) or not 0 < len(stop) <= MAX_STOP_CHARS:
            raise _wrong("stop", stop, wanted)
    return tuple(stops)


def _ids(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    wanted = "a list of token ids"
    if not isinstance(value, (Sequence, set, frozenset)) or isinstance(value, (str, bytes)):
        raise _wrong("stop_token_ids", value, wanted)
    return tuple(_token_id("stop_token_ids", item) for item in value)


def _token_id(name: str, value: Any) -> int:
    number = _whole(value)
    if number is None or not 0 <= number <= _MAX_ID:
        raise _wrong(name, value, "token ids, which are whole numbers from 0 to 2**31 - 1")
    return number


def _biases(value: Any) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping) or len(value) > _MAX_BIASES:
        raise _wrong("logit_bias", value, "a mapping of token ids to numbers from -100 to 100")
    biases = {}
    for key, bias in value.items():
        token_id = _token_id("logit_bias", key)
        number = _number(f"logit_bias[{token_id}]", bias, -100.0, 100.0)
        if number is None:
            raise _wrong(f"logit_bias[{token_id}]", bias, "a number from -100 to 100")
        biases[token_id] = number
    return biases
