"""The limits of steps against KERNELS' hand-computed ones for Scout on an H200."""

from __future__ import annotations

import pytest

import limits
from random_model import config_of

SCOUT = config_of("scout", None)
READ_GB_S, BF16_TFLOP_S = 4300.0, 790.0
POSITION = 8191  # the last of a chunk: local layers see 8192 keys


def us(work: limits.Work) -> float:
    return 1e6 * work.seconds(READ_GB_S, BF16_TFLOP_S)


# Of one layer and one token. KERNELS.md 3.2, which counts no scales of the head.
def test_parts_of_a_layer() -> None:
    assert limits.qkv(SCOUT, 1).n_bytes == 7168 * 5120 * 66 / 128
    assert us(limits.qkv(SCOUT, 1)) == pytest.approx(4.40, abs=0.01)
    assert us(limits.output(SCOUT, 1)) == pytest.approx(3.14, abs=0.01)
    # Gate, up and down of the shared expert and of one routed: 43.3 + 21.6 MB each.
    assert us(limits.experts(SCOUT, 1)) == pytest.approx(2 * (10.1 + 5.03), rel=0.01)
    assert us(limits.head(SCOUT, 1)) == pytest.approx(241 * (1 + 2 / 128), rel=0.005)
    assert us(limits.attention(SCOUT, 0, POSITION, "bf16")) == pytest.approx(7.8, abs=0.02)
    fp8 = limits.attention(SCOUT, 0, POSITION, "fp8")
    assert us(fp8) == pytest.approx(3.9 * 132 / 128, rel=0.01)


@pytest.mark.parametrize(("n_tokens", "n_hit"), [(1, 1), (8, 6.45), (64, 15.74), (256, 16.0)])
def test_experts_that_tokens_hit(n_tokens: int, n_hit: float) -> None:
    assert limits.experts_hit(SCOUT, n_tokens) == pytest.approx(n_hit, abs=0.01)


def test_local_layers_see_their_chunk_and_global_ones_everything() -> None:
    assert [limits.n_keys(SCOUT, layer, 8192) for layer in range(4)] == [1, 1, 1, 8193]
    assert sum(SCOUT.is_chunked_layer) == 36
    assert limits.kv_token_bytes(SCOUT, "bf16") == 4096
    assert limits.kv_token_bytes(SCOUT, "fp8") == 2048 + 64


# KERNELS.md 3.3, milliseconds of a step behind 8K.
@pytest.mark.parametrize(
    ("kv", "n_sequences", "ms"),
    [("bf16", 1, 2.43), ("bf16", 8, 9.00), ("bf16", 64, 36.7), ("bf16", 256, 109),
     ("fp8", 1, 2.24), ("fp8", 8, 7.50), ("fp8", 64, 24.7)],
)  # fmt: skip
def test_steps_of_decoding(kv: str, n_sequences: int, ms: float) -> None:
    work = limits.decode(SCOUT, n_sequences, POSITION, kv)
    assert us(work) / 1000 == pytest.approx(ms, rel=0.02)


# KERNELS.md 3.4.
def test_prefill() -> None:
    work = limits.prefill(SCOUT, 8192, 8192)
    assert work.n_flops == pytest.approx(2.5e14 + 2.5e13 + 8e12, rel=0.01)
    assert us(work) / 1e6 == pytest.approx(0.35, abs=0.01)
    longer = limits.prefill(SCOUT, 131072, 8192)
    assert us(longer) / 1e6 == pytest.approx(8.2, rel=0.02)


def test_prefill_in_pieces_reads_the_weights_again() -> None:
    whole, pieces = (limits.prefill(SCOUT, 8192, piece) for piece in (8192, 2048))
    assert pieces.n_flops == whole.n_flops
    weights = 48 * (0.515625 * (7168 + 5120 + 17 * 3 * 8192) + 2 * 16) * 5120
    assert pieces.n_bytes - whole.n_bytes == pytest.approx(3 * weights, rel=1e-6)


def test_local_prefill_counts_each_chunk_by_itself() -> None:
    local, all_ = (limits.causal_attention(SCOUT, layer, 8192 + 10) for layer in (0, 3))
    pairs = 4 * 40 * 128
    assert local.n_flops == pairs * (8192 * 8193 // 2 + 55)
    assert all_.n_flops == pairs * 8202 * 8203 // 2


def test_what_nobody_measured_limits_nothing() -> None:
    work = limits.Work(4.3e9, 7.9e14)
    assert work.seconds(4300, 790) == pytest.approx(1.0)
    assert work.seconds(4300, 0) == pytest.approx(0.001)
    assert work.seconds(0, 0) == 0
