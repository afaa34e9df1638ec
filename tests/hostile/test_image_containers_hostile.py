"""Files whose decoding would take longer than their pixels do: refused, or stripped, in time."""

from __future__ import annotations

import io
import struct
import time
import tracemalloc
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from camelid.errors import Error, InvalidRequest, Unsupported
from camelid.image_containers import MAX_SCAN_PIXELS, MAX_SCANS
from camelid.image_files import MAX_PIXELS, load_image, rgb_pixels

SIDE = 9456  # 9456 x 9456 is nearly MAX_PIXELS


@contextmanager
def soon(seconds: float = 1.0) -> Iterator[None]:
    """Fail where the block takes longer; without the limits each takes 10 s or more."""
    started = time.perf_counter()
    yield
    assert time.perf_counter() - started < seconds


def segment(marker: int, body: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body


def scans(side: int, n_scans: int, *, frame: int = 0xC2, between: bytes = b"") -> bytes:
    """Return a progressive JPEG of scans that each say "nothing here" for the whole picture."""
    header = segment(0xDB, b"\0" + b"\1" * 64)
    header += segment(frame, struct.pack(">BHHB", 8, side, side, 1) + b"\1\x11\0")
    header += segment(0xC4, b"\x10" + bytes([1] + [0] * 15) + b"\xe0")  # one symbol: EOB14
    payload = bytes((15 * ((side // 8) ** 2 // 16384 + 1) + 7) // 8)
    scan = segment(0xDA, b"\1\1\0\1\x3f\0") + payload
    return b"\xff\xd8" + header + (scan + between) * n_scans + b"\xff\xd9"


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def noise(width: int, height: int) -> Image.Image:
    bits = np.random.PCG64(5).random_raw(width * height * 3) >> np.uint64(56)
    return Image.fromarray(bits.astype(np.uint8).reshape(height, width, 3))


@pytest.mark.parametrize(
    ("side", "n_scans"),
    [(SIDE, 33), (SIDE, 1500), (16, MAX_SCANS + 1), (16, 1_000_000), (4000, 200)],
)
def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded(side: int, n_scans: int) -> None:
    data = scans(side, n_scans)
    most = min(MAX_SCANS, MAX_SCAN_PIXELS // side**2)
    with soon(), pytest.raises(InvalidRequest, match=rf"{side} x {side} pixels in .* most {most} "):
        load_image(data)


@pytest.mark.parametrize(
    "between", [b"\xff\x02\xff\xff", b"\xff\xff\xff\xff", b"\xff\x00\xd0", b"\xff\xd3junk", b"junk"]
)
def test_scans_cannot_be_hidden(between: bytes) -> None:
    with soon(), pytest.raises(InvalidRequest, match=r"scans|segments"):
        load_image(scans(SIDE, 1500, between=between))


def test_ordinary_progressive_pictures_pass_at_every_size() -> None:
    assert rgb_pixels(load_image(scans(SIDE // 2, 100))).shape == (SIDE // 2, SIDE // 2, 3)
    image = noise(300, 200)
    for options in ({"progressive": True}, {"optimize": True}, {"restart_marker_blocks": 3}, {}):
        data = saved(image, "JPEG", quality=80, **options)
        expected = np.asarray(Image.open(io.BytesIO(data)))
        np.testing.assert_array_equal(rgb_pixels(load_image(data + b"\xff\xda" * 999)), expected)


def test_arithmetic_coding_and_run_lengths_are_refused_by_name() -> None:
    with pytest.raises(Unsupported, match="arithmetic coding"):
        load_image(scans(16, 1, frame=0xCA))
    bmp = bytearray(saved(Image.new("P", (20, 20)), "BMP"))
    bmp[30] = 1
    with pytest.raises(Unsupported, match="run lengths"):
        load_image(bytes(bmp))


def test_a_jpeg_of_padding_segments_or_tables_takes_no_time() -> None:
    good = saved(noise(20, 10), "JPEG")
    expected = rgb_pixels(load_image(good))
    with soon():
        padded = good[:2] + b"\xff" * (16 << 20) + good[2:]
        np.testing.assert_array_equal(rgb_pixels(load_image(padded)), expected)
        for many in (segment(0xFE, b""), segment(0xDB, b"\0" + b"\1" * 64)):
            with pytest.raises(InvalidRequest, match=r"JPEG (segments|tables)"):
                load_image(good[:2] + many * 200_000 + good[2:])


def exif_bomb(n_bytes: int) -> bytes:
    """Return notes of thousands of entries, each of which holds all of the notes."""
    n_entries = min(65_535, (n_bytes - 20) // 12)
    entries = b"".join(struct.pack(">HHII", n, 7, n_bytes - 8, 8) for n in range(n_entries))
    return (b"MM\0*" + struct.pack(">IH", 8, n_entries) + entries).ljust(n_bytes, b"\0")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunks(*chunks: bytes) -> bytes:
    data = saved(noise(20, 10), "PNG")
    return data[:33] + b"".join(chunks) + data[33:]


def test_notes_that_grow_when_read_are_left_out() -> None:
    profile = chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(1 << 20), 9))
    many = segment(0xE1, b"Exif\0\0" + bytes(10))
    webp = bytearray(saved(noise(20, 10), "WEBP", lossless=True, exif=exif_bomb(1 << 20)))
    jpeg = saved(noise(20, 10), "JPEG")
    tracemalloc.start()
    with soon(5):
        for data in (
            with_chunks(profile * 5000),
            with_chunks(chunk(b"eXIf", exif_bomb(1 << 20))),
            bytes(webp),
            jpeg[:2] + many * 4000 + jpeg[2:],
        ):
            assert rgb_pixels(load_image(data)).shape == (10, 20, 3)
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


def test_pngs_of_countless_chunks_are_refused() -> None:
    with soon(), pytest.raises(InvalidRequest, match="PNG chunks"):
        load_image(with_chunks(chunk(b"tEXt", b"") * 1_000_000))


def test_a_gif_reaches_its_picture_past_comments_and_junk() -> None:
    image = Image.new("P", (20, 10), 1)
    image.putpalette([0, 0, 0, 9, 99, 199])
    data = saved(image, "GIF", transparency=0)
    start = 13 + 3 * (2 << (data[10] & 7))
    head, tail = data[:start], data[start:]
    comment = b"!\xfe" + (b"\xff" + b"c" * 255) * 40_000 + b"\0"
    with soon():
        for between in (b"", comment, b"\0" * (16 << 20), b"!\xfe\1c\0" * 1000):
            pixels = rgb_pixels(load_image(head + between + tail))
            assert (pixels == (9, 99, 199)).all()
        with pytest.raises(InvalidRequest, match="blocks of GIF extensions"):
            load_image(head + b"!\xfe\0" * 1_000_000 + tail)


def webp_claiming(width: int, height: int) -> bytes:
    size = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBPVP8X" + struct.pack("<II", 10, 0) + size
    return b"RIFF" + struct.pack("<I", len(body)) + body


def gif_claiming(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + b",".ljust(40, b"\0")


@pytest.mark.parametrize("size", [(10_000, 9_500), (16_384, 10_000), (60_000, 50_000)])
def test_sizes_beyond_the_limit_give_an_error_and_no_warning(
    size: tuple[int, int], capfd: pytest.CaptureFixture[str]
) -> None:
    ihdr = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))
    frame = segment(0xC0, struct.pack(">BHHB", 8, *size[::-1], 1) + b"\1\x11\0")
    files = [
        b"\x89PNG\r\n\x1a\n" + ihdr + chunk(b"IDAT", b""),
        b"\xff\xd8" + frame + segment(0xDA, b"\1\1\0\0\x3f\0"),
        webp_claiming(*size),
        gif_claiming(*size),
        b"BM" + struct.pack("<IIIIiiHHI", 99, 0, 54, 40, *size, 1, 24, 0) + bytes(99),
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for data in files:
            with pytest.raises(InvalidRequest, match=f"{size[0]} x {size[1]}.* most {MAX_PIXELS}"):
                load_image(data)
    assert caught == []
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_every_beginning_of_a_file_gives_an_answer_or_an_error(kind: str) -> None:
    data = saved(noise(5, 4), kind)
    for length in range(min(len(data), 700)):
        message = "[image] "
        try:
            load_image(data[:length])
        except Error as error:
            message = str(error)
        assert message.startswith("[image] ")


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "AVIF"])
def test_formats_without_a_bound_are_refused(kind: str) -> None:
    with pytest.raises(InvalidRequest, match="expected PNG, JPEG, WEBP, GIF or BMP"):
        load_image(saved(noise(16, 16), kind))
