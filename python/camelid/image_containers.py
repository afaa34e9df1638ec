"""What an image file is made of: its format, its size, and what of it a decoder gets to see.

Decoders are fast where they draw, and slow where strangers can make them be: JPEG draws a picture
as many times as it has scans, and Pillow reads notes (EXIF, profiles, comments) in Python, some in
time that grows with their square. So this bounds the first, and leaves out what no pixel depends
on. Owns these limits. Must never decode, nor import Pillow.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass

from camelid.errors import InvalidRequest, Unsupported

__all__ = ["MAX_EXIF_BYTES", "MAX_SCANS", "MAX_SCAN_PIXELS", "Container", "read_container"]

MAX_EXIF_BYTES = 65_533  # what a JPEG segment holds; Pillow takes up to 6,000 times its memory
MAX_SCANS = 500  # of a JPEG; where libjpeg-turbo's own fuzzers give up, encoders write 1 to 12
# Scans times pixels: 32 scans of the largest picture, which take 1 s (measured: 8 to 30 ms each).
MAX_SCAN_PIXELS = 32 * 89_478_485
_MAX_SEGMENTS = 4096  # of a JPEG: 3 per scan, and 64 MiB of notes in pieces of 64 KiB
_MAX_TABLE_BYTES = 1 << 16  # of a JPEG before its first scan: 8 Huffman and 4 quantisation tables
_MAX_CHUNKS = 1 << 17  # of a PNG: 64 MiB in pieces of 512 bytes, encoders write 8 KiB and more
_MAX_SUB_BLOCKS = 1 << 16  # of 255 bytes, before a GIF's first picture

# A marker as libjpeg looks for one: neither a stuffed byte, nor padding, nor a restart.
_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")
_SOI, _EOI, _SOS, _COM = 0xD8, 0xD9, 0xDA, 0xFE
_APP0, _APP1, _APP14, _APP15 = 0xE0, 0xE1, 0xEE, 0xEF
_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})  # SOF markers; others are tables
_ARITHMETIC = frozenset({0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF})
_NOTES = (b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0")  # both may hold the orientation
_GIF_BLOCK = re.compile(rb"[!,;]")


@dataclass(frozen=True)
class Container:
    """A file, stripped of what its picture does not need."""

    kind: str  # as Pillow names it
    width: int  # as its header claims, 0 where there is none
    height: int
    data: bytes


def read_container(data: bytes, where: str) -> Container | None:
    """Tell a file's format by its first bytes, and strip it; None where it is none of ours.

    Raises:
        InvalidRequest: If it has more parts than decode in bounded time.
        Unsupported: If it is coded in a way that nobody sends and that decodes slowly.
    """
    for kind, (pattern, read) in _READERS.items():
        if pattern.match(data):
            try:
                return Container(kind, *read(data, where))
            except (IndexError, struct.error):  # it ends within its header
                return Container(kind, 0, 0, data)
    return None


_Read = tuple[int, int, bytes]  # width, height, data


def _read_jpeg(data: bytes, where: str) -> _Read:
    """Walk from marker to marker as libjpeg does; never miss a scan that it would see."""
    width = height = n_scans = n_segments = n_table_bytes = 0
    kept = [b"\xff\xd8"]
    notes = set(_NOTES)
    position, first_scan, end = 2, len(data), len(data)
    while found := _MARKER.search(data, position):
        start, position, marker = found.start(), found.end(), found[1][0]
        n_segments += 1
        if marker == _EOI:
            end = position
            break
        # Reserved ones have no length where libjpeg skips them; elsewhere it gives up.
        if marker >= 0xC0 and marker != _SOI:
            (length,) = struct.unpack_from(">H", data, position)
            position += max(length, 2)
        if marker in _FRAMES:
            if marker in _ARITHMETIC:
                raise _slow(where, "JPEG with arithmetic coding")
            h, w = struct.unpack_from(">HH", data, start + 5)
            width, height = max(w, width), max(h, height)
        if marker == _SOS:
            first_scan = min(first_scan, start)
            n_scans += 1
        elif not n_scans and _is_needed(data, start, marker, notes):
            kept.append(data[start:position])
            n_table_bytes += 0 if _APP0 <= marker <= _APP15 else position - start
        _check_number(where, n_segments, _MAX_SEGMENTS, "JPEG segments")
        _check_number(where, n_table_bytes, _MAX_TABLE_BYTES, "bytes of JPEG tables")
        _check_scans(where, n_scans, width, height)
    return width, height, b"".join([*kept, memoryview(data)[first_scan:end]])


def _is_needed(data: bytes, start: int, marker: int, notes: set[bytes]) -> bool:
    """Say whether a segment of a JPEG changes pixels or orientation; of notes the first does."""
    if marker == _APP1:
        note = next((note for note in notes if data.startswith(note, start + 4)), None)
        notes.discard(note or b"")
        return note is not None
    if _APP0 < marker <= _APP15:
        return marker == _APP14  # Adobe's, which says how colours are coded
    return marker >= 0xC0 and marker not in (_SOI, _COM)


def _check_scans(where: str, n_scans: int, width: int, height: int) -> None:
    # One per colour in any case: a picture too large is refused for that.
    n_most = max(4, min(MAX_SCANS, MAX_SCAN_PIXELS // max(1, width * height)))
    if n_scans > n_most:
        raise InvalidRequest(
            f"[image] {where} is a JPEG that draws its {width} x {height} pixels in {n_scans} or "
            f"more scans, expected at most {n_most} at that size. Save it as a baseline JPEG."
        )


def _read_png(data: bytes, where: str) -> _Read:
    width, height = struct.unpack_from(">II", data, 16)
    kept = [(0, 8)]
    notes = {b"eXIf", b"iTXt"}
    position, n_chunks = 8, 0
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        start, position = position, position + 12 + length
        n_chunks += 1
        _check_number(where, n_chunks, _MAX_CHUNKS, "PNG chunks")
        is_note = kind in notes and length <= MAX_EXIF_BYTES
        if kind == b"iTXt":
            is_note = is_note and data.startswith(b"XML:com.adobe.xmp\0", start + 8)
        if is_note:
            notes.discard(kind)
        elif kind[0] & 0x20 and kind != b"tRNS":
            continue  # ancillary: profiles, texts, times, frames of an animation
        if kept[-1][1] == start:
            start = kept.pop()[0]
        kept.append((start, position))
        if kind == b"IEND":
            break
    view = memoryview(data)
    return width, height, b"".join([view[start:end] for start, end in kept])


def _read_gif(data: bytes, where: str) -> _Read:
    """Leave out comments and other extensions before the first picture, but what is clear."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    position = 13 + (3 * (2 << (flags & 7)) if flags & 0x80 else 0)
    kept = [data[:position]]
    n_blocks = 0
    while found := _GIF_BLOCK.search(data, position):
        start = found.start()
        if found[0] != b"!":
            if found[0] == b",":
                x, y, w, h = struct.unpack_from("<4H", data, start + 1)
                width, height = max(width, x + w), max(height, y + h)
            kept.append(data[start:])
            break
        position = start + 2
        while length := data[position]:
            position += 1 + length
            n_blocks += 1
            _check_number(where, n_blocks, _MAX_SUB_BLOCKS, "blocks of GIF extensions")
        position += 1
        n_blocks += 1
        _check_number(where, n_blocks, _MAX_SUB_BLOCKS, "blocks of GIF extensions")
        if data[start + 1] == 0xF9:  # a graphic control extension: which colour is clear
            kept.append(data[start:position])
    return width, height, b"".join(kept)


