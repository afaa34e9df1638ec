"""Remembers the features of tiles that were encoded before, by what is in their pixels.

A conversation is sent anew with every turn, its images too. Tiles are remembered one by one, since
a tile's features depend on no other. Must never know the engine.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

__all__ = ["FeatureCache", "tile_key"]


def tile_key(pixels: NDArray[np.float32]) -> bytes:
    """Return what two tiles share only if their pixels are the same. Requires contiguous ones.

    A cryptographic hash: whoever could make two pictures collide would read another's image.
    """
    return hashlib.blake2b(pixels.data, digest_size=32).digest()


class FeatureCache:
    """Features by tile, the least recently used dropped first; any thread may use it.

    Args:
        limit_bytes: Most bytes of all features held; 0 holds none.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self._lock = threading.Lock()
        self._features: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._features)

    def find(self, key: bytes) -> NDArray[np.float32] | None:
        """Return a tile's features, [tokens_per_tile, dim], read-only; None if not held."""
        with self._lock:
            features = self._features.get(key)
            if features is not None:
                self._features.move_to_end(key)
            return features

    def add(self, key: bytes, features: NDArray[np.float32]) -> None:
        """Hold a tile's features, which nobody may change from now on."""
        features.flags.writeable = False
        with self._lock:
            # Two threads may have encoded the same tile: both have the same bits.
            if key in self._features or features.nbytes > self.limit_bytes:
                return
            self._features[key] = features
            self.used_bytes += features.nbytes
            while self.used_bytes > self.limit_bytes:
                _, dropped = self._features.popitem(last=False)
                self.used_bytes -= dropped.nbytes
