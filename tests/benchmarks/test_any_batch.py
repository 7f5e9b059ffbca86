"""The study of benchmarks/any_batch: its images, arms and rules; on the bundled digits, so that
nothing is fetched."""

import argparse
import copy
import json
import math
import os
import shutil
import signal
import numpy as np
import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.utils.events import EventStorage

from agvm_d2 import Settings
from agvm_d2.d2.checks import check_config
from agvm_d2.d2.preemption import Preempted
from agvm_d2.data import digits
from agvm_d2.moments import pairwise_moments
from agvm_d2.rules import RULES
from benchmarks.any_batch import curvature, figures, hooks, run, scenes, setting, tables
from benchmarks.any_batch.plan import GRID, GRID_ON_GPU


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
    sample = scenes.Scenes(1, masks=True, labels="panoptic")(record(7))
    found = sample["instances"]
    assert sample["image"].shape == (3, 64, 64) and sample["image"].dtype == torch.uint8
    assert len(found) >= 1 and set(found.gt_classes.tolist()) <= set(range(10))
    for box, mask in zip(found.gt_boxes.tensor, found.gt_masks.tensor):
        rows, columns = np.nonzero(mask.numpy())
        assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    stuff = sample["sem_seg"]
    assert torch.equal(stuff == 0, found.gt_masks.tensor.any(0))
    assert len(stuff.unique()) == 2 and stuff.max() in (1, 2)  # one of two photographs
    of_class = scenes.Scenes(1, labels="sem_seg")(record(7))["sem_seg"]
    assert (of_class[stuff == 0] < 10).all() and (of_class[stuff > 0] == 9 + stuff.max()).all()
    for mask, label in zip(found.gt_masks.tensor, found.gt_classes):
        assert (of_class[mask] == label).all()


def test_images_that_are_kept_are_those_that_are_drawn(offline, tmp_path, monkeypatch):
    draw = scenes.Scenes(1, masks=True, labels="panoptic")
    drawn = [draw(record(i)) for i in range(20)]
    monkeypatch.setattr(scenes, "DRAWN", tmp_path)
    scenes.store.cache_clear()
    first = [draw(record(i)) for i in range(20)]
    monkeypatch.setattr(scenes, "scene", None)  # no more
    for found in (first, [draw(record(i)) for i in range(20)]):
        for a, b in zip(drawn, found, strict=True):
            assert torch.equal(a["image"], b["image"]) and torch.equal(a["sem_seg"], b["sem_seg"])
            one, other = a["instances"], b["instances"]
            assert torch.equal(one.gt_boxes.tensor, other.gt_boxes.tensor)
            assert torch.equal(one.gt_classes, other.gt_classes)
            assert torch.equal(one.gt_masks.tensor, other.gt_masks.tensor)
    scenes.store.cache_clear()


@pytest.mark.parametrize("arm", setting.ARMS)
def test_every_arm_is_a_config_that_holds(arm, offline):
    for pipeline in setting.PIPELINES:
        for batch in (32, 256):
            cfg = setting.config(setting.Run(pipeline, arm, batch, 0.02, 1), "folder")
            check_config(cfg, 1)
            assert cfg.SOLVER.IMS_PER_BATCH // cfg.SOLVER.MICRO_BATCH_SIZE >= 2
            assert (cfg.AGVM.SCHEDULE == "gain") == setting.ARMS[arm].by_gain
            assert cfg.AGVM.BASE_BATCH_SIZE == 32 and cfg.SOLVER.MAX_ITER == setting.ITERATIONS


def test_a_folded_norm_is_the_same_function_of_the_same_parameters():
    torch.manual_seed(0)
    blocks = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, bias=False), FrozenBatchNorm2d(4), torch.nn.ReLU6()
    )
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(blocks[1], name).uniform_(0.5, 2)
    folded = copy.deepcopy(blocks)
    setting.fold_norms(folded)
    assert folded.state_dict().keys() == blocks.state_dict().keys()
    images, grads = torch.randn(2, 3, 8, 8), []
    for model in (blocks, folded):
        grads.append(torch.autograd.grad(model(images).square().sum(), model[0].weight)[0])
    torch.testing.assert_close(folded(images), blocks(images))
    torch.testing.assert_close(*grads)


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


