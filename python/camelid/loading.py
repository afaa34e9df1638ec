"""From a folder to an engine that holds its weights, by way of a plan (plan.py).

Owns where a model comes from (folder or hub) and the order in which it is
packed, so that no more than one matrix is in memory twice. Must never know requests or text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from camelid.checkpoint import Checkpoint, account
from camelid.errors import CheckpointError, InvalidRequest, Unsupported
from camelid.options import LoadOptions
from camelid.plan import LoadPlan, image_cache_bytes, make_plan, require_fit
from camelid.sources import (
    LinearSource,
    embedding_source,
    final_norm_source,
    head_source,
    layer_sources,
)
from camelid.vision_sources import frame_sources, vision_layer_sources

if TYPE_CHECKING:
    from camelid import _core
    from camelid.config import ModelConfig, VisionConfig

__all__ = ["Loaded", "find_folder", "load"]

# What a repository on the hub must hold for us; weights in other formats stay there.
_HUB_FILES = ["*.json", "*.jinja", "*.safetensors", "tokenizer.model"]
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Loaded:
    """A loaded engine and what was decided on the way."""

    core: _core.Engine
    config: ModelConfig
    plan: LoadPlan
    image_cache_bytes: int


def find_folder(model: str | os.PathLike[str]) -> Path:
    """Return the model's folder, downloading it when `model` names a repository on the hub.

    Raises:
        CheckpointError: If there is no such folder or repository.
        Unsupported: If it looks like a repository and huggingface_hub is not installed.
    """
    if not isinstance(model, (str, os.PathLike)) or not os.fspath(model):
        raise InvalidRequest(f"[llm] model is {model!r:.80}, expected a folder or a hub id.")
    path = Path(model)
    name = os.fspath(model)
    if path.exists() or not isinstance(name, str) or not _HUB_NAME.fullmatch(name):
        return path  # Checkpoint.open says what is wrong with it
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise Unsupported(
            f"[llm] {name} is no folder here. To download it from the hub, "
            'pip install "camelid[hub]"; or give the path of a downloaded folder.'
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"[llm] {name} could not be downloaded: {error}") from error


def load(
    checkpoint: Checkpoint,
    options: LoadOptions,
    *,
    max_step_tokens: int | None = None,
    progress: bool = False,
) -> Loaded:
    """Check, plan and pack a checkpoint; nothing is kept when any of it fails.

    Raises:
        CapacityError: Before a weight is read, if the weights cannot fit.
        CheckpointError: If the folder is incomplete or damaged.
        Unsupported: If the device is not there.
    """
    from camelid import _core

    account(checkpoint)
    config = checkpoint.config
    device = options.device
    if device == "auto":
        # What only the CPU does is no reason to refuse: nobody asked for the GPU.
        for_cpu = options.compute == "exact" or options.kv_cache == "f32"
        device = "cpu" if for_cpu or not _core.cuda_available() else "cuda"
    on_cpu = device == "cpu"
    plan = make_plan(checkpoint, options, on_gpu=not on_cpu)
    releaser = _Releaser(checkpoint)
    core = _core.Engine(
        config,
        device=device,
        threads=options.threads or 0,
        weights=plan.weights,
        kv_cache=plan.kv_cache,
        fast=plan.compute == "fast",
        int8_head=plan.head == "int8",
        memory_bytes=options.memory or 0,
        max_step_tokens=plan.step_tokens if max_step_tokens is None else max_step_tokens,
        on_packed=releaser,
    )
    limit = core.available_bytes()
    if options.memory is not None:
        limit = min(limit, options.memory)
    left = require_fit(
        checkpoint,
        plan,
        limit_bytes=limit,
        limit_is_wish=limit == options.memory,
        workspace_bytes=core.workspace_bytes(),
        on_gpu=not on_cpu,
        cache_bytes=image_cache_bytes(config, options, 0) if on_cpu else 0,
    )
    _load_weights(core, checkpoint, releaser, progress=progress)
    # Encoded images are held by the host: of another device's memory they take nothing.
    cache_bytes = image_cache_bytes(config, options, left if on_cpu else _core.available_memory())
    core.finish_loading(reserved_bytes=cache_bytes if on_cpu else 0)
    return Loaded(core, config, plan, cache_bytes)


class _Releaser:
    """Gives back a matrix's mapped pages once it is packed, so that no layer is held twice."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._tensors: dict[str, tuple[str, ...]] = {}  # by the matrix's name

    def expect(self, linears: Iterable[LinearSource]) -> None:
        self._tensors = {linear.name: linear.tensor_names for linear in linears}

    def __call__(self, name: str) -> None:
        self._checkpoint.release(self._tensors[name])


def _load_weights(
    core: _core.Engine, checkpoint: Checkpoint, releaser: _Releaser, *, progress: bool
) -> None:
    """Pack part after part."""
    from tqdm import tqdm

    config = checkpoint.config
    with tqdm(
        total=config.n_layers + 2, desc="loading", unit="layer", disable=not progress, leave=False
    ) as bar:
        # The two largest matrices first: each is in memory twice for a moment.
        embedding = embedding_source(checkpoint)
        releaser.expect([embedding])
        core.load_embedding(embedding)
        bar.update()
        head = head_source(checkpoint)
        releaser.expect([head] if head else [])
        core.load_head(final_norm_source(checkpoint), head)
        bar.update()
        for layer in range(config.n_layers):
            sources = layer_sources(checkpoint, layer)
            releaser.expect(sources.linears())
            core.load_layer(sources)
            bar.update()
        if config.vision is not None:
            _load_vision(core, checkpoint, config.vision, releaser)


def _load_vision(
    core: _core.Engine, checkpoint: Checkpoint, vision: VisionConfig, releaser: _Releaser
) -> None:
    frame = frame_sources(checkpoint, vision)
    releaser.expect(frame.linears())
    core.load_vision_frame(frame)
    for layer in range(vision.n_layers):
        sources = vision_layer_sources(checkpoint, vision, layer)
        releaser.expect(sources.linears())
        core.load_vision_layer(sources)
