"""Optimizer, param groups, gradient clipping and LR schedule from a config."""

from __future__ import annotations
import logging
import torch
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier
from detectron2.solver import build_lr_scheduler as d2_build_lr_scheduler
from detectron2.solver.build import get_default_optimizer_params
from detectron2.utils.events import get_event_storage
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    CosineParamScheduler,
    ExponentialParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
    StepWithFixedGammaParamScheduler,
)
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from .modules import Rules, assign_modules


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """As `detectron2.solver.build_optimizer`, with SOLVER.OPTIMIZER, clipping by this package's
    keys, and groups that hold one module each where AGVM is enabled.

    Raises:
        ValueError: see `assign_modules`; an unknown SOLVER.OPTIMIZER.
    """
    solver = cfg.SOLVER
    params = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    if solver.OPTIMIZER == "SGD":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            params,
            lr=solver.BASE_LR,
            momentum=solver.MOMENTUM,
            nesterov=solver.NESTEROV,
            weight_decay=solver.WEIGHT_DECAY,
            foreach=True,
        )
    elif solver.OPTIMIZER == "ADAMW":
        optimizer = torch.optim.AdamW(
            params, lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY, foreach=True
        )
    else:
        raise ValueError(f"SOLVER.OPTIMIZER: found '{solver.OPTIMIZER}'; use SGD or ADAMW.")
    if solver.CLIP_GRADIENTS.ENABLED:
        clip_gradients(optimizer, solver.CLIP_GRADIENTS)
    if cfg.AGVM.ENABLED:
        split_param_groups(optimizer, model, cfg.AGVM.MODULES)
    return optimizer


def split_param_groups(
    optimizer: torch.optim.Optimizer, model: nn.Module, modules: Rules = ()
) -> torch.optim.Optimizer:
    """Split each group of a freshly built optimizer by module, in place, keeping every other key.

    Args:
        optimizer: any optimizer over parameters of `model`, before its LR scheduler is built.
        model: the model, also inside DistributedDataParallel.
        modules: rules as for `assign_modules`.

    Returns:
        The same optimizer.

    Raises:
        ValueError: a scheduler is built already; a parameter that is not in the model; see also
            `assign_modules`.
    """
    owner = {p: name for name, ps in assign_modules(model, modules).items() for p in ps}
    known = set(model.parameters())
    groups = []
    for i, group in enumerate(optimizer.param_groups):
        if "initial_lr" in group:
            raise ValueError(
                "split_param_groups: the optimizer has an LR scheduler already, which would keep "
                "the old groups' learning rates. Split first, then build the scheduler."
            )
        parts: dict[str, list[int]] = {}
        for k, param in enumerate(group["params"]):
            if param not in known:
                raise ValueError(
                    f"split_param_groups: group {i} of the optimizer holds a parameter of shape "
                    f"{tuple(param.shape)} that is not in the model."
                )
            # A frozen parameter, never updated, may stand in any group.
            name = owner.get(param) or next(iter(parts), "")
            parts.setdefault(name, []).append(k)
        aligned = [k for k in ("params", "param_names") if k in group]
        for indices in parts.values():
            groups.append({**group, **{key: [group[key][k] for k in indices] for key in aligned}})
    optimizer.param_groups[:] = groups
    return optimizer


def clip_gradients(optimizer: torch.optim.Optimizer, clip: CfgNode) -> None:
    """Clip gradients just before each step of `optimizer`, as SOLVER.CLIP_GRADIENTS says.

    With ITER_RANGE the current iteration is the one of Detectron2's EventStorage.
    """
    # The order now, so that a norm has the same bits whether groups are split later or not.
    params = [p for group in optimizer.param_groups for p in group["params"]]

    def clip_now(*_) -> None:
        if clip.ITER_RANGE:
            first, last = clip.ITER_RANGE
            if not first <= get_event_storage().iter < last:
                return
        if clip.CLIP_TYPE == "full_model":
            clip_grad_norm_(params, clip.CLIP_VALUE, clip.NORM_TYPE)
        elif clip.CLIP_TYPE == "norm":
            for param in params:
                clip_grad_norm_(param, clip.CLIP_VALUE, clip.NORM_TYPE)
        else:
            clip_grad_value_(params, clip.CLIP_VALUE)

    optimizer.register_step_pre_hook(clip_now)


def build_lr_scheduler(
    cfg: CfgNode, optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LRScheduler:
    """As `detectron2.solver.build_lr_scheduler`, and SOLVER.WARMUP_METHOD "exp":
    lr = base * WARMUP_FACTOR^(1 - iter/WARMUP_ITERS), as in mmdetection."""
    solver = cfg.SOLVER
    if solver.WARMUP_METHOD != "exp" or not solver.WARMUP_ITERS:
        return d2_build_lr_scheduler(cfg, optimizer)
    schedule = _schedule(solver)
    length = min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0)
    end = schedule(0.0 if solver.RESCALE_INTERVAL else length)
    start = solver.WARMUP_FACTOR * schedule(0.0)
    multiplier = CompositeParamScheduler(
        [ExponentialParamScheduler(start, end / start), schedule],
        lengths=[length, 1 - length],
        interval_scaling=["rescaled", "rescaled" if solver.RESCALE_INTERVAL else "fixed"],
    )
    return LRMultiplier(optimizer, multiplier=multiplier, max_iter=solver.MAX_ITER)


def _schedule(solver: CfgNode) -> ParamScheduler:
    name = solver.LR_SCHEDULER_NAME
    if name == "WarmupMultiStepLR":
        steps = [s for s in solver.STEPS if s <= solver.MAX_ITER]
        if len(steps) < len(solver.STEPS):
            logging.getLogger("detectron2.agvm_d2").warning(
                "SOLVER.STEPS has values larger than SOLVER.MAX_ITER; they are ignored."
            )
        values = [solver.GAMMA**k for k in range(len(steps) + 1)]
        return MultiStepParamScheduler(values, milestones=steps, num_updates=solver.MAX_ITER)
    if name == "WarmupCosineLR":
        return CosineParamScheduler(1, solver.BASE_LR_END / solver.BASE_LR)
    if name == "WarmupStepWithFixedGammaLR":
        return StepWithFixedGammaParamScheduler(
            1.0, num_decays=solver.NUM_DECAYS, gamma=solver.GAMMA, num_updates=solver.MAX_ITER
        )
    raise ValueError(
        f"SOLVER.LR_SCHEDULER_NAME: found '{name}'; with WARMUP_METHOD exp it must be one of "
        "WarmupMultiStepLR, WarmupCosineLR, WarmupStepWithFixedGammaLR."
    )
