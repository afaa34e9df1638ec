"""What is remembered of encoded tiles, and for how long."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from numpy.typing import NDArray

from camelid.image_cache import FeatureCache, tile_key

ROW_BYTES = 40


def features(value: int, n_rows: int = 1) -> NDArray[np.float32]:
    return np.full((n_rows, 10), value, np.float32)


def key(value: int) -> bytes:
    return tile_key(np.full((3, 2, 2), value, np.float32))


def test_keys_tell_pixels_apart_to_the_bit() -> None:
    tile = np.zeros((3, 4, 4), np.float32)
    other = tile.copy()
    other[2, 3, 3] = np.float32(1e-45)
    assert tile_key(tile) == tile_key(tile.copy())
    assert len({tile_key(tile), tile_key(other), tile_key(-tile)}) == 3


def test_the_least_recently_used_goes_first() -> None:
    cache = FeatureCache(3 * ROW_BYTES)
    for value in range(3):
        cache.add(key(value), features(value))
    assert cache.find(key(0)) is not None  # used: 1 is the oldest now
    cache.add(key(3), features(3))
    assert [cache.find(key(value)) is not None for value in range(4)] == [True, False, True, True]
    assert (len(cache), cache.used_bytes) == (3, 3 * ROW_BYTES)
    held = cache.find(key(3))
    assert held is not None
    assert (held == 3).all()
    cache.add(key(4), features(4, n_rows=2))  # needs the place of two
    assert (len(cache), cache.used_bytes) == (2, 3 * ROW_BYTES)


def test_what_is_larger_than_everything_is_not_held() -> None:
    cache = FeatureCache(3 * ROW_BYTES)
    cache.add(key(0), features(0))
    cache.add(key(1), features(1, n_rows=4))
    assert cache.find(key(0)) is not None
    assert cache.find(key(1)) is None
    off = FeatureCache(0)
    off.add(key(0), features(0))
    assert (len(off), off.used_bytes, off.find(key(0))) == (0, 0, None)


def test_what_is_held_cannot_be_changed_and_counts_once() -> None:
    cache = FeatureCache(10 * ROW_BYTES)
    mine = features(1)
    cache.add(key(1), mine)
    cache.add(key(1), features(1))
    assert cache.used_bytes == ROW_BYTES
    with pytest.raises(ValueError, match="read-only"):
        mine[0, 0] = 2


def test_threads_never_see_more_than_the_bound_or_anothers_features() -> None:
    cache = FeatureCache(5 * ROW_BYTES)
    wrong: list[object] = []

    def work(seed: int) -> None:
        random = np.random.Generator(np.random.PCG64(seed))
        for value in random.integers(0, 12, 2000).tolist():
            found = cache.find(key(value))
            if found is None:
                cache.add(key(value), features(value))
            elif not (found == value).all():
                wrong.append(value)
            if len(cache) > 6:  # one may just be on its way in
                wrong.append(len(cache))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert cache.used_bytes == len(cache) * ROW_BYTES <= 5 * ROW_BYTES
