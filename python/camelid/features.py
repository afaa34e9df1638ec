"""Which rows of image features stand for which tokens of a prompt.

Must never know the engine, pixels or text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from camelid.errors import InvalidRequest

__all__ = ["Features", "join_features", "place_features"]


@dataclass(frozen=True)
class Features:
    """Embeddings [n_features, dim], and for every token the row in its place, -1 where none is."""

    values: NDArray[np.float32]
    rows: NDArray[np.int32]

    def part(self, first: int, n_tokens: int) -> Features:
        """Return what tokens [first, first + n_tokens) need, and no feature of others."""
        rows = self.rows[first : first + n_tokens]
        used = rows[rows >= 0]
        if not len(used):
            return Features(self.values[:0], rows)
        low, high = int(used[0]), int(used[-1]) + 1  # rows ascend
        return Features(self.values[low:high], np.where(rows >= 0, rows - low, -1).astype(np.int32))


def place_features(
    ids: NDArray[np.int32], images: Sequence[NDArray[np.float32]], image_token_id: int
) -> Features:
    """Give every image token of a prompt its feature, in the order of the images.

    Args:
        ids: The prompt, int32 [n_tokens].
        images: Of each image its features, [n_tiles, tokens_per_tile, dim].
        image_token_id: The token each feature stands for.

    Raises:
        InvalidRequest: If there are more or fewer image tokens than features.
    """
    is_image = ids == image_token_id
    n_tokens = int(is_image.sum())
    counts = [image.shape[0] * image.shape[1] for image in images]
    if n_tokens != sum(counts):
        each = ", ".join(str(count) for count in counts[:8]) + (", ..." if len(counts) > 8 else "")
        raise InvalidRequest(
            f"[prompt] {len(images)} images need {sum(counts)} image tokens ({each}), the prompt "
            f"holds {n_tokens} of id {image_token_id}. Encode each image's layout in the prompt."
        )
    rows = np.where(is_image, np.cumsum(is_image) - 1, -1).astype(np.int32)
    values = [image.reshape(-1, image.shape[2]) for image in images]
    return Features(np.concatenate(values), rows)


def join_features(parts: Sequence[Features | None], counts: Sequence[int]) -> Features | None:
    """Lay the parts of a step end to end; None where no token of it stands for a feature."""
    held = [part for part in parts if part is not None and len(part.values)]
    if not held:
        return None
    rows, first = [], 0
    for part, n_tokens in zip(parts, counts, strict=True):
        if part is None or not len(part.values):
            rows.append(np.full(n_tokens, -1, np.int32))
            continue
        rows.append(np.where(part.rows >= 0, part.rows + first, -1).astype(np.int32))
        first += len(part.values)
    return Features(np.concatenate([part.values for part in held]), np.concatenate(rows))
