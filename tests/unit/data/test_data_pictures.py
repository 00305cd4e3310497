"""Still pictures of every mode, by files and in memory: scaled right, upright and on white, or refused by name."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps

from megatron_flashi2v.data.pictures import (
    FORMATS,
    PictureError,
    UnreadableModeError,
    picture_to_tensor,
    read_picture,
    still_kind,
)

YELLOW = (230, 220, 30)
RAMP = np.array([[0, 64, 128, 255]], np.uint8)


def shown(path: Path) -> list[list[int]]:
    """Pixels of the first row, (red, green, blue) each."""
    return read_picture(path)[:, 0].T.tolist()


def save(picture: Image.Image, path: Path, **options: Any) -> Path:
    picture.save(path, **options)
    return path


def patched(path: Path, tag: int, value: int) -> Path:
    """Set a short tag of a little-endian TIFF."""
    data = bytearray(path.read_bytes())
    first = struct.unpack_from("<I", data, 4)[0]
    for number in range(struct.unpack_from("<H", data, first)[0]):
        entry = first + 2 + 12 * number
        if struct.unpack_from("<H", data, entry)[0] == tag:
            struct.pack_into("<H", data, entry + 8, value)
            path.write_bytes(data)
            return path
    raise AssertionError(f"{path} has no tag {tag}")


def png(colour_type: int, depth: int, pixels: bytes, width: int, transparency: bytes) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, 1, depth, colour_type, 0, 0, 0)
    parts = [(b"IHDR", head), (b"tRNS", transparency), (b"IDAT", zlib.compress(b"\0" + pixels)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts if part[1] or part[0] == b"IEND")


@pytest.mark.parametrize("white", [1.0, 255.0, 65535.0])
def test_floating_tiff(tmp_path: Path, white: float) -> None:
    levels = RAMP.astype(np.float32) / 255 * np.float32(white)
    assert shown(save(Image.fromarray(levels), tmp_path / "a.tif")) == [[level] * 3 for level in RAMP[0].tolist()]


def test_floating_levels_that_swing_over_are_clipped() -> None:
    levels = np.array([[-0.03, 0.0, 0.5, 1.0, 1.05]], np.float32)
    assert picture_to_tensor(Image.fromarray(levels))[0, 0].tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("levels", [[0.0, 1e6], [-5.0, 1.0], [0.0, np.nan], [0.0, np.inf]])
def test_floating_levels_without_a_white_are_refused(tmp_path: Path, levels: list[float]) -> None:
    path = save(Image.fromarray(np.array([levels], np.float32)), tmp_path / "a.tif")
    with pytest.raises(PictureError, match=r"a\.tif: the picture has floating levels of .* save it as an 8-bit PNG"):
        read_picture(path)


@pytest.mark.parametrize("top", [255, 65535, 2**31 - 1])
def test_whole_numbers_of_32_bits(tmp_path: Path, top: int) -> None:
    levels = np.rint(RAMP / 255 * top).astype(np.int32)
    assert shown(save(Image.fromarray(levels), tmp_path / "a.tif")) == [[level] * 3 for level in RAMP[0].tolist()]


def test_unsigned_whole_numbers_of_32_bits(tmp_path: Path) -> None:
    levels = np.rint(RAMP / 255 * (2**32 - 1)).astype(np.uint32)
    path = patched(save(Image.fromarray(levels.view(np.int32)), tmp_path / "a.tif"), 339, 1)
    assert shown(path) == [[level] * 3 for level in RAMP[0].tolist()]


def test_negative_whole_numbers_are_refused(tmp_path: Path) -> None:
    path = save(Image.fromarray(np.array([[-3, 9]], np.int32)), tmp_path / "a.tif")
    with pytest.raises(PictureError, match="levels down to -3") as caught:
        read_picture(path)
    assert caught.value.reason == "unsupported_picture"


def test_sixteen_bits(tmp_path: Path) -> None:
    levels = RAMP.astype(np.uint16) * 257
    for name in ("a.png", "a.tif"):
        assert shown(save(Image.fromarray(levels), tmp_path / name)) == [[level] * 3 for level in RAMP[0].tolist()]
    big = Image.frombytes("I;16B", (4, 1), levels.astype(">u2").tobytes())
    assert picture_to_tensor(big)[0, 0].tolist() == RAMP[0].tolist()


def test_twelve_bits(tmp_path: Path) -> None:
    """Pillow gives the numbers of such a file as they are, 0 to 4095."""
    packed = int("".join(f"{value:012b}" for value in (0, 1024, 2048, 4095)), 2).to_bytes(6, "big")
    # Width, height, bits, no compression, black is 0, place of the pixels, samples, rows, bytes.
    tags = {256: 4, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 6}
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag == 273 else 3, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<I", 14)
    (tmp_path / "a.tif").write_bytes(head + packed + struct.pack("<H", len(tags)) + entries + bytes(4))
    assert shown(tmp_path / "a.tif") == [[level] * 3 for level in (0, 64, 128, 255)]


def test_white_is_zero(tmp_path: Path) -> None:
    """TIFFs may count from white; Pillow turns those of 8 bits and leaves the others."""
    for levels in (RAMP.astype(np.uint16) * 257, RAMP.astype(np.float32) / 255):
        path = patched(save(Image.fromarray(levels), tmp_path / "a.tif"), 262, 0)
        assert shown(path) == [[255 - level] * 3 for level in RAMP[0].tolist()]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV", "P", "PA"])
def test_colours_of_every_mode(mode: str) -> None:
    colours = np.array([[YELLOW, (200, 30, 30), (20, 60, 220), (255, 255, 255), (0, 0, 0)]], np.uint8)
    picture = Image.fromarray(colours)
    if mode == "LAB":
        profiles = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
        picture = ImageCms.profileToProfile(picture, *profiles, outputMode="LAB")
    elif mode == "PA":
        picture = picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=256).convert("PA")
    elif mode == "P":
        picture = picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=256)
    elif mode == "RGBa":
        picture = picture.convert("RGBA").convert("RGBa")
    else:
        picture = picture.convert(mode)
    assert picture.mode == mode
    found = picture_to_tensor(picture).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(found - colours).max() <= (6 if mode in ("LAB", "HSV") else 2)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N", "F"])
def test_greys_of_every_mode(mode: str) -> None:
    dark = Image.new(mode, (4, 3), (0, 255) if len(mode) == 2 else 0)
    top = {"1": 1, "I": 255, "F": 255.0}.get(mode, 65535 if mode.startswith("I;") else 255)
    bright = Image.new(mode, (4, 3), (255, 255) if len(mode) == 2 else top)
    assert not picture_to_tensor(dark).any() and (picture_to_tensor(bright) == 255).all()


def test_modes_of_pillow_are_all_known() -> None:
    """A mode that a later Pillow brings must be looked at."""
    from PIL import ImageMode

    for mode in (*Image.MODES, "La", "PA", "I;16L", "I;16B", "I;16N"):
        assert ImageMode.getmode(mode)
        assert picture_to_tensor(Image.new(mode, (2, 2))).shape == (3, 2, 2)


def test_unknown_modes_are_refused_by_name() -> None:
    class Strange(Image.Image):
        mode = "BGR;15"

    picture = Strange()
    with pytest.raises(UnreadableModeError, match="'BGR;15'"):
        picture_to_tensor(picture)


@pytest.mark.parametrize("quality", [75, 100])
def test_cmyk_of_photo_editors(tmp_path: Path, quality: int) -> None:
    """JPEGs of CMYK are stored inverted, with Adobe's mark; other files are not."""
    picture = Image.new("RGB", (32, 32), YELLOW).convert("CMYK")
    for name in ("a.jpg", "a.tif"):
        path = save(picture, tmp_path / name, **({"quality": quality} if name == "a.jpg" else {}))
        if name == "a.jpg":
            assert b"Adobe" in path.read_bytes()
        assert np.abs(np.array(shown(path)[0]) - YELLOW).max() <= 3


