"""The study of benchmarks/any_batch: its images, arms and rules; on the bundled digits, so that
nothing is fetched."""

import json
import numpy as np
import pytest
import torch

from agvm_d2 import Settings
from agvm_d2.d2.checks import check_config
from agvm_d2.data import digits
from agvm_d2.moments import pairwise_moments
from agvm_d2.rules import RULES
from benchmarks.any_batch import figures, run, scenes, setting, tables
from benchmarks.any_batch.plan import GRID


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(scenes, "sources", digits.sources)
    monkeypatch.setattr(setting, "weights", lambda: "none.pth")


def record(i):
    return {"image_id": i, "file_name": f"{i}", "height": 64, "width": 64}


def test_a_record_is_the_same_image_for_a_seed_and_another_for_another(offline):
    def image(seed, i):
        return scenes.Scenes(seed)(record(i))["image"]

    assert torch.equal(image(1, 5), image(1, 5))
    assert not torch.equal(image(1, 5), image(1, 6))
    assert not torch.equal(image(1, 5), image(2, 5))


def test_labels_are_those_of_the_digits(offline):
    sample = scenes.Scenes(1, masks=True, stuff=True)(record(7))
    found = sample["instances"]
    assert sample["image"].shape == (3, 64, 64) and sample["image"].dtype == torch.uint8
    assert len(found) >= 1 and set(found.gt_classes.tolist()) <= set(range(10))
    for box, mask in zip(found.gt_boxes.tensor, found.gt_masks.tensor):
        rows, columns = np.nonzero(mask.numpy())
        assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    stuff = sample["sem_seg"]
    assert torch.equal(stuff == 0, found.gt_masks.tensor.any(0))
    assert len(stuff.unique()) == 2 and stuff.max() in (1, 2)  # one of two photographs


@pytest.mark.parametrize("arm", setting.ARMS)
def test_every_arm_is_a_config_that_holds(arm, offline):
    for pipeline in setting.PIPELINES:
        for batch in (32, 256):
            cfg = setting.config(setting.Run(pipeline, arm, batch, 0.02, 1), "folder")
            check_config(cfg, 1)
            assert cfg.SOLVER.IMS_PER_BATCH // cfg.SOLVER.MICRO_BATCH_SIZE >= 2
            assert (cfg.AGVM.SCHEDULE == "gain") == setting.ARMS[arm].by_gain
            assert cfg.AGVM.BASE_BATCH_SIZE == 32 and cfg.SOLVER.MAX_ITER == setting.ITERATIONS


def test_whole_model_adascale_is_one_module(offline):
    cfg = setting.config(setting.Run("faster_rcnn", "whole", 64, 0.02, 1), "folder")
    assert cfg.AGVM.MODULES == (("all", "."),)


# K = 4 units of which one is the base batch: gains 4 and 1, and 8/5 of both together.
MOMENTS = pairwise_moments(
    torch.tensor([4.0, 4.0], dtype=torch.float64), torch.tensor([1.0, 4.0], dtype=torch.float64), 4
)


@pytest.mark.parametrize(
    "name, wanted",
    [("sqrt_gain", [2, 1]), ("gain_if_clipped", [4 / 1.6**0.5, 1 / 1.6**0.5])],
)
def test_the_studys_rules(name, wanted):
    rule = RULES[name](Settings(rule=name, base_batch_size=32), ["a", "b"], 128)
    assert rule(MOMENTS).tolist() == pytest.approx(wanted)


def test_the_least_gain_is_a_modules():
    progress = run.LeastGain(modules=2, base_share=1 / 4, momentum=0.0)
    progress.update(MOMENTS)
    progress.begin()
    progress.count(raised=True)
    assert progress.iterations == 1


def test_results_are_read_back(tmp_path):
    runs = [setting.Run("faster_rcnn", "gain", b, 0.02, 1) for b in (64, 128)]
    path = tmp_path / "rows.jsonl"
    assert run.read(path) == {}
    path.write_text("".join(json.dumps({**r._asdict(), "accuracy": r.batch}) + "\n" for r in runs))
    assert {r: row["accuracy"] for r, row in run.read(path).items()} == dict(zip(runs, (64, 128)))


def row(run_, accuracy, took, noise=()):
    curves = {"iteration": [took * i // len(noise) for i, _ in enumerate(noise)]}
    curves |= {"progress": [10, 2000], "gain/model": [1.0, 2.0]}
    curves |= {"gain/backbone": [1.0, 4.0], "gain/rpn": [1.0, 1.25]}
    return {
        **run_._asdict(),
        "accuracy": accuracy,
        "took": took,
        "seconds": 3600,
        "curves": {**curves, "noise_scale/model": list(noise)},
        **{"torch": "2", "machine": "m", "weights_hash": "h"},
    }


def test_the_tables_by_hand(tmp_path):
    base = setting.Run("faster_rcnn", "sgd", 32, 0.02, 1)
    gain = setting.Run("faster_rcnn", "gain", 128, 0.02, 1)
    rows = {
        base: row(base, 46.0, 3000, [96.0, 96.0, 96.0]),
        base._replace(lr=0.04): row(base._replace(lr=0.04), 40.0, 3000),
        gain: row(gain, 45.0, 1300),
        gain._replace(seed=2): row(gain._replace(seed=2), 47.0, 1500),
    }
    figures.draw(rows, tmp_path)
    assert (tmp_path / "any_batch.png").stat().st_size > 10_000
    text = tables.report(rows)
    assert text.startswith(
        "4 runs, 4.0 hours of one core (m; torch 2; hash of the first weights h)"
    )
    # 1,400 x 128 / (3,000 x 32) = 1.87 times the images.
    wanted = "| module-wise AdaScale | 0.02 | 1400 ± 141 | 0.47 | 1.9 | 46.0 ± 1.4 (2) | 100 % |"
    assert wanted in text
    assert "| SGD | 0.04 | 3000 | 1.00 | 1.0 | 40.0 (1) | 87 % |" in text
    # (1 + 96/32)/(1 + 96/128) = 16/7; 45 (16/7 - 1) of progress is missing at the start.
    assert f"| 0.02 | {round((3000 + 45 * 9 / 7) * 7 / 16)}" in text.split("plan / took")[1]
    # 2,000 iterations at a gain of 1 and 1,000 of progress at 2, 2.625, 1.25 and 4.
    shares = [f"{(2000 + 1000 / gain) / 3000:.2f} ± 0.00" for gain in (2, 2.625, 1.25, 4)]
    assert f"| 0.02 | {' | '.join(shares)} |" in text


def test_the_page_holds_what_the_runs_say():
    page = tables.DOCUMENT.read_text().split(tables.BEGIN)[1].split(tables.END)[0]
    assert page.strip() == tables.report(run.read()).strip()


def test_the_grid_has_each_run_once_and_all_that_are_done():
    assert len(set(GRID)) == len(GRID)
    assert set(run.read()) <= set(GRID)
    for wanted in GRID:
        arm = setting.ARMS[wanted.arm]
        assert wanted.pipeline in setting.PIPELINES
        # By the gain, iterations are the base's; a control at a larger batch has fewer.
        fewer = wanted.iterations < setting.ITERATIONS
        assert fewer == (wanted.batch > setting.BASE and not arm.by_gain)
