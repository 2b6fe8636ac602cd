"""Manifests: a row's own settings, and everything that a hostile or careless one may contain."""

from __future__ import annotations

import os
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from batch_case import arrays, batch, bundle, contents, failures, here, record  # noqa: F401
from PIL import Image

from rlsd.pipeline import cli
from rlsd.pipeline.errors import InputError
from rlsd.pipeline.manifest import Entry, open_manifest


def listed(text: str | bytes, *, root: Path | None = None) -> list[Entry]:
    """The entries of a manifest of this content, in the working folder."""
    Path("list.csv").write_bytes(text.encode() if isinstance(text, str) else text)
    return list(open_manifest(Path("list.csv"), root, ["mask"]).entries())


def test_each_item_has_its_own_settings() -> None:
    Path("masks").mkdir()
    np.save("masks/a.npy", np.ones((1, 4, 4), np.float32))
    Image.fromarray(np.eye(4, dtype=np.uint8) * 255).save("masks/b.png")
    Path("list.csv").write_text(
        "input,name,item,sigma,particles,class,mask\n"
        "in/0.png,first,7,,,,masks/a.npy\n"
        "\n"
        'in/1.png,"second",,0.5,3,loud,masks/b.png\n'
        "in/2.png,,,0,1,,\n"
    )
    assert batch(source="list.csv") == 0
    assert sorted(os.listdir("out/items")) == ["000002-2", "first", "second"]
    shapes = {name: len(arrays(Path("out/items") / name)["particles"]) for name in os.listdir("out/items")}
    assert shapes == {"first": 2, "second": 3, "000002-2": 1}
    facts = {name: record(Path("out"), name) for name in shapes}
    assert [facts["first"][key] for key in ("item", "sigma", "class")] == [7, 0.01, None]
    assert [facts["second"][key] for key in ("item", "sigma", "class")] == [1, 0.5, "loud"]
    assert facts["000002-2"]["sigma"] == 0
    words = ["reconstruct", "-m", "bundle", "-t", "random", "-i", "in/0.png", "in/1.png", "-o", "plain", "-n", "3"]
    words += ["--steps", "12", "--class", "loud", "--sigma", "0.5", "--mask", "masks/a.npy", "--mask", "masks/b.png"]
    assert cli.run(words) == 0
    plain, mine = arrays(Path("plain/1")), arrays(Path("out/items/second"))
    assert plain["particles"].tobytes() == mine["particles"].tobytes()


ATTACKS = {
    "/etc/passwd": "must be relative", "../secret.png": "must be relative", "in/../../secret.png": "must be relative",
    "in/../in/0.png": "must be relative", "out-link.png": "leads out of the folder",
    "dir-link/secret.png": "leads out of the folder", "chain.png": "leads out of the folder",
    "loop.png": "cannot be read", "pipe.png": "is no regular file", "device-link": "leads out of the folder",
    "in": "is a folder", "": "input is empty", "missing.png": "does not exist",
    "in/0.png[3]": "does not exist", "~/secret.png": "does not exist", "a" * 300: "cannot be read",
    "a" * 5000: "cannot be", "proc-link/self/environ": "leads out of the folder", "in\\..\\..\\secret.png": "not exist",
}  # fmt: skip