def _read_webp(data: bytes, where: str) -> _Read:
    """Return the canvas's size, for which the decoder takes memory as soon as it is opened."""
    kind = data[12:16]
    if kind == b"VP8X":
        low, width_high, height_low, high = struct.unpack_from("<HBBH", data, 24)
        return (low | width_high << 16) + 1, (height_low | high << 8) + 1, data
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, data
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF, data


def _read_bmp(data: bytes, where: str) -> _Read:
    (header_bytes,) = struct.unpack_from("<I", data, 14)
    if header_bytes == 12:  # OS/2's, never compressed
        return *struct.unpack_from("<HH", data, 18), data
    width, height, _, _, compression = struct.unpack_from("<iiHHI", data, 18)
    if compression in (1, 2):
        raise _slow(where, "BMP with run lengths")
    return abs(width), abs(height), data


def _check_number(where: str, n: int, most: int, what: str) -> None:
    if n > most:
        raise InvalidRequest(
            f"[image] {where} has more than {most} {what}, which take long to read and hold no "
            "picture. Save it again with any image program."
        )


def _slow(where: str, what: str) -> Unsupported:
    return Unsupported(
        f"[image] {where} is a {what}, which few programs write and decoders are slow at. Save it "
        "as a PNG or a baseline JPEG."
    )


_READERS: dict[str, tuple[re.Pattern[bytes], Callable[[bytes, str], _Read]]] = {
    "PNG": (re.compile(rb"\x89PNG\r\n\x1a\n"), _read_png),
    "JPEG": (re.compile(rb"\xff\xd8\xff"), _read_jpeg),
    "WEBP": (re.compile(rb"RIFF....WEBPVP8", re.DOTALL), _read_webp),
    "GIF": (re.compile(rb"GIF8[79]a"), _read_gif),
    "BMP": (re.compile(rb"BM"), _read_bmp),
}
