import math
import pytest
import torch
from detectron2.solver import build_lr_scheduler as d2_build_lr_scheduler
from fvcore.common.param_scheduler import ConstantParamScheduler
from torch import nn
from toy import ToyDetector
from toy_d2 import toy_config

from agvm_d2.solver import adam_scaled, build_lr_scheduler, exp_warmup, scaled_lr

# Learning rate for a batch


@pytest.mark.parametrize("batch, lr", [(16, 0.02), (128, 0.16), (256, 0.2263), (1024, 0.4525)])
def test_the_papers_scaling(batch, lr):
    assert scaled_lr(batch) == pytest.approx(lr, abs=1e-4)


def test_other_scalings_and_references():
    assert scaled_lr(256, "linear") == pytest.approx(0.32)
    assert scaled_lr(256, "sqrt") == pytest.approx(0.08)  # 0.02 * sqrt(16)
    # From beyond the knee, down: 0.4 is 0.32's 512 times sqrt(2).
    assert scaled_lr(512, base_lr=0.4, base_batch=1024) == pytest.approx(0.4 / 2**0.5)
    assert scaled_lr(64, base_lr=0.16, base_batch=256) == pytest.approx(0.16 / 2**0.5 / 2)


def test_bad_scalings_and_batches():
    with pytest.raises(ValueError, match="scaling: found 'cubic', .*linear, sqrt, linear-sqrt"):
        scaled_lr(256, "cubic")
    with pytest.raises(ValueError, match="batch: found 0"):
        scaled_lr(0)


def test_adams_betas_and_eps_by_hand():
    betas, eps = adam_scaled(8, (0.95, 0.999), 1e-8)
    assert betas == pytest.approx((0.6, 0.992)) and eps == pytest.approx(1e-8 / 8**0.5)
    assert adam_scaled(1, (0.9, 0.98), 1e-6) == (pytest.approx((0.9, 0.98)), 1e-6)
    assert adam_scaled(0.5, (0.9, 0.98))[0] == pytest.approx((0.95, 0.99))
    assert adam_scaled(48)[0] == pytest.approx((0.0, 0.952))  # 1 - beta is at most 1
    for kappa in (0, -1, math.inf, math.nan):
        with pytest.raises(ValueError, match="kappa: found .* be positive"):
            adam_scaled(kappa)


# Schedule


def lrs(cfg, build):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=cfg.SOLVER.BASE_LR)
    scheduler, found = build(cfg, optimizer), []
    for i in range(cfg.SOLVER.MAX_ITER):
        found.append(optimizer.param_groups[0]["lr"])
        if i == cfg.SOLVER.MAX_ITER - 1:  # fvcore's StepParamScheduler has no value at the very end
            return found
        optimizer.step()
        scheduler.step()


SCHEDULE = {
    "SOLVER__MAX_ITER": 100,
    "SOLVER__WARMUP_ITERS": 10,
    "SOLVER__STEPS": (50, 80),
    "SOLVER__BASE_LR": 2.0,
}


def test_exponential_warm_up_by_hand(tmp_path):
    cfg = toy_config(tmp_path, SOLVER__WARMUP_METHOD="exp", **SCHEDULE)
    found = lrs(cfg, build_lr_scheduler)
    for i in range(10):
        assert found[i] == pytest.approx(2.0 * 0.001 ** (1 - i / 10))
    assert found[10:50] == [2.0] * 40
    assert found[50:80] == pytest.approx([0.2] * 30)
    assert found[80:] == pytest.approx([0.02] * 20)


def test_exponential_warm_up_ends_where_the_schedule_is_by_then(tmp_path):
    options = {**SCHEDULE, "SOLVER__LR_SCHEDULER_NAME": "WarmupCosineLR"}
    found = lrs(toy_config(tmp_path, SOLVER__WARMUP_METHOD="exp", **options), build_lr_scheduler)
    end = 0.5 + 0.5 * math.cos(math.pi * 0.1)  # a tenth of the cosine is over
    for i in range(10):
        assert found[i] == pytest.approx(2.0 * 0.001 * (end / 0.001) ** (i / 10))
    assert found[10] == pytest.approx(2.0 * end)


def test_warm_up_is_from_the_schedules_own_start():
    warm = exp_warmup(ConstantParamScheduler(2.0), 0.25, 0.5)
    assert [warm(x) for x in (0.0, 0.25, 0.5, 0.9)] == pytest.approx([0.5, 1.0, 2.0, 2.0])
    schedule = ConstantParamScheduler(2.0)
    assert exp_warmup(schedule, 0.25, 0.0) is schedule


def test_exponential_warm_up_longer_than_training(tmp_path):
    cfg = toy_config(tmp_path, SOLVER__WARMUP_METHOD="exp", **SCHEDULE)
    cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.STEPS = 200, ()
    assert lrs(cfg, build_lr_scheduler)[50] == pytest.approx(2.0 * 0.001**0.5)


def test_steps_after_the_end_are_named_and_left_out(tmp_path, d2_log):
    cfg = toy_config(tmp_path, SOLVER__WARMUP_METHOD="exp", **SCHEDULE)
    cfg.SOLVER.STEPS = (50, 200)
    assert lrs(cfg, build_lr_scheduler)[-1] == pytest.approx(0.2)
    assert "larger than SOLVER.MAX_ITER" in d2_log.text


@pytest.mark.parametrize(
    "name", ["WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"]
)
@pytest.mark.parametrize("rescale", [False, True])
def test_after_exponential_warm_up_the_schedule_is_detectron2_s(tmp_path, name, rescale):
    options = {
        **SCHEDULE,
        "SOLVER__LR_SCHEDULER_NAME": name,
        "SOLVER__RESCALE_INTERVAL": rescale,
    }
    ours = lrs(toy_config(tmp_path, SOLVER__WARMUP_METHOD="exp", **options), build_lr_scheduler)
    theirs = lrs(toy_config(tmp_path, **options), d2_build_lr_scheduler)
    assert ours[0] == pytest.approx(theirs[0])
    assert ours[10:] == pytest.approx(theirs[10:])
    assert ours[9] < theirs[9]


@pytest.mark.parametrize("method", ["linear", "constant"])
def test_other_warm_ups_are_detectron2_s(tmp_path, method):
    cfg = toy_config(tmp_path, SOLVER__WARMUP_METHOD=method, **SCHEDULE)
    assert lrs(cfg, build_lr_scheduler) == lrs(cfg, d2_build_lr_scheduler)


def test_an_unknown_schedule_is_named(tmp_path):
    cfg = toy_config(tmp_path, SOLVER__WARMUP_METHOD="exp", **SCHEDULE)
    cfg.SOLVER.LR_SCHEDULER_NAME = "Warmup"
    with pytest.raises(ValueError, match="SOLVER.LR_SCHEDULER_NAME: found 'Warmup'"):
        build_lr_scheduler(cfg, torch.optim.SGD(ToyDetector().parameters(), lr=0.1))