def test_by_the_models_clock_a_step_counts_as_the_gain_of_all_together():
    progress = hooks.ModelGain(modules=2, base_share=1 / 4, momentum=0.0)
    progress.update(MOMENTS)
    progress.begin()
    progress.count(raised=True)
    assert progress.iterations == pytest.approx(8 / 5)


class Stub:
    """Of AGVM, what the hooks need: modules, an optimizer and a modulator."""

    def __init__(self, modules):
        self.modules = modules
        params = [p for ps in modules.values() for p in ps]
        self.optimizer = torch.optim.SGD(params, lr=1.0, momentum=0.9)
        self.modulator = argparse.Namespace(rule=lambda moments: torch.tensor([2.0, 2.0]))


def test_a_profile_goes_where_gradient_and_momentum_agree(tmp_path):
    a, b = (torch.nn.Parameter(torch.zeros(2)) for _ in "ab")
    agvm = Stub({"a": [a], "b": [b]})
    profile = hooks.Profile(agvm, rate=0.5, limit=2.0)
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 5.0])
    assert agvm.modulator.rule(MOMENTS).tolist() == [2, 2]  # no momentum yet
    agvm.optimizer.step()
    a.grad, b.grad = torch.tensor([1.0, 0.0]), torch.tensor([0.0, -1.0])  # cosines 1 and -1
    assert agvm.modulator.rule(MOMENTS).tolist() == pytest.approx(
        [2 * min(math.exp(0.5), 2), 2 * max(math.exp(-0.5), 1 / 2)]
    )
    again = hooks.Profile(Stub({"a": [a], "b": [b]}), rate=0.5, limit=2.0)
    again.load_state_dict(profile.state_dict())
    assert agvm.modulator.rule(MOMENTS).tolist() == [4, 1]  # at its limits
    assert again(MOMENTS).tolist() == pytest.approx([2 * math.exp(0.5), 2 * math.exp(-0.5)])


