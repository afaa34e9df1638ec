"""No image, data URL or preprocessor_config.json gives anything but an Error or tiles, in time."""

from __future__ import annotations

import base64
import io
import json
import os
import struct
import time
import tracemalloc
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from camelid.errors import CheckpointError, Error, InvalidRequest, Unsupported
from camelid.image_files import MAX_BYTES, MAX_PIXELS, load_image
from camelid.images import ImageConfig, tile

KINDS = ["PNG", "JPEG", "GIF", "WEBP", "BMP"]


def encoded(kind: str, size: tuple[int, int] = (60, 40), **options: Any) -> bytes:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_claiming(width: int, height: int, pixels: bytes = b"\0") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(pixels))
    return b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b"")


def tiles_or_error(data: bytes) -> None:
    refusal = None
    try:
        tiles, (rows, columns) = tile(load_image(data))
    except Error as error:
        refusal = str(error)
    if refusal is not None:
        assert refusal.startswith("[image] ")
        assert len(refusal) < 600
    else:
        assert np.isfinite(tiles).all()
        assert len(tiles) == rows * columns + (rows * columns > 1)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_truncated_files_are_refused(kind: str) -> None:
    data = encoded(kind)
    for part in (0.3, 0.6, 0.95):
        with pytest.raises(InvalidRequest, match=r"\[image\] the image .*damaged"):
            load_image(data[: int(len(data) * part)])


@pytest.mark.parametrize("kind", KINDS)
def test_every_truncation_gives_tiles_or_an_error(kind: str) -> None:
    data = encoded(kind, (9, 7))
    for length in range(0, len(data), max(1, len(data) // 60)):
        tiles_or_error(data[:length])


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow says what it thinks of such files
@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bytes_give_tiles_or_an_error(kind: str) -> None:
    rng = np.random.default_rng(1)
    good = encoded(kind, (9, 7))
    for _ in range(40):
        data = bytearray(good)
        for place in rng.integers(0, len(data), 3):
            data[place] = rng.integers(256)
        tiles_or_error(bytes(data))


OTHERS = [b"", b"\0", b"hello" * 100, b"\x89PNG\r\n\x1a\n", b"GIF89a", b"%!PS-Adobe-3.0 EPSF-3.0\n",
          b"<svg/>"]  # fmt: skip


@pytest.mark.parametrize("data", OTHERS)
def test_other_contents_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequest, match=r"expected PNG, JPEG, .* or BMP"):
        load_image(data)


@pytest.mark.parametrize("warn", ["error", "ignore"])
@pytest.mark.parametrize(
    ("width", "height"),
    [(100_000, 100_000), (10_000, 10_000), (70_000, 2), (2, 70_000), (2**31 - 1, 1)],
)
def test_headers_that_claim_too_much_cost_nothing(width: int, height: int, warn: str) -> None:
    tracemalloc.start()
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter(warn, Image.DecompressionBombWarning)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest, match=f"expected at most {MAX_PIXELS} in all and 65535"):
            load_image(png_claiming(width, height))
    assert time.perf_counter() - started < 1
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


def test_the_limit_holds_for_open_images_and_names_what_was_got() -> None:
    image = Image.new("1", (65_536, 10))
    with pytest.raises(InvalidRequest, match=r"the image has 65536 x 10 pixels, expected at most"):
        tile(image)
    for size in [(0, 0), (0, 5), (5, 0)]:
        with pytest.raises(
            InvalidRequest, match=f"has {size[0]} x {size[1]} pixels, expected some"
        ):
            tile(Image.new("RGB", size))


def test_zero_sizes_in_files_are_refused() -> None:
    for width, height in [(0, 0), (0, 7), (7, 0)]:
        with pytest.raises(InvalidRequest):
            load_image(png_claiming(width, height))


def test_an_image_closed_or_damaged_before_it_is_tiled() -> None:
    data = encoded("PNG", (300, 300))
    lazy = Image.open(io.BytesIO(data[: len(data) // 2]))
    with pytest.raises(InvalidRequest, match="truncated or damaged"):
        tile(lazy)
    with pytest.raises(InvalidRequest, match="Its mode is 'La'; convert it to RGB yourself"):
        tile(Image.new("La", (3, 3)))


def test_only_the_first_of_many_frames_is_decoded() -> None:
    frames = [Image.new("P", (200, 200), n % 256) for n in range(400)]
    out = io.BytesIO()
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:], duration=10)
    started = time.perf_counter()
    for _ in range(20):
        assert tile(load_image(out.getvalue()))[1] == (1, 1)
    assert time.perf_counter() - started < 1.5  # 400 frames take longer than this 20 times


def test_small_files_of_large_pictures_take_bounded_time() -> None:
    data = png_claiming(8000, 2000, b"\0" * (2000 * (8000 * 3 + 1)))
    assert len(data) < 60_000
    started = time.perf_counter()
    assert tile(load_image(data))[1] == (2, 8)
    assert time.perf_counter() - started < 5


def test_text_chunks_that_inflate_are_refused() -> None:
    bomb = chunk(b"zTXt", b"k\0\0" + zlib.compress(b"x" * (64 << 20), 9))
    data = encoded("PNG")
    end = data.index(b"IDAT") - 4
    tiles_or_error(data[:end] + bomb * 20 + data[end:])


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("data:", InvalidRequest, "has no comma within 256"),
        ("data:" + "x" * 10_000_000, InvalidRequest, "has no comma within 256"),
        ("data:,hello", Unsupported, "only ;base64"),
        ("data:image/png,%89PNG", Unsupported, "only ;base64"),
        ("data:image/png;base64,", InvalidRequest, "in no format"),
        ("data:image/png;base64,!!!!", InvalidRequest, "not base64"),
        ("data:image/png;base64,iVBORw0KGg", InvalidRequest, "not base64"),
        ("data:image/png;base64,\u00e9\u00e9\u00e9\u00e9", InvalidRequest, "not base64"),
        ("data:image/png;base64,aGVsbG8=", InvalidRequest, "in no format"),
        ("data:text/html;base64," + "\ud800", InvalidRequest, "not base64"),
    ],
    ids=range(10),
)
def test_malformed_data_urls(url: str, error: type[Error], message: str) -> None:
    with pytest.raises(error, match=message):
        load_image(url)


