"""Which runs there are to do: a search for each cell's learning rate, then seeds at the best."""

from __future__ import annotations
from collections.abc import Sequence
from typing import NamedTuple

from .methods import METHODS, scaled
from .results import UNIT, Cell, Rows, Run

# Where the search for the best learning rate at batch 16 starts.
FIRST_LR = {"SGD": 0.08, "ADAMW": 0.002, "LARS": 4.0, "LAMB": 0.01}
SEEDS = (1, 2, 3, 4, 5, 6)
LONG = 48  # epochs: three times the iterations
HALVED = "SOLVER.MICRO_BATCH_SIZE 8"  # batch 16 then has two gradients to compare


class Search(NamedTuple):
    """`lrs`: these only, without a search; `seeds`: how many the best one gets."""

    cell: Cell
    lrs: tuple[float, ...] = ()
    seeds: int = 3

    def runs(self, rows: Rows, seeds: Sequence[int] = SEEDS) -> list[Run]:
        """Those that can start now, finished ones too: the search with the first seed, and the
        paper's rule; then the best learning rate with the other seeds."""
        cell, method = self.cell, METHODS[self.cell.method]
        first = FIRST_LR[method.optimizer]
        if self.lrs:
            runs = [cell.run(lr, seeds[0]) for lr in self.lrs]
        elif cell.batch == UNIT:
            runs = search(cell, rows, first, seeds[0])
        else:
            small = search(cell._replace(method=method.plain, batch=UNIT), rows, first, seeds[0])
            if not all(run in rows for run in small):
                return []
            base = best(small, rows).lr
            start = "none" if method.lr_rule == "none" else "sqrt"
            runs = search(cell, rows, scaled(base, cell.batch, start), seeds[0])
            if method.lr_rule == "linear-sqrt":
                runs.append(cell.run(scaled(base, cell.batch, method.lr_rule), seeds[0]))
        if all(run in rows for run in runs):
            runs += [best(runs, rows)._replace(seed=seed) for seed in seeds[1 : self.seeds]]
        return runs


def best(runs: list[Run], rows: Rows) -> Run:
    return max(runs, key=lambda run: rows[run]["accuracy"])


def search(cell: Cell, rows: Rows, first: float, seed: int) -> list[Run]:
    """`first` and half of it; then on by factors of 2 until the best is not the last one. All runs
    so far; the search is over when all of them are in `rows`."""
    low, high = -1, 0
    while True:
        tried = [cell.run(first * 2.0**k, seed) for k in range(low, high + 1)]
        if not all(run in rows for run in tried):
            return tried
        place = tried.index(best(tried, rows))
        if 0 < place < len(tried) - 1:
            return tried
        low, high = low - (place == 0), high + (place > 0)


def pending(
    searches: list[Search], rows: Rows, running: set[Run], seeds: Sequence[int]
) -> list[Run]:
    """What is missing and can start now, the first seed everywhere first."""
    wanted = [run for each in searches for run in each.runs(rows, seeds)]
    missing = [run for run in dict.fromkeys(wanted) if run not in rows and run not in running]
    return sorted(missing, key=lambda run: run.seed)


