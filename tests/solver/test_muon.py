"""SOLVER.OPTIMIZER MUON."""

import importlib.metadata
import math
import pytest
import torch
from detectron2.utils.events import EventStorage
from helpers import needs_muon, same
from torch import nn
from toy import MODULES, ToyDetector
from toy_d2 import ToyLoader, ToyTrainer, agvm_hook, toy_config, train, weights

from agvm_d2 import build_optimizer
from agvm_d2.param_groups import loading_as_torch
from agvm_d2.solver import build_muon, muon_params, skip_nonfinite_steps
from agvm_d2.solver.build import prepare
from agvm_d2.solver.muon import muon_matrices

needs_muon()
import pytorch_optimizer  # noqa: E402

MUON = {"SOLVER__OPTIMIZER": "MUON", "SOLVER__MOMENTUM": 0.95, "SOLVER__MICRO_BATCH_SIZE": 2}
OFF = {"AGVM__ENABLED": False}


def named(model, params):
    return {name for name, p in model.named_parameters() if p in params}


class MLP(nn.Module):
    """DETR's."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])


class Everything(nn.Module):
    """One of each kind of layer."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 2, 2)
        )
        self.attention = nn.MultiheadAttention(4, 2)
        self.attention_of_others = nn.MultiheadAttention(4, 2, kdim=3, vdim=3)
        self.pos_embed = nn.Parameter(torch.randn(1, 5, 4))
        self.query_feat = nn.Embedding(3, 4)
        self.tied = nn.Linear(4, 3, bias=False)
        self.tied.weight = self.query_feat.weight
        self.cls_score = nn.Linear(4, 2)
        self.predictor = nn.ModuleDict({"linear1": nn.Linear(4, 4), "class_embed": nn.Linear(4, 2)})
        self.center_predictor = nn.Conv2d(4, 2, 1)
        self.mask_fcn_logits = nn.Conv2d(4, 2, 1)
        self.prediction = nn.Linear(4, 2)
        self.bbox_embed = MLP()
        self.transformer = nn.Module()  # Deformable DETR's and DINO's: one per layer
        self.transformer.class_embed = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)])
        self.transformer.bbox_embed = nn.ModuleList([MLP(), MLP()])
        self.transformer.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.box_predictor = nn.ModuleList([nn.ModuleDict({"bbox_pred": nn.Linear(4, 4)})])


def test_matrices_inside_the_model():
    model = Everything()
    assert named(model, muon_matrices(model)) == {
        "backbone.0.weight",
        "backbone.2.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        *(f"attention_of_others.{k}_proj_weight" for k in "qkv"),
        "attention_of_others.out_proj.weight",
        "bbox_embed.layers.0.weight",
        *(f"transformer.bbox_embed.{i}.layers.0.weight" for i in range(2)),
        *(f"transformer.layers.{i}.weight" for i in range(2)),
        "predictor.linear1.weight",  # a transformer decoder may be called so
    }


def test_groups_of_one_kind_and_one_module(tmp_path):
    options = {"SOLVER__WEIGHT_DECAY": 0.05, "SOLVER__BIAS_LR_FACTOR": 2.0, **MUON}
    model = ToyDetector()
    optimizer = build_optimizer(toy_config(tmp_path, **options), model)
    found = {}
    for group in optimizer.param_groups:
        for name in named(model, set(group["params"])):
            found[name] = {k: v for k, v in group.items() if k != "params"}
    assert found.keys() == dict(model.named_parameters()).keys()
    assert len(optimizer.param_groups) == 2 * len(MODULES)  # weights and biases
    for name, group in found.items():
        matrix = name.endswith("weight")
        assert group["use_muon"] == matrix and group["weight_decay"] == 0.05
        assert group["lr"] == (0.05 if matrix else 0.1)
        assert group["momentum"] == 0.95 if matrix else group["betas"] == (0.9, 0.999)
        assert matrix or group["eps"] == 1e-8


