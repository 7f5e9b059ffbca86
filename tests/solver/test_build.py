import sys
import pytest
import torch
from detectron2.solver import build_optimizer as d2_build_optimizer
from torch import nn
from toy import MODULES, ToyDetector
from toy_d2 import ToyTrainer, agvm_hook, toy_config

from agvm_d2 import build_optimizer


def check_param_group(group, num_params=None, **values):
    if num_params is not None:
        assert len(group["params"]) == num_params
    for key, value in values.items():
        assert group[key] == value


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


@pytest.mark.parametrize("name, eps", [("ADAMW", 1e-8), ("LAMB", 1e-6)])
def test_betas_and_eps(tmp_path, name, eps):
    if name == "LAMB":
        pytest.importorskip("pytorch_optimizer")
    cfg = toy_config(tmp_path, SOLVER__OPTIMIZER=name)
    for group in build_optimizer(cfg, ToyDetector()).param_groups:
        check_param_group(group, betas=(0.9, 0.999), eps=eps)
    cfg.SOLVER.BETAS, cfg.SOLVER.EPS = [0.8, 0.95], 1e-5  # a list, as YAML may have it
    for group in build_optimizer(cfg, ToyDetector()).param_groups:
        check_param_group(group, betas=(0.8, 0.95), eps=1e-5)


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
    modulator = agvm_hook(trainer).modulator
    assert modulator.num_units == 4 and (modulator.factors != 1).any()


def test_an_optimizer_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(ValueError, match="SOLVER.OPTIMIZER: 'LARS' .*pip install"):
        build_optimizer(toy_config(tmp_path, SOLVER__OPTIMIZER="LARS"), ToyDetector())
