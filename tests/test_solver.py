import sys
import pytest
import torch
from detectron2.solver import build_lr_scheduler as d2_build_lr_scheduler
from detectron2.solver import build_optimizer as d2_build_optimizer
from detectron2.utils.events import EventStorage
from torch import nn
from toy import MODULES, ToyDetector, ToyTrainer, batch, loss, parameter_names, toy_config

from agvm_d2 import AGVMHook, build_optimizer, split_param_groups
from agvm_d2.solver import build_lr_scheduler, clip_gradients, scaled_lr


def check_param_group(group, num_params=None, **values):
    if num_params is not None:
        assert len(group["params"]) == num_params
    for key, value in values.items():
        assert group[key] == value


def names_in(model, group):
    name = {p: n for n, p in model.named_parameters()}
    return [name[p] for p in group["params"]]


# Groups


def test_split_gives_each_module_a_group_and_keeps_every_key():
    model = ToyDetector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.8, weight_decay=0.01)
    optimizer.param_groups[0]["their_key"] = "kept"
    assert split_param_groups(optimizer, model) is optimizer
    assert [names_in(model, g) for g in optimizer.param_groups] == list(
        parameter_names(model).values()
    )
    for group in optimizer.param_groups:
        check_param_group(group, lr=0.3, momentum=0.8, weight_decay=0.01, their_key="kept")


def test_split_keeps_the_groups_that_were_there():
    model = ToyDetector()
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    others = [p for n, p in model.named_parameters() if not n.endswith("bias")]
    optimizer = torch.optim.AdamW([{"params": others}, {"params": biases, "lr": 0.2}], lr=0.1)
    split_param_groups(optimizer, model)
    assert [(len(g["params"]), g["lr"]) for g in optimizer.param_groups] == [
        (2, 0.1),
        (1, 0.1),
        (1, 0.1),
        (1, 0.1),
        (2, 0.2),
        (1, 0.2),
        (1, 0.2),
        (1, 0.2),
    ]


def test_split_keeps_names_beside_their_parameters():
    model = ToyDetector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["param_names"] = [n for n, _ in model.named_parameters()]
    split_param_groups(optimizer, model)
    for group in optimizer.param_groups:
        assert group["param_names"] == names_in(model, group)


def test_split_changes_no_bit_of_a_step():
    a, b = ToyDetector(), ToyDetector()
    one = torch.optim.SGD(a.parameters(), lr=0.1, momentum=0.9)
    two = split_param_groups(torch.optim.SGD(b.parameters(), lr=0.1, momentum=0.9), b)
    for model, optimizer in ((a, one), (b, two)):
        for seed in range(3):
            optimizer.zero_grad()
            loss(model, batch(4, seed=seed)).backward()
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_split_takes_frozen_parameters_along():
    model = ToyDetector()
    model.backbone.bottom_up[0].requires_grad_(False)
    optimizer = split_param_groups(torch.optim.SGD(model.parameters(), lr=0.1), model)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 10


def test_split_after_the_scheduler_is_an_error():
    model = ToyDetector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(ValueError, match="Split first, then build the scheduler"):
        split_param_groups(optimizer, model)


def test_split_names_a_stranger():
    model = ToyDetector()
    optimizer = torch.optim.SGD([*model.parameters(), nn.Parameter(torch.ones(3, 2))], lr=0.1)
    with pytest.raises(ValueError, match=r"group 0 .*shape \(3, 2\) that is not in the model"):
        split_param_groups(optimizer, model)


# Optimizer


def test_sgd_is_detectron2_s(tmp_path):
    options = {
        "SOLVER__WEIGHT_DECAY_NORM": 0.5,
        "SOLVER__BIAS_LR_FACTOR": 2.0,
        "SOLVER__WEIGHT_DECAY_BIAS": 0.25,
        "SOLVER__NESTEROV": True,
    }
    cfg = toy_config(tmp_path, **options)
    model = ToyDetector()
    model.backbone.norm = nn.BatchNorm1d(8)
    ours, theirs = build_optimizer(cfg, model), d2_build_optimizer(cfg, model)
    assert type(ours) is type(theirs)

    def by_parameter(optimizer):
        return {
            p: {k: v for k, v in g.items() if k != "params"}
            for g in optimizer.param_groups
            for p in g["params"]
        }

    assert by_parameter(ours) == by_parameter(theirs)
    assert len(ours.param_groups) > len(theirs.param_groups)


