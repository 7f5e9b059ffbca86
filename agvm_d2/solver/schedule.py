"""Learning rates: how they grow with the batch, and how they change while training."""

from __future__ import annotations
import logging
import math
import torch
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier
from detectron2.solver import build_lr_scheduler as d2_build_lr_scheduler
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    CosineParamScheduler,
    ExponentialParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
    StepWithFixedGammaParamScheduler,
)

from ..validate import one_of, require

logger = logging.getLogger("detectron2.agvm_d2")

LR_SCALINGS = ("linear", "sqrt", "linear-sqrt")
KNEE = 128  # images


def scaled_lr(
    batch: int,
    scaling: str = "linear-sqrt",
    base_lr: float = 0.02,
    base_batch: int = 16,
) -> float:
    """The learning rate for a batch of `batch` images, from one known to work at `base_batch`.

    Args:
        scaling: "linear": lr ~ batch; "sqrt": lr ~ sqrt(batch), usual with Adam; "linear-sqrt":
            linear up to 128 images and sqrt beyond it, the paper's for SGD.

    Raises:
        ValueError: an unknown scaling; a batch that is not positive.
    """
    one_of("scaling", scaling, LR_SCALINGS)
    if min(batch, base_batch) < 1:
        raise ValueError(f"batch: found {min(batch, base_batch)}, but it must be positive.")

    def growth(images: int) -> float:
        if scaling == "sqrt":
            return math.sqrt(images)
        if scaling == "linear" or images <= KNEE:
            return images
        return math.sqrt(images * KNEE)

    return base_lr * growth(batch) / growth(base_batch)


def adam_scaled(
    kappa: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> tuple[tuple[float, float], float]:
    """Adam's betas and eps at `kappa` times the batch, beside a learning rate of sqrt(kappa) times
    as much: 1 - beta grows by kappa, eps falls by its root.

    So Malladi et al. (2022, arXiv 2205.10287), for gradients that are mostly noise. From
    kappa = 1 / (1 - beta) on, 10 for a beta of 0.9, it is 0: no average is left.

    >>> betas, eps = adam_scaled(4)
    >>> [round(beta, 6) for beta in betas], eps
    ([0.6, 0.996], 5e-09)

    Raises:
        ValueError: a `kappa` that is not positive.
    """
    require(0 < kappa < math.inf, "kappa", kappa, "be positive")
    beta1, beta2 = (1 - min(1.0, kappa * (1 - beta)) for beta in betas)
    return (beta1, beta2), eps / math.sqrt(kappa)


def exp_warmup(
    schedule: ParamScheduler, warmup_factor: float, warmup_length: float, rescale: bool = False
) -> ParamScheduler:
    """`schedule` after an exponential warm-up: from `warmup_factor` times its start, growing by a
    constant factor per iteration, as in mmdetection.

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
