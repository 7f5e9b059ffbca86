"""benchmarks/scale.py: its formulas against numbers by hand, its tables, a small run."""

import json
import pytest
import torch
from detectron2.modeling import build_model

from agvm_d2.d2.config import read_config
from agvm_d2.modules import assign_modules
from benchmarks import scale
from benchmarks.scale import Model, Network

# 400 bytes in 4 tensors.
MODEL = Model("toy", numbers=100, tensors=4, modules=2, alone=10.0)
NETWORK = Network(latency=1.0, bandwidth=100.0, memory=800.0)


def test_all_reduces():
    assert scale.ring(400, 4, NETWORK) == 6 * (1 + 1)  # messages of 100 bytes
    assert scale.ring(400, 1, NETWORK) == scale.tree(400, 1, NETWORK) == 0
    assert scale.tree(400, 4, NETWORK) == 2 * (4 + 2)  # two hops up, two down
    assert scale.tree(400, 5, NETWORK) == 2 * (4 + 3)
    assert scale.all_reduce(100, 4, NETWORK) == 6  # the tree; the ring takes 6 x 1.25
    assert scale.all_reduce(100, 2, NETWORK) == 3  # the ring, 2 x 1.5; the tree takes 4


def test_a_plain_step():
    assert scale.plain_step(MODEL, 4, NETWORK) == 10 + 12
    assert scale.plain_step(MODEL, 1, NETWORK) == 10


def test_what_agvm_costs():
    # 800 bytes read; 5 float64 over a tree: 2 (0.4 + 2).
    assert scale.agvm_cost(MODEL, 4, NETWORK) == pytest.approx(1 + 4.8)


def test_what_the_official_scheme_costs():
    # Over all 4 x 6 instead of 12; over a half 4 x 3; a gradient sent, 4 + 1; 8 bytes broadcast
    # over two hops, 2.08; 800 bytes read.
    other = scale.official_cost(MODEL, 4, NETWORK, measured=False)
    assert other == pytest.approx(24 - 12)
    assert scale.official_cost(MODEL, 4, NETWORK) == pytest.approx(12 + 12 + 5 + 2.08 + 1)
    found = scale.averages(MODEL, 4, NETWORK, interval=4)
    assert found == pytest.approx((5.8 / 4, (32.08 + 3 * 12) / 4))


def test_the_model_is_the_papers():
    cfg = read_config(
        str(scale.ROOT / "configs/COCO-Detection/faster_rcnn_R_50_FPN_12ep_bs1536_adamw_agvm.yaml"),
        ["MODEL.DEVICE", "meta"],
    )
    with torch.device("meta"):
        modules = assign_modules(build_model(cfg))
    params = [p for params in modules.values() for p in params]
    found = sum(p.numel() for p in params), len(params), len(modules)
    assert found == (scale.R50.numbers, scale.R50.tensors, scale.R50.modules)
    assert cfg.AGVM.INTERVAL == scale.INTERVAL


def test_fewer_units():
    # tr(Sigma) = (5 - 2) 4/3 = 4 and |G|^2 = 2 - 4/4 = 1: with two units 1 + 4/2, with one S1.
    assert scale.fewer_units(5.0, 2.0, 4, 2) == pytest.approx(3)
    assert scale.fewer_units(5.0, 2.0, 4, 1) == pytest.approx(5)
    assert scale.fewer_units(5.0, 2.0, 4, 4) == 2


def result() -> dict:
    """One step of four replicas, in which all modules are alike but FPN, which is all noise."""
    moments = {
        "unit_sq": [5.0, 4.0, 5.0, 5.0],
        "mean_sq": [2.0, 1.0, 2.0, 2.0],
        "mean_sq_of_first": {"2": [4.0, 2.0, 4.0, 4.0]},
    }
    return {
        **{"replicas": 4, "images": 2, "start": 3, "start_units": 8, "steps": 1},
        **{"start_cpu_seconds": 1, "step_cpu_seconds": 2.0},
        **{"torch": "2", "machine": "m", "weights_hash": "h"},
        "lr_scale": [1.0, 0.9, 1.0, 1.0],
        "modules": ["backbone", "fpn", "rpn", "box_head"],
        "moments": [{"kind": kind, **moments} for kind in scale.KINDS],
    }


def test_the_tables_by_hand():
    text = scale.measured_tables(result())
    assert "1 steps of 4 × 2 images, each 2 s of CPU time, after 3 steps of 8 × 2 (1 s)" in text
    assert "backbone 1.00, fpn 0.90" in text
    # phi = 2 (5 - 2)/(2 x 2 + 5) and 2 (4 - 1)/(2 x 1 + 4); the noise scale is 2 x 4 images. With
    # 256 units S2 is 1 + 4/256 and 4/256, so phi 7.97/262.97 and 1.
    rpn = "0.67 (0.67 to 0.67) | 0.03 | 0.55 | 1.00 | 1.00 | 1.39 | 8 |"
    fpn = "1.00 (1.00 to 1.00) | 1.00 | 0.41 | 0.82 | 0.17 | 1.61 | – |"
    assert f"| AdamW's | rpn | {rpn}" in text and f"| AdamW's | fpn | {fpn}" in text
    # With two units S2 is 3, so phi 2 (5 - 3)/5; the first two had 4, so 2 (5 - 4)/5.
    assert "| plain | rpn | 0.80 (0.40) | 0.67 |" in text


def test_the_figure(tmp_path):
    scale.draw(tmp_path)
    assert (tmp_path / "scale.png").stat().st_size > 10_000


def test_the_page_holds_what_was_measured():
    page = scale.DOCUMENT.read_text().split(scale.BEGIN)[1].split(scale.END)[0]
    assert page.strip() == scale.report(json.loads(scale.RESULTS.read_text())).strip()


def test_drawn_images_are_all_different():
    draw, again = scale.Drawn(1), scale.Drawn(1)
    first, second = draw()["image"], draw()["image"]
    assert not torch.equal(first, second)
    assert torch.equal(again()["image"], first)


@pytest.mark.integration
def test_a_run(monkeypatch):
    monkeypatch.setattr(scale, "FEWER", (2, 3))
    found = json.loads(json.dumps(scale.measure(replicas=3, steps=2, start=1)))
    assert found["modules"] == ["backbone", "fpn", "rpn", "box_head"]
    assert [row["kind"] for row in found["moments"]] == ["adamw", "sgd"] * 2
    for row in found["moments"]:
        assert [*row["mean_sq_of_first"]] == ["2"]
        for unit_sq, mean_sq in zip(row["unit_sq"], row["mean_sq"], strict=True):
            assert 0 < mean_sq <= unit_sq  # a mean's square is at most the mean of squares
    assert "| plain | box_head |" in scale.measured_tables(found)
