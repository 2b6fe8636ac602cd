"""Reading images in every format, and refusing what is none."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from rlsd.pipeline import images
from rlsd.pipeline.errors import InputError
from rlsd.pipeline.images import read_image

RNG = np.random.default_rng(0)
GRAY8 = RNG.integers(0, 256, (12, 20), np.uint8)
GRAY16 = RNG.integers(0, 65536, (12, 20), np.uint16)
RGB8 = RNG.integers(0, 256, (12, 20, 3), np.uint8)
RGB16 = RNG.integers(0, 65536, (12, 20, 3), np.uint16)


def expected(array: np.ndarray) -> np.ndarray:
    values = array.astype(np.float64) / np.iinfo(array.dtype).max * 2 - 1
    return values[None] if array.ndim == 2 else np.moveaxis(values, -1, 0)


def assert_reads(path, array):
    picture = read_image(path)
    assert picture.values.dtype == np.float32
    np.testing.assert_allclose(picture.values, expected(array), atol=1e-6)


@pytest.mark.parametrize("array", [GRAY8, GRAY16, RGB8])
def test_png(tmp_path, array):
    Image.fromarray(array).save(tmp_path / "a.png")
    assert_reads(tmp_path / "a.png", array)


@pytest.mark.parametrize("array", [GRAY8, GRAY16, RGB8, RGB16])
@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"byteorder": ">"}, {"bigtiff": True}])
def test_tiff(tmp_path, array, options):
    kind = "rgb" if array.ndim == 3 else "minisblack"
    tifffile.imwrite(tmp_path / "a.tif", array, photometric=kind, **options)
    assert_reads(tmp_path / "a.tif", array)


def test_tiff_in_planes_white_as_zero_float_and_lzw(tmp_path):
    tifffile.imwrite(tmp_path / "p.tif", np.moveaxis(RGB16, -1, 0), photometric="rgb", planarconfig="separate")
    assert_reads(tmp_path / "p.tif", RGB16)
    tifffile.imwrite(tmp_path / "w.tif", GRAY16, photometric="miniswhite")
    assert_reads(tmp_path / "w.tif", 65535 - GRAY16)
    tifffile.imwrite(tmp_path / "f.tif", expected(GRAY8)[0].astype(np.float32), photometric="minisblack")
    assert_reads(tmp_path / "f.tif", GRAY8)
    Image.fromarray(RGB8).save(tmp_path / "l.tif", compression="tiff_lzw")
    assert_reads(tmp_path / "l.tif", RGB8)
    Image.fromarray(GRAY16).save(tmp_path / "l16.tif", compression="tiff_lzw")
    assert_reads(tmp_path / "l16.tif", GRAY16)
    Image.fromarray(GRAY8).convert("P").save(tmp_path / "palette.tif")
    np.testing.assert_allclose(read_image(tmp_path / "palette.tif").values, expected(GRAY8).repeat(3, 0), atol=1e-6)


def test_a_tiff_that_tifffile_reads_as_nothing(tmp_path, monkeypatch):
    """As its newest version reads some damaged files; Pillow may know better, and if not the file is refused."""
    monkeypatch.setattr(tifffile.TiffPage, "asarray", lambda page: np.zeros((0, 0), np.uint8))
    tifffile.imwrite(tmp_path / "a.tif", GRAY8, photometric="minisblack")
    np.testing.assert_allclose(read_image(tmp_path / "a.tif").values, expected(GRAY8), atol=1e-6)
    tifffile.imwrite(tmp_path / "b.tif", expected(GRAY8)[0].astype(np.float64), photometric="minisblack")
    with pytest.raises(InputError, match=r"b\.tif: cannot be read as TIFF \(has 0 values"):
        read_image(tmp_path / "b.tif")


def test_first_page_of_a_tiff(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.stack([GRAY8, 255 - GRAY8]), photometric="minisblack")
    assert_reads(tmp_path / "a.tif", GRAY8)
    assert read_image(tmp_path / "a.tif").notes == ("first of 2 pages",)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg(tmp_path, mode):
    smooth = np.linspace(0, 255, 64 * 48).reshape(48, 64).astype(np.uint8)
    Image.fromarray(smooth).convert(mode).save(tmp_path / "a.jpg", quality=98)
    values = read_image(tmp_path / "a.jpg").values
    assert values.shape == (1 if mode == "L" else 3, 48, 64)
    np.testing.assert_allclose(values, np.broadcast_to(expected(smooth), values.shape), atol=0.03)


def test_jpeg_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RGB8).save(tmp_path / "a.jpg", exif=exif)
    picture = read_image(tmp_path / "a.jpg")
    assert picture.values.shape == (3, 20, 12)
    assert picture.notes == ("turned as its EXIF orientation says",)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_turned_as_a_png_is(tmp_path, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(RGB8).save(tmp_path / "a.png", exif=exif)
    given = {"photometric": "rgb", "extratags": [(274, 3, 1, orientation, True)]}
    tifffile.imwrite(tmp_path / "a.tif", RGB8, **given)
    tifffile.imwrite(tmp_path / "planes.tif", np.moveaxis(RGB8, -1, 0), planarconfig="separate", **given)
    Image.fromarray(RGB8).save(tmp_path / "pillow.tif", compression="tiff_lzw", tiffinfo={274: orientation})
    Image.fromarray(RGB8).convert("P").save(tmp_path / "palette.tif", tiffinfo={274: orientation})
    wanted = read_image(tmp_path / "a.png")
    for name in ("a.tif", "planes.tif", "pillow.tif"):
        found = read_image(tmp_path / name)
        assert found.notes == wanted.notes and len(found.notes) == (orientation > 1)
        np.testing.assert_allclose(found.values, wanted.values, atol=1e-6)
    assert read_image(tmp_path / "palette.tif").values.shape == wanted.values.shape


def test_twelve_bits_in_sixteen_are_noted(tmp_path):
    dark = "values up to 4095 of 65535: very dark; scale them if the sensor has fewer bits"
    for most, notes in ((4095, (dark,)), (4096, ())):
        values = np.linspace(0, most, 64).astype(np.uint16).reshape(4, 16)
        tifffile.imwrite(tmp_path / "a.tif", values, photometric="minisblack")
        assert_reads(tmp_path / "a.tif", values)
        assert read_image(tmp_path / "a.tif").notes == notes
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((4, 16), np.uint16), photometric="minisblack")
    assert read_image(tmp_path / "a.tif").notes == ()


@pytest.mark.parametrize("values", [[0, 65536], [-1, 5]])
def test_what_needs_more_than_16_bits_is_refused(values):
    """As Pillow may give of what tifffile does not read; they would be cut off at the top."""
    with pytest.raises(InputError, match=f"has values from {values[0]} to {values[1]}; allowed are 16 bits"):
        images._pillow_array(Image.fromarray(np.array([values], np.int32)))


@pytest.mark.parametrize("bits", [4, 12])
def test_tiff_of_other_depths_spans_black_to_white(tmp_path, bits):
    values = np.linspace(0, 2**bits - 1, 64).astype(int).reshape(4, 16)
    data = int("".join(f"{value:0{bits}b}" for value in values.ravel()), 2).to_bytes(8 * bits, "big")
    tags = {256: 16, 257: 4, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: 4, 279: len(data)}
    lines = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    (tmp_path / "a.tif").write_bytes(head + data + struct.pack("<H", len(tags)) + lines + bytes(4))
    found = read_image(tmp_path / "a.tif").values[0]
    np.testing.assert_allclose(found, values / (2**bits - 1) * 2 - 1, atol=2 / 65535)


@pytest.mark.parametrize("colour", [0, 2, 4])
def test_a_png_of_16_bits_that_is_cut_says_so(tmp_path, colour):
    channels = {0: 1, 2: 3, 4: 2}[colour]
    lines = b"".join(b"\0" + bytes(range(2 * channels)) for _ in range(2))
    chunks = (
        (b"IHDR", struct.pack(">2I5B", 1, 2, 16, colour, 0, 0, 0)),
        (b"IDAT", zlib.compress(lines)),
        (b"IEND", b""),
    )
    parts = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    assert ("16 bits cut to 8" in read_image(tmp_path / "a.png").notes) == (colour > 0)


@pytest.mark.parametrize("array", [GRAY8, GRAY16, RGB8, RGB16, GRAY16.astype(">u2")])
def test_npy(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    assert_reads(tmp_path / "a.npy", array)
    if array.ndim == 3:
        np.save(tmp_path / "c.npy", np.moveaxis(array, -1, 0))
        assert_reads(tmp_path / "c.npy", array)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_npy_of_floats_is_taken_as_it_is(tmp_path, kind):
    values = RNG.uniform(-1, 1, (3, 12, 20)).astype(kind)
    np.save(tmp_path / "a.npy", values)
    np.testing.assert_array_equal(read_image(tmp_path / "a.npy").values, values.astype(np.float32))


def test_floats_that_may_be_meant_from_0_to_1_are_noted(tmp_path):
    for least, noted in ((0, True), (-1, False)):
        values = np.linspace(least, 1, 240, dtype=np.float32).reshape(12, 20)
        np.save(tmp_path / "a.npy", values)
        tifffile.imwrite(tmp_path / "a.tif", values, photometric="minisblack")
        for name in ("a.npy", "a.tif"):
            picture = read_image(tmp_path / name)
            assert picture.notes == (images.FROM_ZERO,) * noted
            np.testing.assert_array_equal(picture.values[0], values)


def test_transparency_is_laid_on_black(tmp_path):
    alpha = RNG.integers(0, 256, (12, 20, 1), np.uint8)
    Image.fromarray(np.concatenate([RGB8, alpha], 2)).save(tmp_path / "a.png")
    picture = read_image(tmp_path / "a.png")
    assert picture.notes == ("transparency laid on black",)
    np.testing.assert_allclose(picture.values, expected(np.round(RGB8 * (alpha / 255)).astype(np.uint8)), atol=1e-6)


def png_bytes() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (64, 64), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def tiff_bytes() -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, RNG.integers(0, 256, (64, 64), np.uint8), compression="zlib")
    return stream.getvalue()


def tall_tiff() -> bytes:
    """One strip of 16 rows, of the 1,048,576 that an image of 2^24 rows has: to go through the others took seconds."""
    stream = io.BytesIO()
    tifffile.imwrite(stream, np.zeros((16, 4), np.uint8), rowsperstrip=16)
    stream.seek(0)
    with tifffile.TiffFile(stream, mode="r+") as file:
        file.pages.first.tags["ImageLength"].overwrite(1 << 24, dtype="I")
    return stream.getvalue()


def npy_bytes(array) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


BAD = {
    "empty.png": (b"", "is empty"),
    "text.png": (b"hello, this is no image", "is not a PNG, JPEG, TIFF, NPY or DICOM file"),
    "cut.png": (png_bytes()[:1000], "cannot be read as PNG"),
    "head.png": (png_bytes()[:20], "cannot be read as PNG"),
    "rot.png": (png_bytes()[:100] + bytes(200) + png_bytes()[300:], "cannot be read as PNG"),
    "head.jpg": (b"\xff\xd8\xff\xe0 no jpeg", "cannot be read as JPEG"),
    "head.tif": (b"II*\0\xff\xff\xff\x7f", "cannot be read as TIFF"),
    "cut.tif": (tiff_bytes()[:2000], "cannot be read as TIFF"),
    "tall.tif": (tall_tiff(), "has 1 of its 1048576 strips or tiles"),
    "cut.npy": (npy_bytes(np.zeros((50, 50)))[:600], "cannot be read as NPY"),
    "head.npy": (b"\x93NUMPY\x01\x00garbage", "cannot be read as NPY"),
    "pickle.npy": (npy_bytes(np.array([{"a": 1}], object)), "cannot be read as NPY"),
    "nan.npy": (npy_bytes(np.full((8, 8), np.nan)), "NaN or infinite; an image must be finite"),
    "range.npy": (npy_bytes(np.full((8, 8), 200.0)), r"values from 200 to 200; they must lie in \[-1, 1\]"),
    "int.npy": (npy_bytes(np.zeros((8, 8), np.int32)), "numbers of type int32; allowed are bool, uint8, uint16"),
    "text.npy": (npy_bytes(np.array(["a", "b"])), "numbers of type <U1"),
    "line.npy": (npy_bytes(np.zeros(8)), "has the shape 8; allowed are H x W"),
    "deep.npy": (npy_bytes(np.zeros((8, 8, 8))), "has the shape 8 x 8 x 8; allowed are H x W"),
    "none.npy": (npy_bytes(np.zeros((0, 8))), "has 0 values"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_give_one_sentence(tmp_path, name):
    content, message = BAD[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read_image(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_image(tmp_path / "no.png")
    with pytest.raises(InputError, match="is a folder; a file is wanted"):
        read_image(tmp_path)


def test_a_bomb_is_refused(tmp_path):
    head = bytearray(npy_bytes(np.zeros((100, 100), np.uint8)))
    head[:128] = head[:128].replace(b"(100, 100), }", b"(99999, 9999)}")
    (tmp_path / "a.npy").write_bytes(head)
    with pytest.raises(InputError):
        read_image(tmp_path / "a.npy")


def test_the_limit_of_pixels_is_ours_and_not_pillows(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    Image.fromarray(GRAY8).save(tmp_path / "a.png")
    assert_reads(tmp_path / "a.png", GRAY8)
    Image.fromarray(np.zeros((30, 20), np.uint8)).save(tmp_path / "b.png")
    with pytest.raises(InputError, match=r"b\.png: has more values than the 100000000 that are allowed"):
        read_image(tmp_path / "b.png")
