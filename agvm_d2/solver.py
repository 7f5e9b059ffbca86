"""Optimizer, param groups, gradient clipping, LR rule and LR schedule."""

from __future__ import annotations
import logging
import math
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

from .config import CLIP_TYPES, OPTIMIZERS, one_of
from .modules import Rules, assign_modules
from .moments import block_norms

logger = logging.getLogger("detectron2.agvm_d2")

LR_RULES = ("linear", "sqrt", "linear-sqrt")


def scaled_lr(
    batch: int,
    rule: str = "linear-sqrt",
    base_lr: float = 0.02,
    base_batch: int = 16,
    knee: int = 128,
) -> float:
    """The learning rate for a batch of `batch` images, from one known to work at `base_batch`.

    Args:
        rule: "linear": lr ~ batch; "sqrt": lr ~ sqrt(batch), usual with Adam; "linear-sqrt": linear
            up to `knee` images and sqrt beyond it, the paper's rule for SGD.

    Raises:
        ValueError: an unknown rule; a batch that is not positive.
    """
    one_of("rule", rule, LR_RULES)
    if min(batch, base_batch) < 1:
        raise ValueError(f"batch: found {min(batch, base_batch)}, but it must be positive.")

    def growth(images: int) -> float:
        if rule == "sqrt":
            return math.sqrt(images)
        if rule == "linear" or images <= knee:
            return images
        return math.sqrt(images * knee)

    return base_lr * growth(batch) / growth(base_batch)


def _pytorch_optimizer(name: str) -> type[torch.optim.Optimizer]:
    try:
        import pytorch_optimizer
    except ImportError:
        raise ValueError(
            f"SOLVER.OPTIMIZER: '{name}' is in the package pytorch-optimizer, which is not "
            "installed: pip install 'pytorch-optimizer>=3.1'."
        ) from None
    return {"LARS": pytorch_optimizer.LARS, "LAMB": pytorch_optimizer.Lamb}[name]


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
    one_of("SOLVER.OPTIMIZER", solver.OPTIMIZER, OPTIMIZERS)
    if solver.OPTIMIZER == "SGD":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(params, foreach=True, **options)
    elif solver.OPTIMIZER == "ADAMW":
        optimizer = torch.optim.AdamW(params, foreach=True, **options)
    else:
        optimizer = _pytorch_optimizer(solver.OPTIMIZER)(params, **options)
    clip = solver.CLIP_GRADIENTS
    if solver.ON_NONFINITE == "skip":  # first: clipping by value makes an inf finite
        skip_nonfinite_steps(optimizer, model)
    if clip.ENABLED:
        clip_gradients(optimizer, clip.CLIP_TYPE, clip.CLIP_VALUE, clip.NORM_TYPE, clip.ITER_RANGE)
    return optimizer


def prepare_optimizer(
    cfg: CfgNode, optimizer: torch.optim.Optimizer, model: nn.Module
) -> torch.optim.Optimizer:
    """What this package asks of any new optimizer: to skip, and groups of one module."""
    if cfg.SOLVER.ON_NONFINITE == "skip":
        skip_nonfinite_steps(optimizer, model)
    if cfg.AGVM.ENABLED:
        return split_param_groups(optimizer, model, cfg.AGVM.MODULES)
    fit_loaded_state(optimizer)
    return optimizer


def fit_loaded_state(optimizer: torch.optim.Optimizer) -> None:
    """From now on `load_state_dict` takes states saved with the groups as they are now, also after
    `split_param_groups`, and refuses others clearly."""
    whole = [list(group["params"]) for group in optimizer.param_groups]
    optimizer.register_load_state_dict_pre_hook(
        lambda optimizer, state: _fit_state(optimizer, state, whole)
    )


# By which optimizers can be told apart, and none that only some versions of torch have.
HYPERPARAMETERS = ("momentum", "betas", "trust_coefficient", "grad_averaging")


def _fit_state(
    optimizer: torch.optim.Optimizer, state: dict, whole: list[list[nn.Parameter]]
) -> dict:
    """A saved optimizer state for the groups of `optimizer`, also where it was saved without AGVM.

    Args:
        whole: the groups before they were split.

    Raises:
        ValueError: a state of other groups, or of another optimizer.
    """
    groups, saved = optimizer.param_groups, state["param_groups"]
    keys = [
        {key for key in HYPERPARAMETERS if key in defaults}
        for defaults in (optimizer.defaults, saved[0])
    ]
    if keys[0] != keys[1]:
        raise ValueError(
            f"The checkpoint is of another optimizer than {type(optimizer).__name__}: it has "
            f"{', '.join(sorted(keys[1]))} instead of {', '.join(sorted(keys[0]))}. Resume with "
            "the SOLVER.OPTIMIZER it was trained with, or start from its weights: MODEL.WEIGHTS, "
            "without --resume."
        )
    sizes = [len(group["params"]) for group in saved]
    if sizes == [len(group["params"]) for group in groups]:
        return state
    if sizes != [len(params) for params in whole]:
        raise ValueError(
            f"The checkpoint's optimizer has {len(saved)} param groups of {sizes} parameters; this "
            f"one has {len(groups)}. With other AGVM.MODULES, or AGVM.ENABLED False after True, "
            'keep them as they were and set AGVM.MODE "monitor" to train without the factors; or '
            "start from its weights: MODEL.WEIGHTS, without --resume."
        )
    # Saved without AGVM: the same parameters in the same groups, not yet split.
    index, group_of = {}, {}
    for group, params in zip(saved, whole, strict=True):
        index.update(zip(params, group["params"], strict=True))
        group_of.update(dict.fromkeys(params, group))
    return {
        **state,
        "param_groups": [
            {**group_of[group["params"][0]], "params": [index[p] for p in group["params"]]}
            for group in groups
        ],
    }


