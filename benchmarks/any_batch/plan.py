"""Which runs there are to do, in order."""

from __future__ import annotations

from .setting import BASE, ITERATIONS, ON_GPU, Run

SEEDS = (1, 2, 3)
LOOSE_CLIP = "SOLVER.CLIP_GRADIENTS.ENABLED True SOLVER.CLIP_GRADIENTS.CLIP_VALUE 10.0"
# The norm to at most four times its moving average: a value for any model.
RELATIVE_CLIP = (
    "SOLVER.CLIP_GRADIENTS.ENABLED True SOLVER.CLIP_GRADIENTS.CLIP_TYPE relative "
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE 4.0"
)
HEAVY_DECAY = "SOLVER.WEIGHT_DECAY 0.05"  # AdamW's
OPTIONS = {  # in words
    LOOSE_CLIP: "norm clipped at 10",
    RELATIVE_CLIP: "norm clipped at 4 × its average",
    HEAVY_DECAY: "weight decay 0.05",
    ON_GPU: "",
}
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


def controls(arm: str, *lrs: float, seeds: tuple[int, ...] = (1,)) -> list[Run]:
    return runs(arm, 128, *lrs, seeds=seeds, iterations=TOOK["faster_rcnn"])


def same_epochs(arm: str, *lrs: float, seeds: tuple[int, ...] = (1,)) -> list[Run]:
    """At batch 128, as many images as the base."""
    return runs(arm, 128, *lrs, seeds=seeds, iterations=ITERATIONS * BASE // 128)


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
    # Those that diverge, with the gradient's norm clipped at about four times its usual value.
    Run("panoptic_fpn", "gain_least", 64, LR, 3, options=LOOSE_CLIP),
    *(
        Run("panoptic_fpn", "gain_least", batch, LR, seed, options=RELATIVE_CLIP)
        for batch, seed in ((256, 2), (64, 3))
    ),
    # One gain for the whole model; and its gain as the clock of module-wise AdaScale.
    *(Run(pipeline, "whole", 128, LR, seed) for seed in SEEDS for pipeline in BOTH),
    *(run for batch in (64, 128, 256) for run in runs("gain", batch, LR, seeds=SEEDS)),
    *(Run("panoptic_fpn", "gain", 128, LR, seed) for seed in SEEDS[:2]),
    # Controls with as many iterations, and with as many images as the base.
    *(
        Run(p, arm, 128, lr, 1, TOOK[p])
        for arm in ("sgd", "agvm")
        for lr in (LR, 2 * LR)
        for p in BOTH
    ),
    *rivals("sgd", 2 * LR),
    *(
        Run("panoptic_fpn", "sgd", 128, lr, 1, TOOK_BY_MODEL["panoptic_fpn"])
        for lr in (2 * LR, 4 * LR)
    ),
    *(run for arm in ("sgd", "agvm") for run in same_epochs(arm, LR)),
    *runs("gain_profile", 128, LR),
    # Adam's rule: the gain or its root.
    *runs("adamw", BASE, 0.001, 0.0005, 0.002),
    *(run for arm in ("gain_adamw", "sqrt_gain_adamw") for run in runs(arm, 128, 0.001)),
    *runs("gain_least_adamw", 128, 0.001),
    # The rivals.
    *rivals("adamw", 0.002, 0.001),
    *rivals("adamw_scaled", 0.002, 0.001),
    *rivals("muon", 0.01),
    # Muon: the base's epochs are enough for it. Its own base, and by the gain.
    *same_epochs("muon", 0.002, seeds=SEEDS),
    *same_epochs("muon", 0.004),
    *(run._replace(options=HEAVY_DECAY) for run in same_epochs("muon", 0.002)),
    *runs("muon", 256, 0.0028, seeds=SEEDS, iterations=ITERATIONS * BASE // 256),
    *(Run("panoptic_fpn", "muon", 128, 0.002, s, ITERATIONS * BASE // 128) for s in SEEDS),
    Run("panoptic_fpn", "muon", BASE, 0.001, 1),
    *runs("muon", BASE, 0.001, 0.002, 0.0005),
    *runs("gain_least_muon", 128, 0.001),
    *same_epochs("sam", LR),
    *rivals("sgd_3", 2 * LR),
    *controls("sgd_3", LR, seeds=SEEDS),
    *controls("sgd_soft", LR),
    *controls("sgd_3_soft", LR),
    # Other pipelines, clipped as by the recipe.
    *(
        run
        for seed in SEEDS
        for p, optimizer, gain, lr in (
            ("mask_rcnn", "sgd", "gain_least", LR),
            ("semantic_fpn", "sgd", "gain_least", LR),
            ("faster_rcnn_swin", "adamw", "gain_least_adamw", 0.001),
        )
        for run in (
            Run(p, optimizer, BASE, lr, seed),
            Run(p, gain, 128, lr, seed, options=RELATIVE_CLIP),
        )
    ),
    Run("faster_rcnn", "gain_least", 128, LR, 1, options=RELATIVE_CLIP),
    *runs("gain_decay", 128, LR),
    *runs("gain_least", 512, LR),
    # As many images at the base batch as by the smallest gain at 128.
    *runs("sgd", BASE, LR, iterations=TOOK["faster_rcnn"] * 128 // BASE),
]

# Many side by side in ten minutes of a GPU.
GRID_ON_GPU: list[Run] = [
    run._replace(options=ON_GPU)
    for arm, lrs in {
        "sgd": (2 * LR, LR),
        "agvm": (2 * LR, 4 * LR, LR),
        "sam": (2 * LR,),
        "adamw": (0.001, 0.002, 0.004),
        "adamw_scaled": (0.001, 0.002),
        "lamb": (0.004, 0.008, 0.016),
        "muon": (0.001, 0.002),
    }.items()
    for run in same_epochs(arm, *lrs)
]
