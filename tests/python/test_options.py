"""Every sampling and loading option: what it takes, what it refuses, what unset means."""

from __future__ import annotations

import contextlib
import math
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from camelid.errors import InvalidRequest, Unsupported
from camelid.options import LoadOptions, SamplingParams, parse_count, parse_size


def test_everything_is_unset_by_default_and_resolves_to_neutral() -> None:
    resolved = SamplingParams(seed=5).resolve()
    assert resolved.max_tokens is None
    assert (resolved.temperature, resolved.top_p, resolved.top_k, resolved.min_p) == (1, 1, 0, 0)
    assert (resolved.repetition_penalty, resolved.presence_penalty) == (1, 0)
    assert (resolved.stop, resolved.stop_token_ids, resolved.logit_bias) == ((), frozenset(), {})
    assert resolved.seed == 5


def test_unset_seeds_differ_and_set_ones_do_not() -> None:
    unset = SamplingParams()
    assert len({unset.resolve().seed for _ in range(20)}) == 20
    assert SamplingParams(seed=-1).resolve().seed == 2**64 - 1


def test_resolve_lets_the_folder_fill_only_what_is_unset() -> None:
    from camelid.config import GenerationDefaults

    folder = GenerationDefaults(do_sample=True, temperature=0.6, top_p=0.9)
    assert SamplingParams().resolve(folder).temperature == 0.6
    assert SamplingParams().resolve(folder).top_p == 0.9
    assert SamplingParams(temperature=1.0, top_p=1.0).resolve(folder).temperature == 1.0
    assert SamplingParams(temperature=0).resolve(folder).temperature == 0.0
    greedy = GenerationDefaults(do_sample=False, temperature=0.6)
    assert SamplingParams().resolve(greedy).temperature == 0.0
    assert SamplingParams(temperature=0.3).resolve(greedy).temperature == 0.3
    assert SamplingParams().resolve(GenerationDefaults(top_k=-1, top_p=0.0)).top_k == 0


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_tokens", [1, 2**40, np.int32(7)]),
        ("temperature", [0, 0.0, 1, 100, np.float32(0.5), Fraction(1, 2)]),
        ("top_p", [1, 1e-9, 0.5]),
        ("top_k", [-1, 0, 5, 10**9]),
        ("min_p", [0, 1, 0.05]),
        ("repetition_penalty", [0.001, 1, 1000]),
        ("presence_penalty", [-2, 0, 2]),
        ("frequency_penalty", [-2, 0, 2]),
        ("seed", [0, -(2**63), 2**64 - 1]),
        ("logprobs", [0, 20]),
        ("stop", ["x", [], ["a", "b"], ("a",)]),
        ("stop_token_ids", [[], [1, 2], {3}, (np.int64(4),)]),
        ("logit_bias", [{}, {1: -100, np.int64(2): 100.0}]),
        ("ignore_eos", [True, False]),
    ],
)
def test_values_in_range_are_taken(name: str, values: list[Any]) -> None:
    for value in values:
        SamplingParams(**{name: value}).resolve()