def split_param_groups(
    optimizer: torch.optim.Optimizer, model: nn.Module, modules: Rules = ()
) -> torch.optim.Optimizer:
    """Split each group of a freshly built optimizer by module, in place, keeping every other key.
    A state saved before or without that still loads.

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
    fit_loaded_state(optimizer)
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


def clip_gradients(
    optimizer: torch.optim.Optimizer,
    clip_type: str,
    clip_value: float,
    norm_type: float = 2.0,
    iter_range: tuple[int, int] | tuple[()] = (),
) -> None:
    """Clip gradients just before each step of `optimizer`.

    Args:
        clip_type: "value", "norm" (of each parameter), or "full_model" (of all together).
        iter_range: clip in iterations [first, last) only, those of Detectron2's EventStorage.

    Raises:
        ValueError: an unknown type.
    """
    one_of("clip_type", clip_type, CLIP_TYPES)
    # The order now, so that a norm has the same bits whether groups are split later or not.
    params = [p for group in optimizer.param_groups for p in group["params"]]

    def clip_now(*_) -> None:
        if iter_range and not iter_range[0] <= get_event_storage().iter < iter_range[1]:
            return
        if all(p.grad is None for p in params):  # a skipped step
            return
        if clip_type == "full_model":
            clip_grad_norm_(params, clip_value, norm_type)
        elif clip_type == "norm":
            for param in params:
                clip_grad_norm_(param, clip_value, norm_type)
        else:
            clip_grad_value_(params, clip_value)

    optimizer.register_step_pre_hook(clip_now)


@torch.no_grad()
def _finite(tensors: list[torch.Tensor]) -> bool:
    return bool(torch.cat([n for norms in block_norms(tensors) for n in norms]).isfinite().all())


def skip_nonfinite_steps(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Leave out each step of `optimizer` whose gradient has a NaN or inf, and say so in the log.

    DDP's workers hold the same averaged gradient, so all of them decide alike. The buffers of
    `model`, such as BatchNorm's statistics, go back to what they were after the last step taken.
    """
    if getattr(optimizer, "skips_nonfinite", False):
        return
    optimizer.skips_nonfinite = True
    skipped = 0
    good = [buffer.clone() for buffer in model.buffers()]

    @torch.no_grad()
    def look(*_) -> None:
        nonlocal skipped
        params = [p for group in optimizer.param_groups for p in group["params"]]
        grads = [p.grad for p in params if p.grad is not None]
        if not grads or _finite(grads):
            for kept, buffer in zip(good, model.buffers(), strict=True):
                kept.copy_(buffer)
            return
        for param in params:
            param.grad = None  # then there is nothing to step by
        for kept, buffer in zip(good, model.buffers(), strict=True):
            buffer.copy_(kept)
        skipped += 1
        logger.warning(
            f"Iteration {get_event_storage().iter}: a gradient is NaN or inf, the step is skipped "
            f"({skipped} so far)."
        )

    optimizer.register_step_pre_hook(look)


def exp_warmup(
    schedule: ParamScheduler, warmup_factor: float, warmup_length: float, rescale: bool = False
) -> ParamScheduler:
    """`schedule` after an exponential warm-up: from `warmup_factor` times its start, growing by a
    constant factor an iteration, as in mmdetection.

    Args:
        warmup_length: warm-up's share of training, in [0, 1].
        rescale: the whole of `schedule` follows warm-up, instead of its rest (fvcore's "rescaled").
    """
    if not warmup_length:
        return schedule
    start = warmup_factor * schedule(0.0)
    end = schedule(0.0 if rescale else warmup_length)
    return CompositeParamScheduler(
        [ExponentialParamScheduler(start, end / start), schedule],
        lengths=[warmup_length, 1 - warmup_length],
        interval_scaling=["rescaled", "rescaled" if rescale else "fixed"],
    )


def build_lr_scheduler(
    cfg: CfgNode, optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LRScheduler:
    """As `detectron2.solver.build_lr_scheduler`, and SOLVER.WARMUP_METHOD "exp"."""
    solver = cfg.SOLVER
    if solver.WARMUP_METHOD != "exp":
        return d2_build_lr_scheduler(cfg, optimizer)
    length = min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0)
    multiplier = exp_warmup(
        _schedule(solver), solver.WARMUP_FACTOR, length, solver.RESCALE_INTERVAL
    )
    return LRMultiplier(optimizer, multiplier=multiplier, max_iter=solver.MAX_ITER)


def _schedule(solver: CfgNode) -> ParamScheduler:
    name = solver.LR_SCHEDULER_NAME
    if name == "WarmupMultiStepLR":
        steps = [s for s in solver.STEPS if s <= solver.MAX_ITER]
        if len(steps) < len(solver.STEPS):
            logger.warning("SOLVER.STEPS has values larger than SOLVER.MAX_ITER; they are ignored.")
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
