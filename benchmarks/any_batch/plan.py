"""Which runs there are to do, in order."""

from __future__ import annotations

from .setting import BASE, ITERATIONS, Run

SEEDS = (1, 2, 3)
LR = 0.02  # of the base, which 0.04 does not beat by more than seeds may differ
TOOK = {64: 1852, 128: 1272}  # iterations of the first run by the gain: those of the controls


def runs(
    arm: str, batch: int, *lrs: float, seeds: tuple[int, ...] = (1,), iterations: int = ITERATIONS
) -> list[Run]:
    """Of Faster R-CNN, by seed and then by learning rate."""
    return [Run("faster_rcnn", arm, batch, lr, seed, iterations) for seed in seeds for lr in lrs]


def rivals(arm: str, *lrs: float) -> list[Run]:
    return runs(arm, 128, *lrs, iterations=TOOK[128])


GRID: list[Run] = [
    *runs("sgd", BASE, LR, 2 * LR),
    *(run for batch in (128, 64) for run in runs("gain", batch, LR)),
    *runs("sgd", 128, 2 * LR, iterations=TOOK[128]),
    # Does it need modules?
    *runs("whole", 128, LR),
    *runs("gain", 256, LR),
    # Seeds of what a claim will rest on.
    *(
        run
        for seed in SEEDS[1:]
        for arm, batch in (("sgd", BASE), *(("gain", n) for n in (128, 64, 256)), ("whole", 128))
        for run in runs(arm, batch, LR, seeds=(seed,))
    ),
    # Another pipeline, Adam's rule, the gain or its root, and controls with as many iterations.
    Run("panoptic_fpn", "sgd", BASE, LR, 1),
    *runs("adamw", BASE, 0.001, 0.0005),
    *runs("gain_adamw", 128, 0.001),
    Run("panoptic_fpn", "gain", 128, LR, 1),
    *runs("sqrt_gain_adamw", 128, 0.001),
    Run("panoptic_fpn", "gain", 128, LR, 2),
    *runs("gain_profile", 128, LR),
    Run("panoptic_fpn", "sgd", BASE, LR, 2),
    # As many iterations as the gain took; and the rivals at one rate each.
    *runs("sgd_3", 128, 2 * LR, iterations=TOOK[128]),
    Run("panoptic_fpn", "sgd", 128, 2 * LR, 1, 1324),
    *rivals("adamw", 0.002),
    *rivals("adamw_scaled", 0.002),
    Run("panoptic_fpn", "gain_least", 128, LR, 1),
    *rivals("muon", 0.01),
    *rivals("sam", 2 * LR),
    Run("panoptic_fpn", "sgd", 128, 4 * LR, 1, 1324),
    *(Run("panoptic_fpn", "whole", 128, LR, seed) for seed in SEEDS),
    *(Run("panoptic_fpn", "gain_least", 128, LR, seed) for seed in SEEDS[1:]),
    *rivals("lamb", 0.004),
    *rivals("adamw", 0.001),
    *rivals("adamw_scaled", 0.001),
    *rivals("muon", 0.002),
    Run("panoptic_fpn", "gain", 256, LR, 1),
    *rivals("lamb", 0.008),
    *rivals("sam", LR),
    *rivals("muon", 0.001),
    *rivals("lamb", 0.002),
    *(
        Run("panoptic_fpn", "gain", batch, LR, seed)
        for batch in (64, 128, 256)
        for seed in SEEDS
        if (batch, seed) not in ((128, 1), (128, 2), (256, 1))
    ),
    Run("panoptic_fpn", "sgd", BASE, LR, 3),
    *(run for arm in ("agvm", "sgd_soft") for run in runs(arm, 128, 2 * LR, iterations=TOOK[128])),
    *runs("sgd_3", 128, LR, iterations=TOOK[128]),
    *runs("adamw", BASE, 0.002),
    Run("mask_rcnn", "sgd", BASE, LR, 1),
    Run("mask_rcnn", "gain", 128, LR, 1),
    *runs("sgd", 128, LR, 4 * LR, iterations=TOOK[128]),
    *runs("agvm", 128, LR, iterations=TOOK[128]),
    *(run for arm in ("gain_least", "gain_decay") for run in runs(arm, 128, LR)),
    # As many images at the base batch as the gain takes at 128.
    *runs("sgd", BASE, LR, iterations=TOOK[128] * 128 // BASE),
]
