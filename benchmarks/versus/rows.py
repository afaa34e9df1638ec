"""The rows of the comparison, and what a row would cost a machine that wastes nothing.

Knows the model's shapes. Must never start anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

INT4_BYTES = 0.5 + 2 / 128  # per weight: codes, and a 16-bit scale for each 128
INT8_BYTES = 1 + 2 / 128


@dataclass(frozen=True)
class Row:
    """`n_prompt` tokens read or `n_answer` generated, in `n_batch` sequences that hold `depth`.

    Sides take turns `n_turns` times; in each, a side's process measures `n_repeats` runs.
    """

    key: str  # what --rows names it by
    n_prompt: int
    n_answer: int
    depth: int = 0
    n_batch: int = 1
    n_turns: int = 5
    n_repeats: int = 1

    @property
    def name(self) -> str:
        """The name as llama-bench writes it."""
        text = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_answer}"
        text += f" @ d{self.depth}" if self.depth else ""
        return text + (f" @ b{self.n_batch}" if self.n_batch > 1 else "")


def all_rows(n_runs: int) -> dict[str, Row]:
    """Return every row by key; `n_runs` of each, fewer of those that take minutes."""
    rows = (
        Row("pp512", 512, 0, n_turns=n_runs),
        Row("tg64", 0, 64, n_turns=n_runs),
        Row("d4096", 0, 64, depth=4096, n_turns=n_runs),
        # Reading 32768 tokens takes minutes: one turn, all runs behind one reading.
        Row("d32768", 0, 64, depth=32768, n_turns=1, n_repeats=n_runs),
        # At 32768 local layers begin a chunk and hold nothing, which favours whoever drops the old
        # one; here they hold 3232 tokens.
        Row("d36000", 0, 64, depth=36000, n_turns=1, n_repeats=n_runs),
        # Behind 16 tokens each; llama-batched-bench measures once per process.
        Row("b8", 0, 32, depth=16, n_batch=8, n_turns=n_runs),
        Row("b32", 0, 32, depth=16, n_batch=32, n_turns=n_runs),
        Row("pp8192", 8192, 0, n_turns=2),
        Row("pp8192-second", 8192, 0, depth=8192, n_turns=2),
    )
    return {row.key: row for row in rows}


@dataclass(frozen=True)
class Work:
    """The least a row needs per token."""

    bytes_read: float  # weights and keys and values, each read once per step
    operations: float  # a multiply and an add are two


def work_per_token(config: dict[str, Any], row: Row, kv_bytes: float = 2) -> Work:
    """Return the least work: INT4 weights, INT8 head, `kv_bytes` per element of the cache."""
    dim, head_dim = config["hidden_size"], config["head_dim"]
    n_heads, n_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    n_experts, step = config["num_local_experts"], config["interleave_moe_layer_step"]
    chunk = config["attention_chunk_size"]
    attention = 2 * dim * head_dim * (n_heads + n_kv_heads)
    expert = 3 * dim * config["intermediate_size"]
    dense = 3 * dim * config["intermediate_size_mlp"]
    # One expert per token: so many different ones for a step's tokens if each is as likely.
    n_tokens = row.n_prompt or row.n_batch
    n_touched = n_experts * (1 - (1 - 1 / n_experts) ** n_tokens)
    weights = active = kv_read = 0.0
    pairs = 0.0  # keys a query meets, summed over layers
    for layer in range(config["num_hidden_layers"]):
        moe = layer % step == step - 1
        weights += attention + (expert * (1 + n_touched) if moe else dense)
        active += attention + (2 * expert if moe else dense)
        before = row.depth if layer % 4 == 3 else row.depth % chunk
        seen = before + (row.n_prompt or row.n_answer) / 2
        if row.n_prompt and layer % 4 != 3 and row.n_prompt > chunk:
            seen = chunk / 2
        pairs += seen
        kv_read += 2 * seen * n_kv_heads * head_dim * kv_bytes
    head = dim * config["vocab_size"]
    per_step = weights * INT4_BYTES + head * INT8_BYTES
    if row.n_prompt:
        operations = 2 * active + 4 * n_heads * head_dim * pairs
        return Work(per_step / row.n_prompt, operations)
    operations = 2 * (active + head) + 4 * n_heads * head_dim * pairs
    return Work(per_step / row.n_batch + kv_read, operations)