class Quadratic(torch.nn.Module):
    """a has curvature 3 and 1, b 5; each sample has its own minimum, on the second axis of a."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (torch.nn.Parameter(torch.ones(2)) for _ in "ab")

    def forward(self, samples):
        at = torch.tensor([[0.0, sample["at"]] for sample in samples])
        return {
            "a": (torch.tensor([3.0, 1.0]) / 2 * (self.a - at).square()).sum(1).mean(),
            "b": 5 / 2 * (self.b - at).square().sum(1).mean(),
        }


def test_curvature_of_a_quadratic_along_the_mean_gradient_and_along_its_noise():
    model = Quadratic()
    model.a.grad = torch.tensor([7.0, 7.0])
    # Two halves with the mean 1: the gradient of a is (3, 0), its noise lies on the second axis.
    samples = [{"at": at} for at in (3.0, 1.0, 2.0, -1.0, 0.0, 1.0)]
    hook = curvature.Curvature({"a": [model.a], "b": [model.b]}, samples, 2, [0])
    hook.trainer = argparse.Namespace(iter=0, model=model)
    before = torch.get_rng_state()
    hook.after_step()
    # Of the model: along (3, 0, 5, 0), and along (0, 1, 0, 5).
    model_mean, model_noise = (27 + 125) / 34, (1 + 125) / 26
    assert hook.found[0] == pytest.approx({"a": 3, "b": 5, "model": model_mean}, rel=1e-3)
    assert hook.of_noise[0] == pytest.approx({"a": 1, "b": 5, "model": model_noise}, rel=1e-3)
    # Training does not notice.
    assert model.a.tolist() == [1, 1] and model.a.grad.tolist() == [7, 7] and model.b.grad is None
    assert torch.equal(torch.get_rng_state(), before)


def test_what_a_run_keeps_outlives_a_resume():
    agvm = argparse.Namespace(measured=True, scalars=lambda: {"agvm/gain/model": 2.0})
    first, second = hooks.Curves(agvm), hooks.Curves(agvm)
    for curves, iteration in ((first, 0), (second, 5)):
        storage = EventStorage()
        storage.put_scalar("total_loss", 1.5)
        curves.trainer = argparse.Namespace(iter=iteration, storage=storage)
        if curves is second:
            first.before = 100.0
            second.load_state_dict(first.state_dict())
        curves.after_step()
    assert second.thin() == {"iteration": [0, 5], "loss": [1.5, 1.5], "gain/model": [2, 2]}
    assert second.seconds >= 100


@pytest.mark.integration
@pytest.mark.parametrize("arm", ["sgd", "gain_profile", "sam"])
def test_a_run_that_was_stopped_goes_on(arm, offline, tmp_path, monkeypatch):
    short = "DATASETS.TEST () DATALOADER.NUM_WORKERS 0"
    monkeypatch.setattr(setting, "SETTING", [*setting.SETTING, *short.split()])
    monkeypatch.setattr(setting, "weights", lambda: "''")
    monkeypatch.setattr(run, "weights_hash", lambda: "none")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "IMAGES", 2)
    monkeypatch.setattr(setting, "BASE", 4)
    monkeypatch.setattr(run, "BASE", 4)
    wanted, path = setting.Run("faster_rcnn", arm, 4, 0.02, 1, 6), tmp_path / "rows.jsonl"
    whole = run.do_run(wanted, path)
    path.unlink()
    shutil.rmtree(tmp_path / "output")
    after_step = hooks.Curves.after_step

    def stopped(self):
        after_step(self)
        if self.trainer.iter == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(hooks.Curves, "after_step", stopped)
        with pytest.raises(Preempted):
            run.do_run(wanted, path)
    assert run.read(path) == {}
    again = run.do_run(wanted, path)
    assert again["took"] == whole["took"] == 6
    for row_ in (whole, again):  # Detectron2's medians start anew
        row_["curves"].pop("loss", None)
    assert again["curves"] == whole["curves"] and again["curvature"] == whole["curvature"]
    assert bool(whole["curvature"]) == (arm == "sgd")
    assert (whole["curves"] == {}) == (arm == "sam")
    assert list(run.read(path)) == [wanted]


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
    gain = setting.Run("faster_rcnn", "gain_least", 128, 0.02, 1)
    rows = {
        base: row(base, 46.0, 3000, [96.0, 96.0, 96.0]),
        base._replace(lr=0.04): row(base._replace(lr=0.04), 40.0, 3000),
        gain: row(gain, 45.0, 1300),
        gain._replace(seed=2): row(gain._replace(seed=2), 47.0, 1500),
        gain._replace(seed=3): {**row(gain._replace(seed=3), 0.0, 90), "diverged_at": 90},
    }
    rows[base]["parts"] = {"PQ_th": 30.0, "PQ_st": 50.04}  # as Panoptic FPN's
    rows[base]["seen_parts"] = {"PQ_th": 31.0, "PQ_st": 80.0}
    rows[base]["curvature"] = {"1000": {"backbone": 4.0, "rpn": 2.0}}
    rows[base]["noise_curvature"] = {"1000": {"backbone": 1.0, "rpn": -1.0}}
    rows[base]["curves"] |= {"noise_scale/backbone": [128.0] * 3, "noise_scale/rpn": [64.0] * 3}
    on_gpu = gain._replace(arm="muon", options=setting.ON_GPU)
    rows[on_gpu] = {**row(on_gpu, 48.0, 750), "machine": "gpu", "torch": "1"}
    figures.draw(rows, tmp_path)
    assert (tmp_path / "any_batch.png").stat().st_size > 10_000
    text = tables.report(rows)
    assert text.startswith(
        "5 runs, 5.0 hours of one core (m; torch 2; hash of the first weights h)"
    )
    # 1,400 x 128 / (3,000 x 32) = 1.87 times the images.
    wanted = (
        "| module-wise AdaScale | 0.02 | 1400 ± 141 | 0.47 | 1.9 | 46.0 ± 1.4 (2), 1 diverged |"
    )
    assert wanted in text
    assert "| SGD | 0.04 | 3000 | 1.00 | 1.0 | 40.0 (1) | 87 % |" in text
    assert "one GPU (gpu; torch 1; hash of the first weights h)" in text
    assert "| faster_rcnn | 128 | Muon | 0.02 | 750 | 0.25 | 1.0 | 48.0 (1) | – |" in text
    # The RPN's (1 + 64/32)/(1 + 64/128) = 2; 45 (2 - 1) of progress is missing at the start.
    assert f"| 0.02 | {math.ceil((3000 + 45) / 2)}" in text.split("plan / took")[1]
    assert "| 32 | SGD | 0.02 | 30.0 (1) | 50.0 (1) | 31.0 (1) | 80.0 (1) |" in text
    # Noise scales 64 and 128: best 1/(c (1 + B/256)), the gain (1 + B/32)/(1 + B/256), and AGVM
    # sqrt((256 + 2 B)/2 B), each over the backbone's.
    best, gained, agvm = (4 / 2) * (1.5 / 1.25), (3 / 1.25) / (5 / 1.5), (3 / 2) ** 0.5
    assert f"| 1000 | backbone | 4.0 | 128 | {1:.2f} | {1:.2f} | {1:.2f} | 1 |" in text
    assert f"| 1000 | rpn | 2.0 | 64 | {best:.2f} | {gained:.2f} | {agvm:.2f} | 1 |" in text
    # At 128 (1 + 128/32)/(1 + 128/128); with a quarter of the noise scale (1 + 32/32)/(1 + 32/128).
    assert "| 1000 | backbone | 4.0 | 1.0 | 128 | 2.50 | 32 | 1.60 | 1 |" in text
    assert "| 1000 | rpn | 2.0 | -1.0 | 64 | 2.00 | – | – | 1 |" in text
    # 2,000 iterations at a gain of 1 and 1,000 of progress at 2, 2.625, 1.25 and 4.
    shares = [f"{(2000 + 1000 / gain) / 3000:.2f} ± 0.00" for gain in (2, 2.625, 1.25, 4)]
    assert f"| module-wise AdaScale | {' | '.join(shares)} |" in text


def test_losses_at_equal_progress():
    base = setting.Run("faster_rcnn", "sgd", 32, 0.02, 1)
    gain = base._replace(arm="gain_least", batch=128)

    def losses(*values):  # at 9, 29, 49, ... % of progress
        points = [300 + 600 * i - 30 for i in range(5)]
        return [{"iterations": 3000, "curves": {"progress": points, "loss": list(values)}}]

    cells = {base: losses(4, 2, 2, 1, 1), gain: losses(4, 1, 2, 0.9, 2)}
    cells[gain._replace(batch=64)] = [{"iterations": 3000, "curves": {"progress": [300]}}]
    (line,) = tables.at_equal_progress(cells).splitlines()[2:]
    ratios = "1.000 | 0.500 | 1.000 | 0.900 | 2.000"
    assert line == f"| faster_rcnn | 128 | module-wise AdaScale | 0.02 | {ratios} |"


def test_the_page_holds_what_the_runs_say():
    page = tables.DOCUMENT.read_text().split(tables.BEGIN)[1].split(tables.END)[0]
    assert page.strip() == tables.report(run.read()).strip()


def test_the_grid_has_each_run_once_and_all_that_are_done():
    every = [*GRID, *GRID_ON_GPU]
    assert len(set(every)) == len(every)
    assert set(run.read()) <= set(every)
    for wanted in every:
        arm = setting.ARMS[wanted.arm]
        assert wanted.pipeline in setting.PIPELINES
        # By the gain, iterations are the base's; a control at a larger batch has fewer.
        fewer = wanted.iterations < setting.ITERATIONS
        assert fewer == (wanted.batch > setting.BASE and not arm.by_gain)
