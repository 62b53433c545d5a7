"""The picture shows what the benchmark's lines and a profile say."""

import json

import pytest
from PIL import Image

from tools.draw_roofline import draw, main, points_of

LINE = {
    "case": "lora",
    "gpu": "a card",
    "ms_median": 20.0,
    "floor_ms": 5.0,
    "share_of_ceiling": 0.25,
    "ceiling_tflops": 800.0,
    "ceiling_gb_s": 4000.0,
}
PRODUCTS = [
    {"kind": "product", "shape": [4096, 2048, 2048], "ms": 10.0, "calls": 5, "teraflop": 6.0, "gigabyte": 8.0},
    {"kind": "product", "shape": [4096, 16, 2048], "ms": 2.0, "calls": 5, "teraflop": 0.1, "gigabyte": 4.0},
    {"kind": "attention", "shape": [16, 4096, 4096, 128], "ms": 4.0, "calls": 2, "teraflop": 2.0, "gigabyte": 1.0},
    {"kind": "product", "shape": [1, 2048, 2048], "ms": 0.0, "calls": 1, "teraflop": 0.0, "gigabyte": 0.0},
]
PROFILE = {
    "busy_ms": 18.0,
    "products": PRODUCTS,
    "kinds": [
        {"kind": "large products", "ms": 10.0, "share": 0.6, "kernels": 5},
        {"kind": "attention", "ms": 4.0, "share": 0.2, "kernels": 2},
        {"kind": "something new", "ms": 4.0, "share": 0.2, "kernels": 9},
    ],
}


def test_each_shape_lies_at_its_work_for_a_byte_and_its_speed():
    points = points_of(PRODUCTS)
    assert points["large products"] == [(750.0, 600.0, 10.0)]
    assert points["thin products"] == [(25.0, 50.0, 2.0)]
    assert points["attention"] == [(2000.0, 500.0, 4.0)]
    assert points["attention backward"] == []


def test_bars_are_as_long_as_times():
    roof, cases, kinds = draw([LINE, {**LINE, "case": "slow", "ms_median": 40.0}], PROFILE, "lora").axes
    assert [bar.get_width() for bar in cases.patches] == [20.0, 40.0, 5.0, 5.0]
    assert [(bar.get_x(), bar.get_width()) for bar in kinds.patches] == [(0, 10), (10, 4), (14, 4)]
    x, y = roof.lines[0].get_data()
    assert y[1:] == pytest.approx([800, 800]) and x[1] == pytest.approx(200) and y[0] == pytest.approx(4 * x[0])


def files(tmp_path):
    lines, profile = tmp_path / "lines.jsonl", tmp_path / "profile.json"
    lines.write_text(f"loading\n{json.dumps(LINE)}\n", encoding="utf-8")
    profile.write_text(json.dumps({"lora": PROFILE}), encoding="utf-8")
    return ["--lines", str(lines), "--profile", str(profile), "--output", str(tmp_path / "roofline.png")]


def test_the_picture_is_written(tmp_path):
    assert main(files(tmp_path)) == 0
    assert Image.open(tmp_path / "roofline.png").width > 1000


def test_a_case_that_is_not_there_is_named(tmp_path, capsys):
    assert main([*files(tmp_path), "--case", "lokr"]) == 1
    assert "--case lokr" in capsys.readouterr().err
