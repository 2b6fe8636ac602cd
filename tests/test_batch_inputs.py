"""Elements of zarr arrays and DICOM images as inputs of `rlsd batch` and `rlsd reconstruct`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from batch_case import arrays, batch, bundle, failures, here, record  # noqa: F401

from rlsd.pipeline.errors import InputError
from rlsd.pipeline.images import read_image

zarr = pytest.importorskip("zarr")
pydicom = pytest.importorskip("pydicom")


FORMATS = [2, 3] if int(zarr.__version__.split(".")[0]) >= 3 else [2]  # which this version of zarr can write


def save(path: str, values: np.ndarray, form: int = 2) -> None:
    """A zarr array with one item a chunk."""
    options = {"zarr_format": form} if len(FORMATS) > 1 else {}
    chunks = (1, *values.shape[1:])
    array = zarr.open_array(path, mode="w", shape=values.shape, dtype=values.dtype, chunks=chunks, **options)
    array[...] = values


def images(count: int = 3) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, 4, 4), np.uint8)


@pytest.mark.parametrize("form", FORMATS)
def test_an_array_is_its_items(form: int) -> None:
    save("scan.zarr", images(), form)
    for index, image in enumerate(images()):
        np.save(f"{index}.npy", image)
    assert batch(source="scan.zarr") == 0 and batch(source="?.npy", out="plain") == 0
    for index in range(3):
        mine, plain = arrays(Path(f"out/items/{index:06}-scan")), arrays(Path(f"plain/items/{index:06}-{index}"))
        assert mine["particles"].tobytes() == plain["particles"].tobytes()
        facts = record(Path("out"), f"{index:06}-scan")
        assert facts["source"] == f"scan.zarr[{index}]" and len(facts["sha256"]) == 64
    assert batch(source="scan.zarr") == 0
    save("scan.zarr", images(4), form)
    assert batch(source="scan.zarr") == 2


def test_a_group_of_arrays_and_elements_in_a_manifest() -> None:
    zarr.open_group("all.zarr", mode="w")
    save("all.zarr/b", images(2))
    save("all.zarr/a", np.moveaxis(np.stack([images(1)] * 3), 0, -1))  # colour
    assert batch(source="all.zarr") == 0
    assert sorted(os.listdir("out/items")) == ["000000-a", "000001-b", "000002-b"]
    assert record(Path("out"), "000000-a")["notes"] == ["colour turned to gray"]
    save("masks.zarr", np.ones((2, 1, 4, 4), np.float32))
    Path("list.csv").write_text(
        "input,mask\nall.zarr/b[1],masks.zarr[0]\nall.zarr/b[2],\nall.zarr/b[0],masks.zarr[9]\n"
    )
    assert batch(source="list.csv", out="listed") == 1
    assert os.listdir("listed/items") == ["000000-b-1"]
    assert [error.rpartition(": ")[2] for error in failures(Path("listed")).values()] == [
        "has 2 items, and so no item 2", "has 2 items, and so no item 9",
    ]  # fmt: skip


def test_measured_arrays_are_taken_as_they_are() -> None:
    save("y.zarr", np.linspace(-2, 2, 32, dtype=np.float32).reshape(2, 1, 4, 4))
    save("mask.zarr", np.ones((1, 1, 4, 4), np.float32))
    Path("list.csv").write_text("input,mask\ny.zarr[0],mask.zarr[0]\n")
    assert batch("--measured", source="list.csv") == 0
    assert batch("--measured", "--mask", "mask.zarr[0]", source="y.zarr[0]", out="plain") == 0


def spoil(what: str) -> None:
    """Turns scan.zarr into something that must not be read."""
    file = Path("scan.zarr/.zarray")
    facts = json.loads(file.read_text())
    if what == "pickle":
        facts["filters"] = [{"id": "pickle"}]
    elif what == "object":
        facts |= {"dtype": "|O", "fill_value": None, "filters": [{"id": "json2"}]}
    elif what == "huge chunk":
        facts |= {"chunks": [1, 1 << 20, 1 << 20], "shape": [1, 1 << 20, 1 << 20]}
    elif what == "text":
        facts |= {"dtype": "<U4", "fill_value": ""}
    elif what == "flat":
        facts |= {"shape": [16], "chunks": [16]}
    file.write_text("[" * 100_000 if what == "nested" else "{" if what == "json" else json.dumps(facts))
    if what == "link":
        os.symlink("/etc/hostname", "scan.zarr/0.0.1")
    elif what == "chunk":
        Path("scan.zarr/0.0.0").write_bytes(b"nothing of this kind")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("pickle", "is stored with the codec 'pickle'"), ("object", "is stored with the codec 'json2'"),
        ("huge chunk", "has chunks of 1099511627776 bytes"), ("text", "has numbers of type"),
        ("flat", "an array [items, ...] is wanted"), ("nested", "cannot be read as JSON"),
        ("json", "cannot be read as JSON"), ("link", "has a symbolic link inside (0.0.1)"),
    ],
)  # fmt: skip
def test_what_zarr_must_not_do(what: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    save("scan.zarr", images(1))
    spoil(what)
    assert batch(source="scan.zarr") == 2
    assert message in capsys.readouterr().err


def test_a_damaged_chunk_is_its_items_own() -> None:
    save("scan.zarr", images(2))
    spoil("chunk")
    assert batch(source="scan.zarr") == 1
    ((name, error),) = failures(Path("out")).items()
    assert name == "000000-scan" and "cannot be read as zarr" in error


@pytest.mark.skipif(3 not in FORMATS, reason="zarr 2 has no shards")
def test_codecs_in_shards_are_seen() -> None:
    save("scan.zarr", images(1), 3)
    file = Path("scan.zarr/zarr.json")
    facts = json.loads(file.read_text())
    inner = [{"name": "bytes"}, {"name": "numcodecs.pickle"}]
    facts["codecs"] = [{"name": "sharding_indexed", "configuration": {"codecs": inner, "index_codecs": []}}]
    file.write_text(json.dumps(facts))
    with pytest.raises(InputError, match=r"codec 'numcodecs\.pickle'"):
        read_image(Path("scan.zarr[0]"))


# ------------------------------------------------------------ DICOM


def dicom(path: str, pixels: np.ndarray, photometric: str = "MONOCHROME2", **facts) -> None:
    """A DICOM file with these pixels."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = SecondaryCaptureImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
    bits = pixels.dtype.itemsize * 8
    data.Rows, data.Columns = pixels.shape[-2:] if photometric != "RGB" else pixels.shape[:2]
    data.SamplesPerPixel, data.PhotometricInterpretation = (3 if photometric == "RGB" else 1), photometric
    data.BitsAllocated = data.BitsStored = bits
    data.HighBit, data.PixelRepresentation = bits - 1, int(pixels.dtype.kind == "i")
    if photometric == "RGB":
        data.PlanarConfiguration = 0
    for key, value in facts.items():
        setattr(data, key, value)
    data.PixelData = pixels.tobytes()
    data.save_as(path, enforce_file_format=True)


