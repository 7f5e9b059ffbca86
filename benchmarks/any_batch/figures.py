"""The figure of docs/evidence.md."""

from __future__ import annotations
import statistics
from pathlib import Path
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from agvm_d2.plot import colours_of, plain_log

from .setting import ARMS, BASE, ITERATIONS
from .tables import Rows, base_of, by_cell, measured

MARKS = {
    "sgd": ("0.5", "o"),
    "gain": ("tab:red", "s"),
    "whole": ("tab:blue", "^"),
    "adamw": ("0.5", "D"),
    "gain_adamw": ("tab:orange", "D"),
}


def draw(rows: Rows, folder: Path, pipeline: str = "faster_rcnn") -> None:
    """Accuracy against iterations; gain and noise scale over training: any_batch.png."""
    cells = by_cell({run: row for run, row in rows.items() if run.pipeline == pipeline})
    base = base_of(cells, pipeline)
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
        for run, found in sorted(cells.items()):
            if run.arm not in MARKS or run.options:
                continue
            colour, mark = MARKS[run.arm]
            x = statistics.fmean(row["took"] for row in found) / ITERATIONS
            values = [row["accuracy"] for row in found]
            y = statistics.fmean(values)
            axes[0].plot(x, y, mark, color=colour)
            axes[0].plot([x, x], [min(values), max(values)], color=colour, lw=1)  # over seeds
            axes[0].annotate(f"{run.batch}", (x, y), (4, 4), textcoords="offset points")
        for arm, (colour, mark) in MARKS.items():
            if any(run.arm == arm for run in cells):
                axes[0].plot([], [], mark, color=colour, label=ARMS[arm].label)
        if base:
            whole = statistics.fmean(row["accuracy"] for row in base)
            axes[0].axhline(whole, color="0.7", lw=0.8, zorder=0)
        axes[0].set(xlabel=f"iterations / those of batch {BASE}", ylabel="accuracy", title="runs")
        axes[0].legend(frameon=False)
        gains = [run for run in sorted(cells) if run.arm == "gain" and not run.options]
        for run in gains:
            curves = cells[run][0]["curves"]
            share = [100 * p / run.iterations for p in curves["progress"]]
            axes[1].plot(share, curves["gain/model"], label=f"batch {run.batch}", lw=1.4)
        axes[1].set(xlabel="% of training", title="gain of the whole model", ylim=(0.9, None))
        if gains:
            axes[1].legend(frameon=False)
        if base:
            noise = measured(base[0]).noise
            colours = {**colours_of([name for name in noise if name != "model"]), "model": "black"}
            for name, (share, images) in noise.items():
                axes[2].plot(100 * share, images, color=colours[name], label=name, lw=1.4)
            axes[2].set(
                xlabel="% of training",
                title=f"noise scale at batch {BASE}, images",
                yscale="log",
                ylim=(1, 1e4),
            )
            plain_log(axes[2].yaxis)
            axes[2].legend(frameon=False)
        figure.savefig(folder / "any_batch.png", dpi=110)
        plt.close(figure)
