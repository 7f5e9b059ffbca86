"""Which runs there are to do, in order."""

from __future__ import annotations

from .setting import BASE, ITERATIONS, Run

SEEDS = (1, 2, 3)
LR = 0.02  # of the base, which 0.04 does not beat by more than seeds may differ
TOOK = {128: 1272}  # iterations of the first run by the model's gain: those of the controls


def runs(
    arm: str, batch: int, *lrs: float, seeds: tuple[int, ...] = (1,), iterations: int = ITERATIONS
) -> list[Run]:
    """Of Faster R-CNN, by seed and then by learning rate."""
    return [Run("faster_rcnn", arm, batch, lr, seed, iterations) for seed in seeds for lr in lrs]


def rivals(arm: str, *lrs: float) -> list[Run]:
    return runs(arm, 128, *lrs, iterations=TOOK[128])


BOTH = "faster_rcnn", "panoptic_fpn"

GRID: list[Run] = [
    # The claim: the base, and by the gain at each batch.
    *(Run(pipeline, "sgd", BASE, LR, seed) for seed in SEEDS for pipeline in BOTH),
    *runs("sgd", BASE, 2 * LR),
    *(
        Run(pipeline, "gain_least", batch, LR, seed)
        for seed in SEEDS
        for batch in (128, 64, 256)
        for pipeline in BOTH
    ),
    # One gain for the whole model; and its gain as the clock of module-wise AdaScale.
    *(Run(pipeline, "whole", 128, LR, seed) for seed in SEEDS for pipeline in BOTH),
    *(run for batch in (64, 128, 256) for run in runs("gain", batch, LR, seeds=SEEDS)),
    *(Run("panoptic_fpn", "gain", 128, LR, seed) for seed in SEEDS),
    # Controls with as many iterations.
    *runs("sgd", 128, 2 * LR, iterations=TOOK[128]),
    *(Run("panoptic_fpn", "sgd", 128, lr, 1, 1324) for lr in (2 * LR, 4 * LR)),
    *runs("gain_profile", 128, LR),
    # Adam's rule: the gain or its root.
    *runs("adamw", BASE, 0.001, 0.0005, 0.002),
    *(run for arm in ("gain_adamw", "sqrt_gain_adamw") for run in runs(arm, 128, 0.001)),
    *runs("gain_least_adamw", 128, 0.001),
    # The rivals.
    *rivals("adamw", 0.002, 0.001),
    *rivals("adamw_scaled", 0.002, 0.001),
    *rivals("muon", 0.01, 0.002, 0.001),
    *rivals("sam", 2 * LR, LR),
    *rivals("lamb", 0.004, 0.008, 0.002),
    *(run for arm in ("agvm", "sgd_soft") for run in runs(arm, 128, 2 * LR, iterations=TOOK[128])),
    *runs("sgd_3", 128, 2 * LR, LR, iterations=TOOK[128]),
    *runs("sgd", 128, LR, 4 * LR, iterations=TOOK[128]),
    *runs("agvm", 128, LR, iterations=TOOK[128]),
    Run("mask_rcnn", "sgd", BASE, LR, 1),
    Run("mask_rcnn", "gain_least", 128, LR, 1),
    *runs("gain_decay", 128, LR),
    # As many images at the base batch as by the model's clock at 128.
    *runs("sgd", BASE, LR, iterations=TOOK[128] * 128 // BASE),
]
