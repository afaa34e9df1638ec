"""What README promises of int8 activations, on fewer documents than fast_accuracy.py reads."""

from __future__ import annotations

import pytest

import camelid
from fast_accuracy import compare, demo_prompts


@pytest.mark.slow
def test_int8_activations_move_the_demo_model_by_less_than_a_thousandth_of_a_nat() -> None:
    folder = camelid.demo_model_path()
    fast = {"compute": "fast", "head": "stored", "kv_cache": "f32"}
    found = compare(folder, demo_prompts(folder, 20), "auto", fast)
    assert 0 < found["mean_kl_nats"] < 1e-3  # measured: 4.9e-4 over 20 documents
    assert found["same_top_token"] > 0.99
