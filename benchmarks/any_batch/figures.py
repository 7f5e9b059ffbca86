"""The figure of docs/evidence.md."""

from __future__ import annotations
import statistics
from pathlib import Path
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from .setting import ARMS, BASE, ITERATIONS
from .tables import Rows, base_of, by_cell, ended, smallest_gain

MARKS = {
    "sgd": ("0.5", "o"),
    "gain_least": ("tab:red", "s"),
    "whole": ("tab:blue", "^"),
    "muon": ("tab:green", "D"),
}
BROKEN = 0.5  # of the base's accuracy: below, a run is in the tables only
CURVES = "faster_rcnn"  # whose gain is drawn
PANELS = {"faster_rcnn": "Faster R-CNN, box AP", "panoptic_fpn": "Panoptic FPN, PQ"}


def draw(rows: Rows, folder: Path) -> None:
    """Accuracy against iterations of two pipelines, and the gain that counts over training:
    any_batch.png."""
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
        for panel, pipeline in zip(axes, PANELS, strict=False):
            draw_runs(rows, pipeline, panel)
        for run, found in sorted(by_cell(rows).items()):
            if (run.pipeline, run.arm, run.options) == (CURVES, "gain_least", ""):
                curves = found[0]["curves"]
                share = [100 * p / run.iterations for p in curves["progress"]]
                axes[2].plot(share, smallest_gain(curves), label=f"batch {run.batch}", lw=1.4)
        axes[2].set(xlabel="% of training", title="smallest gain, Faster R-CNN", ylim=(0.9, None))
        if axes[2].lines:
            axes[2].legend(frameon=False)
        marks = [
            Line2D([], [], color=c, marker=m, ls="", label=ARMS[a].label)
            for a, (c, m) in MARKS.items()
        ]
        figure.legend(handles=marks, loc="outside lower left", ncols=len(marks), frameon=False)
        figure.savefig(folder / "any_batch.png", dpi=110)
        plt.close(figure)


def draw_runs(rows: Rows, pipeline: str, panel: Axes) -> None:
    """A mark for each cell, the mean over seeds, with a line from its lowest to its highest."""
    cells = by_cell({run: row for run, row in rows.items() if run.pipeline == pipeline})
    base = base_of(cells, pipeline)
    whole = statistics.fmean(row["accuracy"] for row in base) if base else 0.0
    for arm, (colour, mark) in MARKS.items():
        for run, found in sorted(cells.items()):
            kept = ended(found)
            if run.arm != arm or run.options or not kept:
                continue
            values = [row["accuracy"] for row in kept]
            x = statistics.fmean(row["took"] for row in kept) / ITERATIONS
            y = statistics.fmean(values)
            if y < BROKEN * whole:
                continue
            panel.plot(x, y, mark, color=colour)
            panel.plot([x, x], [min(values), max(values)], color=colour, lw=1)
            panel.annotate(f"{run.batch}", (x, y), (4, 4), textcoords="offset points")
    if base:
        panel.axhline(whole, color="0.7", lw=0.8, zorder=0)
    panel.set(xlabel=f"iterations / those of batch {BASE}", title=PANELS[pipeline], xscale="log")
    panel.set_xticks(shares := (0.125, 0.25, 0.5, 1, 2), [f"{share:g}" for share in shares])
    panel.minorticks_off()
    panel.margins(0.15)