def test_steps_are_torchs_muon_and_adamw(tmp_path):
    """A convolution is the matrix of its flattened kernels."""
    torch.manual_seed(0)
    model = nn.Module()
    model.backbone = nn.Conv2d(3, 8, 2)
    matrix = nn.Parameter(model.backbone.weight.detach().flatten(1).clone())
    bias = nn.Parameter(model.backbone.bias.detach().clone())
    options = {"SOLVER__WEIGHT_DECAY": 0.05, "SOLVER__WEIGHT_DECAY_BIAS": 0.05, **MUON}
    optimizer = build_optimizer(toy_config(tmp_path, **options), model)
    adamw = torch.optim.AdamW([bias], lr=0.05, weight_decay=0.05)
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim.Muon is there from torch 2.9 on")
    muon = torch.optim.Muon(
        [matrix], lr=0.05, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        matrix.grad, bias.grad = torch.randn_like(matrix), torch.randn_like(bias)
        model.backbone.weight.grad = matrix.grad.view_as(model.backbone.weight).clone()
        model.backbone.bias.grad = bias.grad.clone()
        for each in (optimizer, adamw, muon):
            each.step()
    # Its products are in bfloat16, of eight bits.
    assert torch.allclose(model.backbone.weight.flatten(1), matrix, atol=2e-3)
    assert torch.allclose(model.backbone.bias, bias, rtol=1e-5)


def test_monitor_is_bit_identical_to_off_and_factors_scale_the_step(tmp_path):
    off = train(toy_config(tmp_path / "off", **OFF, **MUON))
    monitor = train(toy_config(tmp_path / "monitor", AGVM__MODE="monitor", **MUON))
    same(weights(off), weights(monitor))
    on = train(toy_config(tmp_path / "on", **MUON))
    factors = agvm_hook(on).modulator.factors
    assert (factors[1:] != 1).all()
    for name in ("proposal_generator.weight", "proposal_generator.bias"):  # of either kind
        assert not torch.equal(weights(on)[name], weights(off)[name])


def test_the_schedule_reaches_both_kinds(tmp_path):
    options = {"SOLVER__STEPS": (5,), "SOLVER__BIAS_LR_FACTOR": 2.0, **MUON}
    trainer = train(toy_config(tmp_path, **options))
    found = {(g["use_muon"], round(g["lr"], 9)) for g in trainer.optimizer.param_groups}
    assert found == {(True, 0.005), (False, 0.01)}


class FromTheSixth(ToyTrainer):
    """The toy loader, at its sixth batch."""

    @classmethod
    def build_train_loader(cls, cfg):
        loader = iter(ToyLoader(cfg.SOLVER.IMS_PER_BATCH))
        for _ in range(5):
            next(loader)
        return loader


@pytest.mark.parametrize("optimizer", ["MUON", "LAMB"])
@pytest.mark.parametrize("first", [{}, OFF], ids=["agvm", "off"])
def test_resume_is_exact_also_without_agvm_before(first, optimizer, tmp_path):
    """AGVM starts at 6: until then, a run without it has the same bits."""
    late = {"AGVM__START_ITER": 6, **MUON, "SOLVER__OPTIMIZER": optimizer}
    straight = train(toy_config(tmp_path / "straight", **late))
    train(toy_config(tmp_path / "half", SOLVER__MAX_ITER=5, **{**late, **first}))
    again = train(toy_config(tmp_path / "half", **late), FromTheSixth, resume=True)
    factors = agvm_hook(again).modulator.factors
    same(factors, agvm_hook(straight).modulator.factors)
    assert (factors[1:] != 1).all()
    same(weights(straight), weights(again))
    same(straight.optimizer.state_dict(), again.optimizer.state_dict())


def test_new_options_hold_after_a_resume(tmp_path):
    train(toy_config(tmp_path, SOLVER__MAX_ITER=5, **MUON))
    options = {**MUON, "SOLVER__MOMENTUM": 0.8, "SOLVER__BETAS": (0.8, 0.9)}
    again = train(toy_config(tmp_path, **options), resume=True)
    for group in again.optimizer.param_groups:
        assert group["momentum"] == 0.8 if group["use_muon"] else group["betas"] == (0.8, 0.9)
        assert group["step"] == 10


@pytest.mark.parametrize("before, after", [("SGD", "MUON"), ("MUON", "SGD"), ("MUON", "ADAMW")])
def test_another_optimizers_checkpoint_is_refused(before, after, tmp_path):
    train(toy_config(tmp_path, **{**MUON, "SOLVER__OPTIMIZER": before}))
    with pytest.raises(ValueError, match="is of another optimizer than .*use_muon"):
        train(toy_config(tmp_path, **{**MUON, "SOLVER__OPTIMIZER": after}), resume=True)


@pytest.mark.parametrize(
    "found, said", [(None, "which is not installed"), ("3.1.2", "and here is 3.1.2")]
)
def test_a_package_that_is_missing_or_old(found, said, tmp_path, monkeypatch):
    def version(name):
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ValueError, match=f"SOLVER.OPTIMIZER: 'MUON' .*{said}: pip install"):
        build_optimizer(toy_config(tmp_path, **MUON), ToyDetector())