def test_no_path_leaves_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    top = tmp_path / "top"
    top.mkdir()
    for name in ("in", "bundle"):
        os.rename(name, top / name)
    monkeypatch.chdir(top)
    Image.open("in/0.png").save(tmp_path / "secret.png")
    links = {"out-link.png": tmp_path / "secret.png", "dir-link": tmp_path, "chain.png": "out-link.png"}
    links |= {"loop.png": "loop.png", "device-link": "/dev/zero", "proc-link": "/proc", "fine.png": "in/1.png"}
    for name, target in links.items():
        os.symlink(target, name)
    os.mkfifo("pipe.png")
    rows = [f'"{path}",,' for path in ATTACKS] + ["in/0.png,,out-link.png", "in/0.png,,../mask.npy", "fine.png,,"]
    Path("list.csv").write_text("input,name,mask\n" + "\n".join(rows) + "\n")
    assert batch(source="list.csv") == 1
    found = failures(Path("out"))
    assert len(found) == len(ATTACKS) + 2 and os.listdir("out/items") == [f"{len(rows) - 1:06}-fine"]
    for (path, message), (name, error) in zip(ATTACKS.items(), sorted(found.items())):
        assert message in error or "no regular file" in error, (path, name, error)
    assert sorted(os.listdir(tmp_path)) == ["secret.png", "top"]


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "-x", "a b", "ä", "x" * 201, "..", "a\\b", "a\nb"])
def test_names_stay_in_the_output_folder(name: str) -> None:
    (entry,) = listed(f'input,name\nin/0.png,"{name}"\n')
    assert entry.error and "is not allowed: 1 to 200 of A-Z" in entry.error and entry.name == "row 0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("input,colour\nin/0.png,x\n", "has the column 'colour'; allowed are input, name, item, sigma, particles, cla"),
        ("input,gain\nin/0.png,x\n", "has the column 'gain'"),
        ("name\nx\n", "has no column `input`"),
        ("input,input\na,b\n", "has the column 'input' twice"),
        ("input,name\nin/0.png\n", "row 0 has 1 cells; the header has 2"),
        ("input\nin/0.png,x\n", "row 0 has 2 cells; the header has 1"),
        ("input,name\nin/0.png,A\nin/1.png,a\n", "name a is given twice"),
        ("input,name\nin/0.png,000001-1\nin/1.png,\n", "name 000001-1 is given twice"),
        ("input,item\nin/0.png,1\nin/1.png,\n", "item 1 is given twice"),
        ("input,item\na/0.png,1\nb/0.png,\n", "item 1 is given twice; each item needs its own (without one it is"),
        ("input\n", "has no rows"),
        ("", "has no column `input`"),
        ("input\nin/0.png\0\n", "has a NUL character"),
        (b"input\nin/\xff.png\n", "is not UTF-8 text (byte 0xff)"),
        ("input\n" + "x" * 70000 + "\n", "has a row of more than 65536 characters"),
        ('input\n"' + "x\n" * 40000, "has a row of more than 65536 characters"),
        ('input\n"in/0.png"x\n', "is not understood as CSV"),
        ('input\n"in/0.png\n', "is not understood as CSV"),
        ("input".encode("utf-16"), "is not UTF-8 text"),
    ],
)
def test_a_manifest_is_read_strictly(text: str | bytes, message: str) -> None:
    with pytest.raises(InputError) as error:
        listed(text)
    assert message in str(error.value) and "list.csv" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("sigma", "-1", "sigma is '-1'; it must be a number"),
        ("sigma", "nan", "sigma is 'nan'"),
        ("sigma", "inf", "sigma is 'inf'"),
        ("sigma", "x", "sigma is 'x'"),
        ("sigma", "1_0", "sigma is '1_0'"),
        ("sigma", "٠.٥", "sigma is '٠.٥'"),
        ("sigma", "1e999", "sigma is '1e999'"),
        ("particles", "0", "particles is '0'; allowed are 1 to 65536"),
        ("particles", "1e3", "particles is '1e3'"),
        ("particles", "99999999999999999999", "particles is"),
        ("item", "-1", "item is '-1'"),
        ("item", "4294967296", "allowed are 0 to 4294967295"),
        ("item", "１", "item is"),
    ],
)
def test_a_bad_cell_is_its_rows_own(column: str, value: str, message: str) -> None:
    bad, good = listed(f"input,{column}\nin/0.png,{value}\nin/1.png,\n")
    assert bad.error and message in bad.error and bad.error.startswith("row 0: ") and bad.index == 0
    assert good.error is None and good.index == 1


def test_sigma_in_any_plain_notation() -> None:
    given = {"2": 2.0, "0.05": 0.05, ".5": 0.5, "5.": 5.0, "+1": 1.0, "5e-2": 0.05, "1.5E+1": 15.0, "-0": 0.0}
    rows = "".join(f"in/0.png,{text}\n" for text in given)
    assert [entry.sigma for entry in listed(f"input,sigma\n{rows}")] == list(given.values())


def test_a_row_without_a_usable_name_or_number_fails_alone() -> None:
    rows = ["x.png,a b,", "in/1.png,000000,3", "x.png,,-1", "in/2.png,000002,2", "in/3.png,row-4,0", "x.png,/,3"]
    Path("list.csv").write_text("input,name,item\n" + "\n".join(rows) + "\nmissing.png,gone,5\n")
    assert batch(source="list.csv") == 1
    assert sorted(os.listdir("out/items")) == ["000000", "000002", "row-4"]
    found = failures(Path("out"))
    assert list(found) == ["row 0", "row 2", "row 5", "gone"]
    assert "row 2: item is '-1'" in found["row 2"] and "does not exist" in found["gone"]
    Path("list.csv").write_text("input,item\nin/0.png,x\n")
    assert [entry.name for entry in open_manifest(Path("list.csv"), None, []).entries()] == ["row 0"]


