"""Photos: every kind of file a phone or a browser hands over, damaged ones, and pixels equal to transformers'."""

from __future__ import annotations

import errno
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import runtime.image
from export.families.llava.preprocessor import clip_preprocessor
from runtime.bundle import ImageInfo
from runtime.errors import ImageError
from runtime.image import MAX_PIXELS, load_photo, preprocess, view
from runtime.latency import peak_rss_bytes

CLIP = clip_preprocessor(336)
INFO = ImageInfo.from_preprocessor(CLIP)
RED, GREEN = (255, 0, 0), (0, 255, 0)


def _left_red_right_green(width: int = 32, height: int = 16) -> Image.Image:
    image = Image.new("RGB", (width, height), RED)
    image.paste(GREEN, (width // 2, 0, width, height))
    return image


def _near(photo: np.ndarray, row: int, column: int, colour: tuple[int, int, int], *, within: int = 6) -> bool:
    return bool(np.abs(photo[row, column].astype(int) - colour).max() <= within)


# Kinds of photos


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tiff", "gif"])
def test_common_formats(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"photo.{suffix}"
    _left_red_right_green().save(path)
    photo = load_photo(path)
    assert photo.shape == (16, 32, 3)
    assert photo.dtype == np.uint8
    assert _near(photo, 8, 2, RED)
    assert _near(photo, 8, 29, GREEN)


def test_the_name_does_not_matter(tmp_path: Path) -> None:
    _left_red_right_green().save(tmp_path / "photo.png")
    (tmp_path / "photo.png").rename(tmp_path / "photo.jpg")
    assert load_photo(tmp_path / "photo.jpg").shape == (16, 32, 3)


def test_cmyk(tmp_path: Path) -> None:
    _left_red_right_green().convert("CMYK").save(tmp_path / "photo.jpg", quality=95)
    photo = load_photo(tmp_path / "photo.jpg")
    assert _near(photo, 8, 2, RED)
    assert _near(photo, 8, 29, GREEN)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_grey_keeps_the_upper_8_bits(tmp_path: Path, suffix: str) -> None:
    ramp = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / f"photo.{suffix}")
    photo = load_photo(tmp_path / f"photo.{suffix}")
    assert np.array_equal(photo[..., 0], ramp >> 8)
    assert np.array_equal(photo[..., 0], photo[..., 2])


def _png(width: int, height: int, *, depth: int, colour: int, rows: bytes, clear: bytes = b"") -> bytes:
    """A PNG put together by hand, for what Pillow itself does not write; `clear` says what is transparent."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    before = chunk(b"IHDR", header) + (chunk(b"PLTE", bytes(range(9))) if colour == 3 else b"")
    data = (
        before + (chunk(b"tRNS", clear) if clear else b"") + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    return b"\x89PNG\r\n\x1a\n" + data


def test_16_bit_colour(tmp_path: Path) -> None:
    row = b"\0" + struct.pack(">6H", 65535, 0, 0, 0x1234, 0x8000, 0xFFFF)
    (tmp_path / "photo.png").write_bytes(_png(2, 1, depth=16, colour=2, rows=row))
    assert load_photo(tmp_path / "photo.png").tolist() == [[[255, 0, 0], [0x12, 0x80, 0xFF]]]


def test_32_bit_and_floating_point_samples_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 100_000, dtype=np.int32)).save(tmp_path / "deep.tiff")
    Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(ImageError, match="32-bit samples; save it with 8 or 16"):
        load_photo(tmp_path / "deep.tiff")
    with pytest.raises(ImageError, match="floating-point samples; save it with 8 or 16"):
        load_photo(tmp_path / "float.tiff")


def test_palette(tmp_path: Path) -> None:
    _left_red_right_green().convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "photo.png")
    photo = load_photo(tmp_path / "photo.png")
    assert _near(photo, 8, 2, RED)
    assert _near(photo, 8, 29, GREEN)


def test_palette_with_transparency_is_laid_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.paste(1, (0, 0, 2, 4))
    image.save(tmp_path / "photo.png", transparency=0)
    photo = load_photo(tmp_path / "photo.png")
    assert photo[0, 0].tolist() == [255, 0, 0]
    assert photo[0, 3].tolist() == [255, 255, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_laid_on_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (2, 0, 4, 4))
    image.putpixel((3, 3), (0, 0, 0, 128))
    image.convert(mode).save(tmp_path / "photo.png")
    photo = load_photo(tmp_path / "photo.png")
    assert photo[0, 0].tolist() == [0, 0, 0]
    assert photo[0, 3].tolist() == [255, 255, 255]
    assert abs(int(photo[3, 3, 0]) - 127) <= 1


@pytest.mark.parametrize(
    ("depth", "colour", "row", "clear", "expected"),
    [
        (1, 0, b"\x40", b"\0\1", [0, 255, 0, 0]),
        (1, 0, b"\x40", b"\0\0", [255, 255, 255, 255]),
        (2, 0, b"\x1b", b"\0\2", [0, 85, 255, 255]),
        (4, 0, b"\x01\x2f", b"\0\2", [0, 17, 255, 255]),
        (8, 0, b"\x00\x01\x02\x03", b"\0\2", [0, 1, 255, 3]),
        (8, 0, b"\x00\x01\x02\x03", b"\7\2", [0, 1, 255, 3]),  # only as many bits as a sample has count
        (16, 0, struct.pack(">4H", 0x1200, 0x1234, 0x1235, 0xFFFF), b"\x12\x34", [0x12, 255, 0x12, 255]),
        (8, 2, bytes([1, 2, 3] * 2 + [1, 2, 4] * 2), b"\0\1\0\2\0\3", [255, 255, (1, 2, 4), (1, 2, 4)]),
        (
            16,
            2,
            struct.pack(">12H", 0x1234, 0x5678, 0x9ABC, 0x1234, 0x5678, 0x9ABD, 0, 0, 0, 0x1200, 0x5600, 0x9A00),
            b"\x12\x34\x56\x78\x9a\xbc",
            [255, (0x12, 0x56, 0x9A), 0, (0x12, 0x56, 0x9A)],
        ),
        (8, 3, bytes([0, 1, 2, 1]), b"\xff\0", [(0, 1, 2), 255, (6, 7, 8), 255]),
        (8, 3, bytes([0, 1, 2, 1]), b"\xff\x80", [(0, 1, 2), (129, 129, 130), (6, 7, 8), (129, 129, 130)]),
        (8, 3, bytes([0, 200, 2, 2]), b"", [(0, 1, 2), 0, (6, 7, 8), (6, 7, 8)]),  # beyond the palette
        (8, 4, bytes([9, 255, 9, 0, 0, 255, 255, 255]), b"", [9, 255, 0, 255]),
        (16, 4, struct.pack(">8H", 0x9000, 65535, 9, 0, 0, 65535, 65535, 65535), b"", [0x90, 255, 0, 255]),
        (8, 6, bytes([1, 2, 3, 255, 1, 2, 3, 0] * 2), b"", [(1, 2, 3), 255, (1, 2, 3), 255]),
        (16, 6, struct.pack(">8H", 256, 512, 768, 65535, 1, 2, 3, 0) * 2, b"", [(1, 2, 3), 255, (1, 2, 3), 255]),
    ],
)
def test_every_kind_of_png(
    tmp_path: Path, depth: int, colour: int, row: bytes, clear: bytes, expected: list[int | tuple[int, int, int]]
) -> None:
    """Every depth and colour type, with what it has to say about transparency."""
    (tmp_path / "photo.png").write_bytes(_png(4, 1, depth=depth, colour=colour, rows=b"\0" + row, clear=clear))
    wanted = [list(pixel) if isinstance(pixel, tuple) else [pixel] * 3 for pixel in expected]
    assert load_photo(tmp_path / "photo.png")[0].tolist() == wanted


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize(
    ("photometric", "expected"), [(0, 255 - 156), (1, 156)], ids=["white is zero", "black is zero"]
)
def test_16_bit_tiff(tmp_path: Path, compression: str | None, photometric: int, expected: int) -> None:
    image = Image.fromarray(np.full((4, 4), 40_000, np.uint16))
    image.save(tmp_path / "photo.tiff", compression=compression, tiffinfo={262: photometric})
    assert load_photo(tmp_path / "photo.tiff")[0, 0].tolist() == [expected] * 3


def test_16_bit_pgm(tmp_path: Path) -> None:
    (tmp_path / "photo.pgm").write_bytes(b"P5 2 1 65535\n" + struct.pack(">2H", 0x9C40, 0x12FF))
    assert load_photo(tmp_path / "photo.pgm")[0, :, 0].tolist() == [0x9C, 0x12]


def test_what_a_first_frame_does_not_cover_is_white(tmp_path: Path) -> None:
    """A screen of 4 x 2 pixels whose one picture covers the left half; index 0 of the palette is red."""
    screen = b"GIF89a" + struct.pack("<HHBBB", 4, 2, 0x80, 0, 0) + bytes([255, 0, 0, 0, 255, 0])
    picture = b"," + struct.pack("<HHHHB", 0, 0, 2, 2, 0) + bytes([2, 3, 0x44, 0x02, 0x05, 0]) + b";"
    (tmp_path / "photo.gif").write_bytes(screen + picture)
    photo = load_photo(tmp_path / "photo.gif")
    assert photo[0, 0].tolist() != [255, 255, 255]
    assert photo[:, 2:].min() == 255


@pytest.mark.parametrize("mode", ["RGBa", "La", "PA", "HSV", "F", "I", "I;16B", "RGBX"])
def test_modes_that_few_files_have(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a decoder of Pillow's hands over becomes RGB or an ImageError."""
    Image.new("L", (4, 4)).save(tmp_path / "photo.png")
    opened = Image.new(mode, (4, 4))
    opened.format, opened.tile = "PNG", []  # type: ignore[attr-defined]
    monkeypatch.setattr(Image, "open", lambda _: opened)
    if mode == "F":
        with pytest.raises(ImageError, match="a PNG image, holds floating-point samples"):
            load_photo(tmp_path / "photo.png")
        return
    clear = "a" in mode.lower()
    assert load_photo(tmp_path / "photo.png")[0, 0].tolist() == ([255] * 3 if clear else [0] * 3)


@pytest.mark.parametrize("mode", ["1", "L", "YCbCr", "LAB", "HSV"])
def test_other_colour_modes(tmp_path: Path, mode: str) -> None:
    suffix = {"YCbCr": "jpg", "LAB": "tiff", "HSV": "png"}.get(mode, "png")
    image = _left_red_right_green().convert(mode) if mode not in ("LAB", "HSV") else Image.new("LAB", (8, 8))
    if mode == "HSV":
        image = _left_red_right_green().convert("HSV").convert("RGB")
    image.save(tmp_path / f"photo.{suffix}")
    photo = load_photo(tmp_path / f"photo.{suffix}")
    assert photo.shape[2:] == (3,)
    assert photo.dtype == np.uint8


@pytest.mark.parametrize(
    ("orientation", "shape", "red_at"),
    [
        (1, (16, 32), (8, 2)),
        (2, (16, 32), (8, 29)),
        (3, (16, 32), (8, 29)),
        (4, (16, 32), (8, 2)),
        (5, (32, 16), (2, 8)),
        (6, (32, 16), (2, 8)),
        (7, (32, 16), (29, 8)),
        (8, (32, 16), (29, 8)),
    ],
)
def test_exif_rotation(tmp_path: Path, orientation: int, shape: tuple[int, int], red_at: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    _left_red_right_green().save(tmp_path / "photo.jpg", exif=exif, quality=95)
    photo = load_photo(tmp_path / "photo.jpg")
    assert photo.shape[:2] == shape
    assert _near(photo, *red_at, RED)


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff"])
def test_exif_rotation_is_not_for_jpeg_alone(tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    _left_red_right_green().save(tmp_path / f"photo.{suffix}", exif=exif)
    photo = load_photo(tmp_path / f"photo.{suffix}")
    assert photo.shape == (32, 16, 3)
    assert _near(photo, 2, 8, RED)


@pytest.mark.parametrize(
    "exif",
    [
        b"II*\0\xff\xff\xff\xff" + bytes(range(64)),
        b"II*\0\x08\0\0\0\x40\0\x12\x01",
        b"MM",
        b"",
        b"nonsense" * 9,
        b"II*\0\x08\0\0\0\1\0\x12\1\2\0\x20\0\0\0\xff\xff\0\0",
    ],
)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_broken_exif_leaves_the_photo_as_it_is(tmp_path: Path, exif: bytes, suffix: str) -> None:
    _left_red_right_green().save(tmp_path / f"photo.{suffix}", exif=b"Exif\0\0" + exif)
    assert load_photo(tmp_path / f"photo.{suffix}").shape == (16, 32, 3)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animation_gives_its_first_frame(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, (0, 0, 255))]
    frames[0].save(tmp_path / f"photo.{suffix}", save_all=True, append_images=frames[1:], duration=50)
    photo = load_photo(tmp_path / f"photo.{suffix}")
    assert photo.shape == (8, 8, 3)
    assert _near(photo, 4, 4, RED)


def test_1_x_1(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), RED).save(tmp_path / "photo.png")
    pixels = preprocess(load_photo(tmp_path / "photo.png"), INFO)
    assert pixels.shape == (1, 3, 336, 336)
    assert np.ptp(pixels.reshape(3, -1), axis=1).max() == 0, "one pixel becomes one even colour"


def test_30000_x_30000_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(_png(30_000, 30_000, depth=8, colour=2, rows=bytes(1000)))
    before = peak_rss_bytes()
    with pytest.raises(ImageError, match="more than 128 megapixels"):
        load_photo(tmp_path / "photo.png")
    assert peak_rss_bytes() - before < 100e6


def test_between_our_limit_and_pillows(tmp_path: Path) -> None:
    Image.new("1", (13_000, 10_000)).save(tmp_path / "photo.png")
    assert MAX_PIXELS < 13_000 * 10_000
    with pytest.raises(ImageError, match="is 13000 x 10000, more than 128 megapixels; scale it down first"):
        load_photo(tmp_path / "photo.png")


def test_large_phone_photo_is_read_without_a_warning(tmp_path: Path) -> None:
    """108 megapixels are above the size at which Pillow warns; warnings are errors here."""
    Image.new("L", (12_000, 9_000), 200).save(tmp_path / "photo.png", compress_level=1)
    assert load_photo(tmp_path / "photo.png").shape == (9_000, 12_000, 3)


# Files that are none


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tiff"])
def test_truncated(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"photo.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ImageError, match=r"photo\.\w+ (is damaged and cannot be decoded|is not an image)"):
        load_photo(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tiff", "bmp"])
def test_corrupt_bytes_give_a_photo_or_an_image_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"photo.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(path)
    good = path.read_bytes()
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(60):
        data = bytearray(good)
        for position in rng.integers(0, len(data), 8):
            data[position] = rng.integers(256)
        path.write_bytes(data)
        try:
            photo = load_photo(path)
        except ImageError:
            refused += 1
        else:
            assert photo.ndim == 3
    if suffix in ("png", "webp"):
        assert refused


def test_corrupt_png(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    _left_red_right_green(64, 64).save(path)
    data = bytearray(path.read_bytes())
    at = data.index(b"IDAT") + 6
    data[at : at + 20] = bytes(20)
    path.write_bytes(data)
    with pytest.raises(ImageError, match="is damaged and cannot be decoded"):
        load_photo(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"%PDF-1.7", bytes(1000)])
def test_not_an_image(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "photo.jpg").write_bytes(content)
    with pytest.raises(ImageError, match="is not an image; give the path of a JPEG, PNG or WebP"):
        load_photo(tmp_path / "photo.jpg")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "an empty file"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIF photo; save it as JPEG"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "a video"),
        (b"%PDF-1.7", "a PDF document"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing"),
    ],
)
def test_what_is_no_image_is_named(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "photo.jpg").write_bytes(content)
    with pytest.raises(ImageError, match=rf"is not an image; give the path .* \(it is {what}\)"):
        load_photo(tmp_path / "photo.jpg")


def test_drawings_start_no_other_program(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "photo.eps")
    with pytest.raises(ImageError, match="a file of kind EPS, which only other programs can draw"):
        load_photo(tmp_path / "photo.eps")


def test_damage_names_the_kind_of_file(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "photo.bmp")
    (tmp_path / "photo.bmp").write_bytes((tmp_path / "photo.bmp").read_bytes()[:999])
    with pytest.raises(ImageError, match=r"is damaged and cannot be decoded \(BMP image of mode RGB: "):
        load_photo(tmp_path / "photo.bmp")


def test_missing_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="does not exist"):
        load_photo(tmp_path / "nothing.jpg")
    with pytest.raises(ImageError, match="is a folder"):
        load_photo(tmp_path)


def test_what_the_system_refuses_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nothing")
    os.mkfifo(tmp_path / "pipe")
    for name, said in (
        ("file/photo.jpg", "cannot be read: Not a directory"),
        ("loop", "cannot be read: Too many levels of symbolic links"),
        ("x" * 300, "cannot be read: File name too long"),
        ("dangling", "is a link to nothing"),
        ("pipe", "is a pipe or a device"),
        ("nul\0", r"nul\\x00 cannot be the name of a file"),
    ):
        with pytest.raises(ImageError, match=said):
            load_photo(tmp_path / name)

    def fails(_: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Image, "open", fails)
    with pytest.raises(ImageError, match="cannot be read: Input/output error; give a photo that can be read"):
        load_photo(tmp_path / "file")


def test_a_name_of_any_bytes(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    _left_red_right_green().save(path)
    assert load_photo(path).shape == (16, 32, 3)
    path.write_bytes(b"hello")
    with pytest.raises(ImageError, match=r"caf\\xe9.png is not an image"):
        load_photo(path)


# From photo to pixel_values


def _packaged_photos() -> list[Path]:
    import skimage
    import sklearn.datasets

    skimage_data = Path(skimage.__file__).parent / "data"
    sklearn_images = Path(sklearn.datasets.__file__).parent / "images"
    return [
        *(skimage_data / name for name in ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "retina.jpg")),
        *(sklearn_images / name for name in ("china.jpg", "flower.jpg")),
    ]


@pytest.mark.parametrize("path", _packaged_photos(), ids=lambda path: path.name)
def test_pixels_equal_transformers(path: Path) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    photo = load_photo(path)
    theirs = CLIPImageProcessorPil(**CLIP)(images=Image.open(path), return_tensors="np")["pixel_values"]
    ours = preprocess(photo, INFO)
    assert ours.shape == theirs.shape == (1, 3, 336, 336)
    assert ours.dtype == np.float32
    grey_levels = np.abs(ours - theirs) * np.reshape(INFO.std, (1, 3, 1, 1)) * 255
    assert grey_levels.max() < 1e-3, "nothing but the rounding of float32 may differ: both resize with Pillow"


@pytest.mark.parametrize("size", [(336, 336), (337, 336), (335, 900), (900, 335), (1, 1), (5, 3), (200, 1999)])
@pytest.mark.parametrize("resample", [0, 2, 3])
def test_shapes_and_filters_equal_transformers(size: tuple[int, int], resample: int) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    photo = np.random.default_rng(3).integers(0, 256, (*size, 3), dtype=np.uint8)
    config = {**CLIP, "resample": resample, "size": {"shortest_edge": 56}, "crop_size": {"height": 42, "width": 56}}
    # Channels are stated: a photo 3 pixels wide could be taken for channels first.
    theirs = CLIPImageProcessorPil(**config)(images=photo, return_tensors="np", input_data_format="channels_last")[
        "pixel_values"
    ]
    info = ImageInfo.from_preprocessor(config)
    grey_levels = np.abs(preprocess(photo, info) - theirs) * np.reshape(info.std, (1, 3, 1, 1)) * 255
    assert grey_levels.max() < 1e-3


def test_squeezed_without_a_crop() -> None:
    info = ImageInfo.from_preprocessor({**CLIP, "do_center_crop": False, "size": {"height": 40, "width": 30}})
    photo = np.asarray(_left_red_right_green(60, 20))
    seen = view(photo, info)
    assert seen.shape == (40, 30, 3)
    assert _near(seen, 20, 1, RED)
    assert _near(seen, 20, 28, GREEN)


def test_view_is_what_the_crop_shows() -> None:
    info = ImageInfo.from_preprocessor(
        {**CLIP, "size": {"shortest_edge": 20}, "crop_size": {"height": 20, "width": 20}}
    )
    photo = np.asarray(_left_red_right_green(60, 20))
    assert np.array_equal(view(photo, info), photo[:, 20:40])


def test_pixels_are_normalised_per_channel() -> None:
    pixels = preprocess(np.full((400, 400, 3), 255, np.uint8), INFO)
    expected = (1 - np.array(INFO.mean)) / np.array(INFO.std)
    assert np.allclose(pixels[0, :, 100, 100], expected, atol=1e-6)


def test_input_is_left_alone() -> None:
    photo = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    before = photo.copy()
    photo.setflags(write=False)
    preprocess(photo, INFO)
    assert np.array_equal(photo, before)


def test_a_sliver_is_refused_before_it_is_resized() -> None:
    with pytest.raises(ImageError, match="its long side may be at most 50 times the short"):
        view(np.zeros((1, 30_000, 3), np.uint8), INFO)


@pytest.mark.parametrize(
    "photo",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
    ],
    ids=["grey", "alpha", "float", "empty"],
)
def test_arrays_that_are_no_photo(photo: np.ndarray) -> None:
    with pytest.raises(ImageError, match=r"a photo is uint8 \(H, W, 3\)"):
        preprocess(photo, INFO)


def test_the_limit_is_one_number() -> None:
    assert runtime.image.MAX_PIXELS == MAX_PIXELS == 128_000_000
