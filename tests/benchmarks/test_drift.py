"""benchmarks/drift.py: the variants of RetinaNet, each run's config, what is read off a curve."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from agvm_d2.modules import assign_modules
from benchmarks import drift
from benchmarks.any_batch import setting


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    monkeypatch.setattr(setting, "weights", lambda: "''")


def model(pipeline):
    cfg = setting.config(drift.Key(pipeline, "sgd", drift.LARGE).run(), "unused")
    return build_model(cfg).train()


@pytest.mark.parametrize("key", drift.GRID, ids=lambda key: "-".join(map(str, key)))
def test_every_run_is_a_config_and_sees_as_many_images(key):
    cfg = setting.config(key.run(), "unused")
    assert abs(cfg.SOLVER.MAX_ITER * key.batch - drift.IMAGES) < key.batch
    assert cfg.SOLVER.IMS_PER_BATCH // cfg.SOLVER.MICRO_BATCH_SIZE >= 2
    assert cfg.AGVM.MODE == "monitor" and not cfg.DATASETS.TEST


@pytest.mark.parametrize("name", drift.WHY)
def test_modules_of_each_retinanet(name):
    fpn = [] if name == "retinanet_no_fpn" else ["fpn"]
    assert [*assign_modules(model(name))] == ["backbone", *fpn, "head"]


def test_a_head_per_level_shares_nothing():
    shared, own = model("retinanet").head, model("retinanet_per_level").head
    count = [sum(p.numel() for p in head.parameters()) for head in (shared, own)]
    assert count[1] == 4 * count[0]
    levels = [torch.rand(1, 32, n, n) for n in (8, 4, 2, 1)]
    for a, b in zip(shared(levels), own(levels), strict=True):
        assert [x.shape for x in a] == [x.shape for x in b]


def test_three_quarters_of_the_pixels_have_no_loss():
    masked = model("retinanet_masked")
    features = [torch.zeros(1, 32, n, n) for n in (64, 32, 16, 8)]
    truth = Instances((256, 256))
    truth.gt_boxes, truth.gt_classes = Boxes(torch.zeros(0, 4)), torch.zeros(0, dtype=torch.long)
    torch.manual_seed(0)
    (labels,), _ = masked.label_anchors(masked.anchor_generator(features), [truth])
    per_pixel = (labels == -1).view(-1, 3)
    assert (per_pixel.all(1) == per_pixel.any(1)).all()
    assert per_pixel.float().mean().item() == pytest.approx(0.75, abs=0.02)


def test_levels_are_means_of_the_middle_and_the_end():
    curve = [9.0] * 15 + [0.5] * 15 + [7.0] * 6 + [1.0, None, 1.0, 1.0]
    assert drift.levels({"curves": {"fpn": curve}}) == {"fpn": (0.5, 1.0)}


def test_the_page_holds_what_the_runs_say():
    page = drift.PAGE.read_text().split(drift.BEGIN)[1].split(drift.END)[0]
    assert page.strip() == drift.table(drift.read()).strip()


def test_of_runs_with_other_iterations_one_that_ended_counts(monkeypatch, tmp_path):
    def row(diverged_at):
        return {"diverged_at": diverged_at, "curves": {"variance/fpn": [0.5], "gain/fpn": [2.0]}}

    run = setting.Run("faster_rcnn", "sgd", 128, 0.04, 1, 1272)
    rows = {run: row(None), run._replace(iterations=1607): row(84)}
    for found in (rows, dict(reversed(rows.items()))):
        monkeypatch.setattr(drift.any_batch, "read", lambda found=found: found)
        (kept,) = drift.read(tmp_path / "none").values()
        assert kept == {"diverged_at": None, "curves": {"fpn": [0.5]}}