def test_a_class_in_each_row_is_guided_to() -> None:
    Path("list.csv").write_text("input,class\nin/0.png,loud\nin/1.png,\n")
    assert batch("--guidance", "3", source="list.csv") == 1
    assert os.listdir("out/items") == ["000000-0"]
    assert "guidance is 3, which needs a class" in failures(Path("out"))["000001-1"]
    assert batch("--guidance", "3", out="other") == 2


def test_a_mask_in_each_row_of_measurements() -> None:
    np.save("mask.npy", np.ones((1, 4, 4), np.float32))
    Path("list.csv").write_text("input,mask\nin/0.png,mask.npy\nin/1.png,\n")
    assert batch("--measured", source="list.csv") == 1
    assert "needs the operator's mask" in failures(Path("out"))["000001-1"]


def test_the_same_list_of_other_images_is_another_batch(capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("in", "a/in")
    shutil.copytree("in", "b/in")
    os.symlink("a", "now")
    Path("list.csv").write_text("input\nin/0.png\n")
    assert batch("--root", "now", source="list.csv") == 0
    assert batch("--root", "a", source="list.csv") == 0
    os.unlink("now")
    os.symlink("b", "now")
    assert batch("--root", "now", source="list.csv") == 2
    assert "holds a batch whose root is" in capsys.readouterr().err


def test_a_manifest_that_changes_is_noticed() -> None:
    Path("list.csv").write_text("input\nin/0.png\nin/1.png\n")
    manifest = open_manifest(Path("list.csv"), None, [])
    entries = manifest.entries()
    assert next(entries).name == "000000-0"
    os.utime("list.csv", (1, 1))  # touched, but the same
    assert next(entries).name == "000001-1"
    Path("list.csv").write_text("input\nin/0.png\nin/2.png\n")
    with pytest.raises(InputError, match=r"list\.csv has changed since the batch began"):
        list(manifest.entries())
    Path("list.csv").write_text("input\nin/0.png\nin/1.png\n")
    entries = manifest.entries()
    next(entries)
    Path("list.csv").write_text("input\nin/0.png\nin/2.png\n")  # while it is read, to as many bytes
    with pytest.raises(InputError, match=r"list\.csv has changed since the batch began"):
        next(entries)


def test_bad_class_and_parameter_fail_alone() -> None:
    Path("list.csv").write_text("input,class,mask\nin/0.png,cat,\nin/1.png,,in/2.png\nin/2.png,,list.csv\nin/3.png,,\n")
    assert batch(source="list.csv") == 1
    found = failures(Path("out"))
    assert "class 'cat' is not known" in found["000000-0"] and "list.csv is not a PNG" in found["000002-2"]
    assert sorted(os.listdir("out/items")) == ["000001-1", "000003-3"]


def test_root_and_a_byte_order_mark() -> None:
    Path("lists").mkdir()
    Path("lists/list.csv").write_bytes("input\nin/0.png\n".encode("utf-8-sig"))
    assert batch(source="lists/list.csv") == 1
    assert batch("--root", ".", source="lists/list.csv", out="rooted") == 0
    assert "rooted/items/000000-0/item.json" in {f"rooted/{name}" for name in contents(Path("rooted"))}


def test_rows_are_of_bounded_length_and_manifests_are_not() -> None:
    row = f"in/0.png,{'x' * 30_000}\n"
    Path("list.csv").write_text("input,class\n" + 3 * row)
    assert open_manifest(Path("list.csv"), None, []).count == 3


def test_memory_of_a_manifest_is_a_few_bytes_a_row() -> None:
    def most(rows: int) -> int:
        Path("list.csv").write_text("input\n" + "in/0.png\n" * rows)
        tracemalloc.start()
        manifest = open_manifest(Path("list.csv"), None, [])
        assert sum(1 for _ in manifest.entries()) == manifest.count == rows
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    most(10)
    assert (most(1500) - most(500)) / 1000 < 64