def test_dicom_goes_through_slope_and_window() -> None:
    stored = np.arange(16, dtype=np.int16).reshape(4, 4) * 100
    dicom("ct.dcm", stored, RescaleSlope="2", RescaleIntercept="-1000", WindowCenter="0.5", WindowWidth="2001")
    found = read_image(Path("ct.dcm"))
    hounsfield = stored * 2.0 - 1000
    assert np.allclose(found.values[0], np.clip(hounsfield / 1000, -1, 1), atol=1e-6)
    assert found.notes == ("window -1000 to 1000, the file's own",)


def test_dicom_without_window_and_inverted() -> None:
    stored = np.arange(16, dtype=np.uint16).reshape(4, 4) + 7
    dicom("plain.dcm", stored)
    found = read_image(Path("plain.dcm"))
    assert np.allclose(found.values[0].ravel(), np.linspace(-1, 1, 16), atol=1e-6)
    assert found.notes == ("window 7 to 22, all values of the image",)
    dicom("inverted.dcm", stored, "MONOCHROME1")
    inverted = read_image(Path("inverted.dcm"))
    assert np.array_equal(inverted.values, -found.values) and inverted.notes[1] == "inverted: MONOCHROME1"


@pytest.mark.parametrize(
    ("function", "centre", "width", "wanted", "note"),
    [
        ("LINEAR_EXACT", 50, 100, lambda x: np.clip((x - 50) / 50, -1, 1), "window 0 to 100, the file's own"),
        ("LINEAR_EXACT", 0.5, 0.5, lambda x: np.where(x < 0.5, -1, 1), "window 0.25 to 0.75, the file's own"),
        ("SIGMOID", 60, 80, lambda x: 2 / (1 + np.exp(-4 * (x - 60) / 80)) - 1, "window 60 +- 40, sigmoid, the fil"),
        ("LINEAR", 50, 1, lambda x: np.where(x <= 49.5, -1, 1), "window 49.5 to 49.5, the file's own"),
        ("", 50, 101, lambda x: np.clip((x - 49.5) / 50, -1, 1), "window -0.5 to 99.5, the file's own"),
        ("LINEAR", 50, 0.5, lambda x: x / 75 - 1, "window 0 to 150, all values of the image"),
    ],
)
def test_dicom_has_three_functions_of_a_window(function: str, centre: float, width: float, wanted, note: str) -> None:
    stored = np.arange(16, dtype=np.uint16).reshape(4, 4) * 10
    dicom("window.dcm", stored, WindowCenter=centre, WindowWidth=width, VOILUTFunction=function)
    found = read_image(Path("window.dcm"))
    assert np.allclose(found.values[0], wanted(stored.astype(float)), atol=1e-6)
    assert found.notes[0].startswith(note)


