"""The command line with a stand-in engine: what it writes and how it ends."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from pipeline_cli import FAKE, files_in, reconstruct, rlsd, work  # noqa: F401 (a fixture of all tests here)

from rlsd.pipeline import cli, run
from rlsd.pipeline.items import check_plan
from rlsd.pipeline.presets import FASHION

# ------------------------------------------------------------------ what it writes


def test_reconstruct_writes_pictures_and_reports(tmp_path, capsys):
    Image.fromarray(np.zeros((50, 40, 3), np.uint8)).save("b.jpg")
    code = rlsd(
        "reconstruct", "--model", "bundle", "--task", "random", "--input", "a.png", "b.jpg", "--out", "out",
        "--steps", "4", "--particles", "3", "--seed", "7", "--sigma", "0.05", "--gamma", "2", "--class", "dog",
    )  # fmt: skip
    assert code == 0
    assert {"a", "b", "report.json", "report.html"} <= files_in(tmp_path / "out")
    assert "out/report.html" in capsys.readouterr().out
    report = json.loads((tmp_path / "out/report.json").read_text(), parse_constant=pytest.fail)
    (task,) = report["tasks"]
    assert (task["particles"], task["seed"], task["sigma"], task["gamma"], task["steps"]) == (3, 7, 0.05, 2, 4)
    assert task["class"] == "dog" and task["lambda"] == FASHION["random"].lambda_
    assert [entry["name"] for entry in report["items"]] == ["a", "b"]
    assert report["items"][0]["sha256"] == sha256(tmp_path / "a.png")
    assert report["bundle"]["manifest_sha256"] == sha256(tmp_path / "bundle/manifest.txt")
    assert "colour turned to gray" in report["items"][1]["notes"]
    assert {"rlsd", "numpy", "python", "onnxruntime"} <= set(report["versions"])
    assert {"processor", "cores", "memory"} <= set(report["machine"])
    assert report["time"]["thread_seconds"]["denoiser"] == 0.25 and report["time"]["particle_steps"] == 18


def sha256(path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


class Links(HTMLParser):
    """Collects what a page refers to, and checks that its tags are closed in order."""

    def __init__(self):
        super().__init__()
        self.links, self.open = [], []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.links += [value for key, value in attributes if key in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_sound_and_its_pictures_are_there(tmp_path):
    Image.fromarray(np.zeros((28, 28), np.uint8)).save("x<b>&y.png")
    assert reconstruct(source="x<b>&y.png") == 0
    page = Links()
    page.feed((tmp_path / "out/report.html").read_text())
    assert page.open == [] and any(link.endswith("grid.png") for link in page.links)
    for link in page.links:
        assert (tmp_path / "out" / link).is_file()
    assert "<b>&y" not in (tmp_path / "out/report.html").read_text()


def test_the_notes_of_a_measured_image_are_in_the_report(tmp_path):
    Image.fromarray(np.full((28, 28, 3), 99, np.uint8)).save("colour.png")
    assert reconstruct("--measured", "--mask", "a.png", "-n", "1", source="colour.png") == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["items"][0]["notes"] == ["colour turned to gray"]


def test_measured_input_with_a_mask(tmp_path):
    mask = np.zeros((28, 28), np.uint8)
    mask[10:] = 255
    Image.fromarray(mask).save("mask.png")
    assert reconstruct("--measured", "--mask", "mask.png", "-n", "2") == 0
    with np.load("out/a/arrays.npz") as arrays:
        assert set(arrays) == {"particles", "latents", "y", "param.mask", "trace"}
        assert (arrays["y"][:, 2:12, 2:30] == 0).all()
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["items"][0]["measured"] and "psnr" not in report["items"][0]
    assert report["items"][0]["notes"] == []
    assert report["tasks"][0]["sigma"] is None and report["items"][0]["residual_in_sigma"] is None
    assert report["tasks"][0]["parameter_files"]["mask"][0]["sha256"] == sha256(tmp_path / "mask.png")


def test_the_same_command_writes_the_same_bytes(tmp_path):
    for out in ("one", "two"):
        assert reconstruct(out=out) == 0
    for name in files_in(tmp_path / "one"):
        if (tmp_path / "one" / name).is_file() and not name.startswith("report"):
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_overwrite(tmp_path, capsys):
    assert reconstruct() == 0
    assert reconstruct() == 2
    assert "rlsd: output out is not empty: name another folder or add --overwrite" in capsys.readouterr().err
    assert reconstruct("--overwrite", "-n", "1") == 0
    assert "a/particle_01.png" not in files_in(tmp_path / "out")


def test_overwrite_leaves_nothing_of_an_item_that_fails_now(tmp_path):
    (tmp_path / "out/a").mkdir(parents=True)
    (tmp_path / "out/a/item.json").touch()
    (tmp_path / "out/mine.png").touch()
    (tmp_path / "out/calibration.png").touch()
    FAKE["broken"] = [0]
    assert reconstruct("--overwrite") == 1
    reports = {"report.json", "report.html", "items.csv", "particles.csv"}
    assert files_in(tmp_path / "out") == {"mine.png", *reports}


def test_many_particles_have_names_in_order_and_a_grid_in_rows(tmp_path):
    assert reconstruct("-n", "101") == 0
    assert {"a/particle_000.png", "a/particle_100.png"} <= files_in(tmp_path / "out")
    assert max(Image.open("out/a/grid.png").size) < 2000


@pytest.mark.parametrize("given", [("snapshots", "kept"), ("snapshot-steps", "50"), ("timeout", "600")])
def test_options_of_several_processes_are_refused_for_one(tmp_path, capsys, given):
    assert reconstruct(f"--{given[0]}", given[1]) == 2
    assert f"rlsd: {given[0]} is {given[1]}" in (said := capsys.readouterr().err)
    assert said.endswith("which is for several processes: --distributed\n") and not (tmp_path / "out").exists()


def test_names_that_look_like_markup(capsys):
    assert reconstruct(out="[bold]out") == 0
    assert "[bold]out/report.html" in capsys.readouterr().out


def test_names_of_files_need_not_be_text(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    os.rename("a.png", name)
    assert reconstruct(source=name) == 0
    assert json.loads((tmp_path / "out/report.json").read_text())["items"][0]["source"] == name
    assert b",caf\xe9.png," in (tmp_path / "out/items.csv").read_bytes()
    assert r"from caf\udce9.png" in (tmp_path / "out/report.html").read_text(encoding="utf-8")


def test_a_terminal_that_lacks_the_letters_of_a_name(tmp_path, monkeypatch):
    os.rename("a.png", "кот.png")
    words = ["reconstruct", "-m", "bundle", "-t", "half", "-i", "кот.png", "-o", "out"]
    stdout = io.TextIOWrapper(said := io.BytesIO(), "ascii", write_through=True)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr("sys.stdout", stdout)
        patch.setattr("sys.argv", ["rlsd", *words, "--steps", "4"])
        cli.main()
    assert end.value.code == 0 and rb"\u043a\u043e\u0442" in said.getvalue()


def test_what_a_killed_run_left_is_no_obstacle(tmp_path):
    (tmp_path / "out" / ".tmp-abc").mkdir(parents=True)
    assert reconstruct() == 0


def test_help_and_version(capsys):
    assert rlsd("--version") == 0
    assert re.fullmatch(r"rlsd \d+\.\d+\.\d+\n", capsys.readouterr().out)
    for words in ((), ("reconstruct",), ("demo",), ("tasks",), ("info",), ("export",)):
        assert rlsd(*words, "--help") == 0
        assert len(capsys.readouterr().out) > 200


def test_tasks_and_info(capsys):
    assert rlsd("tasks") == 0
    both = capsys.readouterr().out
    assert "phase-retrieval" in both and "fashion" in both and "sd512" in both
    assert rlsd("tasks", "--model", "bundle") == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert lines["sr4"].split()[1] == "200"  # the settings' table comes last
    assert len(lines["task"].split()) == len(lines["sr4"].split()) and "…" not in lines["task"], "a head each"
    assert rlsd("info", "bundle") == 0
    shown = capsys.readouterr().out
    assert "28 x 28 are content" in shown and "2.0e-07" in shown and "mask 1 x 32 x 32" in shown
    assert rlsd("info") == 0
    assert "ONNX Runtime" in capsys.readouterr().out


def test_without_a_command_there_is_the_help_and_nothing_else(capsys):
    assert rlsd() == 2
    said = capsys.readouterr()
    assert "Usage: rlsd" in said.out + said.err and "rlsd: " not in said.err


def test_a_plan_of_a_manifest_that_was_cut_off(tmp_path, capsys):
    lines = [
        "rlsd-bundle 1",
        "target cuda",
        "image 1 8 8",
        "latent 1 4 4",
        "graph denoiser 2 d",
        "weights w",
        "file w 9 ab",
    ]
    for count in range(2, len(lines) + 1):
        (tmp_path / "bundle/manifest.txt").write_text("\n".join(lines[:count]))
        assert rlsd("info", "bundle", "--plan") == 2
        assert capsys.readouterr().err == "rlsd: bundle: its manifest.txt is not that of a whole bundle\n"
    (tmp_path / "bundle/manifest.txt").write_text("\n".join([*lines, "end ab"]))
    assert rlsd("info", "bundle", "--plan") == 0
    for memory in ("inf", "nan", "1e300"):
        assert rlsd("info", "bundle", "--plan", "--memory", memory) == 2
        said = capsys.readouterr().err
        assert said.startswith("rlsd: ") and "memory" in said and "0.1" in said and said.count("\n") == 1


def test_wildcards_may_follow_an_option():
    assert cli.spread(["x", "-i", "a", "b", "--out", "o", "-i", "c"], ("-i",)) == [
        "x", "-i", "a", "-i", "b", "--out", "o", "-i", "c",
    ]  # fmt: skip


# ------------------------------------------------------------------ how it ends


def test_an_item_that_fails_is_reported_and_the_others_are_written(tmp_path, capsys):
    FAKE["broken"] = [0]
    Image.fromarray(np.zeros((28, 28), np.uint8)).save("b.png")
    assert rlsd("reconstruct", "-m", "bundle", "-t", "sr4", "-i", "a.png", "b.png", "-o", "out", "--steps", "4") == 1
    assert "rlsd: a: item 0 became NaN" in capsys.readouterr().err
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert [entry["name"] for entry in report["items"]] == ["b"] and report["failed"][0]["name"] == "a"
    assert "a failed" in (tmp_path / "out/report.html").read_text() and not (tmp_path / "out/a").exists()


def test_inputs_that_vanish_or_change_on_the_way(tmp_path, capsys, monkeypatch):
    def checked(*given):
        check_plan(*given)
        (tmp_path / "b.png").unlink()
        (tmp_path / "c.png").write_text("no image")

    for name in "bcd":
        shutil.copy("a.png", f"{name}.png")
    monkeypatch.setattr(run, "check_plan", checked)
    inputs = ["-i", "a.png", "b.png", "c.png", "d.png"]
    assert rlsd("reconstruct", "-m", "bundle", "-t", "sr4", *inputs, "-o", "out", "--steps", "4") == 1
    said = capsys.readouterr().err
    assert "rlsd: b: b.png does not exist\n" in said and "rlsd: c: c.png is not a PNG" in said
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert [entry["name"] for entry in report["items"]] == ["a", "d"]
    assert [entry["name"] for entry in report["failed"]] == ["b", "c"]


def test_all_items_failing(tmp_path):
    FAKE["broken"] = [0]
    assert reconstruct() == 1
    assert files_in(tmp_path / "out") == {"report.json", "report.html", "items.csv", "particles.csv"}


def test_an_interrupt_leaves_nothing_half_written(tmp_path, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    FAKE["on_tick"] = interrupt
    assert reconstruct() == 130
    assert capsys.readouterr().err.strip() == "rlsd: interrupted"
    assert not (tmp_path / "out").exists()


def test_a_fault_while_writing_leaves_nothing_half_written(tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError(28, "No space left on device", "arrays.npz")

    monkeypatch.setattr(np, "savez", fail)
    assert reconstruct() == 1
    assert capsys.readouterr().err == "rlsd: arrays.npz: No space left on device\n"
    assert not (tmp_path / "out").exists()


def test_a_fault_of_ours_shows_where(monkeypatch, capsys):
    monkeypatch.setattr(np, "savez", lambda *_, **__: 1 / 0)
    assert reconstruct() == 1
    error = capsys.readouterr().err
    assert "ZeroDivisionError" in error and error.endswith("please report it with the lines above\n")


def test_export_says_what_is_missing():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from rlsd.pipeline.cli import run\n"
        "sys.exit(run(['export', '--checkpoint', '.', '--out', 'x']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "rlsd: export needs torch, which is not installed: pip install 'rlsd[export]'\n"