def test_transparency_of_every_kind_lies_on_white(tmp_path: Path) -> None:
    """The first of two pixels is transparent."""
    grey16 = png(0, 16, struct.pack(">HH", 25700, 7000), 2, struct.pack(">H", 25700))
    files = {
        "rgba": (png(6, 8, bytes([9, 9, 9, 0, 1, 2, 3, 255]), 2, b""), [1, 2, 3]),
        "grey and alpha": (png(4, 8, bytes([9, 0, 7, 255]), 2, b""), [7] * 3),
        "grey": (png(0, 8, bytes([100, 7]), 2, struct.pack(">H", 100)), [7] * 3),
        "grey of 16 bits": (grey16, [7000 >> 8] * 3),
        "one bit": (png(0, 1, bytes([0b10000000]), 2, struct.pack(">H", 1)), [0] * 3),
        "rgb": (png(2, 8, bytes([1, 2, 3, 4, 5, 6]), 2, struct.pack(">HHH", 1, 2, 3)), [4, 5, 6]),
        "rgb of 16 bits": (
            png(2, 16, struct.pack(">6H", 257, 514, 771, 1028, 1285, 1542), 2, struct.pack(">3H", 257, 514, 771)),
            [4, 5, 6],
        ),
    }
    for name, (data, second) in files.items():
        (tmp_path / "a.png").write_bytes(data)
        assert shown(tmp_path / "a.png") == [[255] * 3, second], name
    palette = Image.new("P", (2, 1))
    palette.putpalette([9, 9, 9, 200, 0, 0])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=bytes([0, 128]))
    assert shown(tmp_path / "p.png") == [[255] * 3, [227, 127, 127]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", [
    "RGB.jpg", "L.tif", "I;16.tif", "I;16.png", "F.tif", "RGBA.tif", "RGBA.png", "RGB.webp",
])
def test_orientation_of_every_depth(tmp_path: Path, kind: str, orientation: int) -> None:
    mode, name = kind.split(".")[0], f"a.{kind.split('.')[1]}"
    bright = np.zeros((16, 24), bool)
    bright[:8, :12] = True
    if mode in ("I;16", "F"):
        picture = Image.fromarray(bright.astype(np.uint16) * 60000 if mode == "I;16" else bright.astype(np.float32))
    else:
        picture = Image.fromarray(bright.astype(np.uint8) * 255).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    plain = Image.fromarray(bright.astype(np.uint8) * 255)
    plain.getexif()[0x0112] = orientation
    wanted = np.asarray(ImageOps.exif_transpose(plain)) > 128
    found = read_picture(save(picture, tmp_path / name, exif=exif))
    assert np.array_equal(found[0].numpy() > 128, wanted)