def test_groups_of_no_kind_are_told():
    with pytest.raises(ValueError, match=r"build_muon: params: .*L\(muon_params\)"):
        build_muon([{"params": list(ToyDetector().parameters())}], lr=0.1)


@pytest.mark.parametrize("lr, told", [(0.004, False), (0.02, True)])
def test_a_learning_rate_of_sgds_size_is_told(lr, told, caplog):
    build_muon(muon_params(ToyDetector()), lr=lr)
    assert (f"optimizer.lr): found {lr:g}, which is SGD's" in caplog.text) == told


def test_groups_of_muon_under_another_optimizer_are_told():
    model = ToyDetector()
    with pytest.raises(ValueError, match=r"optimizer: found AdamW .*build_muon"):
        prepare(torch.optim.AdamW(muon_params(model), lr=0.1), model, False, None)
    prepare(build_muon(muon_params(model), lr=0.1), model, False, None)


@pytest.mark.parametrize("kind", ["muon", "lamb", "adamw"])
def test_a_skipped_step_is_not_counted(kind):
    def train(scales):
        model = nn.Sequential(nn.Linear(4, 4))
        model.backbone = nn.Linear(4, 4)
        with torch.no_grad():
            for param in model.parameters():
                param.fill_(0.5)
        params = muon_params(model) if kind == "muon" else [{"params": [*model.parameters()]}]
        make = {
            "muon": build_muon,
            "lamb": loading_as_torch(pytorch_optimizer.Lamb),
            "adamw": torch.optim.AdamW,
        }[kind]
        optimizer = make(params, lr=0.01)
        skip_nonfinite_steps(optimizer, model)
        with EventStorage():
            for scale in scales:
                for param in model.parameters():
                    param.grad = torch.linspace(1, 2, param.numel()).view_as(param) * scale
                optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    good = train([1, 2, 3])
    nan = math.nan
    same(good, train([nan, nan, 1, nan, 2, 3, nan]))


def test_a_lazyconfigs_groups_are_those_of_a_yaml_config(tmp_path):
    model = ToyDetector()
    yaml = build_optimizer(toy_config(tmp_path, **MUON, **OFF), model)
    lazy = build_muon(muon_params(model, bias_lr_factor=1.0), lr=0.05, weight_decay=0.0001)
    assert [[id(p) for p in g["params"]] for g in lazy.param_groups] == [
        [id(p) for p in g["params"]] for g in yaml.param_groups
    ]
    for ours, theirs in zip(lazy.param_groups, yaml.param_groups, strict=True):
        assert {k: v for k, v in ours.items() if k in theirs and k != "params"} == {
            k: v for k, v in theirs.items() if k in ours and k != "params"
        }


@pytest.mark.slow
def test_two_workers_have_the_same_bits(tmp_path, workers):
    found = workers(2).run(_trained, str(tmp_path))
    same(found[0], found[1])


def _trained(folder):
    return weights(train(toy_config(folder, **{**MUON, "SOLVER__MICRO_BATCH_SIZE": 0})))
