"""Images from bytes, paths and data URLs; orientation and transparency; what is not opened."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from camelid.errors import InvalidRequest, Unsupported
from camelid.image_files import load_image, rgb_pixels
from image_cases import ORIENTATION


def picture() -> Image.Image:
    values = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    return Image.fromarray(values)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def data_url(data: bytes, media: str = "image/png") -> str:
    return f"data:{media};base64,{base64.b64encode(data).decode()}"


def test_every_kind_of_source_gives_the_same_pixels(tmp_path: Path) -> None:
    expected = np.asarray(picture())
    data = encoded(picture())
    path = tmp_path / "ein Bild.png"
    path.write_bytes(data)
    url = data_url(data)
    sources = [picture(), data, bytearray(data), memoryview(data), path, str(path), url,
               url.replace("data:", "DATA:"), data_url(data, "application/octet-stream"),
               url[:60] + "\r\n" + url[60:]]  # fmt: skip
    for source in sources:
        np.testing.assert_array_equal(rgb_pixels(load_image(source)), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP"])
def test_formats_without_loss(kind: str) -> None:
    image = Image.new("RGB", (40, 30), (255, 0, 0))
    options = {"lossless": True} if kind == "WEBP" else {}
    pixels = rgb_pixels(load_image(encoded(image, kind, **options)))
    np.testing.assert_array_equal(pixels, np.asarray(image))


def test_jpeg_of_a_camera_is_turned_upright() -> None:
    image = Image.new("L", (64, 32), 0)
    image.paste(255, (0, 0, 32, 32))  # left half white
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # the camera was held a quarter turn: its left is up
    pixels = rgb_pixels(load_image(encoded(image, "JPEG", exif=exif.tobytes())))
    assert pixels.shape == (64, 32, 3)
    assert pixels[:28].min() > 200
    assert pixels[36:].max() < 50


def test_damaged_exif_leaves_the_picture() -> None:
    for exif in [b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"\0" * 40]:
        image = picture()
        image.info["exif"] = exif
        np.testing.assert_array_equal(rgb_pixels(image), np.asarray(picture()))


def test_transparency_lies_on_white_in_every_band() -> None:
    image = Image.new("RGBA", (3000, 1000), (0, 0, 0, 0))
    image.paste((10, 20, 30, 255), (0, 500, 3000, 1000))
    pixels = rgb_pixels(image)
    assert (pixels[:500] == 255).all()
    assert (pixels[500:] == (10, 20, 30)).all()


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "green", "blue")]
    for kind in ("GIF", "PNG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert tuple(rgb_pixels(load_image(data))[0, 0]) == (255, 0, 0)


@pytest.mark.parametrize("url", ["http://a/b.png", "https://a/b.png", "HTTPS://a", "ftp://a/b.png"])
def test_urls_are_not_fetched(url: str) -> None:
    with pytest.raises(Unsupported, match=r"URLs are not fetched.*data: URL"):
        load_image(url)


def test_file_urls_are_paths(tmp_path: Path) -> None:
    path = tmp_path / "a b%é.png"
    path.write_bytes(encoded(picture()))
    for url in (path.as_uri(), path.as_uri().replace("file://", "FILE://localhost")):
        assert load_image(url).size == (6, 4)
        with pytest.raises(Unsupported, match="local paths"):
            load_image(url, allow_files=False)
    for url in ("file://", "file://other/a.png", "file://a.png"):
        with pytest.raises(InvalidRequest, match="no file of this machine"):
            load_image(url)


def test_paths_can_be_forbidden(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(picture()))
    for source in (path, str(path)):
        with pytest.raises(Unsupported, match=r"a\.png'? is no data: URL, and local paths are not"):
            load_image(source, allow_files=False)
    assert load_image(data_url(path.read_bytes()), allow_files=False).size == (6, 4)


def test_other_objects_are_refused() -> None:
    for source in (None, 3, [1], np.zeros((3, 3))):
        with pytest.raises(InvalidRequest, match="expected a Pillow image, the bytes"):
            load_image(source)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("note", ["exif", "xmp"])
def test_orientation_is_found_where_cameras_write_it(kind: str, note: str) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    options: dict[str, object] = {"exif": exif.tobytes()} if note == "exif" else {"xmp": xmp}
    if kind == "PNG" and note == "xmp":
        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", xmp.decode())
        options = {"pnginfo": info}
    data = encoded(picture(), kind, comment="a camera", icc_profile=bytes(200), **options)
    assert rgb_pixels(load_image(data)).shape == (6, 4, 3)


@pytest.mark.parametrize("code", ["{:02X}", "{:02x}"])
def test_data_urls_may_be_percent_encoded(code: str) -> None:
    data = encoded(picture()) + bytes(range(256))  # behind the end of the picture
    url = data_url(data)
    for character in "+/=":
        assert character in url[22:]
        url = url[:22] + url[22:].replace(character, "%" + code.format(ord(character)))
    url += "%0A%0d%20"
    np.testing.assert_array_equal(rgb_pixels(load_image(url)), np.asarray(picture()))
    for wrong in ("%2", "%", "%zz", "%00"):
        with pytest.raises(InvalidRequest, match="not base64"):
            load_image(url + wrong)


class Strange:
    def __init__(self, answer: object) -> None:
        self.answer = answer

    def __fspath__(self) -> str:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer  # type: ignore[return-value]


@pytest.mark.parametrize(
    "answer", [5, None, OSError("no"), RuntimeError("no"), InvalidRequest("x")]
)
def test_objects_that_give_no_path_are_refused(answer: object) -> None:
    for allow_files in (True, False):
        with pytest.raises(InvalidRequest, match="type Strange gives no path"):
            load_image(Strange(answer), allow_files=allow_files)


def test_paths_of_bytes_are_paths(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(picture()))
    assert load_image(Strange(str(path).encode())).size == (6, 4)


def closed_images(path: Path) -> list[Image.Image]:
    """Return images closed in every way that Pillow knows."""
    path.write_bytes(encoded(picture()))
    never_read = Image.open(path)
    never_read.close()
    with Image.open(path) as left_block:
        pass
    with path.open("rb") as file:
        lost_file = Image.open(file)
    in_memory = picture()
    in_memory.close()
    return [never_read, left_block, lost_file, in_memory]


def test_closed_images_are_said_to_be_closed(tmp_path: Path) -> None:
    for image in closed_images(tmp_path / "a.png"):
        for read in (load_image, rgb_pixels):
            with pytest.raises(InvalidRequest, match=r"the image is closed.*load\(\)"):
                read(image)
    with Image.open(tmp_path / "a.png") as read_in_time:
        read_in_time.load()
    assert load_image(read_in_time).size == (6, 4)