def test_colour_profiles_are_applied(tmp_path: Path) -> None:
    """Viewers show what the file's profile says; sRGB's own changes no pixel."""
    colours = np.array([[YELLOW, (200, 30, 30), (90, 120, 60)]], np.uint8)
    picture = Image.fromarray(colours)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert shown(save(picture, tmp_path / "a.png", icc_profile=srgb)) == colours[0].tolist()
    swapped = swapped_primaries(srgb)
    found = np.array(shown(save(picture, tmp_path / "b.png", icc_profile=swapped)))
    assert np.abs(found - colours[0][:, [1, 0, 2]]).max() <= 3
    assert shown(save(picture, tmp_path / "c.png", icc_profile=b"no profile")) == colours[0].tolist()


def swapped_primaries(profile: bytes) -> bytes:
    """sRGB with red and green exchanged, and another name."""
    data = bytearray(profile)
    table = {}
    for number in range(struct.unpack_from(">I", data, 128)[0]):
        name, place, size = struct.unpack_from(">4sII", data, 132 + 12 * number)
        table[name] = (132 + 12 * number, place, size)
    red, green = table[b"rXYZ"], table[b"gXYZ"]
    struct.pack_into(">II", data, red[0] + 4, *green[1:])
    struct.pack_into(">II", data, green[0] + 4, *red[1:])
    _, place, size = table[b"desc"]
    for old in ("sRGB".encode("utf-16-be"), b"sRGB"):
        data[place : place + size] = bytes(data[place : place + size]).replace(old, bytes(reversed(old)))
    return bytes(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "JPEG2000", "PPM", "TGA", "AVIF", "MPO"])
def test_formats(tmp_path: Path, kind: str) -> None:
    endings = {"JPEG2000": "jp2", "TGA": "tga"}
    path = tmp_path / f"a.{endings.get(kind, 'picture')}"
    Image.new("RGB", (16, 8), (200, 100, 40)).save(path, kind)
    assert np.abs(np.array(shown(path)[0]) - (200, 100, 40)).max() <= 4
    assert (still_kind(path) is None) == (kind == "GIF")  # a GIF is a video, of one frame perhaps
    assert read_picture(path).dtype == torch.uint8


def test_what_is_no_still_picture(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    frames = [Image.new("RGB", (8, 8), (level, 0, 0)) for level in (0, 90, 200)]
    frames[0].save(tmp_path / "moving.png", save_all=True, append_images=frames[1:])
    for name in ("a.txt", "absent.png", "moving.png"):
        assert still_kind(tmp_path / name) is None, name
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:])
    assert still_kind(tmp_path / "moving.webp") == "WEBP"  # FFmpeg does not read these as videos


def test_pictures_that_are_not_read_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64))
    path = patched(save(Image.fromarray(RAMP.astype(np.float32)), tmp_path / "double.tif"), 258, 64)
    for name, word in (("a.heic", "HEIF"), (path.name, "TIFF")):
        assert still_kind(tmp_path / name) == word
        with pytest.raises(PictureError, match=f"is a {word} picture of a kind that is not read") as caught:
            read_picture(tmp_path / name)
        assert caught.value.reason == "unsupported_picture"


def test_large_and_damaged_pictures(tmp_path: Path) -> None:
    path = save(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)), tmp_path / "a.png")
    with pytest.raises(PictureError, match="64 x 64 pixels; at most 1000") as caught:
        read_picture(path, max_pixels=1000)
    assert caught.value.reason == "too_large"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(PictureError, match="damaged") as caught:
        read_picture(path)
    assert caught.value.reason == "unreadable"


def test_no_format_calls_other_programs() -> None:
    assert "EPS" not in FORMATS and "WMF" not in FORMATS  # Ghostscript, GDI
    with io.BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n") as data:
        assert Image.open(data).format == "EPS"


@pytest.mark.parametrize("brightest", [1.2, 7.0, 1023.0])
def test_floats_that_would_come_out_black_are_refused(tmp_path: Path, brightest: float) -> None:
    """Highlights above a white of 1, and levels of 10 bits."""
    path = tmp_path / "a.tif"
    Image.fromarray(np.linspace(0, brightest, 64, dtype=np.float32).reshape(8, 8)).save(path)
    with pytest.raises(PictureError, match="white 1, 255 or 65535"):
        read_picture(path)
