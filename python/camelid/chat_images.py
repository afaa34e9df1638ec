"""The images of one conversation: from its image parts to their place in the prompt, and tiles.

Owns that every mistake names its message, that a conversation too long is refused before all of its
images are decoded, and that a URL is fetched once however often it stands there. Must never know
templates or the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from camelid.errors import Cancelled, Error
from camelid.image_inputs import ImageInputs, is_remote
from camelid.image_parts import ImagePart
from camelid.image_prompt import image_ids, n_image_tokens

if TYPE_CHECKING:
    from camelid.image_config import ImageConfig

__all__ = ["ChatImages"]


class ChatImages:
    """Takes the images of a conversation one after another.

    Args:
        inputs: Opens images for the model.
        special_id: Returns a special token's id.
        check_length: Called with the tokens of all images so far; raises when they are too many.
        check_wanted: Called before each image and while one is fetched; raises Cancelled when
            nobody waits for them any more.
    """

    def __init__(
        self,
        inputs: ImageInputs,
        special_id: Callable[[str], int],
        check_length: Callable[[int], None],
        check_wanted: Callable[[], None],
    ) -> None:
        self.tiles: list[NDArray[np.float32]] = []  # of each image, the overview last
        self._inputs = inputs.for_call(check_wanted)
        self._special_id = special_id
        self._check_length = check_length
        self._check_wanted = check_wanted
        self._fetched: dict[str, _Tiled] = {}  # by URL
        self._config: ImageConfig | None = None
        self._n_tokens = 0

    def take(self, part: ImagePart) -> list[int]:
        """Open and tile an image; return the token ids that stand for it in the prompt.

        Raises:
            Cancelled: If `check_wanted` says so.
            InvalidRequest: If it cannot be opened, or makes the conversation too long.
            Unsupported: If the model has no vision tower, or such a source is not allowed.
        """
        self._check_wanted()
        per_tile = self._inputs.require_vision().tokens_per_tile
        if self._config is None:
            self._config = self._inputs.tiling()
        tiles, grid = self._tile(part, self._config)
        self._n_tokens += n_image_tokens(grid, per_tile)
        self._check_length(self._n_tokens)
        self.tiles.append(tiles)
        return image_ids(grid, per_tile, self._special_id)

    def _tile(self, part: ImagePart, config: ImageConfig) -> _Tiled:
        if not is_remote(part.source):
            return _tile(self._inputs, part, config)
        if part.source not in self._fetched:
            self._fetched[part.source] = _tile(self._inputs, part, config)
        return self._fetched[part.source]


# Tiles, the overview last, and their (rows, columns).
_Tiled = tuple[NDArray[np.float32], tuple[int, int]]


def _tile(inputs: ImageInputs, part: ImagePart, config: ImageConfig) -> _Tiled:
    from camelid.images import tile

    try:
        return tile(inputs.open(part.source), config)
    except Cancelled:
        raise
    except Error as cause:
        said = str(cause).removeprefix("[image] ")
        raise type(cause)(f"[chat] {part.where}: {said}") from cause
