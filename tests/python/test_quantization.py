"""Which module gets which scheme, and which formats are refused by name."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from camelid.errors import CheckpointError, Unsupported
from camelid.quantization import Scheme, parse_quantization
from checkpoints import Quantization

LAYER = "language_model.model.layers.3"


def config(**weights: Any) -> dict[str, Any]:
    data = deepcopy(Quantization(group_size=128).config())
    data["config_groups"]["group_0"]["weights"].update(weights)
    return data


def test_released_recipe_quantises_experts_and_shared_expert_only() -> None:
    parsed = parse_quantization(config())
    int4 = Scheme(4, 128, symmetric=True)
    assert parsed.scheme_for(f"{LAYER}.feed_forward.experts.5.gate_proj") == int4
    assert parsed.scheme_for(f"{LAYER}.feed_forward.shared_expert.down_proj") == int4
    for name in (
        f"{LAYER}.self_attn.q_proj",
        f"{LAYER}.feed_forward.router",
        "language_model.lm_head",
        "vision_model.model.layers.0.mlp.fc1",
        "multi_modal_projector.linear_1",
    ):
        assert parsed.scheme_for(name) is None


@pytest.mark.parametrize(
    ("weights", "wanted"),
    [
        ({}, Scheme(4, 128, True)),
        ({"group_size": 32}, Scheme(4, 32, True)),
        ({"strategy": "channel", "group_size": None}, Scheme(4, 0, True)),
        ({"strategy": None, "group_size": -1}, Scheme(4, 0, True)),
        ({"strategy": None}, Scheme(4, 128, True)),
        ({"symmetric": False}, Scheme(4, 128, False)),
        ({"num_bits": 8}, Scheme(8, 128, True)),
        ({"actorder": "weight"}, Scheme(4, 128, True)),
        ({"actorder": "static"}, Scheme(4, 128, True)),
        ({"type": "INT", "strategy": "GROUP"}, Scheme(4, 128, True)),
    ],
)
def test_scheme(weights: dict[str, Any], wanted: Scheme) -> None:
    assert parse_quantization(config(**weights)).scheme_for("x.experts.0.up_proj") == wanted


def test_most_specific_target_wins() -> None:
    data = config()
    group = data["config_groups"]["group_0"]
    for name, bits, target in (("g1", 8, r"re:.*down_proj"), ("g2", 4, "a.down_proj")):
        data["config_groups"][name] = {
            "targets": [target],
            "weights": {"num_bits": bits, "group_size": 64},
            "input_activations": None,
        }
    parsed = parse_quantization(data)
    assert group["targets"] == ["Linear"]
    assert parsed.scheme_for("a.up_proj") == Scheme(4, 128, True)
    assert parsed.scheme_for("b.down_proj") == Scheme(8, 64, True)
    assert parsed.scheme_for("a.down_proj") == Scheme(4, 64, True)


def test_ignore_by_name_pattern_and_class() -> None:
    data = config()
    data["ignore"] = ["a.b", "re:^c", "Llama4Router", "Llama4TextAttention"]
    parsed = parse_quantization(data)
    assert parsed.scheme_for("a.b") is None
    assert parsed.scheme_for("c.d") is None
    assert parsed.scheme_for("x.feed_forward.router") is None
    assert parsed.scheme_for("x.a.b") is not None
    # As in compressed-tensors: a class names modules of that class, not the linears inside them.
    assert parsed.scheme_for("x.self_attn.q_proj") is not None


def test_no_target_matches() -> None:
    data = config()
    data["config_groups"]["group_0"]["targets"] = ["re:.*experts.*"]
    data["ignore"] = None
    assert parse_quantization(data).scheme_for("lm_head") is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"quant_method": "fp8"}, "'fp8'"),
        ({"quant_method": "fbgemm_fp8"}, "fbgemm"),
        ({"quant_method": "gptq"}, "GPTQ"),
        ({"quant_method": "awq"}, "AWQ"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"quant_method": "modelopt"}, "ModelOpt"),
        ({"quant_method": ["x"]}, "x"),
        ({"format": "float-quantized"}, "'float-quantized'"),
        ({"format": "nvfp4-pack-quantized"}, "nvfp4"),
        ({"format": "marlin-24"}, "marlin"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24"),
        ({"transform_config": {"config_groups": {"r1": {}}}}, "transform_config"),
        ({"ignore": ["re:(?i)x"]}, "pattern"),
        ({"ignore": [f"re:{i}" for i in range(200)]}, "200 patterns"),
    ],
)
def test_other_formats_are_refused_with_what_is_supported(
    change: dict[str, Any], named: str
) -> None:
    with pytest.raises(Unsupported) as caught:
        parse_quantization({**config(), **change})
    assert named in str(caught.value)
    assert "Supported:" in str(caught.value) or "at most" in str(caught.value)


@pytest.mark.parametrize(
    ("weights", "named"),
    [
        ({"type": "float"}, "float"),
        ({"num_bits": 3}, "3 bits"),
        ({"dynamic": True}, "dynamic"),
        ({"actorder": "group"}, "'group'"),
        ({"actorder": True}, "actorder"),
        ({"strategy": "tensor", "group_size": None}, "tensor"),
        ({"strategy": "block", "group_size": None}, "block"),
    ],
)
def test_other_weights_are_refused(weights: dict[str, Any], named: str) -> None:
    with pytest.raises(Unsupported, match=named):
        parse_quantization(config(**weights))


def test_quantised_activations_are_refused() -> None:
    data = config()
    data["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
    with pytest.raises(Unsupported, match="input_activations"):
        parse_quantization(data)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"config_groups": {}}, "config_groups is empty"),
        ({"config_groups": []}, "config_groups"),
        ({"config_groups": {"W4A16": ["Linear"]}}, "W4A16"),
        ({"config_groups": {"g": {"targets": ["Linear"]}}}, "weights is missing"),
        ({"config_groups": {"g": {"weights": {}}}}, "targets is missing"),
        ({"config_groups": {"g": {"targets": "Linear", "weights": {}}}}, "targets"),
        ({"ignore": "lm_head"}, "ignore"),
    ],
)
def test_damaged_config_is_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        parse_quantization({**config(), **change})


@pytest.mark.parametrize(
    "weights",
    [{"group_size": 0}, {"group_size": "128"}, {"strategy": "channel"}, {"num_bits": "4"},
     {"symmetric": "yes"}, {"group_size": None, "strategy": "group"}],
)  # fmt: skip
def test_damaged_weights_are_refused(weights: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError):
        parse_quantization(config(**weights))
