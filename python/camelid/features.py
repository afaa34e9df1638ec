"""Which rows of image features stand for which tokens of a prompt.

Must never know the engine, pixels or text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from camelid.errors import InvalidRequest

__all__ = ["Features", "PromptFeatures", "check_blocks", "feature_rows", "join_features"]


@dataclass(frozen=True)
class Features:
    """Embeddings [n_features, dim], and for every token the row in its place, -1 where none is."""

    values: NDArray[np.float32]
    rows: NDArray[np.int32]


@dataclass(frozen=True)
class PromptFeatures:
    """The embeddings of a prompt's tiles; `rows` counts through all of them.

    Others may hold the same tiles: they are never copied but for the step that needs them.
    """

    tiles: Sequence[NDArray[np.float32]]  # each [tokens_per_tile, dim]; one at least
    rows: NDArray[np.int32]  # [n_tokens], ascending where not -1

    def part(self, first: int, n_tokens: int) -> Features | None:
        """Return what tokens [first, first + n_tokens) need; None where no feature stands."""
        rows = self.rows[first : first + n_tokens]
        used = rows[rows >= 0]
        if not len(used):
            return None
        per_tile = len(self.tiles[0])
        low, high = int(used[0]) // per_tile, int(used[-1]) // per_tile + 1
        shifted = np.where(rows >= 0, rows - low * per_tile, -1).astype(np.int32)
        return Features(_concatenate(self.tiles[low:high]), shifted)


def feature_rows(
    ids: NDArray[np.int32], n_features: Sequence[int], image_token_id: int
) -> NDArray[np.int32]:
    """Return for every token of a prompt the row of the feature in its place, -1 where none is.

    Args:
        ids: The prompt, int32 [n_tokens].
        n_features: Of each image, in order.
        image_token_id: The token each feature stands for.

    Raises:
        InvalidRequest: If there are more or fewer image tokens than features.
    """
    is_image = ids == image_token_id
    n_tokens = int(is_image.sum())
    if n_tokens and not n_features:
        raise InvalidRequest(
            f"[prompt] {n_tokens} tokens are {image_token_id}, which stands for images, and there "
            "are no images. Pass them in order with the prompt's images, or leave these tokens out."
        )
    if n_tokens != sum(n_features):
        each = ", ".join(map(str, n_features[:8])) + (", ..." if len(n_features) > 8 else "")
        raise InvalidRequest(
            f"[prompt] {len(n_features)} images need {sum(n_features)} image tokens ({each}), the "
            f"prompt holds {n_tokens} of id {image_token_id}. Encode each image's layout in the "
            "prompt."
        )
    return np.where(is_image, np.cumsum(is_image) - 1, -1).astype(np.int32)


def check_blocks(
    ids: NDArray[np.int32], n_features: Sequence[int], image_token_id: int, marks: tuple[int, int]
) -> None:
    """Refuse images that do not fill their places in a prompt, where it marks all of them.

    Args:
        ids: The prompt, int32 [n_tokens].
        n_features: Of each image, in order.
        image_token_id: The token each feature stands for.
        marks: The tokens that begin and end an image.

    Raises:
        InvalidRequest: If all image tokens stand between marks, in as many places as there are
            images, and one's number of tokens is not its image's.
    """
    edges = np.flatnonzero((ids == marks[0]) | (ids == marks[1]))
    before = np.concatenate([[0], np.cumsum(ids == image_token_id)])
    held = before[[*edges[1:], len(ids)]] - before[edges]  # from each mark to the next
    blocks = [int(n) for n in held[ids[edges] == marks[0]] if n]
    if sum(blocks) != before[-1]:
        return  # some stand elsewhere: the prompt has a layout of its own
    if len(blocks) != len(n_features):
        return  # the tiles of several images may come as one array
    for place, (n_held, n_wanted) in enumerate(zip(blocks, n_features, strict=True)):
        if n_held != n_wanted:
            raise InvalidRequest(
                f"[prompt] images[{place}] needs {n_wanted} image tokens, its place in the prompt "
                f"holds {n_held}. Pass images in the order of their places."
            )


def join_features(parts: Sequence[Features | None], counts: Sequence[int]) -> Features | None:
    """Lay the parts of a step end to end; None where no token of it stands for a feature."""
    held = [part for part in parts if part is not None]
    if not held:
        return None
    rows, first = [], 0
    for part, n_tokens in zip(parts, counts, strict=True):
        if part is None:
            rows.append(np.full(n_tokens, -1, np.int32))
            continue
        rows.append(np.where(part.rows >= 0, part.rows + first, -1).astype(np.int32))
        first += len(part.values)
    return Features(_concatenate([part.values for part in held]), np.concatenate(rows))


def _concatenate(parts: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
