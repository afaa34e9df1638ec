"""From what callers pass as images to the tiles the vision tower takes, with every mistake named.

Must never know the engine, prompts or messages.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from camelid.errors import CheckpointError, Error, InvalidRequest, Unsupported
from camelid.image_parts import is_pillow

if TYPE_CHECKING:
    from PIL import Image

    from camelid.config import VisionConfig
    from camelid.image_config import ImageConfig
    from camelid.image_fetch import ImageFetcher
    from camelid.options import LoadOptions

__all__ = ["ImageInputs", "is_remote", "tile_array"]

_WANTED = "Pillow images, or float arrays [n_tiles, channels, side, side]"


class ImageInputs:
    """Reads images for one model.

    Args:
        folder: The model's, which says how images are cut.
        vision: Its vision tower, None where it has none.
        allow_files: Whether `open` takes local paths.
        fetcher: Fetches http(s) URLs; None refuses them.
    """

    def __init__(
        self,
        folder: Path,
        vision: VisionConfig | None,
        *,
        allow_files: bool = True,
        fetcher: ImageFetcher | None = None,
    ) -> None:
        self._folder = folder
        self._vision = vision
        self._allow_files = allow_files
        self._fetcher = fetcher
        self._fetch: Callable[[str], bytes] | None = None if fetcher is None else fetcher.fetch

    @classmethod
    def from_options(
        cls, folder: Path, vision: VisionConfig | None, options: LoadOptions
    ) -> ImageInputs:
        """Return what reads images as a model was loaded to do."""
        fetcher = None
        if options.fetch_images:
            from camelid.image_fetch import ImageFetcher

            fetcher = ImageFetcher()
        return cls(folder, vision, allow_files=options.image_files, fetcher=fetcher)

    def for_call(self, check: Callable[[], object]) -> ImageInputs:
        """Return what opens the images of one call, whose fetches share their limits.

        Args:
            check: Called while an image is fetched; what it raises ends that.
        """
        inputs = copy.copy(self)
        if self._fetcher is not None:
            from camelid.image_fetch import FetchSession

            inputs._fetch = FetchSession(self._fetcher, check).fetch
        return inputs

    def require_vision(self) -> VisionConfig:
        """Return the vision tower's config.

        Raises:
            Unsupported: If the model has none.
        """
        if self._vision is None:
            raise Unsupported(
                "[prompt] images: this model has no vision tower. Send text only, or load the "
                "checkpoint of a Llama4ForConditionalGeneration."
            )
        return self._vision

    def read(self, images: Any) -> list[NDArray[np.float32]]:
        """Return the tiles of each image of a prompt of token ids, the overview last.

        Raises:
            InvalidRequest: If `images` is no list of images, or one is damaged or of wrong shape.
            CheckpointError: If the folder's image configuration does not fit its vision tower.
            Unsupported: If the model has no vision tower.
        """
        vision = self.require_vision()
        if isinstance(images, (str, bytes, np.ndarray)) or not isinstance(images, Sequence):
            raise InvalidRequest(
                f"[prompt] images is {type(images).__name__}, expected a list of {_WANTED}."
            )
        config = self.tiling() if any(map(is_pillow, images)) else None
        return [
            self._tiles(image, vision, config, f"[prompt] images[{place}]")
            for place, image in enumerate(images)
        ]

    def open(self, source: bytes | str | os.PathLike[str] | Image.Image) -> Image.Image:
        """Decode an image of a message: bytes, a data: or http(s) URL, a path, an open image.

        Raises:
            InvalidRequest: If it is damaged, cannot be had, or is beyond a limit.
            Unsupported: If it is a URL or a path, and those are not allowed.
        """
        from camelid.image_files import load_image

        if is_remote(source):
            if self._fetch is None:
                raise Unsupported(
                    "[image] http(s) URLs are fetched only by a model loaded with "
                    "fetch_images=True: this process would open connections that a prompt chose. "
                    "Send a data: URL instead."
                )
            return load_image(self._fetch(str(source)))
        return load_image(source, allow_files=self._allow_files)

    def tiling(self) -> ImageConfig:
        """Return how the folder cuts images, where its tower takes such tiles.

        Raises:
            CheckpointError: If it says nothing, or what does not fit.
            Unsupported: If the model has no vision tower.
        """
        from camelid.images import ImageConfig

        vision = self.require_vision()
        config = ImageConfig.from_folder(self._folder)
        if config.tile_side != vision.image_size or vision.n_channels != 3:
            raise CheckpointError(
                f"[config] {self._folder}: preprocessor_config.json makes tiles of 3 channels and "
                f"{config.tile_side} pixels, the vision tower takes {vision.n_channels} and "
                f"{vision.image_size}. Download both files again."
            )
        return config

    def _tiles(
        self, image: Any, vision: VisionConfig, config: ImageConfig | None, where: str
    ) -> NDArray[np.float32]:
        if config is None or not is_pillow(image):
            return tile_array(image, vision, where=where)
        from camelid.images import tile

        try:
            return tile(image, config)[0]
        except Error as cause:
            said = str(cause).removeprefix("[image] ")
            raise type(cause)(f"{where}: {said}") from cause


def is_remote(source: object) -> bool:
    """Say whether an image's source is an http(s) URL."""
    return isinstance(source, str) and source[:8].lower().startswith(("http://", "https://"))


def tile_array(
    pixels: Any, vision: VisionConfig | None, *, where: str = "[vision] pixel_values"
) -> NDArray[np.float32]:
    """Return tiles [n_tiles, channels, side, side] as contiguous float32, checked and copied.

    A copy, because the caller may change its own before they are encoded, or meanwhile.

    Args:
        pixels: What the caller gave.
        vision: The model's vision tower, None where it has none.
        where: Names the pixels in errors.

    Raises:
        InvalidRequest: If the shape, the type or a value is not what the vision tower takes.
        Unsupported: If there is none.
    """
    if vision is None:
        raise Unsupported(
            "[vision] this model has no vision tower: its config.json names none. Load the "
            "checkpoint of a Llama4ForConditionalGeneration."
        )
    side = vision.image_size
    wanted = f"float32 [n_tiles, {vision.n_channels}, {side}, {side}]"
    array = _as_array(pixels, where, wanted)
    if array.ndim != 4 or array.shape[1:] != (vision.n_channels, side, side) or not len(array):
        raise InvalidRequest(
            f"{where} is {list(array.shape)}, expected {wanted}, one tile or more."
        )
    if not np.issubdtype(array.dtype, np.floating):
        raise InvalidRequest(
            f"{where} is {array.dtype}, expected {wanted} with values from -1 to 1."
        )
    with np.errstate(over="ignore"):  # what overflows is found below
        tiles = np.array(array, np.float32, order="C", copy=True)
    if not np.isfinite(tiles).all():
        raise InvalidRequest(
            f"{where} holds values that are not finite in float32, expected values from -1 to 1."
        )
    return tiles


def _as_array(pixels: Any, where: str, wanted: str) -> NDArray[Any]:
    if pixels is None or isinstance(pixels, (str, bytes, bytearray, os.PathLike)):
        raise InvalidRequest(
            f"{where} is {type(pixels).__name__}, expected {wanted}. Paths, URLs and bytes are "
            "taken in chat messages only; prompts of token ids also take Pillow images, which "
            "PIL.Image.open makes of them."
        )
    try:
        return np.asarray(pixels)
    except MemoryError:
        raise
    except Exception as error:  # a caller's __array__ may raise anything
        raise InvalidRequest(
            f"{where} is no array: {type(error).__name__}: {error!s:.200}; expected {wanted}."
        ) from error
