"""The two dialects of config.json, their defaults, and what is refused by name."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from camelid.config import ModelConfig, RopeScaling, load_config, parse_config
from camelid.errors import CheckpointError, Unsupported
from checkpoints import REMOVE, TEXT_CONFIG, VISION_CONFIG, merged, write_checkpoint


def text(**overrides: Any) -> dict[str, Any]:
    return merged({"architectures": ["Llama4ForCausalLM"], **TEXT_CONFIG}, overrides)


def multimodal(top: dict[str, Any] | None = None, **overrides: Any) -> dict[str, Any]:
    base = {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "text_config": merged(TEXT_CONFIG, overrides),
        "vision_config": VISION_CONFIG,
        "image_token_index": 7,
    }
    return merged(base, top)


def test_empty_text_config_means_the_defaults_of_transformers() -> None:
    config = parse_config({"model_type": "llama4_text"})
    assert (config.dim, config.n_layers, config.n_heads, config.n_kv_heads) == (5120, 48, 40, 8)
    assert (config.head_dim, config.expert_dim, config.dense_dim) == (128, 8192, 16384)
    assert (config.n_experts, config.top_k, config.vocab_size) == (16, 1, 202048)
    assert (config.rms_norm_eps, config.rope_theta, config.rope_scaling) == (1e-5, 500000.0, None)
    assert config.attention_chunk_size == 8192
    assert config.is_rope_layer == tuple((i + 1) % 4 != 0 for i in range(48))
    assert config.is_chunked_layer == config.is_rope_layer
    assert config.is_moe_layer == (True,) * 48
    assert (config.use_qk_norm, config.attn_temperature_tuning) == (True, True)
    assert (config.floor_scale, config.attn_scale) == (8192.0, 0.1)
    assert config.max_position_embeddings == 131072
    assert not config.tie_word_embeddings
    assert (config.bos_id, config.eos_ids, config.pad_id) == (None, (), None)
    assert (config.prefix, config.has_vision) == ("", False)


def test_multimodal_config_has_prefix_vision_and_image_token() -> None:
    config = parse_config(multimodal({"image_token_index": 270}))
    assert config.architecture == "Llama4ForConditionalGeneration"
    assert config.prefix == "language_model."
    assert config.image_token_index == 270
    assert config.vision is not None
    assert (config.vision.dim, config.vision.n_patches, config.vision.tokens_per_tile) == (
        32,
        16,
        4,
    )


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 1e6, "rope_scaling": {"type": "llama3", **TEXT_CONFIG["rope_scaling"]}},
        {"rope_theta": REMOVE, "rope_scaling": REMOVE,
         "rope_parameters": {"rope_theta": 1e6, **TEXT_CONFIG["rope_scaling"]}},
        {"rope_theta": 1e6, "rope_scaling": None,
         "rope_parameters": TEXT_CONFIG["rope_scaling"]},
        # transformers: rope_scaling wins over rope_parameters, a theta inside over one beside.
        {"rope_theta": 7.0, "rope_parameters": {"rope_type": "yarn"},
         "rope_scaling": {"rope_theta": 1e6, **TEXT_CONFIG["rope_scaling"]}},
    ],
)  # fmt: skip
def test_rope_is_read_from_both_dialects(rope: dict[str, Any]) -> None:
    config = parse_config(text(**rope))
    assert config.rope_theta == 1e6
    assert config.rope_scaling == RopeScaling(16.0, 1.0, 1.0, 64)


def test_rope_scaling_null_and_default_mean_none() -> None:
    assert parse_config(text(rope_scaling=None)).rope_scaling is None
    assert parse_config(text(rope_scaling={"rope_type": "default"})).rope_scaling is None


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ({}, 64),
        ({"original_max_position_embeddings": 99}, 99),  # beside the dict wins, as transformers
    ],
)
def test_original_positions(overrides: dict[str, Any], wanted: int) -> None:
    scaling = parse_config(text(**overrides)).rope_scaling
    assert scaling is not None
    assert scaling.original_max_position == wanted


def test_original_positions_fall_back_to_the_context() -> None:
    rope = {k: v for k, v in TEXT_CONFIG["rope_scaling"].items() if not k.startswith("orig")}
    scaling = parse_config(text(rope_scaling=rope)).rope_scaling
    assert scaling is not None
    assert scaling.original_max_position == 4096


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ({"no_rope_layers": []}, (True, True, True, False)),
        ({"no_rope_layers": None}, (True, True, True, False)),
        ({"no_rope_layers": REMOVE}, (True, True, True, False)),
        ({"no_rope_layers": [1, 0, 0, 1]}, (True, False, False, True)),
        ({"no_rope_layer_interval": 2}, (True, False, True, False)),
        ({"no_rope_layer_interval": 1}, (False, False, False, False)),
    ],
)
def test_no_rope_layers_in_every_spelling(
    overrides: dict[str, Any], wanted: tuple[bool, ...]
) -> None:
    config = parse_config(text(**overrides))
    assert config.is_rope_layer == config.is_chunked_layer == wanted


def test_layer_types_choose_the_mask_and_no_rope_layers_the_rotation() -> None:
    kinds = ["full_attention", "chunked_attention", "attention", "chunked_attention"]
    config = parse_config(text(layer_types=kinds, no_rope_layers=[1, 0, 0, 1]))
    assert config.is_rope_layer == (True, False, False, True)
    assert config.is_chunked_layer == (False, True, False, True)


def test_chunk_size_null_means_no_chunking() -> None:
    config = parse_config(text(attention_chunk_size=None))
    assert config.attention_chunk_size is None
    assert config.is_chunked_layer == (False,) * 4
    assert config.is_rope_layer == (True, True, True, False)


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ({}, (True, True, True, True)),
        ({"interleave_moe_layer_step": 2}, (False, True, False, True)),
        ({"interleave_moe_layer_step": 9}, (False, False, False, False)),
        ({"moe_layers": [0, 3, 47]}, (True, False, False, True)),
        ({"moe_layers": []}, (False, False, False, False)),
        ({"moe_layers": None, "interleave_moe_layer_step": 2}, (False, True, False, True)),
    ],
)
def test_moe_layers_in_every_spelling(overrides: dict[str, Any], wanted: tuple[bool, ...]) -> None:
    assert parse_config(text(**overrides)).is_moe_layer == wanted


@pytest.mark.parametrize(
    ("value", "wanted"), [(True, True), (False, False), (4, True), (0, False), (REMOVE, True)]
)
def test_temperature_tuning_as_bool_or_integer(value: Any, wanted: bool) -> None:
    assert parse_config(text(attn_temperature_tuning=value)).attn_temperature_tuning is wanted


def test_null_heads_are_derived() -> None:
    config = parse_config(text(num_key_value_heads=None, head_dim=None))
    assert (config.n_kv_heads, config.head_dim) == (4, 16)


@pytest.mark.parametrize(
    ("top", "inner", "wanted"),
    [
        ({}, {}, False),
        ({}, {"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}, False),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": REMOVE}, True),
    ],
)
def test_tying_follows_the_text_config(
    top: dict[str, Any], inner: dict[str, Any], wanted: bool
) -> None:
    assert parse_config(multimodal(top, **inner)).tie_word_embeddings is wanted


@pytest.mark.parametrize(
    ("generation", "inner", "wanted"),
    [
        ({}, 7, (7,)),
        ({}, [7, 8], (7, 8)),
        ({}, None, ()),
        ({}, -1, ()),
        ({"eos_token_id": [1, 2]}, 7, (1, 2)),
        ({"eos_token_id": None}, 7, (7,)),
    ],
)
def test_end_ids_as_number_or_list_and_generation_first(
    generation: dict[str, Any], inner: Any, wanted: tuple[int, ...]
) -> None:
    assert parse_config(text(eos_token_id=inner), generation=generation).eos_ids == wanted


def test_generation_config_is_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    assert load_config(tmp_path).generation.temperature is None
    generation = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 5}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    config = load_config(tmp_path)
    assert (config.generation.do_sample, config.generation.temperature) == (True, 0.6)
    assert (config.generation.top_p, config.generation.top_k, config.eos_ids) == (0.9, None, (5,))


def test_first_scout_release_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    rope = {**TEXT_CONFIG["rope_scaling"], "factor": 8.0, "high_freq_factor": 4.0}
    with caplog.at_level(logging.WARNING, logger="camelid"):
        parse_config(text(rope_scaling=rope))
        assert not caplog.records
        config = parse_config({"model_type": "llama4_text", "rope_scaling": rope})
    assert "first release" in caplog.text
    assert config.rope_scaling is not None
    assert config.rope_scaling.factor == 8.0  # believed all the same


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "'LlamaForCausalLM'"),
        ({"model_type": "llama"}, "'llama'"),
        ({}, "no architecture"),
        (text(attention_bias=True), "attention_bias"),
        (text(hidden_act="gelu"), "'gelu'"),
        (text(rope_scaling={"rope_type": "yarn", "factor": 2}), "'yarn'"),
        (text(rope_scaling={"full_attention": {}, "chunked_attention": {}}), "by layer type"),
        (text(rope_scaling={"rope_type": "default", "partial_rotary_factor": 0.5}), "partial"),
        (text(layer_types=["sliding_attention"] * 4), "'sliding_attention'"),
        (text(quantization_config={"quant_method": "gptq"}), "GPTQ"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named_with_what_is(data: dict[str, Any], named: str) -> None:
    with pytest.raises(Unsupported) as caught:
        parse_config(data)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": "5120"}, "hidden_size is '5120'"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": 1 << 40}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"hidden_size": 10**5000}, "hidden_size"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "divisor of num_attention_heads = 4"),
        ({"head_dim": 7}, "even"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok"),
        ({"no_rope_layers": [1, 0]}, "4 times"),
        ({"no_rope_layers": [1, 0, 1, 2]}, "4 times"),
        ({"no_rope_layers": "none"}, "4 times"),
        ({"no_rope_layer_interval": 0}, "no_rope_layer_interval"),
        ({"layer_types": ["full_attention"]}, "4 entries"),
        ({"layer_types": {"a": 1}}, "list of strings"),
        ({"moe_layers": [-1]}, "moe_layers"),
        ({"moe_layers": ["1"]}, "moe_layers"),
        ({"interleave_moe_layer_step": 0}, "interleave_moe_layer_step"),
        ({"attention_chunk_size": 0}, "attention_chunk_size"),
        ({"attn_temperature_tuning": "yes"}, "attn_temperature_tuning"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"floor_scale": 0}, "floor_scale"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "factor is missing"),
        ({"rope_scaling": {**TEXT_CONFIG["rope_scaling"], "high_freq_factor": 0.5}}, "high_freq"),
        ({"eos_token_id": "<|eot|>"}, "eos_token_id"),
        ({"eos_token_id": [1, [2]]}, "eos_token_id"),
        ({"quantization_config": 4}, "quantization_config"),
    ],
)
def test_impossible_value_is_named_with_what_was_wanted(
    overrides: dict[str, Any], named: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_config(text(**overrides))
    assert named in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"num_attention_heads": 5}, "divisor of hidden_size"),
        ({"image_size": 7}, "at least one patch"),
        ({"patch_size": [14, 7]}, "patch_size"),
    ],
)
def test_impossible_vision_value_is_named(overrides: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        parse_config(multimodal({"vision_config": {**VISION_CONFIG, **overrides}}))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[]", "expected an object"),
        (b'{"hidden_size": ' + b"9" * 9999 + b"}", "not valid JSON"),
        (b"[" * 200_000, "nested too deeply"),
    ],
    ids=["empty", "open", "not utf-8", "list", "digits", "deep"],
)
def test_damaged_config_file_is_refused(tmp_path: Path, content: bytes, named: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=named):
        load_config(tmp_path)


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        load_config(tmp_path)


def test_config_is_hashable_apart_from_its_parts() -> None:
    config = parse_config(text())
    assert isinstance(config, ModelConfig)
    with pytest.raises(AttributeError):
        config.dim = 1  # type: ignore[misc]