def test_too_many_bytes_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    limit = f"bytes, expected at most {MAX_BYTES}"
    url = "data:image/png;base64," + "A" * (MAX_BYTES // 3 * 4 + 100)
    tracemalloc.start()
    with pytest.raises(InvalidRequest, match=limit):
        load_image(url)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    with pytest.raises(InvalidRequest, match=limit):
        load_image(bytes(MAX_BYTES + 1))
    path = tmp_path / "large.png"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(InvalidRequest, match=limit):
        load_image(path)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    strange = ["/dev/zero", "", "a\0b", "x" * 100_000, "\ud800"]
    for path in [pipe, tmp_path, tmp_path / "absent", *strange]:
        with pytest.raises(
            InvalidRequest, match=r"\[image\] (cannot read|.* is not a regular file)"
        ):
            load_image(path)


@pytest.mark.skipif(not os.path.exists("/proc/kmsg"), reason="no /proc")
@pytest.mark.parametrize("path", ["/proc/kmsg", "/proc/self/pagemap", "/proc/self/status"])
def test_files_that_never_end_are_not_read(path: str) -> None:
    with pytest.raises(InvalidRequest, match=r"is empty|cannot read"):
        load_image(path)


def test_files_that_change_while_they_are_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, pipe = tmp_path / "a.png", tmp_path / "pipe"
    path.write_bytes(encoded("PNG"))
    os.mkfifo(pipe)
    looked_at = os.stat(path)
    monkeypatch.setattr("camelid.image_files.os.stat", lambda path: looked_at)
    with pytest.raises(InvalidRequest, match="not a regular file"):
        load_image(pipe)  # which waits for a writer when opened to be read
    with path.open("ab") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(InvalidRequest, match="bytes, expected at most"):
        load_image(path)


@pytest.mark.parametrize("filler", [" ", "\n", "%20", "%", "%2B", " A"])
def test_data_urls_take_memory_as_their_length_does(filler: str) -> None:
    url = "data:image/png;base64," + filler * ((16 << 20) // len(filler))
    tracemalloc.start()
    with pytest.raises(InvalidRequest, match="the data URL"):
        load_image(url)
    assert tracemalloc.get_traced_memory()[1] < 4 * len(url)
    tracemalloc.stop()


# Values that have broken parsers: wrong types, edges of integer widths, and plausible ones.
VALUES = st.recursive(
    st.one_of(
        st.sampled_from(
            [None, True, False, 0, 1, -1, 2, 16, 336, 2**31, 2**63, 10**400, 0.0, -0.0, 0.5, 1e-300,
             1e308, float("inf"), float("nan"), "", "336", "channels_first", "\ud800", "x" * 9999]
        ),
        st.integers(-5, 400),
        st.floats(),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(["height", "width", "shortest_edge"]), inner, max_size=3),
    ),
    max_leaves=5,
)  # fmt: skip
KEYS = ["size", "max_patches", "resample", "rescale_factor", "image_mean", "image_std", "do_resize",
        "do_rescale", "do_normalize", "do_convert_rgb", "do_center_crop", "do_pad", "data_format",
        "resize_to_max_canvas", "image_processor_type"]  # fmt: skip
SOME = Image.new("RGB", (5, 3), (10, 200, 30))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4))
def test_any_config_gives_tiles_or_an_error(data: dict[str, Any]) -> None:
    refusal = None
    try:
        config = ImageConfig.from_json(data)
    except (CheckpointError, Unsupported) as error:
        refusal = str(error)
    if refusal is not None:
        assert refusal.startswith("[config] ")
        assert len(refusal) < 500
    else:
        tiles, _ = tile(SOME, config)
        assert np.isfinite(tiles).all()


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"size": ' + "[" * 100_000, "\ufeff{}"])
def test_files_that_are_no_object(tmp_path: Path, text: str) -> None:
    for name in ("preprocessor_config.json", "processor_config.json"):
        (tmp_path / name).write_text(text)
        with pytest.raises(CheckpointError, match=name):
            ImageConfig.from_folder(tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": [1]}))
    with pytest.raises(CheckpointError, match="image_processor is"):
        ImageConfig.from_folder(tmp_path)


def test_data_url_of_a_whole_image_is_read_back() -> None:
    url = "data:image/webp;base64," + base64.b64encode(encoded("PNG")).decode()
    assert tile(load_image(url))[0].shape == (1, 3, 336, 336)
