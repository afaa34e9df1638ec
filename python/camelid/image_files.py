"""Opens images that strangers send: bytes, files and data URLs, decoded by Pillow to RGB.

Owns the limits on bytes and pixels, the orientation in which a photo is seen and the white behind
transparency. Must never resize, and never open a network connection. What a file may ask of its
decoder is `image_containers.py`'s to say.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from camelid.errors import CapacityError, Error, InvalidRequest, Unsupported
from camelid.image_containers import MAX_EXIF_BYTES, Container, read_container
from camelid.json_file import shorten

__all__ = ["MAX_BYTES", "MAX_PIXELS", "MAX_SIDE", "load_image", "rgb_pixels"]

MAX_BYTES = 64 << 20  # 20 times a 12-megapixel photo, as a file or decoded from a data URL
# Where Pillow begins to warn of decompression bombs: 4 bytes each, then 3 more as an array.
MAX_PIXELS = 89_478_485
MAX_SIDE = 65_535  # pixels: what JPEG can name

# What cameras, browsers and screenshots write, and clients send. Each decodes in a time that pixels
# and bytes bound (`image_containers.py` sees to it), which is not so for others that Pillow knows:
# EPS starts another program, TIFF holds any of thirty codecs, AVIF may hide frames before the one
# it shows, and plain PPM is read in Python.
_DECODERS: dict[str, type[ImageFile.ImageFile]] = {
    "PNG": PngImageFile,
    "JPEG": JpegImageFile,
    "WEBP": WebPImageFile,
    "GIF": GifImageFile,
    "BMP": BmpImageFile,
}
_FORMATS = tuple(_DECODERS)
_MAX_URL_HEADER = 256  # characters before the comma of a data URL; a media type and "base64"
# What may be written as a percent code in base64 and blanks, beside letters, which nobody codes.
_PERCENT_CODES = (b"+", b"/", b"=", b"\r", b"\n", b"\t", b" ")
_BLANKS = b" \t\r\n\v\f"
_DAMAGED = "It is truncated or damaged; send it again."
_BAND_PIXELS = 1 << 20  # pixels converted at once, so that a mode's copies stay small

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation


def load_image(
    source: Image.Image | bytes | str | os.PathLike[str], *, allow_files: bool = True
) -> Image.Image:
    """Decode an image; of an animation, its first frame.

    Args:
        source: An open image, the bytes of an image file, a `data:` or `file:` URL, or a local
            path.
        allow_files: Whether a path may be given. Servers pass False: a client's path would read
            the server's files.

    Raises:
        InvalidRequest: If it is none of these, damaged, or beyond `MAX_BYTES`, `MAX_PIXELS` or
            `MAX_SIDE`.
        Unsupported: If it is an http(s) or other URL.
    """
    if isinstance(source, Image.Image):
        _decode(source, "the image")
        return source
    if isinstance(source, bytes | bytearray | memoryview):
        return _decode_bytes(bytes(source), "the image")
    if isinstance(source, str):
        if source[:5].lower() == "data:":
            return _decode_bytes(_read_data_url(source), "the data URL's image")
        scheme = source[:32].partition("://")
        if scheme[0].lower() == "file" and scheme[1]:
            source = _file_url_path(source)
        elif scheme[1]:
            raise Unsupported(
                f"[image] {scheme[0]!r} URLs are not fetched: this process would open connections "
                "that a prompt chose. Download the image, and send its bytes or a data: URL."
            )
    if not isinstance(source, str | os.PathLike):
        raise InvalidRequest(
            f"[image] the source is {type(source).__name__}, expected a Pillow image, the bytes of "
            "a file, a data: URL or a path."
        )
    path = _path_text(source)
    if not allow_files:
        raise Unsupported(
            f"[image] {shorten(path)} is no data: URL, and local paths are not allowed here. Send "
            "a data: URL."
        )
    return _decode_bytes(_read_file(path), shorten(path))


def rgb_pixels(image: Image.Image) -> NDArray[np.uint8]:
    """Return an image as uint8 [height, width, 3]: upright, transparency laid onto white.

    Raises:
        InvalidRequest: If it cannot be decoded, or is too large.
    """
    _decode(image, "the image")
    with _pillow("the image", f"Its mode is {image.mode!r}; convert it to RGB yourself."):
        image = _upright(image)
        if image.mode == "RGB" and image.info.get("transparency") is None:
            return np.asarray(image)
        pixels = np.empty((image.height, image.width, 3), np.uint8)
        n_rows = max(1, _BAND_PIXELS // image.width)
        for top in range(0, image.height, n_rows):
            bottom = min(top + n_rows, image.height)
            pixels[top:bottom] = np.asarray(_to_rgb(image.crop((0, top, image.width, bottom))))
        return pixels


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert as transformers' convert_to_rgb does; plain convert("RGB") gives other pixels."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow documents none; without its notes a picture is still a picture
        return image
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def _decode_bytes(data: bytes, where: str) -> Image.Image:
    if len(data) > MAX_BYTES:
        raise _too_many_bytes(where, len(data))
    container = read_container(data, where)
    if container is None:
        raise _unknown_format(where)
    if container.width and container.height:  # else Pillow says what is wrong
        _check_size((container.width, container.height), where)
    image = _open(container, where)
    if len(image.info.get("exif", b"")) > MAX_EXIF_BYTES:  # WebP's, read when it is asked for
        del image.info["exif"]
    _decode(image, where)
    return image


def _open(container: Container, where: str) -> Image.Image:
    """Read a file's header with the one decoder that its first bytes name.

    Image.open would do so too, and warn on stderr of what `_check_size` refuses with an Error.
    Silencing that warning would take the process's filters or Pillow's global limit, which are not
    ours and which other threads use at the same time.
    """
    with _pillow(where):
        try:
            return _DECODERS[container.kind](io.BytesIO(container.data))
        except (SyntaxError, IndexError, TypeError, struct.error):  # how Pillow says it is none
            raise _unknown_format(where) from None


def _decode(image: Image.Image, where: str) -> None:
    """Check the size that the header claims, then read the pixels."""
    _check_size(image.size, where)
    with _pillow(where):
        try:
            image.load()
        except Exception:
            if _is_closed(image):
                raise InvalidRequest(
                    f"[image] {where} is closed, or was so before its pixels were read. Pass it "
                    "before the end of its `with` block, or call load() there."
                ) from None
            raise


def _is_closed(image: Image.Image) -> bool:
    """Say whether pixels that cannot be read are missing because somebody closed the image."""
    file = getattr(image, "fp", None)
    if file is not None:
        return bool(getattr(file, "closed", False))
    try:
        image.getpixel((0, 0))
    except ValueError as error:  # what Pillow leaves in place of the pixels says so
        return "closed" in str(error)
    except Exception:
        return bool(getattr(image, "tile", None))  # still to be read, and no file to read them from
    return False


def _check_size(size: tuple[int, int], where: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise InvalidRequest(f"[image] {where} has {width} x {height} pixels, expected some.")
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise _too_large(where, f"{width} x {height}")


@contextmanager
def _pillow(where: str, advice: str = _DAMAGED) -> Iterator[None]:
    """Turn whatever Pillow raises into an Error: what damage may raise is not documented."""
    try:
        yield
    except Error:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(where, f"more than {Image.MAX_IMAGE_PIXELS}") from None
    except MemoryError as cause:
        raise CapacityError(
            f"[image] {where} does not fit into memory. Send a smaller one."
        ) from cause
    except Exception as cause:
        raise InvalidRequest(
            f"[image] {where} cannot be decoded: {shorten(cause)}. {advice}"
        ) from cause


def _unknown_format(where: str) -> InvalidRequest:
    return InvalidRequest(
        f"[image] {where} is in no format that is read here, or damaged at its beginning, expected "
        f"{', '.join(_FORMATS[:-1])} or {_FORMATS[-1]}. Convert it, or open it with Pillow "
        "yourself and pass the open image."
    )


def _too_large(where: str, pixels: str) -> InvalidRequest:
    return InvalidRequest(
        f"[image] {where} has {pixels} pixels, expected at most {MAX_PIXELS} in all and {MAX_SIDE} "
        "a side. Send a smaller one: the model sees 2 million pixels at most."
    )


def _too_many_bytes(where: str, n_bytes: int) -> InvalidRequest:
    return InvalidRequest(
        f"[image] {where} has {n_bytes} bytes, expected at most {MAX_BYTES}. Send a smaller one."
    )


def _file_url_path(url: str) -> Path:
    host, slash, path = url[len("file://") :].partition("/")
    if host.lower() not in ("", "localhost") or not slash:
        raise InvalidRequest(
            f"[image] {shorten(url)} names no file of this machine, expected file:///path."
        )
    return Path("/" + unquote(path))


def _read_data_url(url: str) -> bytes:
    header, comma, _ = url[: _MAX_URL_HEADER + 1].partition(",")
    if not comma:
        raise InvalidRequest(
            f"[image] the data URL begins {shorten(header, 40)} and has no comma within "
            f"{_MAX_URL_HEADER} characters, expected data:image/png;base64,..."
        )
    # The media type does not matter: the bytes themselves say what they are.
    if not header.lower().replace(" ", "").endswith(";base64"):
        raise Unsupported(
            f"[image] the data URL begins {shorten(header)}, only ;base64 is supported."
        )
    n_chars = len(url) - len(header) - 2 * url.count("%")
    if (n_bytes := n_chars // 4 * 3) > MAX_BYTES + 3:  # before it costs anything
        raise _too_many_bytes("the data URL's image", n_bytes)
    try:
        # As a whole, never in pieces: a list of 80 million characters takes 50 times their memory.
        characters = _base64_characters(url[len(header) + 1 :].encode("ascii"))
        return base64.b64decode(characters, validate=True)
    except (binascii.Error, ValueError) as cause:
        raise InvalidRequest(
            f"[image] the data URL is not base64: {shorten(cause)}. Encode the file again."
        ) from None


def _base64_characters(payload: bytes) -> bytes:
    """Undo percent codes, and leave out blanks."""
    if b"%" in payload:
        for character in _PERCENT_CODES:
            for code in (f"%{character[0]:02X}", f"%{character[0]:02x}"):
                payload = payload.replace(code.encode(), character)
    return payload.translate(None, _BLANKS)


def _path_text(path: str | os.PathLike[Any]) -> str:
    """Return a path as text; an object's own may raise anything."""
    try:
        return os.fsdecode(path)
    except Exception as cause:
        raise InvalidRequest(
            f"[image] the source's type {type(path).__name__} gives no path: __fspath__ raised "
            f"{type(cause).__name__} or returned no text. Give a path, bytes or a data: URL."
        ) from cause


def _read_file(path: str) -> bytes:
    where = shorten(path)
    try:
        # Before it is opened, too: with some devices opening alone does something.
        _check_file(os.stat(path), where)
        # What would wait for a writer or for news, as pipes and /proc/kmsg do, fails instead.
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        with open(file, "rb") as opened:
            n_bytes = _check_file(os.fstat(file), where)
            data = opened.read(n_bytes)
    except (OSError, ValueError) as cause:
        if isinstance(cause, Error):
            raise
        raise InvalidRequest(
            f"[image] cannot read {where}: {shorten(cause)}. Give a path, bytes or a data: URL."
        ) from cause
    return data or b""  # None where there is nothing yet


def _check_file(info: os.stat_result, where: str) -> int:
    """Return how many bytes a file has, where it is one whose bytes are all there."""
    if not stat.S_ISREG(info.st_mode):
        raise InvalidRequest(f"[image] {where} is not a regular file. Give the path of an image.")
    if info.st_size > MAX_BYTES:
        raise _too_many_bytes(where, info.st_size)
    if info.st_size == 0:  # so are those of /proc, whose reading may never end
        raise InvalidRequest(f"[image] {where} is empty. Give the path of an image.")
    return info.st_size
