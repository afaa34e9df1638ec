"""From tiles to the features that stand for their patch tokens: one tile at a time, each once.

Between two tiles the requests under way get their steps, Ctrl-C and cancellations get through, and
what was encoded is remembered. Must never know prompts or files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from camelid.errors import CapacityError, CheckpointError, InvalidRequest
from camelid.feature_room import FeatureRoom, Ticket
from camelid.features import PromptFeatures, check_blocks, feature_rows
from camelid.image_cache import FeatureCache, tile_key
from camelid.progress import images_bar
from camelid.report import show_bytes

if TYPE_CHECKING:
    from camelid.config import ModelConfig
    from camelid.engine import EngineLoop
    from camelid.request import Request

__all__ = ["ImageEncoder", "PromptImages"]

Tiles: TypeAlias = "NDArray[np.float32]"  # or features
# No preprocessor_config.json makes larger pixels, so these are the caller's fault.
_LARGEST_PIXEL = 1e6


class PromptImages:
    """The images of a prompt, and for every token the row of the features in its place, or -1.

    Args:
        rows: int32 [n_tokens].
        images: Of each image its tiles, [n_tiles, channels, side, side].
    """

    def __init__(self, rows: NDArray[np.int32], images: Sequence[Tiles]) -> None:
        self.rows = rows
        self.n_tiles = [len(tiles) for tiles in images]
        self._read: Callable[[], Sequence[Tiles]] = lambda: images

    @classmethod
    def place(
        cls,
        ids: NDArray[np.int32],
        images: Sequence[Tiles],
        config: ModelConfig,
        marks: tuple[int, int] | None = None,
    ) -> PromptImages | None:
        """Give the image tokens of a prompt to the tiles of its images; None where there are none.

        Args:
            ids: The prompt.
            images: Of each image its tiles.
            config: The model's.
            marks: The ids of <|image_start|> and <|image_end|>. Where they enclose all image
                tokens, in as many places as there are images, each image must fill its place;
                otherwise only the total counts, as with transformers. None: as if there were none
                in the prompt.

        Raises:
            InvalidRequest: If there are more or fewer image tokens than the tiles make.
        """
        if config.vision is None:
            return None
        n_features = [len(tiles) * config.vision.tokens_per_tile for tiles in images]
        rows = feature_rows(ids, n_features, config.image_token_index)
        if not images:
            return None
        if marks is not None:
            check_blocks(ids, n_features, config.image_token_index, marks)
        return cls(rows, images)

    def let_go(self, read: Callable[[], Sequence[Tiles]]) -> None:
        """Hold no tiles until they are taken: `read` will read the same ones again."""
        self._read = read

    def take(self) -> Sequence[Tiles]:
        """Return the tiles of each image.

        Raises:
            InvalidRequest: If they were let go and are others now.
        """
        images = self._read()
        if [len(tiles) for tiles in images] != self.n_tiles:
            raise InvalidRequest(
                "[prompt] images changed while the prompts before theirs ran. Leave them as they "
                "are until the call returns."
            )
        return images


class ImageEncoder:
    """The vision tower of a running model, the memory of what it saw, and who waits with it.

    `room` bounds the features of prompts that have not run by as many bytes as `cache` holds. What
    both hold is mostly the same arrays: those that wait are the last ones encoded.
    """

    def __init__(self, loop: EngineLoop, config: ModelConfig, cache: FeatureCache) -> None:
        self._loop = loop
        self._config = config
        self.cache = cache
        self.room = FeatureRoom(cache.limit_bytes)

    def encode(self, tiles: Tiles, *, progress: bool = False) -> list[Tiles] | None:
        """Return the features of each tile; None where the model's requests are cancelled first.

        Args:
            tiles: [n_tiles, channels, side, side], contiguous.
            progress: Show a bar on stderr when this takes long.

        Returns:
            Of each tile float32 [tokens_per_tile, dim], read-only.

        Raises:
            CapacityError: If the features will not fit in memory.
            Cancelled: If the model is closed meanwhile.
            CheckpointError: If they are not finite though the pixels are small.
            InvalidRequest: If they are not finite for pixels like these, or the model is closed.
        """
        self._loop.check_open()
        self._check_memory(len(tiles))
        with images_bar(len(tiles), progress) as bar:
            return self._encode(tiles, "[vision] pixel_values", self._loop.n_cancellations, bar)

    def encode_prompt(
        self, request: Request, images: PromptImages, *, since: int, progress: bool
    ) -> bool:
        """Give a request the features of its images, as `encode` does; False where cancelled.

        Waits while the features of other prompts fill the room. They leave it with the request's
        `drop_features`, which the caller owes whatever happens.

        Args:
            request: Gets them, and a ticket of the room.
            images: Its images.
            since: `EngineLoop.n_cancellations` when it began.
            progress: Show a bar on stderr when this takes long.
        """
        n_tiles = sum(images.n_tiles)
        self._loop.check_open()
        self._check_memory(n_tiles)
        request.ticket = Ticket(self.room, self._feature_bytes(n_tiles))
        if not self.room.enter(request.ticket, lambda: self._is_wanted(since)):
            return False
        encoded: list[Tiles] = []
        with images_bar(n_tiles, progress) as bar:
            for place, tiles in enumerate(images.take()):
                of_image = self._encode(tiles, f"[vision] images[{place}]", since, bar)
                if of_image is None:
                    return False
                encoded += of_image
        request.features = PromptFeatures(encoded, images.rows)
        return True

    def _is_wanted(self, since: int) -> bool:
        self._loop.check_open(meanwhile=True)
        return self._loop.n_cancellations == since

    def _encode(self, tiles: Tiles, where: str, since: int, bar: Any) -> list[Tiles] | None:
        encoded = []
        for tile in tiles:
            if self._loop.n_cancellations != since:
                return None
            encoded.append(self._encode_tile(tile, where))
            bar.update()
        return encoded

    def _encode_tile(self, tile: Tiles, where: str) -> Tiles:
        key = tile_key(tile)
        features = self.cache.find(key)
        if features is None:
            features = self._loop.encode_tile(tile)
            _check_finite(features, tile, where)
            self.cache.add(key, features)
        return features

    def _feature_bytes(self, n_tiles: int) -> int:
        assert self._config.vision is not None
        return n_tiles * self._config.vision.tokens_per_tile * self._config.dim * 4

    def _check_memory(self, n_tiles: int) -> None:
        from camelid import _core

        n_bytes = self._feature_bytes(n_tiles)
        # Asked for first: the system hands out more than it has, and kills who believes it.
        available = _core.available_memory()
        if n_bytes > available:
            raise CapacityError(
                f"[vision] the features of {n_tiles} tiles take {show_bytes(n_bytes)}, "
                f"{show_bytes(available)} are left. Send fewer or smaller images."
            )


def _check_finite(features: Tiles, pixels: Tiles, where: str) -> None:
    if np.isfinite(features).all():
        return
    largest = float(np.abs(pixels).max())
    if largest > _LARGEST_PIXEL:
        raise InvalidRequest(
            f"{where}: its features are not finite, since its pixel values reach {largest:g}; "
            "expected values from -1 to 1, as preprocessing makes them."
        )
    raise CheckpointError(
        f"{where}: the vision tower makes features that are not finite of pixel values to "
        f"{largest:g}. The checkpoint may be damaged; download it again."
    )
