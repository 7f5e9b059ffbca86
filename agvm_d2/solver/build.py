"""The optimizer that a yacs config describes, and what this package asks of any optimizer."""

from __future__ import annotations
from collections.abc import Callable
import torch
from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params
from torch import nn

from ..modules import ModulePatterns
from ..param_groups import (
    fit_loaded_state,
    loading_as_torch,
    require_hooks,
    split_param_groups,
)
from ..validate import one_of
from .clip import CLIP, check_clip, clip_gradients, clip_key, skip_nonfinite_steps
from .muon import build_muon, check_kind, muon_groups

OPTIMIZERS = ("SGD", "ADAMW", "LARS", "LAMB", "MUON")

# Their own, where SOLVER.EPS is 0.
EPS = {"ADAMW": 1e-8, "LAMB": 1e-6, "MUON": 1e-8}


def _pytorch_optimizer(name: str) -> Callable[..., torch.optim.Optimizer]:
    try:
        import pytorch_optimizer
    except ImportError:
        raise ValueError(
            f"SOLVER.OPTIMIZER: '{name}' is in the package pytorch-optimizer, which is not "
            "installed: pip install 'pytorch-optimizer>=3.1'."
        ) from None
    found = {
        "LARS": pytorch_optimizer.LARS,
        "LAMB": pytorch_optimizer.Lamb,
    }
    return loading_as_torch(found[name])


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """As `detectron2.solver.build_optimizer`, with SOLVER.OPTIMIZER, clipping by this package's
    keys, and groups that hold one module each where AGVM is enabled.

    Raises:
        ValueError: see `assign_modules`; an unknown SOLVER.OPTIMIZER, or one not installed.
    """
    return prepare_optimizer(cfg, unsplit_optimizer(cfg, model), model)


def unsplit_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """`build_optimizer` without what `prepare_optimizer` does."""
    solver = cfg.SOLVER
    params = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    options = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY}
    if solver.OPTIMIZER in ("SGD", "LARS"):
        options.update(momentum=solver.MOMENTUM, nesterov=solver.NESTEROV)
    if solver.OPTIMIZER in EPS:
        options.update(betas=tuple(solver.BETAS), eps=solver.EPS or EPS[solver.OPTIMIZER])
    one_of("SOLVER.OPTIMIZER", solver.OPTIMIZER, OPTIMIZERS)
    if solver.OPTIMIZER == "SGD":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(params, foreach=True, **options)
    elif solver.OPTIMIZER == "ADAMW":
        optimizer = torch.optim.AdamW(params, foreach=True, **options)
    elif solver.OPTIMIZER == "MUON":
        optimizer = build_muon(muon_groups(params, model), momentum=solver.MOMENTUM, **options)
    else:
        optimizer = _pytorch_optimizer(solver.OPTIMIZER)(params, **options)
    clip_by_config(cfg, optimizer, model)
    return optimizer


def clip_by_config(cfg: CfgNode, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """SOLVER.CLIP_GRADIENTS, behind SOLVER.ON_NONFINITE: clipping makes an inf finite."""
    if cfg.SOLVER.ON_NONFINITE == "skip":
        skip_nonfinite_steps(optimizer, model)
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if clip.ENABLED:
        options = {name: clip[name.upper()] for name in CLIP}
        check_clip(options, clip_key)
        clip_gradients(optimizer, **options)


def prepare_optimizer(
    cfg: CfgNode, optimizer: torch.optim.Optimizer, model: nn.Module
) -> torch.optim.Optimizer:
    """What this package asks of a project's own optimizer, before its LR scheduler is built.

    Raises:
        TypeError: a wrapper without hooks.
        ValueError: see `split_param_groups`.
    """
    skip = cfg.SOLVER.ON_NONFINITE == "skip"
    return prepare(optimizer, model, skip, cfg.AGVM.MODULES if cfg.AGVM.ENABLED else None)


def prepare(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    skip_nonfinite: bool,
    modules: ModulePatterns | None,
) -> torch.optim.Optimizer:
    """`prepare_optimizer` without a config.

    Args:
        skip_nonfinite: see `skip_nonfinite_steps`.
        modules: split the groups by these patterns, see `assign_modules`; None: leave them.
    """
    require_hooks(optimizer)
    check_kind(optimizer)
    if skip_nonfinite:
        skip_nonfinite_steps(optimizer, model)
    if modules is not None:
        return split_param_groups(optimizer, model, modules)
    fit_loaded_state(optimizer)
    return optimizer
