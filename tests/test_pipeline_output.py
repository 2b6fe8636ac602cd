"""The output folder: complete items or nothing, whatever happens in between."""

import os

import pytest

from rlsd.pipeline.errors import InputError
from rlsd.pipeline.output import OutputFolder


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_items_and_files_appear_complete(tmp_path):
    out = tmp_path / "deep" / "out"
    with OutputFolder(out, ["a", "t/b"]) as folder:
        for name in ("a", "t/b"):
            with folder.item(name) as path:
                (path / "grid.png").write_bytes(b"x")
                assert not (out / name).exists()
        folder.file("report.json", "{}")
    assert files_in(out) == ["a", "a/grid.png", "report.json", "t", "t/b", "t/b/grid.png"]


def test_a_fault_in_the_middle_leaves_nothing(tmp_path):
    out = tmp_path / "deep" / "out"
    with pytest.raises(RuntimeError), OutputFolder(out, ["a"]) as folder, folder.item("a") as path:
        (path / "grid.png").write_bytes(b"x")
        raise RuntimeError
    assert files_in(tmp_path) == []


def test_a_fault_leaves_the_items_that_were_complete(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), OutputFolder(out, ["a", "b"]) as folder:
        with folder.item("a") as path:
            (path / "grid.png").write_bytes(b"x")
        with folder.item("b") as path:
            (path / "grid.png").write_bytes(b"x")
            raise KeyboardInterrupt
    assert files_in(out) == ["a", "a/grid.png"]


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, call):
    def fail(*_):
        raise OSError(28, "No space left on device")

    folder = OutputFolder(tmp_path / "out", ["a"])
    with pytest.raises(OSError, match="No space"), folder, folder.item("a") as path:
        (path / "grid.png").write_bytes(b"x")
        monkeypatch.setattr(f"os.{call}", fail)
    assert files_in(tmp_path) == []


def test_overwrite_replaces_only_what_is_ours(tmp_path):
    out = tmp_path / "out"
    with OutputFolder(out, ["a"]) as folder, folder.item("a") as path:
        (path / "particle_00.png").write_bytes(b"old")
        (path / "particle_01.png").write_bytes(b"old")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty: name another folder or add --overwrite"):
        OutputFolder(out, ["a"]).check()
    with OutputFolder(out, ["a"], overwrite=True) as folder, folder.item("a") as path:
        (path / "particle_00.png").write_bytes(b"new")
    assert files_in(out) == ["a", "a/particle_00.png", "notes.txt"]
    assert (out / "a" / "particle_00.png").read_bytes() == b"new"
    (out / "a" / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(InputError, match="was not written by rlsd: it will not be replaced"):
        OutputFolder(out, ["a"], overwrite=True).check()
    (out / "a" / "holiday.jpg").unlink()
    (out / "b").symlink_to("a")  # whose owner wanted it to lead there
    with pytest.raises(InputError, match="out/b is there and was not written by rlsd"):
        OutputFolder(out, ["b"], overwrite=True).check()


def test_two_runs_at_once_do_not_replace_each_others_items(tmp_path):
    out = tmp_path / "out"
    with OutputFolder(out, ["a"]) as first, OutputFolder(out, ["a"]) as second:
        with first.item("a") as path:
            (path / "grid.png").write_bytes(b"first")
        with pytest.raises(InputError, match="out/a was written by another run meanwhile"), second.item("a") as path:
            (path / "grid.png").write_bytes(b"second")
    assert files_in(out) == ["a", "a/grid.png"] and (out / "a" / "grid.png").read_bytes() == b"first"


def test_overwriting_that_fails_keeps_the_old(tmp_path, monkeypatch):
    out, rename = tmp_path / "out", os.rename
    with OutputFolder(out, ["a"]) as folder, folder.item("a") as path:
        (path / "grid.png").write_bytes(b"old")

    def fail_to_place_the_new(source, target):
        if target == out / "a" and source.name != "old":
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr("os.rename", fail_to_place_the_new)
    folder = OutputFolder(out, ["a"], overwrite=True)
    with pytest.raises(OSError, match="No space"), folder, folder.item("a") as path:
        (path / "grid.png").write_bytes(b"new")
    assert files_in(out) == ["a", "a/grid.png"] and (out / "a" / "grid.png").read_bytes() == b"old"


def test_an_item_with_the_longest_name_is_replaced(tmp_path):
    out, name = tmp_path / "out", "a" * os.pathconf(tmp_path, "PC_NAME_MAX")
    for content in (b"old", b"new"):
        with OutputFolder(out, [name], overwrite=True) as folder, folder.item(name) as path:
            (path / "grid.png").write_bytes(content)
    assert files_in(out) == [name, f"{name}/grid.png"] and (out / name / "grid.png").read_bytes() == b"new"


def test_unusable_output_folders(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="is a file; a folder is wanted"):
            OutputFolder(path, []).check()


def test_only_a_bundle_is_overwritten(tmp_path):
    pytest.importorskip("onnx_ir")
    from rlsd.export.bundle import BundleWriter

    (tmp_path / "photos").mkdir()
    with pytest.raises(FileExistsError, match=r"photos is no bundle, which has a manifest\.txt; only a bundle is over"):
        BundleWriter(tmp_path / "photos", "x", "p", "cpu", "fp32", overwrite=True)
    with pytest.raises(FileExistsError, match="photos exists already; name another folder or allow to overwrite"):
        BundleWriter(tmp_path / "photos", "x", "p", "cpu", "fp32")


@pytest.mark.parametrize(("flags", "why"), [(os.ST_RDONLY, "{} is on a read-only file"), (0, "no permission in {}")])
def test_why_a_folder_cannot_be_written(tmp_path, monkeypatch, flags, why):
    facts = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((*facts[:8], flags, facts[9])))
    with pytest.raises(InputError, match=f"output .*new cannot be written: {why.format(tmp_path)}"):
        OutputFolder(tmp_path / "new", []).check()
