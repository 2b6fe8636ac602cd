"""CSVs and the page of a report: what is in them, and that thousands of items are no trouble."""

import copy
import csv
import io
import json

import pytest
from pipeline_cli import files_in, reconstruct, work  # noqa: F401 (a fixture of all tests here)
from pipeline_fake import FakeEngine, make_bundle

from rlsd.pipeline import plots
from rlsd.pipeline.html import LISTED, SHOWN, to_html
from rlsd.pipeline.report import times
from rlsd.pipeline.spreadsheet import dig, items_csv, particles_csv


@pytest.fixture
def report(tmp_path):
    assert reconstruct("-n", "3", "--sigma", "0.1") == 0
    return json.loads((tmp_path / "out" / "report.json").read_text())


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_the_files_of_a_run(tmp_path, report):
    assert {"items.csv", "particles.csv", "calibration.png", "report.json", "report.html"} <= files_in(tmp_path / "out")
    assert rows((tmp_path / "out/items.csv").read_text()) == rows(items_csv(report["items"]))
    assert rows((tmp_path / "out/particles.csv").read_text()) == rows(particles_csv(report["items"]))
    (item,) = report["items"]
    pooled = report["calibration"]["random"]
    assert pooled["items"] == 1 and pooled["ranks"] == pytest.approx(item["calibration"]["ranks"])


def test_steps_are_those_of_all_processes(tmp_path):
    engine = FakeEngine(make_bundle(tmp_path / "fake"))
    engine.steps = 46  # of 2 of 5 particles
    found = times(engine, 3.0, share=2 / 5)
    assert (found["particle_steps"], found["particle_steps_per_second"]) == (115, 57.5)
    assert times(engine, 3.0)["particle_steps"] == 46


def test_csv_has_a_row_for_each_item_and_each_particle(report):
    (item,) = report["items"]
    other = copy.deepcopy(item) | {"name": 'a "b", c\nd', "item": 1, "ssim": None}
    first, second = rows(items_csv([item, other]))
    assert float(first["psnr_best_by_fit"]) == item["psnr"]["best_by_fit"] and first["lpips_mean"] == ""
    assert second["name"] == 'a "b", c\nd' and second["ssim_mean"] == "" and second["coverage_nominal"] == "0.5"
    particles = rows(particles_csv([item, other]))
    assert [row["particle"] for row in particles] == ["0", "1", "2"] * 2
    assert [float(row["psnr"]) for row in particles[:3]] == item["psnr"]["particles"]
    assert [row["best_by_fit"] for row in particles[:3]].index("1") == item["best_by_fit"]
    assert dig(item, ("psnr", "nothing", 3)) is None and dig([1, 2], (5,)) is None


def test_the_page_shows_the_figures(tmp_path, report):
    page = (tmp_path / "out/report.html").read_text()
    for text in ("calibration.png", "items.csv", "a/trajectories.png", "a/similarity.png", "by fit", "spread / error"):
        assert text in page, text
    assert "classes:" not in page and "LPIPS</th>" not in page  # there are none here
    assert f"{report['items'][0]['psnr']['best_by_fit']:.2f}" in page


def test_a_page_of_ten_thousand_items(report):
    (item,) = report["items"]
    many = [
        copy.deepcopy(item) | {"name": f"x{i}", "item": i, "plots": item["plots"] if i < 20 else []}
        for i in range(10_000)
    ]
    page = to_html(report | {"items": many})
    assert f"The first {SHOWN} of 10000 items are shown; items.csv has all of them." in page
    assert "The first 20 items have plots." in page
    assert page.count('<section class="card"><h3>x') == SHOWN and page.count("<tr><td>x") == 2 * LISTED
    assert len(page) < 2_000_000


def test_without_matplotlib_the_page_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    assert reconstruct("-n", "2") == 0
    page = (tmp_path / "out/report.html").read_text()
    assert "pip install &#x27;rlsd[report]&#x27;" in page or "pip install 'rlsd[report]'" in page
    assert "trajectories.png" not in page and not (tmp_path / "out/calibration.png").exists()


def test_measurements_have_no_calibration(tmp_path):
    assert reconstruct("--measured", "-n", "2", task="hdr-none") == 2
    assert reconstruct("--measured", "-n", "2", "--mask", "a.png") == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["calibration"] == {} and "Calibration" not in (tmp_path / "out/report.html").read_text()


def test_lpips_weights_that_are_missing_are_one_sentence(tmp_path, capsys):
    assert reconstruct("--lpips", "nowhere.safetensors") == 2
    assert capsys.readouterr().err == (
        "rlsd: lpips nowhere.safetensors: a safetensors file, or a folder with some, is wanted\n"
    )