NUMBERS = ["1", True, [1], {}, math.nan, math.inf, -math.inf, 1j, b"1", Decimal(1), 10**400]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_tokens", [0, -1, 1.0, 2**70, *NUMBERS]),
        ("temperature", [-0.1, 100.1, *NUMBERS]),
        ("top_p", [0, -0.5, 1.1, *NUMBERS]),
        ("top_k", [-2, 1.5, 2**31, *NUMBERS]),
        ("min_p", [-0.1, 1.1, *NUMBERS]),
        ("repetition_penalty", [0, -1, 1001, *NUMBERS]),
        ("presence_penalty", [-2.1, 2.1, *NUMBERS]),
        ("frequency_penalty", [-2.1, 2.1, *NUMBERS]),
        ("seed", [1.0, 2**64, -(2**63) - 1, "x", True]),
        ("logprobs", [-1, 21, True, 1.0]),
        ("ignore_eos", [1, 0, None, "yes"]),
        ("stop", ["", [""], [1], 5, b"x", ["a" * 1001], ["a"] * 65, {"a": 1}, {"a"}]),
        ("stop_token_ids", [5, "5", [-1], [1.0], [True], [2**31], [None]]),
        ("logit_bias", [[1], {"1": 1}, {-1: 1}, {1: 101}, {1: math.nan}, {1: None}, {True: 1}]),
    ],
)
def test_values_out_of_range_are_refused_by_name(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(InvalidRequest, match=name) as caught:
            SamplingParams(**{name: value})
        message = str(caught.value)
        assert message.startswith("[options] ")
        assert "expected" in message
        assert len(message) < 300


def test_json_schema_is_refused_by_name() -> None:
    with pytest.raises(Unsupported, match="json_schema"):
        SamplingParams(json_schema={"type": "object"})


def test_params_are_frozen_and_copy_what_they_are_given() -> None:
    stops, biases = ["a"], {1: 1.0}
    params = SamplingParams(stop=stops, logit_bias=biases)
    stops.append("b")
    biases[2] = 1.0
    assert params.stop == ("a",)
    assert params.logit_bias == {1: 1.0}
    assert SamplingParams(stop="a").stop == ("a",)
    with pytest.raises(AttributeError):
        params.seed = 3  # type: ignore[misc]
    hash(params)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (4096, 4096), ("4096", 4096), ("32k", 32_000), ("32K", 32_768), ("1M", 2**20),
        ("1m", 10**6), ("25.6k", 25_600), ("0.5K", 512), (np.int64(8), 8),
    ],
)  # fmt: skip
def test_parse_count(text: Any, count: int) -> None:
    assert parse_count("max_context", text) == count


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1000, 1000), ("1000", 1000), ("20GiB", 20 * 2**30), ("20 GiB", 20 * 2**30),
        ("20GB", 20 * 10**9), ("20G", 20 * 10**9), ("1.5KiB", 1536), ("100b", 100),
        ("2tib", 2 * 2**40), ("512MiB", 2**29),
    ],
)  # fmt: skip
def test_parse_size(text: Any, size: int) -> None:
    assert parse_size("memory", text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1", "0", 0, -5, "1e9", "nan", "20XB", "1" * 50, 1.5, True, None, "9" * 39]
)
def test_bad_sizes_and_counts_are_refused(text: Any) -> None:
    with pytest.raises(InvalidRequest, match="memory"):
        parse_size("memory", text)
    with pytest.raises(InvalidRequest, match="max_context"):
        parse_count("max_context", text)


@given(st.text(max_size=60))
def test_any_text_is_a_size_or_an_error(text: str) -> None:
    with contextlib.suppress(InvalidRequest):
        assert parse_size("memory", text) > 0


def test_load_options_take_known_names_and_refuse_others() -> None:
    parsed = LoadOptions.parse(
        device="cuda:1", weights="int4", kv_cache="f32", max_context="8K", memory="1GiB", threads=2
    )
    assert (parsed.max_context, parsed.memory, parsed.threads) == (8192, 2**30, 2)
    for device in ("gpu", "cuda:", "cuda:x", "CPU", 0, None):
        with pytest.raises(InvalidRequest, match="device"):
            LoadOptions.parse(device=device)  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match="kv_cache"):
        LoadOptions.parse(kv_cache="int4")
    with pytest.raises(Unsupported, match='weights="fp8"'):
        LoadOptions.parse(weights="fp8")
    for name in ("weights", "kv_cache", "compute", "head"):
        with pytest.raises(InvalidRequest, match=name):
            LoadOptions.parse(**{name: "q4_k_m"})  # type: ignore[arg-type]
    for threads in (0, -1, 1.0, "2", True):
        with pytest.raises(InvalidRequest, match="threads"):
            LoadOptions.parse(threads=threads)  # type: ignore[arg-type]


def test_a_hostile_repr_does_not_hide_the_error() -> None:
    class Nasty:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    with pytest.raises(InvalidRequest, match="a Nasty"):
        SamplingParams(temperature=Nasty())  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="stop"):
        SamplingParams(stop=SimpleNamespace())  # type: ignore[arg-type]


def test_options_of_images() -> None:
    parse = LoadOptions.parse
    usual = parse()
    assert (usual.image_files, usual.fetch_images, usual.image_cache) == (True, False, None)
    for value, wanted in ((0, 0), ("0", 0), (np.int64(0), 0), ("256MiB", 256 << 20), (7, 7)):
        assert parse(image_cache=value).image_cache == wanted  # type: ignore[arg-type]
    for value in ("0B", "0 MiB", "0.0GiB"):
        assert parse(image_cache=value).image_cache == 0
    for value in (-1, "", "much", 1.5, True, False):
        with pytest.raises(InvalidRequest, match=r"image_cache is .* expected 0 or a positive"):
            parse(image_cache=value)  # type: ignore[arg-type]
    for name in ("image_files", "fetch_images"):
        for flag in (1, 0, "no", None):
            with pytest.raises(InvalidRequest, match=name):
                parse(**{name: flag})  # type: ignore[arg-type]
