"""No config.json, index or quantisation section gives anything but an Error or a valid result."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from camelid.checkpoint import Checkpoint, account
from camelid.config import ModelConfig, parse_config
from camelid.errors import CheckpointError, Unsupported
from camelid.layout import iter_expected
from camelid.sources import layer_sources
from checkpoints import TEXT_CONFIG, VISION_CONFIG, Quantization, write_checkpoint

KNOWN = (CheckpointError, Unsupported)
TEXT = {
    "architectures": ["Llama4ForCausalLM"],
    "quantization_config": Quantization().config(),
    "no_rope_layer_interval": 4,
    "layer_types": None,
    "moe_layers": None,
    **TEXT_CONFIG,
}
FULL = {
    "architectures": ["Llama4ForConditionalGeneration"],
    "model_type": "llama4",
    "image_token_index": 270,
    "text_config": {**TEXT_CONFIG, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
    "vision_config": VISION_CONFIG,
    "quantization_config": Quantization(group_size=0).config(),
}
GENERATION = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 5, "eos_token_id": [1]}

# Values that have broken parsers: wrong types, edges of integer widths, and plausible ones.
SCALARS = st.one_of(
    st.sampled_from(
        [None, True, False, 0, 1, -1, 2, 3, 4, 64, 2**31, 2**63, -(2**63), 2**200, 10**4000, 0.0,
         -0.0, 1e308, float("inf"), float("nan"), 0.5, "", "4", "silu", "chunked_attention",
         "llama3", "re:(a+)+$", "re:.*", "re:[", "\0", "\ud800", "x" * 10_000]
    ),
    st.integers(),
    st.floats(),
    st.text(max_size=6),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List every place in a nested value."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    return [path, *(p for key, inner in items for p in paths(inner, (*path, key)))]


@st.composite
def mutated(draw: st.DrawFn, base: dict[str, Any]) -> dict[str, Any]:
    result: Any = copy.deepcopy(base)
    places = [path for path in paths(base) if path]
    for path in draw(st.lists(st.sampled_from(places), min_size=1, max_size=3)):
        holder = result
        for key in path[:-1]:
            try:
                holder = holder[key]
            except (LookupError, TypeError):  # an earlier change removed it
                break
        else:
            if isinstance(holder, dict):
                if draw(st.booleans()) or path[-1] not in holder:
                    holder[path[-1]] = draw(VALUES)
                else:
                    del holder[path[-1]]
            elif isinstance(holder, list) and path[-1] in range(len(holder)):
                holder[path[-1]] = draw(VALUES)
    return result


def check(config: ModelConfig) -> None:
    """What anyone may rely on in a config that was accepted."""
    assert config.n_heads % config.n_kv_heads == 0
    assert config.head_dim % 2 == 0
    assert 1 <= config.top_k <= config.n_experts
    n_layers = config.n_layers
    assert len(config.is_rope_layer) == len(config.is_chunked_layer) == n_layers
    assert len(config.is_moe_layer) == n_layers
    assert config.attention_chunk_size is not None or not any(config.is_chunked_layer)
    assert all(isinstance(token, int) and token >= 0 for token in config.eos_ids)
    for _, (_, expected) in zip(range(300), iter_expected(config), strict=False):
        assert all(0 < extent < 2**63 for extent in expected.shape)


def parse(data: dict[str, Any], generation: dict[str, Any] | None = None) -> None:
    start = time.perf_counter()
    try:
        check(parse_config(data, generation=generation))
    except KNOWN as error:
        message = str(error)
        assert len(message) < 1000, message
        assert message.startswith("[")
    assert time.perf_counter() - start < 5


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=mutated(TEXT))
def test_mutated_text_config(data: dict[str, Any]) -> None:
    parse(data)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=mutated(FULL))
def test_mutated_multimodal_config(data: dict[str, Any]) -> None:
    parse(data)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=mutated(GENERATION))
def test_mutated_generation_config(data: dict[str, Any]) -> None:
    parse(TEXT, data)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.dictionaries(st.sampled_from([*TEXT, *FULL]), VALUES, max_size=6))
def test_any_object(data: dict[str, Any]) -> None:
    parse({"architectures": ["Llama4ForCausalLM"], **data})


def load_all(folder: Path) -> None:
    """Go all the way to the sources of every layer."""
    try:
        with Checkpoint.open(folder) as checkpoint:
            account(checkpoint)
            for layer in range(checkpoint.config.n_layers):
                layer_sources(checkpoint, layer)
    except KNOWN:
        return


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=mutated(TEXT))
def test_mutated_config_against_real_tensors(tmp_path_factory: Any, data: dict[str, Any]) -> None:
    folder = tmp_path_factory.getbasetemp() / "hostile-config"
    if not folder.exists():
        write_checkpoint(folder, quantization=Quantization())
    # As a stranger's writer might: unpaired surrogates and NaN included.
    (folder / "config.json").write_bytes(dump(data))
    load_all(folder)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(draw=st.data())
def test_mutated_index(tmp_path_factory: Any, draw: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp() / "hostile-index"
    keep = tmp_path_factory.getbasetemp() / "hostile-index.json"
    if not keep.exists():
        write_checkpoint(folder, shards=3)
        keep.write_text((folder / "model.safetensors.index.json").read_text())
    data = draw.draw(mutated(json.loads(keep.read_text())))
    (folder / "model.safetensors.index.json").write_bytes(dump(data))
    load_all(folder)


def dump(data: Any) -> bytes:
    return json.dumps(data).encode()
