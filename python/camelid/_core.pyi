"""The compiled engine (csrc/). Private: use `camelid.LLM`."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from camelid.config import ModelConfig
from camelid.sources import LayerSources, LinearSource
from camelid.vision_sources import VisionFrameSources, VisionLayerSources

__version__: str

class SamplerParams:
    """What the sampler of one sequence does; every field has its neutral default."""

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        seed: int = 0,
        n_logprobs: int = -1,
        logit_bias: Mapping[int, float] = ...,
        banned: Sequence[int] = ...,
    ) -> None: ...

class Sampled:
    """One sampled token: `top` holds (token id, logprob) pairs, best first, when asked for.

    Where the logit of token `not_finite` is not finite, nothing was sampled; -1 where all are.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]]
    not_finite: int

class StepResult:
    sampled: list[Sampled]  # one per entry of the step; token -1 where nothing was sampled
    logits: NDArray[np.float32]  # [rows of all entries with output 2, vocab_size]

class Engine:
    """One model on one device. Any thread may call any method; long ones release the GIL."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: str = "auto",
        threads: int = 0,
        weights: str = "auto",
        kv_cache: str = "f32",
        fast: bool = False,
        int8_head: bool = False,
        memory_bytes: int = 0,
        page_size: int = 64,
        max_step_tokens: int = 512,
        on_packed: Callable[[str], None] | None = None,  # a source's name: its pages may go
        timed: bool = False,  # start_timeline() may be called
    ) -> None: ...
    def load_embedding(self, source: LinearSource) -> None: ...
    def load_layer(self, sources: LayerSources) -> None: ...
    def load_head(self, final_norm: NDArray[np.float32], head: LinearSource | None) -> None: ...
    def load_vision_frame(self, sources: VisionFrameSources) -> None: ...
    def load_vision_layer(self, sources: VisionLayerSources) -> None: ...
    def encode_image(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]: ...
    """[n_tiles, channels, side, side] -> [n_tiles, tokens_per_tile, dim]"""
    def finish_loading(self, reserved_bytes: int = 0) -> None: ...
    def open_sequence(self, params: SamplerParams) -> int: ...
    def close_sequence(self, sequence: int) -> None: ...
    def step(
        self,
        sequences: NDArray[np.int64],
        counts: NDArray[np.int32],
        tokens: NDArray[np.int32],
        outputs: NDArray[np.uint8],  # 0 nothing, 1 sample, 2 logits of every token
        features: NDArray[np.float32] | None = None,  # [n_features, dim]
        feature_rows: NDArray[np.int32] | None = None,  # [n_tokens]: a feature's, or -1
    ) -> StepResult: ...
    def kv_bytes_for(self, n_tokens: int) -> int: ...
    def kv_tokens_in(self, n_bytes: int) -> int: ...
    def memory(self) -> dict[str, int]: ...
    """weight_bytes, workspace_bytes, kv_limit_bytes, kv_used_bytes, page_size"""
    def describe(self) -> str: ...
    def available_bytes(self) -> int: ...  # of the device, that this process may still take
    def workspace_bytes(self) -> int: ...  # of steps; what the device adds is known once loaded
    def start_timeline(self, grain: str) -> None: ...
    """Measure the device's part of steps: each of their "calls" by itself, or whole "steps"."""
    def stop_timeline(self) -> list[tuple[str, float]]: ...
    """What was called, in order, and the microseconds of it."""
    def check_invariants(self) -> None: ...

def quantize(
    source: LinearSource, bits: int, group_size: int, threads: int = 0
) -> tuple[NDArray[np.int32], NDArray[np.uint16]]:
    """Words int32 [out, ceil(in / (32 / bits))] and scales bf16 bits [out, n_groups]."""

def resize_image(pixels: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    """Fill `out` with `pixels`, both [height, width, 3]; rows may lie apart in either."""

def cuda_available() -> bool:
    """Whether this build has the CUDA backend, and this machine a GPU for it."""

def available_memory() -> int:
    """Bytes this process may still take: the machine's or its cgroup's, whichever is less."""

def default_threads() -> int:
    """Physical cores this process may use."""
