"""A model of Scout's layers whose weights are random, and no larger on the host than one matrix.

All matrices are views into a few shared buffers, each at another place, so that no two experts of a
layer are alike: what is measured is the real model's work without the real model's file. Scales
keep activations finite through any number of layers (tools/make_slice.py). Routers are random, so
that random tokens spread over the experts.

    embedding, head   row i is what begins at value i of one row: rows differ, and take no memory
    INT4              words of one buffer as large as the largest matrix, begun somewhere else
    scales            bf16, all the same
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools")]
sys.path.append(str(ROOT / "python"))  # where nobody installed it

from camelid.config import ModelConfig, parse_config  # noqa: E402
from camelid.layout import (  # noqa: E402
    Linear,
    attention_linears,
    dense_linears,
    expert_linears,
    router_linear,
    shared_linears,
)
from camelid.sources import LayerSources, LinearSource  # noqa: E402
from shapes import SHAPES  # noqa: E402

if TYPE_CHECKING:
    from camelid import _core

LAYERS, VOCAB = 48, 202048  # of both released models
# Of the same kinds of layers, for the emulated GPU.
TINY = SHAPES["scout"] | {
    "vocab_size": 512,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 128,
    "intermediate_size_mlp": 256,
    "num_local_experts": 4,
    "attention_chunk_size": 64,
    "max_position_embeddings": 1024,
}
ALL_SHAPES = SHAPES | {"tiny": TINY}

GROUP = 128
BODY_SCALE = 2.0**-9  # of codes -8 to 7: an output is 0.6 of a normed input's size
EMBEDDING_SIZE, HEAD_SIZE = 0.5, 2.0**-6  # values lie between this and twice this, of either sign


def config_of(shape: str, n_layers: int | None) -> ModelConfig:
    data = {"num_hidden_layers": LAYERS, "vocab_size": VOCAB} | ALL_SHAPES[shape]
    return parse_config(data if n_layers is None else data | {"num_hidden_layers": n_layers})


def random_bf16(rng: np.random.Generator, n: int, size: float) -> NDArray[np.uint16]:
    """Return bits of values of either sign, in size between `size`, a power of two, and its double.

    No bits drawn at random are not a number, or large.
    """
    exponent = (127 + int(math.log2(size))) << 7
    return rng.integers(0, 1 << 16, n, np.uint16) & np.uint16(0x807F) | np.uint16(exponent)


class RandomModel:
    """What an engine is loaded from."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        self.config = config
        rng = np.random.default_rng(seed)
        dim, heads = config.dim, config.n_heads * config.head_dim
        wide = max(config.expert_dim, config.dense_dim)
        largest = max(wide * dim, heads * dim)  # values of an INT4 matrix
        self._words = rng.integers(0, 1 << 32, largest // 8 + (largest >> 6), np.uint32)
        scale = np.float32(BODY_SCALE).view(np.uint32) >> 16
        self._scales = np.full(largest // min(GROUP, dim, config.expert_dim), scale, np.uint16)
        n_rows = max(config.vocab_size + dim, config.n_experts * dim * 2)
        self._wide = random_bf16(rng, n_rows, EMBEDDING_SIZE)
        self._narrow = random_bf16(rng, n_rows, HEAD_SIZE)
        self._norm = np.ones(dim, np.float32)

    def load(self, engine: _core.Engine) -> None:
        """Pack everything, as a checkpoint is packed."""
        engine.load_embedding(self._overlapping("embedding", self._wide))
        engine.load_head(self._norm, self._overlapping("head", self._narrow))
        for layer in range(self.config.n_layers):
            engine.load_layer(self.layer(layer))
        engine.finish_loading()

    def layer(self, layer: int) -> LayerSources:
        config = self.config
        q, k, v, o = map(self._int4, attention_linears(config, layer))
        moe = config.is_moe_layer[layer]
        experts = range(config.n_experts) if moe else []
        return LayerSources(
            input_norm=self._norm,
            post_norm=self._norm,
            q=q,
            k=k,
            v=v,
            o=o,
            router=self._router(router_linear(config, layer)) if moe else None,
            experts=[self._mlp(expert_linears(config, layer, expert)) for expert in experts],
            shared=self._mlp(shared_linears(config, layer)) if moe else None,
            dense=None if moe else self._mlp(dense_linears(config, layer)),
        )

    def _mlp(
        self, linears: tuple[Linear, Linear, Linear]
    ) -> tuple[LinearSource, LinearSource, LinearSource]:
        gate, up, down = map(self._int4, linears)
        return gate, up, down

    def _int4(self, linear: Linear) -> LinearSource:
        group = min(GROUP, linear.in_dim)
        n_words = linear.out_dim * linear.in_dim // 8
        first = crc32(linear.name.encode()) % (len(self._words) - n_words + 1)
        n_scales = linear.out_dim * linear.in_dim // group
        return LinearSource(
            name=linear.name,
            file="random",
            out_dim=linear.out_dim,
            in_dim=linear.in_dim,
            bits=4,
            group_size=group,
            words=self._words[first : first + n_words].view(np.uint8),
            scales=self._scales[:n_scales].view(np.uint8),
            scale_dtype="BF16",
        )

    def _router(self, linear: Linear) -> LinearSource:
        n = linear.out_dim * linear.in_dim
        first = crc32(linear.name.encode()) % (len(self._narrow) - n + 1)
        return self._plain(linear, self._narrow[first : first + n], linear.in_dim)

    def _overlapping(self, name: str, values: NDArray[np.uint16]) -> LinearSource:
        linear = Linear(name, self.config.vocab_size, self.config.dim)
        return self._plain(linear, values, 1)

    def _plain(self, linear: Linear, values: NDArray[np.uint16], row_stride: int) -> LinearSource:
        return LinearSource(
            name=linear.name,
            file="random",
            out_dim=linear.out_dim,
            in_dim=linear.in_dim,
            dtype="BF16",
            data=values.view(np.uint8),
            row_stride=row_stride,
            col_stride=1,
        )


def open_engine(model: RandomModel, **options: Any) -> _core.Engine:
    """Return an engine that holds the model; `options` are those of `_core.Engine`."""
    from camelid import _core

    engine = _core.Engine(model.config, fast=True, int8_head=True, timed=True, **options)
    model.load(engine)
    return engine
