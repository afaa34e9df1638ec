"""From tiles to the features that stand for their patch tokens: one tile at a time, each once.

Between two tiles the requests under way get their steps, Ctrl-C and cancellations get through, and
what was encoded is remembered. Must never know prompts or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from camelid.config import ModelConfig
from camelid.engine import EngineLoop
from camelid.errors import CapacityError
from camelid.features import PromptFeatures, feature_rows
from camelid.image_cache import FeatureCache, tile_key
from camelid.progress import images_bar
from camelid.report import show_bytes

__all__ = ["ImageEncoder", "PromptImages"]


@dataclass(frozen=True)
class PromptImages:
    """The tiles of a prompt, and for every token the row of the features in its place, or -1."""

    tiles: list[NDArray[np.float32]]  # each [channels, side, side]
    rows: NDArray[np.int32]

    @classmethod
    def place(
        cls, ids: NDArray[np.int32], images: Sequence[NDArray[np.float32]], config: ModelConfig
    ) -> PromptImages | None:
        """Give the image tokens of a prompt to the tiles of its images; None where there are none.

        Raises:
            InvalidRequest: If there are more or fewer than the tiles make.
        """
        if not images:
            return None
        assert config.vision is not None
        n_features = [len(tiles) * config.vision.tokens_per_tile for tiles in images]
        rows = feature_rows(ids, n_features, config.image_token_index)
        return cls([tile for tiles in images for tile in tiles], rows)


class ImageEncoder:
    """The vision tower of a running model, and the memory of what it saw."""

    def __init__(self, loop: EngineLoop, config: ModelConfig, cache: FeatureCache) -> None:
        self._loop = loop
        self._config = config
        self.cache = cache

    def encode(
        self,
        tiles: Sequence[NDArray[np.float32]],
        *,
        since: int | None = None,
        progress: bool = False,
    ) -> list[NDArray[np.float32]] | None:
        """Return the features of each tile; None where the model's requests are cancelled first.

        Args:
            tiles: Each [channels, side, side], contiguous.
            since: `EngineLoop.n_cancellations` when what needs the tiles began; None: now.
            progress: Show a bar on stderr when this takes long.

        Returns:
            Of each tile float32 [tokens_per_tile, dim], read-only.

        Raises:
            CapacityError: If the features will not fit in memory.
            Cancelled: If the model is closed meanwhile.
            InvalidRequest: If it was closed before.
        """
        self._loop.check_open()
        self._check_memory(len(tiles))
        since = self._loop.n_cancellations if since is None else since
        encoded = []
        with images_bar(len(tiles), progress) as bar:
            for tile in tiles:
                if self._loop.n_cancellations != since:
                    return None
                encoded.append(self._encode_tile(tile))
                bar.update()
        return encoded

    def encode_prompt(
        self, images: PromptImages, *, since: int, progress: bool
    ) -> PromptFeatures | None:
        """Encode the tiles of a prompt, as `encode` does."""
        encoded = self.encode(images.tiles, since=since, progress=progress)
        return None if encoded is None else PromptFeatures(encoded, images.rows)

    def _encode_tile(self, tile: NDArray[np.float32]) -> NDArray[np.float32]:
        key = tile_key(tile)
        features = self.cache.find(key)
        if features is None:
            features = self._loop.encode_tile(tile)
            self.cache.add(key, features)
        return features

    def _check_memory(self, n_tiles: int) -> None:
        from camelid import _core

        assert self._config.vision is not None
        n_tokens = n_tiles * self._config.vision.tokens_per_tile
        n_bytes = n_tokens * self._config.dim * 4
        # Asked for first: the system hands out more than it has, and kills who believes it.
        available = _core.available_memory()
        if n_bytes > available:
            raise CapacityError(
                f"[vision] the features of {n_tiles} tiles take {show_bytes(n_bytes)}, "
                f"{show_bytes(available)} are left. Send fewer or smaller images."
            )
