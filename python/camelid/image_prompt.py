"""How an image stands in a prompt: the special tokens around and between its tiles' patches.

Must never know ids (the tokenizer does) or pixels. Source: Llama 4's model card and transformers'
processor, which agree.
"""

from __future__ import annotations

from collections.abc import Callable

from camelid.errors import InvalidRequest

__all__ = ["END", "PATCH", "START", "image_ids", "image_text", "n_image_tokens"]

PATCH = "<|patch|>"  # each stands for one embedding of the vision encoder, in order
START, _OVERVIEW, END = "<|image_start|>", "<|image|>", "<|image_end|>"
_BESIDE, _ROW_END = "<|tile_x_separator|>", "<|tile_y_separator|>"


def image_ids(
    grid: tuple[int, int], tokens_per_tile: int, special_id: Callable[[str], int]
) -> list[int]:
    """Return the token ids that stand for an image.

    Args:
        grid: The image's (rows, columns) of tiles, as `camelid.images.tile` returns them.
        tokens_per_tile: Embeddings the vision encoder makes of one tile.
        special_id: Returns a special token's id, such as `Tokenizer.special_id`.
    """
    names = _names(grid, tokens_per_tile)
    ids = {name: special_id(name) for name in dict.fromkeys(names)}
    return [ids[name] for name in names]


def image_text(grid: tuple[int, int], tokens_per_tile: int) -> str:
    """Return the same prompt as text, for people and for encoding with special tokens allowed."""
    return "".join(_names(grid, tokens_per_tile))


def n_image_tokens(grid: tuple[int, int], tokens_per_tile: int) -> int:
    """Return how many tokens an image takes: `len(image_ids(...))` without making them."""
    rows, columns = _checked(grid, tokens_per_tile)
    n_tiles = rows * columns
    # Every tile is followed by one separator; around the overview stand three tokens.
    return (n_tiles * (tokens_per_tile + 1) if n_tiles > 1 else 0) + tokens_per_tile + 3


def _names(grid: tuple[int, int], tokens_per_tile: int) -> list[str]:
    rows, columns = _checked(grid, tokens_per_tile)
    patches = [PATCH] * tokens_per_tile
    names = [START]
    if rows * columns > 1:
        row = [*patches, *[_BESIDE, *patches] * (columns - 1), _ROW_END]
        names += row * rows
    return [*names, _OVERVIEW, *patches, END]


def _checked(grid: tuple[int, int], tokens_per_tile: int) -> tuple[int, int]:
    if min(grid) < 1 or tokens_per_tile < 1:
        raise InvalidRequest(
            f"[image] {grid[0]} x {grid[1]} tiles of {tokens_per_tile} tokens, expected at least "
            "one of each."
        )
    return grid