def test_without_agvm_groups_stay_as_they_are(tmp_path):
    cfg = toy_config(tmp_path, AGVM__ENABLED=False)
    assert len(build_optimizer(cfg, ToyDetector()).param_groups) == 1


def test_adamw(tmp_path):
    cfg = toy_config(tmp_path, SOLVER__OPTIMIZER="ADAMW", SOLVER__WEIGHT_DECAY=0.05)
    optimizer = build_optimizer(cfg, ToyDetector())
    assert isinstance(optimizer, torch.optim.AdamW)
    assert len(optimizer.param_groups) == len(MODULES)
    check_param_group(optimizer.param_groups[0], 4, lr=0.05, weight_decay=0.05)


@pytest.mark.parametrize("name", ["LARS", "LAMB"])
def test_lars_and_lamb_step_with_factors(tmp_path, name):
    pytest.importorskip("pytorch_optimizer")
    cfg = toy_config(
        tmp_path, SOLVER__OPTIMIZER=name, SOLVER__WEIGHT_DECAY=0.05, SOLVER__MICRO_BATCH_SIZE=2
    )
    trainer = ToyTrainer(cfg)
    optimizer = trainer.optimizer
    assert type(optimizer).__name__.upper() == name
    assert len(optimizer.param_groups) == len(MODULES)
    check_param_group(optimizer.param_groups[0], 4, lr=0.05, weight_decay=0.05)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert not any(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters()))
    (hook,) = (h for h in trainer._hooks if isinstance(h, AGVMHook))
    assert hook.modulator.num_units == 4 and (hook.modulator.factors != 1).any()


def test_an_optimizer_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(ValueError, match="SOLVER.OPTIMIZER: 'LARS' .*pip install"):
        build_optimizer(toy_config(tmp_path, SOLVER__OPTIMIZER="LARS"), ToyDetector())


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


# Clipping


def clip_config(tmp_path, kind, value=0.1, **options):
    return toy_config(
        tmp_path,
        SOLVER__CLIP_GRADIENTS__ENABLED=True,
        SOLVER__CLIP_GRADIENTS__CLIP_TYPE=kind,
        SOLVER__CLIP_GRADIENTS__CLIP_VALUE=value,
        **options,
    )


def clipped_gradients(cfg, model, iteration=0):
    optimizer = build_optimizer(cfg, model)
    loss(model, batch(4, scale=10.0)).backward()
    with EventStorage(iteration):
        optimizer.step()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("kind", ["value", "norm"])
def test_clip_types_of_detectron2_are_detectron2_s(tmp_path, kind):
    cfg, a, b = clip_config(tmp_path, kind), ToyDetector(), ToyDetector()
    ours = clipped_gradients(cfg, a)
    theirs = d2_build_optimizer(cfg, b)
    loss(b, batch(4, scale=10.0)).backward()
    theirs.step()
    assert all(torch.equal(g, p.grad) for g, p in zip(ours, b.parameters(), strict=True))


def test_full_model_clips_the_norm_over_all_parameters(tmp_path):
    gradients = clipped_gradients(clip_config(tmp_path, "full_model"), ToyDetector())
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    assert norm == pytest.approx(0.1, rel=1e-4)


def test_an_unknown_clip_type_is_named():
    optimizer = torch.optim.SGD(ToyDetector().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="clip_type: found 'global', .*full_model"):
        clip_gradients(optimizer, "global", 1.0)


@pytest.mark.parametrize("iteration, clipped", [(9, False), (10, True), (19, True), (20, False)])
def test_clipping_only_in_its_window(tmp_path, iteration, clipped):
    cfg = clip_config(tmp_path, "full_model", SOLVER__CLIP_GRADIENTS__ITER_RANGE=(10, 20))
    norm = torch.cat([g.flatten() for g in clipped_gradients(cfg, ToyDetector(), iteration)]).norm()
    assert (norm <= 0.1001) == clipped


def test_clipping_has_the_same_bits_with_and_without_split_groups(tmp_path):
    one = clipped_gradients(clip_config(tmp_path, "full_model"), ToyDetector())
    two = clipped_gradients(clip_config(tmp_path, "full_model", AGVM__ENABLED=False), ToyDetector())
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


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
