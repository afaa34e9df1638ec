"""The image resize (src/image) against its recipe in NumPy, to the bit; and its bounds."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from camelid._core import resize_image
from camelid.errors import InvalidRequest

PIXELS = NDArray[np.uint8]


def weights_of(n_in: int, n_out: int) -> tuple[NDArray[np.int64], int]:
    """Return the int16 weights of one axis as a matrix [n_out, n_in], and their fraction bits."""
    scale = n_in / n_out
    support = max(scale, 1.0)
    exact = np.zeros((n_out, n_in))
    for i in range(n_out):
        centre = scale * (i + 0.5)
        first = max(int(centre - support + 0.5), 0)
        last = min(int(centre + support + 0.5), n_in)
        x = (np.arange(first, last) - centre + 0.5) * (1 / support)
        triangle = np.maximum(0, 1 - np.abs(x))
        total = 0.0
        for weight in triangle:  # in order: NumPy's pairwise sum rounds otherwise
            total += weight
        exact[i, first:last] = triangle / total
    bits = 0
    while bits < 22 and int(0.5 + exact.max() * 2 ** (bits + 1)) < 1 << 15:
        bits += 1
    return (0.5 + exact * 2**bits).astype(np.int64), bits


def along_axis(pixels: PIXELS, n_out: int, axis: int) -> PIXELS:
    weights, bits = weights_of(pixels.shape[axis], n_out)
    sums = np.tensordot(weights, pixels.astype(np.int64), axes=(1, axis)) + (1 << (bits - 1))
    return np.moveaxis(np.clip(sums >> bits, 0, 255).astype(np.uint8), 0, axis)


def reference(pixels: PIXELS, height: int, width: int) -> PIXELS:
    return along_axis(along_axis(pixels, width, 1), height, 0)


def resized(pixels: PIXELS, height: int, width: int) -> PIXELS:
    out = np.full((height, width, 3), 77, np.uint8)
    resize_image(pixels, out)
    return out


def noise(height: int, width: int, seed: int = 0) -> PIXELS:
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.where(values > 200, np.uint8(255), values)


SIZES = [
    (1, 1, 1, 1), (1, 1, 9, 7), (9, 7, 1, 1), (1, 50, 1, 20), (50, 1, 20, 1), (2, 2, 3, 3),
    (40, 30, 40, 13), (40, 30, 13, 30), (40, 30, 90, 30), (31, 33, 57, 12), (12, 90, 60, 11),
    (64, 64, 32, 32), (100, 100, 99, 101), (700, 3, 2, 5), (3, 700, 5, 2), (257, 130, 84, 300),
]  # fmt: skip


@pytest.mark.parametrize(("height", "width", "out_height", "out_width"), SIZES)
def test_resize_equals_the_recipe(height: int, width: int, out_height: int, out_width: int) -> None:
    pixels = noise(height, width)
    np.testing.assert_array_equal(
        resized(pixels, out_height, out_width), reference(pixels, out_height, out_width)
    )


def test_resize_equals_the_recipe_at_random_sizes() -> None:
    rng = np.random.default_rng(3)
    for seed in range(60):
        height, width, out_height, out_width = (int(n) for n in rng.integers(1, 120, 4))
        pixels = noise(height, width, seed)
        np.testing.assert_array_equal(
            resized(pixels, out_height, out_width), reference(pixels, out_height, out_width)
        )


@pytest.mark.parametrize("value", [0, 1, 128, 254, 255])
@pytest.mark.parametrize(("height", "width"), [(7, 5), (300, 500), (1, 999)])
def test_resize_keeps_one_colour(value: int, height: int, width: int) -> None:
    out = resized(np.full((height, width, 3), value, np.uint8), 40, 60)
    # Weights are rounded one by one, so that their sum may be off by a level, in the reference too.
    assert np.abs(out.astype(int) - value).max() <= 1


def test_resize_to_the_same_size_copies() -> None:
    pixels = noise(33, 44)
    np.testing.assert_array_equal(resized(pixels, 33, 44), pixels)


def test_resize_touches_its_part_of_a_larger_image_only() -> None:
    source = noise(60, 90)
    canvas = np.full((50, 80, 3), 77, np.uint8)
    resize_image(source[10:40, 20:70], canvas[5:25, 30:50])
    expected = reference(np.ascontiguousarray(source[10:40, 20:70]), 20, 20)
    np.testing.assert_array_equal(canvas[5:25, 30:50], expected)
    canvas[5:25, 30:50] = 77
    assert (canvas == 77).all()


@pytest.mark.parametrize(("height", "width"), [(200_000, 1), (1, 200_000)])
def test_resize_shrinks_the_longest_sides(height: int, width: int) -> None:
    pixels = np.full((height, width, 3), 255, np.uint8)
    assert resized(pixels, 1, 1).min() >= 254
    assert resized(pixels, 2, 3).min() >= 254


def test_resize_refuses_sides_beyond_its_arithmetic() -> None:
    one = np.zeros((1, 1, 3), np.uint8)
    long = np.zeros((1, (1 << 20) + 1, 3), np.uint8)
    message = r"1048577 x 1 pixels, expected sides from 1 to 1048576"
    with pytest.raises(InvalidRequest, match=rf"the image is {message}"):
        resize_image(long, one)
    with pytest.raises(InvalidRequest, match=rf"the resized image is {message}"):
        resize_image(one, long)
    for shape in [(0, 1, 3), (1, 0, 3), (0, 0, 3)]:
        with pytest.raises(InvalidRequest):
            resize_image(np.zeros(shape, np.uint8), one)
        with pytest.raises(InvalidRequest):
            resize_image(one, np.zeros(shape, np.uint8))


def test_resize_refuses_other_layouts() -> None:
    good = np.zeros((4, 4, 3), np.uint8)
    wrong = [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        good[:, ::2],
        good[::-1],
        good[:, :, ::-1],
        np.zeros((3, 4, 4), np.uint8).transpose(1, 2, 0),
        np.lib.stride_tricks.as_strided(good, (4, 4, 3), (0, 3, 1)),
    ]
    for array in wrong:
        with pytest.raises(InvalidRequest, match="pixels is not a uint8 array"):
            resize_image(array, good)
        with pytest.raises(InvalidRequest, match="out is not a uint8 array"):
            resize_image(good, array)
    with pytest.raises(TypeError):
        resize_image(good.astype(np.float32), good)  # type: ignore[arg-type]
    frozen = good.copy()
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="not writeable"):
        resize_image(good, frozen)