FIXED = (("sgd", 0.1131), ("agvm", 0.1131), ("gain", 0.08))  # the best of Faster R-CNN at batch 128
GRID = [
    Search(Cell("faster_rcnn", "sgd", 16)),
    *(Search(Cell("faster_rcnn", m, 16), seeds=1) for m in ("adamw", "lars", "lamb")),
    # Seeds 4 to 6 came after the gain's form had been chosen on the first three.
    *(
        Search(Cell("faster_rcnn", m, b), seeds=6)
        for b in (64, 128)
        for m in ("sgd", "agvm", "gain")
    ),
    *(Search(Cell("faster_rcnn", m, 128)) for m in ("adamw", "agvm_adamw")),
    *(Search(Cell("faster_rcnn", m, 128), seeds=1) for m in ("lars", "lamb")),
    Search(Cell("faster_rcnn", "gain_adamw", 128), (0.004,), seeds=1),
    *(
        Search(Cell("faster_rcnn", method, 256), lrs, seeds=1)
        for method, lrs in (
            ("sgd", (0.08, 0.16, 0.32)),
            ("agvm", (0.08, 0.16)),
            ("gain", (0.04, 0.08)),
        )
    ),
    # More iterations.
    *(
        Search(Cell("faster_rcnn", method, batch, LONG), lrs, seeds=seeds)
        for batch, seeds, found in (
            (16, 1, {"sgd": (0.08,), "sgd_3": (0.08,)}),
            (128, 1, {"sgd": (0.1131,), "agvm": (0.1131,), "gain": (0.08,)}),
            (256, 3, {"sgd": (0.16, 0.08), "agvm": (0.08, 0.16), "gain": (0.08,)}),
            (256, 1, {"sgd_3": (0.16,), "gain_3": (0.08,)}),
            (512, 1, {"sgd": (0.16,), "agvm": (0.08,), "gain": (0.08,)}),
        )
        for method, lrs in found.items()
    ),
    # A backbone with three times the rate of the other modules.
    Search(Cell("faster_rcnn", "sgd_3", 16), (0.04, 0.08), seeds=1),
    *(Search(Cell("faster_rcnn", m, 128), (0.05657, 0.1131)) for m in ("sgd_3", "agvm_3")),
    Search(Cell("faster_rcnn", "gain_3", 128), (0.04, 0.08)),
    # Other pipelines.
    Search(Cell("semantic_fpn", "sgd", 16), seeds=1),
    *(
        Search(Cell("semantic_fpn", method, 128), lrs)
        for method, lrs in (
            ("sgd", (0.02828, 0.05657, 0.1131, 0.2263)),
            ("agvm", (0.02828, 0.05657, 0.1131, 0.2263)),
            ("gain", (0.04, 0.08, 0.16)),
        )
    ),
    Search(Cell("semantic_fpn", "agvm_split", 128), (0.1131,), seeds=1),
    *(
        Search(Cell(pipeline, method, 128), (lr,), seeds=seeds)
        for pipeline, seeds in (("mask_rcnn", 3), ("panoptic_fpn", 6))
        for method, lr in FIXED
    ),
    *(Search(Cell(p, "sgd", 16), (0.08,), seeds=1) for p in ("mask_rcnn", "panoptic_fpn")),
    *(
        Search(Cell("faster_rcnn_swin", method, batch), lrs, seeds=1)
        for method, batch, lrs in (
            ("adamw", 16, (0.002, 0.004)),
            ("adamw", 128, (0.002828,)),
            ("agvm_adamw", 128, (0.002828,)),
            ("gain_adamw", 128, (0.002,)),
        )
    ),
    # Controls, other rules and ablations.
    Search(Cell("faster_rcnn", "combined", 128), (0.04, 0.08), seeds=1),
    Search(Cell("faster_rcnn", "bounded", 128), (0.1131, 0.2263), seeds=1),
    *(
        Search(Cell("faster_rcnn", m, 16, options=HALVED), (lr,), seeds=1)
        for m, lr in (("sgd", 0.08), ("like_gain", 0.0457))
    ),
    Search(Cell("faster_rcnn", "like_gain", 128), (0.08,)),
    *(
        Search(Cell("faster_rcnn", method, 128), (0.1131,), seeds=1)
        for method in ("agvm_split", "averaged", "like_agvm")
    ),
    *(
        Search(Cell("faster_rcnn", m, 128, options="MODEL.RESNETS.NORM FrozenBN"), (lr,), seeds=1)
        for m, lr in FIXED
    ),
    *(
        Search(
            Cell("faster_rcnn", "agvm", 128, options=options, workers=workers), (0.1131,), seeds=1
        )
        for options, workers in (
            ("AGVM.ANCHOR fpn", 1),
            ("AGVM.ANCHOR box_head", 1),
            ("AGVM.INTERVAL 1", 1),
            ("AGVM.INTERVAL 10", 1),
            ("AGVM.MOMENTUM 0.97", 1),
            ("AGVM.RATIO_RANGE (0.5,2)", 1),
            ("AGVM.START_ITER 0", 1),
            ("MODEL.RESNETS.NORM BN", 4),
            ("MODEL.RESNETS.NORM naiveSyncBN", 4),
        )
    ),
]
QUICK = [Search(Cell("faster_rcnn", m, b, 2)) for m, b in (("sgd", 16), ("sgd", 64), ("agvm", 64))]