def test_dicom_with_an_unknown_function_or_empty_slope() -> None:
    stored = np.arange(16, dtype=np.uint16).reshape(4, 4)
    dicom("empty.dcm", stored, RescaleSlope=None, RescaleIntercept=None)
    assert read_image(Path("empty.dcm")).notes == ("window 0 to 15, all values of the image",)
    dicom("none.dcm", stored, VOILUTFunction="LOG")
    assert read_image(Path("none.dcm")).notes == ("window 0 to 15, all values of the image",)
    dicom("log.dcm", stored, WindowCenter=5, WindowWidth=5, VOILUTFunction="LOG")
    with pytest.raises(InputError, match="has the window function LOG; allowed are LINEAR, LINEAR_EXACT, SIGMOID"):
        read_image(Path("log.dcm"))


def test_padding_of_dicom_is_no_value_of_the_image() -> None:
    stored = np.arange(16, dtype=np.int16).reshape(4, 4) + 100
    stored[0] = -2000, -1999, -1998, -1500
    facts = {"PixelPaddingValue": -2000, "RescaleSlope": "2", "RescaleIntercept": "-200"}
    dicom("one.dcm", stored, **facts)
    assert read_image(Path("one.dcm")).notes == ("window -4198 to 30, all values of the image but its padding",)
    dicom("range.dcm", stored, **facts, PixelPaddingRangeLimit=-1500)
    found = read_image(Path("range.dcm"))
    assert found.notes == ("window 8 to 30, all values of the image but its padding",)
    assert (found.values[0, 0] == -1).all() and np.allclose(found.values[0, 1:].ravel(), np.linspace(-1, 1, 12))
    dicom("all.dcm", np.full((4, 4), -2000, np.int16), **facts)
    assert read_image(Path("all.dcm")).notes == ("window -4200 to -4200, all values of the image",)


def test_dicom_frames_colours_and_damage() -> None:
    stored = np.arange(32, dtype=np.uint8).reshape(2, 4, 4)
    dicom("frames.dcm", stored, NumberOfFrames="2", WindowCenter=["8", "9"], WindowWidth=["16", "1"])
    assert read_image(Path("frames.dcm")).notes == ("first of 2 frames", "window 0 to 15, the file's own")
    colours = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    dicom("colour.dcm", colours, "RGB")
    assert np.allclose(read_image(Path("colour.dcm")).values, np.moveaxis(colours, -1, 0) / 127.5 - 1, atol=1e-6)
    dicom("palette.dcm", colours[..., 0], "PALETTE COLOR")
    with pytest.raises(InputError, match=r"palette.dcm: has the photometric interpretation PALETTE COLOR"):
        read_image(Path("palette.dcm"))
    data = Path("frames.dcm").read_bytes()
    Path("short.dcm").write_bytes(data[:-20])
    Path("cut.dcm").write_bytes(data[:140])
    for name in ("short.dcm", "cut.dcm"):
        with pytest.raises(InputError, match="cannot be read as DICOM"):
            read_image(Path(name))


def test_dicom_in_a_batch() -> None:
    os.mkdir("study")
    dicom("study/a.dcm", np.arange(16, dtype=np.uint16).reshape(4, 4))
    assert batch(source="study") == 0
    assert record(Path("out"), "000000-a")["notes"] == ["window 0 to 15, all values of the image"]
