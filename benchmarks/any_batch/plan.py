"""Which runs there are to do, in order."""

from __future__ import annotations

from .setting import BASE, ITERATIONS, Run

SEEDS = (1, 2, 3)
LOOSE_CLIP = "SOLVER.CLIP_GRADIENTS.ENABLED True SOLVER.CLIP_GRADIENTS.CLIP_VALUE 10.0"
LR = 0.02  # of the base, which 0.04 does not beat by more than seeds may differ
# Iterations at batch 128 of first runs, those of the controls: by the smallest gain, and by the
# model's gain, the clock before it.
TOOK = {"faster_rcnn": 1607, "panoptic_fpn": 1585}
TOOK_BY_MODEL = {"faster_rcnn": 1272, "panoptic_fpn": 1324}


def runs(
    arm: str, batch: int, *lrs: float, seeds: tuple[int, ...] = (1,), iterations: int = ITERATIONS
) -> list[Run]:
    """Of Faster R-CNN, by seed and then by learning rate."""
    return [Run("faster_rcnn", arm, batch, lr, seed, iterations) for seed in seeds for lr in lrs]


def rivals(arm: str, *lrs: float) -> list[Run]:
    return runs(arm, 128, *lrs, iterations=TOOK_BY_MODEL["faster_rcnn"])


def controls(arm: str, *lrs: float) -> list[Run]:
    return runs(arm, 128, *lrs, iterations=TOOK["faster_rcnn"])


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
    # The one that diverges, with the gradient's norm clipped at about four times its usual value.
    Run("panoptic_fpn", "gain_least", 64, LR, 3, options=LOOSE_CLIP),
    # One gain for the whole model; and its gain as the clock of module-wise AdaScale.
    *(Run(pipeline, "whole", 128, LR, seed) for seed in SEEDS for pipeline in BOTH),
    *(run for batch in (64, 128, 256) for run in runs("gain", batch, LR, seeds=SEEDS)),
    *(Run("panoptic_fpn", "gain", 128, LR, seed) for seed in SEEDS[:2]),
    # Controls with as many iterations, and with as many images as the base.
    *(Run(p, arm, 128, 2 * LR, 1, TOOK[p]) for arm in ("sgd", "agvm") for p in BOTH),
    *rivals("sgd", 2 * LR),
    *(
        Run("panoptic_fpn", "sgd", 128, lr, 1, TOOK_BY_MODEL["panoptic_fpn"])
        for lr in (2 * LR, 4 * LR)
    ),
    *(
        run
        for arm in ("sgd", "agvm")
        for run in runs(arm, 128, 2 * LR, iterations=ITERATIONS * BASE // 128)
    ),
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
    *rivals("sgd_3", 2 * LR),
    *controls("sgd_3", LR),
    *controls("sgd_soft", 2 * LR),
    *controls("sgd", LR, 4 * LR),
    *controls("agvm", LR),
    # Other pipelines.
    *(
        run
        for p in ("mask_rcnn", "semantic_fpn")
        for run in (Run(p, "sgd", BASE, LR, 1), Run(p, "gain_least", 128, LR, 1))
    ),
    Run("faster_rcnn_swin", "adamw", BASE, 0.001, 1),
    Run("faster_rcnn_swin", "gain_least_adamw", 128, 0.001, 1),
    *runs("gain_decay", 128, LR),
    # As many images at the base batch as by the smallest gain at 128.
    *runs("sgd", BASE, LR, iterations=TOOK["faster_rcnn"] * 128 // BASE),
]
