"""The figure of docs/evidence-tables.md."""

from __future__ import annotations
import statistics
from pathlib import Path
import matplotlib

from .methods import METHODS
from .plan import HALVED, LONG
from .results import EPOCHS, UNIT, Cell, Cells
from .tables import accuracy, best, order, small

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MAIN = ("sgd", "agvm", "gain", "adamw", "agvm_adamw", "lars", "lamb")
COLOURS = dict(zip(METHODS, plt.cm.tab20.colors[::2] + plt.cm.tab20.colors[1::2], strict=False))


def mean_sd(rows: list[dict]) -> tuple[float, float]:
    values = accuracy(rows)
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def log_axis(axis, ticks: list[float]) -> None:
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axis.minorticks_off()


def legend(axis, columns: int = 1) -> None:
    if axis.get_legend_handles_labels()[0]:  # nothing may be drawn yet
        axis.legend(frameon=False, fontsize=8, ncols=columns)


def plot(axis, method: str, points: dict[float, tuple[float, float]]) -> None:
    """Mean and sd against a batch or a learning rate."""
    if points:
        style = {
            "marker": "o",
            "label": METHODS[method].label,
            "color": COLOURS[method],
            "capsize": 3,
        }
        axis.errorbar([*points], *zip(*points.values(), strict=True), **style)


def draw(cells: Cells, folder: Path) -> None:
    """Faster R-CNN: AP against batch, AP against LR, variances, factors: evidence.png."""
    rcnn = {c: cells[c] for c in sorted(cells, key=order) if c.pipeline == "faster_rcnn"}
    grid = {c: lrs for c, lrs in rcnn.items() if not c.varied}
    figure, axes = plt.subplots(2, 4, figsize=(19, 8), layout="constrained")
    axes = axes.flatten()
    for axis, epochs in zip(axes[:2], (EPOCHS, LONG), strict=True):
        for method in MAIN:
            own = [c for c in grid if (c.method, c.epochs) == (method, epochs)]
            points = {c.batch: mean_sd(grid[c][best(grid[c])]) for c in own}
            reference = small(cells, own[0]) if own else None
            if reference:  # with one gradient, the optimizer alone
                points = {UNIT: mean_sd(reference[best(reference)])} | points
            plot(axis, method, points)
        axis.set(xlabel="batch", ylabel="box AP, best learning rate tried")
        axis.set(title=f"{epochs} epochs")
        log_axis(axis, sorted({c.batch for c in grid}))
        legend(axis)
    for axis, batch in zip(axes[2:5], (64, 128, 256), strict=True):
        for method in (*MAIN, "gain_averaged"):
            lrs = grid.get(Cell("faster_rcnn", method, batch), {})
            plot(axis, method, {lr: mean_sd(rows) for lr, rows in lrs.items()})
        legend(axis)
        axis.set(xlabel="learning rate", ylabel="box AP", title=f"batch {batch}, {EPOCHS} epochs")
        log_axis(axis, [0.002, 0.01, 0.04, 0.16, 0.64, 4])

    bars = [
        (cell, lrs[best(lrs)][0]["variance"])
        for cell, lrs in rcnn.items()
        if (cell.method, cell.epochs) == ("sgd", EPOCHS) and cell.options in ("", HALVED)
    ]
    bars = [(cell, found) for cell, found in bars if any(found.values())]
    for i, (cell, found) in enumerate(bars):
        width = 0.8 / len(bars)
        values = [v.get("before_drop", 0) for v in found.values()]
        places = [x + i * width for x in range(len(values))]
        axes[5].bar(places, values, 0.9 * width, label=f"batch {cell.batch}")
        axes[5].set_xticks([x + 0.4 - width / 2 for x in range(len(values))], [*found])
    axes[5].set(ylabel="variance φ before the LR drop", title="SGD", ylim=(0, 1.35))
    legend(axes[5], columns=len(bars))

    for axis, method in zip(axes[6:], ("agvm", "gain"), strict=True):
        lrs = grid.get(Cell("faster_rcnn", method, 128))
        if lrs:
            scale = lrs[best(lrs)][0]["lr_scale"]
            for module in (m for m in scale if m != "iteration"):
                axis.plot(scale["iteration"], scale[module], label=module)
            legend(axis)
        axis.set(
            xlabel="iteration", ylabel="LR factor", title=f"{METHODS[method].label}, batch 128"
        )
    figure.savefig(folder / "evidence.png", dpi=100)
